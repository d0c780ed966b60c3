"""Which module may import which, read from import statements (no module is imported)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.own_projects import PROJECTS

ROOT = Path(__file__).parents[2]
PAPERS = {project.name for project in PROJECTS}
LINEAGE = {(project.name, ancestor) for project in PROJECTS for ancestor in project.ancestors}
OPTIONAL = {
    "gradio",
    "h5py",
    "huggingface_hub",
    "imagecodecs",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ray",
    "sahi",
    "roifile",
    "skimage",
    "sklearn",
    "supervision",
    "tifffile",
    "trackers",
    "wandb",
    "zarr",
}


def module_name(path: Path) -> str:
    """Return the name under which a file of the repository is imported, such as instseg.cli."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "projects":
        parts = ("instseg", *parts)
    return ".".join(parts)


def imports(name: str, tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield (module or module.attribute, line, inside a function) of every import in a module.

    Args:
        name: the module's own name, ending in ``.__init__`` for a package.
    """
    delayed = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                modules = [str(node.args[0].value)]
        for module in modules:
            yield module, node.lineno, node in delayed


def paper_of(module: str) -> str | None:
    """Return the paper that a dotted name leads into, or None."""
    parts = module.split(".")
    return (
        parts[2]
        if parts[:2] == ["instseg", "projects"] and parts[2:3] and parts[2] in PAPERS
        else None
    )


def violations(name: str, source: str) -> list[str]:
    """Return one sentence for each import in ``source`` that the module ``name`` may not have."""
    own_paper = paper_of(name)
    messages = []
    for module, line, delayed in imports(name, ast.parse(source)):
        paper = paper_of(module)
        where = f"{name}, line {line}: "
        if paper and own_paper is None and name.startswith("instseg."):
            if name != "instseg.projects.__init__":
                messages.append(f"{where}shared code imports the project {paper}")
        elif paper and own_paper and paper != own_paper and (own_paper, paper) not in LINEAGE:
            messages.append(f"{where}{own_paper} does not descend from {paper}")
        if f"{module}.".startswith("detectron2.model_zoo."):
            messages.append(f"{where}detectron2.model_zoo needs pkg_resources, which is going away")
        package = module.split(".")[0]
        if package in OPTIONAL and not delayed and name.startswith("instseg."):
            messages.append(f"{where}{package} is optional: import it inside the function")
    return messages


def sources() -> list[Path]:
    """Return every Python file that is installed or run by a user."""
    folders = [ROOT / name for name in ("instseg", "projects", "tools")]
    return [
        *ROOT.glob("train_net.py"),
        *(path for f in folders for path in sorted(f.rglob("*.py"))),
    ]


def test_every_file_imports_only_what_its_place_allows():
    per_file = [violations(module_name(path), path.read_text("utf-8")) for path in sources()]
    assert [sentence for sentences in per_file for sentence in sentences] == []


@pytest.mark.parametrize(
    "source",
    [
        "import instseg.projects.mask_rcnn",
        "from instseg.projects import mask_rcnn",
        "from instseg.projects.mask_rcnn.config import add_mask_rcnn_config",
        "from ..projects import mask_rcnn",
        "def f():\n    from instseg.projects.mask_rcnn import x",
        "from importlib import import_module\nimport_module('instseg.projects.mask_rcnn')",
    ],
)
def test_the_checker_sees_shared_code_import_a_project(source):
    [sentence] = violations("instseg.training.trainer", source)
    assert "shared code imports the project mask_rcnn" in sentence


def test_the_registration_module_may_import_every_project():
    source = "\n".join(f"from instseg.projects import {paper}" for paper in sorted(PAPERS))
    assert violations("instseg.projects.__init__", source) == []


@pytest.mark.parametrize("source", ["from instseg.projects import yolact", "from .. import yolact"])
def test_the_checker_sees_a_project_import_an_unrelated_one(source):
    assert violations("instseg.projects.sgn.sgn", source) == [
        "instseg.projects.sgn.sgn, line 1: sgn does not descend from yolact"
    ]


@pytest.mark.parametrize(("child", "parent"), sorted(LINEAGE))
def test_a_project_may_import_its_ancestor_but_not_the_reverse(child, parent):
    down = violations(
        f"instseg.projects.{child}.config", f"import instseg.projects.{parent}.config"
    )
    up = violations(f"instseg.projects.{parent}.config", f"import instseg.projects.{child}.config")
    assert (len(down), len(up)) == (0, 1)


@pytest.mark.parametrize(
    "source",
    [
        "import detectron2.model_zoo",
        "from detectron2 import model_zoo",
        "from detectron2.model_zoo import get_config",
    ],
)
def test_the_checker_sees_the_model_zoo_imported(source):
    assert len(violations("train_net", source)) == 1


def test_the_checker_sees_an_optional_package_imported_outside_a_function():
    assert len(violations("instseg.visualize", "import supervision as sv")) == 1
    assert violations("instseg.visualize", "def draw():\n    import supervision as sv") == []


def test_importing_instseg_imports_neither_torch_nor_detectron2_nor_opencv():
    code = "import sys, instseg; print({'torch', 'detectron2', 'cv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
