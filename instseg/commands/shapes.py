"""``instseg shapes``: the built-in synthetic data set."""

import argparse

from instseg.commands.arguments import path
from instseg.errors import ConfigError, OutputError


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.add_argument("directory", type=path, metavar="DIR")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="may be repeated (default shapes_train and shapes_val)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.set_defaults(run=export)


def export(arguments: argparse.Namespace) -> int:
    """``instseg shapes export``."""
    from instseg.data.synthetic.shapes import export

    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; expected at least 1")
    try:
        splits = arguments.split or ["shapes_train", "shapes_val"]
        paths = [export(split, arguments.directory, limit=arguments.limit) for split in splits]
    except OSError as error:
        raise OutputError(
            f"{arguments.directory} cannot be written: {error.strerror or error}"
        ) from error
    print(*paths, sep="\n")
    return 0
