"""Names say what they hold, and an image is called an image."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

VAGUE = {"found", "most", "own", "place", "places", "seen", "truth", "truths"}
FOLDERS = ("instseg", "projects", "tools", "tests")


def names(path: Path) -> Iterator[str]:
    """Variables, parameters, attributes and classes that a module defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg | ast.ClassDef):
            yield node.arg if isinstance(node, ast.arg) else node.name


def test_names_say_what_they_hold() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    pairs = [(str(path.relative_to(ROOT)), name) for path in paths for name in names(path)]
    assert [pair for pair in pairs if pair[1].strip("_").lower() in VAGUE] == []


def test_an_image_is_called_an_image() -> None:
    paths = [path for folder in (*FOLDERS, "docs") for path in (ROOT / folder).rglob("*.*")]
    texts = {path for path in (*paths, *ROOT.glob("*.md")) if path.suffix in (".py", ".md")}
    others = sorted(texts - {Path(__file__).resolve()})
    assert [path for path in others if re.search("picture", path.read_text(), re.IGNORECASE)] == []
