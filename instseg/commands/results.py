"""``instseg results``: results of an earlier run in other formats."""

import argparse

from instseg.commands.arguments import add_format_argument, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of the command and what it runs."""
    parser.description = (
        "Converts predictions.json or predictions.jsonl, the NAME.json of a video (each frame is "
        "an image then), or any list of results in COCO's format.  categories.json beside the file "
        "names the classes and the images without instances.  Exit status 1 if the results of some "
        "image could not be written."
    )
    add = parser.add_argument
    add("file", type=path, metavar="FILE")
    add_format_argument(parser, "--to", required=True)
    add("--output", type=path, metavar="DIR", help="created if need be (default: that of FILE)")
    add(
        "--images",
        type=path,
        metavar="FOLDER",
        help="the images, for intensities and the size of a pixel (default: where they were)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg results``."""
    from instseg.predict.conversion import convert

    return convert(arguments.file, arguments.to, arguments.output, arguments.images)
