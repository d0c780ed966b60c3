"""``instseg check-data``: finds what is wrong with data sets before training does."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Checks annotations and the header of every image.  Several data sets are checked as those "
        "of one training: they must have the same classes and no image in common.  Training "
        "refuses sets with errors, and leaves out instances with warnings.  Exit status 1 if there "
        "is an error."
    )
    text = "a data set, or coco:PATH:IMAGE_ROOT, or labels:IMAGES:LABELS"
    parser.add_argument("dataset", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--strict", action="store_true", help="exit status 1 for warnings as well")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg check-data``."""
    # Imported here, so that the command line works without the requirements.
    from instseg.check_data import check_data
    from instseg.data.findings import Level

    fatal = {Level.ERROR, Level.WARNING} if arguments.strict else {Level.ERROR}
    status = 0
    for checked in check_data(arguments.dataset):
        sys.stdout.write(f"{checked.table()}\n\n")
        sys.stdout.flush()
        if any(kind.level in fatal for kind in checked.report.ids):
            status = 1
    return status
