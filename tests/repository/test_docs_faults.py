"""``docs/faults.md`` names tests that exist."""

import ast
import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs/faults.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]*test_\w+\.py)(?:::(test_\w+))?`", TEXT)))
OF_OPERATORS = sorted(set(re.findall(r"`(test_\w+)`", TEXT)))


def defined_in(file: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(file)
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_is_named_exists(file: str, test: str) -> None:
    assert not test or test in defined_in(file)


def test_the_defined_in_operators_that_are_named_exist() -> None:
    assert OF_OPERATORS
    assert set(OF_OPERATORS) <= defined_in("ops/test_hostile_input.py")


def test_every_row_of_the_list_is_there() -> None:
    """Thirty-eight kinds of bad input; 3 and 4 share a row."""
    rows = re.findall(r"^\| (\d+)(?:, (\d+))? \|", TEXT, re.MULTILINE)
    assert {int(number) for row in rows for number in row if number} == set(range(1, 39))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]


def test_tables_have_whole_rows_and_as_many_cells_as_columns() -> None:
    wrong = []
    width = 0
    for line in TEXT.splitlines():
        found = cells(line)
        is_row = len(found) > 1
        width = (width or len(found)) if is_row else 0
        if is_row and (found[0] or found[-1] or len(found) != width or not all(found[1:-1])):
            wrong.append(line[:80])
    assert wrong == []


def test_no_row_and_no_test_of_a_row_is_there_twice() -> None:
    rows = [cells(line)[1:-1] for line in TEXT.splitlines() if len(cells(line)) == 7]
    rows = [row for row in rows if row[0] not in ("#", "---")]
    inputs = sorted((row[0], f"{row[1]},") for row in rows)
    pairs = zip(inputs, inputs[1:], strict=False)
    assert [row for row, after in pairs if row[0] == after[0] and after[1].startswith(row[1])] == []
    tests = [re.findall(r"`[\w/]*test_\w+\.py(?:::test_\w+)?`", row[3]) for row in rows]
    assert [names for names in tests if len(set(names)) < len(names)] == []
