"""``instseg proposals``: the boxes of a model without classes, for another detector."""

import argparse

from instseg.commands.arguments import add_model_arguments, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Writes the boxes that a model without classes finds in a data set, for "
        "DATASETS.PROPOSAL_FILES_TRAIN and _TEST of a detector with MODEL.LOAD_PROPOSALS."
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="a data set, or coco:PATH:IMAGE_ROOT")
    add("--output", required=True, type=path, metavar="FILE", help="NAME.pkl")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg proposals``."""
    from instseg.inference.propose import propose

    count = propose(
        arguments.config_file,
        arguments.weights,
        arguments.dataset,
        arguments.output,
        arguments.overrides,
        allow_partial=arguments.allow_partial,
    )
    print(f"{arguments.output}: proposals for {count} images")
    return 0
