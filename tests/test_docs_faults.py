"""``docs/faults.md`` names tests that exist."""

import ast
import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs/faults.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]*test_\w+\.py)(?:::(test_\w+))?`", TEXT)))
OF_OPERATORS = sorted(set(re.findall(r"`(test_\w+)`", TEXT)))


def defined_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
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
