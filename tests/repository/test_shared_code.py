"""Shared code knows no paper: neither names nor texts in it name one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT
from tests.support.own_projects import PROJECTS

# Operators are called by the paper that they come from.
OPERATORS = ROOT / "instseg" / "ops"


def pattern(name: str) -> str:
    """Finds a name in any spelling: ``MASK_RCNN``, ``mask-rcnn``, ``MaskRCNNHead``."""
    words = re.findall(r"[A-Za-z]+|\+", name)
    return r"(?<![A-Za-z])" + r"[\W_]*".join(map(re.escape, words))


NAMES = re.compile(
    "|".join(pattern(name) for project in PROJECTS for name in (project.name, project.title)),
    re.IGNORECASE,
)


def operators() -> set[str]:
    """Names of the modules of operators, and of what is defined there."""
    names = set()
    for path in OPERATORS.glob("*.py"):
        tree = ast.parse(path.read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        names |= {path.stem, *defined}
    return names


def named(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and string of a module, docstrings left out."""
    tree = ast.parse(source)
    documentation = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and node.value
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in documentation:
            if isinstance(node.value, str):
                yield node.lineno, node.value
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text


def offences(source: str) -> list[tuple[int, str]]:
    """Names and texts of a module that name a paper, with their lines."""
    shared = sorted(operators(), key=len, reverse=True)
    lines = []
    for line, text in named(source):
        rest = text
        for operator in shared:
            rest = rest.replace(operator, " ")
        if NAMES.search(rest):
            lines.append((line, text))
    return lines


def test_no_name_and_no_text_of_shared_code_names_a_paper() -> None:
    paths = [path for path in ROOT.glob("instseg/**/*.py") if OPERATORS not in path.parents]
    every: list[tuple[Path, int, str]] = [
        (path.relative_to(ROOT), *offence)
        for path in sorted(paths)
        for offence in offences(path.read_text())
    ]
    assert every == []


def test_the_test_sees_names_in_any_spelling_and_reads_no_documentation() -> None:
    assert offences("import instseg.projects.sgn") == [(1, "instseg.projects.sgn")]
    assert offences("if cfg.MODEL.MASK_RCNN: pass") == [(1, "MASK_RCNN")]
    assert offences("raise ValueError('\\nMask R-CNN can')")[0][1] == "\nMask R-CNN can"
    assert offences("class FCISHead: pass") == [(1, "FCISHead")]
    assert offences("def f(yolact_plus): return f'YOLACT++ {yolact_plus}'")
    assert not offences('"""Of FCIS."""\nX = 1\n"""Of FCIS."""\n# FCIS\nfcis_head(X)\nassign = X')
    assert not offences("'images GN'")
