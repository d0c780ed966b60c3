"""``instseg check-data``: what is wrong with data sets, before training finds it."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of the command and what it runs."""
    parser.description = (
        "Checks annotations and the header of every image.  Several data sets are taken for "
        "those of one training: with the same classes and no image in common.  Training refuses "
        "errors; objects with a warning are left out of it.  Exit status 1 if there is an error."
    )
    parser.add_argument("dataset", nargs="+", metavar="NAME", help="or coco:PATH:IMAGE_ROOT")
    parser.add_argument("--strict", action="store_true", help="exit status 1 for warnings as well")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg check-data``."""
    # Imported here because the command line must be there without what the rest needs.
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
