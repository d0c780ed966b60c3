"""The README's table of shipped models, made from ``zoo/manifest.json``.

python tools/zoo_table.py            prints it
python tools/zoo_table.py --write    puts it into README.md, between two marks
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from instseg.files import atomic_write
from instseg.projects import Project, projects
from instseg.shipped import ShippedModel, shipped_models

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- made by tools/zoo_table.py -->\n", "<!-- end of the table -->\n"
NONE = "No models are shipped yet.\n"
NUMBERS = {
    "AP at 0.5": "contest/AP50",
    "at 0.75": "contest/AP75",
    "mean": "contest/AP",
    "mask AP": "segm/AP",
    "AR@1000": "proposals_segm/AR@1000",
}
"""Column -> name of the number in it."""
COLUMNS = ("system", "family", *NUMBERS, "ms an image", "parameters", "started from", "`--model`")


def tables(models: Sequence[ShippedModel]) -> str:
    """A table for each data set that models were trained on; a sentence if there are none."""
    known = {project.name: project for project in projects()}
    ordered = sorted(models, key=lambda model: (known[model.system].order, model.name))
    parts = []
    for data in dict.fromkeys(model.data for model in ordered):
        chosen = [model for model in ordered if model.data == data]
        lines = [
            f"Trained on `{data}` ({chosen[0].licence}):",
            "",
            _line(COLUMNS),
            _line(["---"] * len(COLUMNS)),
            *(_line(_cells(model, known[model.system])) for model in chosen),
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or NONE


def _cells(model: ShippedModel, project: Project) -> list[str]:
    ms = model.value("ms")
    return [
        f"[{project.title}](projects/{project.name}/README.md)",
        project.family,
        *(_number(model, name) for name in NUMBERS.values()),
        "-" if ms is None else f"{ms:.0f}",
        f"{model.parameters / 1e6:.2f} M",
        f"`{model.trunk}`" if model.trunk else "scratch",
        f"`{model.name}`",
    ]


def _number(model: ShippedModel, name: str) -> str:
    """A number, and in brackets those of trainings with other seeds."""
    value = model.value(name)
    if value is None:
        return "-"
    others = [part.values[name] for part in model.other_seeds if name in part.values]
    return f"{value:.1f}" + (f" ({', '.join(f'{x:.1f}' for x in others)})" if others else "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def written(text: str, table: str) -> str:
    """``text`` with ``table`` between the marks.

    Raises:
        ValueError: it does not have both marks once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one line {BEGIN.strip()} and one line {END.strip()}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    table = tables(shipped_models())
    if parser.parse_args(argv).write:
        text = written(README.read_text(), table)
        atomic_write(README, lambda file: file.write(text.encode()))
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
