"""``instseg convert``: released weights under our names."""

import argparse

from instseg.commands.arguments import add_classes_argument, path
from instseg.projects import converters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Writes a checkpoint and, beside it as .yaml, the configuration that runs it.  Lists what "
        "became of every tensor, and the settings that the file does not contain.  Executes no "
        "code in the file."
    )
    add = parser.add_argument
    *formats, last = converters()
    add(
        "format",
        metavar="FORMAT",
        help=f"format of the file: {', '.join(formats)} or {last}",
    )
    add("input", metavar="IN", help="the file as its authors released it")
    add("output", metavar="OUT", type=path, help="NAME.safetensors (the default) or NAME.pth")
    add(
        "--leave-out-classes",
        action="store_true",
        help="drop the layers whose size depends on the number of classes, to train on others",
    )
    add(
        "--allow-partial",
        action="store_true",
        help="accept a file that holds only some layers, such as a backbone",
    )
    add_classes_argument(parser)
    add(
        "--config-file",
        metavar="FILE",
        help="configuration of the training, or its name in configs/, instead of the nearest one",
    )
    add("overrides", nargs="*", metavar="KEY VALUE", help="settings of the training, last")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg convert``."""
    from instseg.config.classes import classes_option
    from instseg.convert import Options, convert_file

    path, report = convert_file(
        arguments.format,
        arguments.input,
        arguments.output,
        Options(
            leave_out_classes=arguments.leave_out_classes,
            allow_partial=arguments.allow_partial,
            classes=None if arguments.classes is None else classes_option(arguments.classes),
            config=arguments.config_file,
            overrides=tuple(arguments.overrides),
        ),
    )
    print(report)
    print(path.with_suffix(".yaml"))
    print(path)
    return 0
