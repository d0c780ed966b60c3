"""Every row of ``docs/faults.md`` is whole, is there once, and names tests that exist."""

import ast
import re
from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs/faults.md").read_text()
HEADER = re.compile(r"\| # \| (input|fault) \| what happens \| tests \| message \|")
# Prose begins with a capital or with a name in code.
PROSE = re.compile(r"#+ [A-Z]|[A-Z`]")
NUMBER = re.compile(r"–|\d+(, \d+)*")
TEST = re.compile(
    r"`(?P<file>[\w/]*test(_\w+|ing)\.py)(::(?P<name>(test|check)_\w+))?`|`make (?P<target>\w+)`"
)
MESSAGE = re.compile(r"–|`[^`]+`(; `[^`]+`)*")


def cells(line: str) -> list[str]:
    """The text between the bars of a row; a bar in a cell is written with a backslash."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(text: str) -> list[list[str]]:
    """The lines of each table with an input or fault in every row."""
    groups = groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    blocks = [list(lines) for is_table, lines in groups if is_table]
    return [lines for lines in blocks if cells(lines[0])[0] == "#"]


def rows(text: str) -> list[list[str]]:
    return [cells(line) for lines in tables(text) for line in lines[2:]]


@cache
def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def missing(file: str, name: str | None) -> bool:
    """Whether not exactly one file of tests or of ``instseg.testing`` has this path and test."""
    paths = [*(ROOT / "tests").rglob(file), *(ROOT / "instseg").glob(file)]
    return len(paths) != 1 or (name is not None and name not in defined_in(paths[0]))


def faults_of(row: list[str]) -> list[str]:
    """The faults of one row of the table."""
    if len(row) != 5 or not all(row):
        return ["expected a number or –, an input, what is promised, tests and a message"]
    number, _, _, tests, message = row
    faults = []
    if not NUMBER.fullmatch(number):
        faults.append(f"{number} is no number")
    named = [part.strip() for part in tests.split(", ")]
    faults += [f"{part} names no test" for part in named if not TEST.fullmatch(part)]
    faults += [f"{part} is there twice" for part, count in Counter(named).items() if count > 1]
    if not MESSAGE.fullmatch(message):
        faults.append(f"{message} is no message")
    return faults


def problems(text: str) -> list[str]:
    """One sentence for each thing that is wrong with the tables of a text and around them."""
    messages = [f"{line[:60]}: no beginning" for line in text.splitlines() if is_fragment(line)]
    for header, separator, *_ in tables(text):
        if not HEADER.fullmatch(header) or separator != "|---|---|---|---|---|":
            messages.append(f"{header}: no header of such a table")
    for row in rows(text):
        messages += [f"{' | '.join(row)[:60]}: {fault}" for fault in faults_of(row)]
    inputs = Counter(row[1].casefold() for row in rows(text) if len(row) == 5)
    messages += [f"{name}: there {count} times" for name, count in inputs.items() if count > 1]
    return messages


def is_fragment(line: str) -> bool:
    if line.startswith("|"):
        return not line.endswith("|")
    return bool(line) and not PROSE.match(line)


def test_every_line_is_whole_and_no_row_is_there_twice() -> None:
    assert problems(TEXT) == []


def test_each_of_the_thirty_eight_kinds_has_one_row_in_order() -> None:
    """3 and 4 share one."""
    numbers = [part for row in rows(TEXT) for part in row[0].split(", ") if part != "–"]
    assert numbers == [str(number) for number in range(1, 39)]


def test_every_test_and_target_that_is_named_exists() -> None:
    named = list(TEST.finditer(TEXT))
    assert len(named) > 300
    absent = [m[0] for m in named if m["file"] and missing(m["file"], m["name"])]
    makefile = (ROOT / "Makefile").read_text()
    absent += [m[0] for m in named if m["target"] and f"\n{m['target']}:" not in makefile]
    assert absent == []


HEAD = "| # | input | what happens | tests | message |\n|---|---|---|---|---|\n"
GOOD = "| 1 | `None` | refused | `test_a.py::test_b`, `make chaos` | `a`; `b` |\n"


def test_the_checker_finds_nothing_in_a_whole_row() -> None:
    assert problems(f"# Title\n\nProse.\n\n{HEAD}{GOOD}") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (GOOD, "there 2 times"),
        (GOOD.replace("`None`", "`none`").replace("| 1 |", "| – |"), "there 2 times"),
        ("| 2 | a | refused | `test_a.py` |\n", "expected a number"),
        ("| 2 | a |  | `test_a.py` | – |\n", "expected a number"),
        ("| two | a | refused | `test_a.py` | – |\n", "no number"),
        ("| 2 | a | refused | the same | – |\n", "names no test"),
        ("| 2 | a | refused | `test_a.py`, `test_a.py` | – |\n", "twice"),
        ("| 2 | a | refused | `test_a.py` | `a` and so on |\n", "no message"),
        ("| 2 | a | refused | `test_a.py` | –\n", "no beginning"),
        ("of a base that is named again |\n", "no beginning"),
    ],
)
def test_the_checker_sees_a_broken_line(line: str, expected: str) -> None:
    assert expected in "\n".join(problems(HEAD + GOOD + line))
