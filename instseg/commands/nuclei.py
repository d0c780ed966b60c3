"""``instseg nuclei``: the data set of cell nuclei."""

import argparse

from instseg.commands.arguments import path
from instseg.errors import OutputError


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = "Writes OUTPUT/images and OUTPUT/instances_{train,val}.json."
    parser.add_argument("source", type=path, metavar="STAGE1_TRAIN", help="the unpacked download")
    parser.add_argument("output", type=path, metavar="OUTPUT")
    for split, count in (("train", 400), ("val", 60)):
        text = "images (default %(default)s)"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=text)
    parser.set_defaults(run=build)


def build(arguments: argparse.Namespace) -> int:
    """``instseg nuclei build``."""
    from instseg.data.readers.nuclei import build

    try:
        counts = build(arguments.source, arguments.output, arguments.train, arguments.val)
    except OSError as error:
        raise OutputError(f"{arguments.output} cannot be written: {error}") from error
    print(f"{arguments.output}: {counts['train']} training, {counts['val']} validation images")
    return 0
