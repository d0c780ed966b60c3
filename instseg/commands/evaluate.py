"""``instseg evaluate``: results of any program against the ground truth."""

import argparse
import sys

from instseg.commands.arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of the command and what it runs."""
    parser.description = (
        "Compares results, boxes or masks, with the ground truth of a data set.  Prints COCO's AP "
        "and AR of all classes, of each class and by size, precision and recall at IoU 0.5, and "
        "which classes are taken for which.  Exit status 1 if an image could not be drawn."
    )
    add = parser.add_argument
    add(
        "results",
        type=path,
        metavar="RESULTS",
        help="a list in COCO's result format, or predictions.json(l) of `instseg predict "
        "--images-of DATASET`",
    )
    text = "a data set, or coco:PATH:IMAGE_ROOT, or labels:IMAGES:LABELS"
    add("dataset", metavar="DATASET", help=text)
    add(
        "--by",
        default="size,class",
        metavar="GROUP,...",
        help="tables by size, class and crowding, the largest IoU of the box of an instance with "
        "that of another one in its image (default %(default)s)",
    )
    add(
        "--score",
        type=float,
        metavar="S",
        help="of precision, recall, confusions and images: detections with a lower score are left "
        "out (default: that with the best F1 at IoU 0.5)",
    )
    add(
        "--max-detections",
        type=int,
        default=100,
        metavar="N",
        help="that count per image and class, the best first (default %(default)s, as for COCO)",
    )
    add(
        "--output",
        type=path,
        metavar="DIR",
        help="writes metrics.json, a CSV per table, plots, and the worst images with hits, misses "
        "and false alarms",
    )
    add(
        "--worst",
        type=int,
        default=20,
        metavar="N",
        help="number of images to draw, those with the most misses and false alarms (default "
        "%(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg evaluate``."""
    # Imported here, so that the command line works without the requirements.
    from instseg.reports.evaluate import EvaluateOptions, evaluate

    options = EvaluateOptions(
        results=arguments.results,
        dataset=arguments.dataset,
        by=tuple(filter(None, arguments.by.split(","))),
        score=arguments.score,
        max_detections=arguments.max_detections,
        output=arguments.output,
        worst=arguments.worst,
    )
    tables, failures = evaluate(options)
    sys.stdout.write("\n".join(table.text() for table in tables))
    return 1 if failures else 0
