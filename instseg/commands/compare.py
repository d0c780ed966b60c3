"""``instseg compare``: trainings side by side."""

import argparse
import sys

from instseg.commands.arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of the command and what it runs."""
    parser.description = (
        "Shows iterations, time, best and last AP of trainings, and the keys of their "
        "configurations that differ, from metrics.json and config.yaml in their OUTPUT_DIRs.  Exit "
        "status 1 if such a file is missing or damaged; a line names it, and the rest is shown."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=path, metavar="RUN", help="OUTPUT_DIR of a training")
    add(
        "--metrics",
        default="",
        metavar="NAME,...",
        help="metrics to show, such as segm/AP50,segm/APs (default: those that end in /AP, /AR@100 "
        "or /SBD)",
    )
    add("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg compare``."""
    # Imported here, so that the command line works without the requirements.
    from instseg.reports.compare import as_json, read_run, tables

    names = list(filter(None, arguments.metrics.split(",")))
    read = [read_run(folder, names) for folder in arguments.runs]
    problems = [problem for _, lines in read for problem in lines]
    for problem in problems:
        print(problem, file=sys.stderr)
    runs = [run for run, _ in read]
    if arguments.json:
        print(as_json(runs))
    else:
        sys.stdout.write("\n".join(table.text() for table in tables(runs)))
    return 1 if problems else 0
