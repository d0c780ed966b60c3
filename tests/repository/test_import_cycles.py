"""No module of instseg or of a paper imports itself by way of others, and no package does.

Imports inside functions count.  Three kinds cannot be read from a module and are no part of this:
``instseg/__init__.py`` resolves its names on first use, what is imported for types alone is never
imported, and ``instseg/projects/__init__.py`` finds the papers, which import whatever they need.
"""

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.repository.test_layering import ROOT, imports, module_name

Graph = Mapping[str, set[str]]
LAYERS = (
    ("errors", "install_detectron2", "processes", "projects"),
    ("optional",),
    ("categories", "console", "files", "forks", "masks", "tracking"),
    ("ops", "shipped"),
    ("downloads",),
    ("modeling", "pickles", "visualize"),
    ("data",),
    ("checkpoint", "evaluation"),
    ("config", "stock"),
    ("check_data", "convert", "inference"),
    ("export", "testing", "training"),
    ("benchmark", "predict"),
    ("reports",),
    ("commands",),
    ("cli",),
)
"""Packages and modules of instseg, the lowest first; none imports one of its own layer."""


def sources() -> dict[str, str]:
    """Name of every module, which ends in ``.__init__`` for a package → its text."""
    files = [*ROOT.glob("instseg/**/*.py"), *ROOT.glob("projects/**/*.py")]
    return {module_name(file): file.read_text("utf-8") for file in files}


def module_graph(texts: Mapping[str, str]) -> Graph:
    """Module → those that it imports."""
    names = {name.removesuffix(".__init__") for name in texts}
    graph: dict[str, set[str]] = {}
    for name, text in texts.items():
        module = name.removesuffix(".__init__")
        modules = (_module(target, names) for target, *_ in imports(name, _executed(text)))
        graph[module] = {other for other in modules if other} - {module, "instseg"}
    return graph


def package_graph(modules: Graph) -> Graph:
    """Package → those that it imports; a module directly under instseg is one by itself."""
    graph: dict[str, set[str]] = {}
    for module, others in modules.items():
        package = _package(module)
        graph.setdefault(package, set()).update(set(map(_package, others)) - {package})
    return graph


def cycle(graph: Graph) -> list[str]:
    """The names along a cycle, the first again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        names: list[str] = error.args[1]
        return names
    return []


def _module(target: str, names: Iterable[str]) -> str:
    """The module of instseg that ``target``, a module or something in one, is or lies in."""
    while target and target not in names:
        target = target.rpartition(".")[0]
    return target


def _package(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[:2] == ["instseg", "projects"] else 2])


def _executed(text: str) -> ast.Module:
    """The module without what only a type checker reads."""
    tree = ast.parse(text)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return tree


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycle(module_graph(sources())) == []


def test_no_package_imports_itself_by_way_of_others() -> None:
    assert cycle(package_graph(module_graph(sources()))) == []


def test_every_package_imports_lower_layers_alone() -> None:
    graph = package_graph(module_graph(sources()))
    names = {name for name in graph if name != "instseg" and ".projects." not in name}
    levels = {f"instseg.{name}": level for level, layer in enumerate(LAYERS) for name in layer}
    assert names == set(levels)
    upward = [
        f"{name} imports {other}"
        for name in sorted(names)
        for other in sorted(graph[name] & names)
        if levels[other] >= levels[name]
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("texts", "modules", "packages"),
    [
        ({"instseg.a.x": "import instseg.a.y", "instseg.a.y": ""}, 0, 0),
        ({"instseg.a.x": "import instseg.a.y", "instseg.a.y": "from instseg.a import x"}, 2, 0),
        (
            {"instseg.a.x": "def f():\n    import instseg.b", "instseg.b": "import instseg.a.x"},
            2,
            2,
        ),
        (
            {
                "instseg.a.x": "from instseg.b.x import name",
                "instseg.a.y": "",
                "instseg.b.x": "from .y import name",
                "instseg.b.y": "from instseg.a.y import name",
            },
            0,
            2,
        ),
        (
            {
                "instseg.a": "if TYPE_CHECKING:\n    import instseg.b",
                "instseg.b": "import instseg.a",
            },
            0,
            0,
        ),
    ],
)
def test_the_checker_sees_cycles(texts: dict[str, str], modules: int, packages: int) -> None:
    graph = module_graph(texts)
    cycles = cycle(graph), cycle(package_graph(graph))
    assert [max(len(names) - 1, 0) for names in cycles] == [modules, packages]
