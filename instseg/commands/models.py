"""``instseg models``: the shipped models."""

import argparse
import json
import sys
from dataclasses import asdict

from instseg.shipped import RESULTS, ShippedModel, shipped_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Lists the models that --model NAME and MODEL.WEIGHTS zoo://NAME take, with what was "
        "measured on the test set of their data."
    )
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg models``."""
    from tabulate import tabulate

    models = shipped_models()
    if arguments.json:
        json.dump([asdict(model) for model in models], sys.stdout, indent=2)
        print()
    elif not models:
        print("no models are shipped with this copy of instseg")
    else:
        headers = ["name", "system", "classes", "MB", "result", "ms"]
        print(tabulate([_row(model) for model in models], headers, disable_numparse=True))
    return 0


def _row(model: ShippedModel) -> list[str]:
    result, ms = model.first_of(RESULTS), model.value("ms")
    return [
        model.name,
        model.system,
        ", ".join(model.classes),
        f"{model.size / 1e6:.1f}",
        "" if result is None else f"{result[0]} {result[1]:.1f}",
        "" if ms is None else f"{ms:.0f}",
    ]
