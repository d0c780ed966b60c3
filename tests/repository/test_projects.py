"""Projects are found where they are, and the README's table is what they declare."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import instseg
from instseg.projects import Project, converters, folders, projects
from tests.conftest import ROOT
from tests.support.own_projects import PROJECTS

LIST = "import instseg.projects as p; print(*(x.name for x in p.projects()))"
DECLARATION = """
from instseg.projects import Project

PROJECT = Project(
    name="{name}", title="{name}", paper="", family="", best_at="", example="", reference=""
)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which finds packages in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )


def install(folder: Path, name: str, value: str, source: str) -> None:
    """Install a package as pip does, with an entry point for instseg.

    Args:
        folder: on the path.
        name: of the package and of the entry point.
        value: of the entry point.
        source: of the package.
    """
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[instseg.projects]\n{name} = {value}\n")


def test_the_table_of_the_readme_is_what_the_projects_declare() -> None:
    text, _, _ = (ROOT / "README.md").read_text().partition("## Shipped models")
    lines = text.splitlines()
    table = [line for line in lines if "](projects/" in line and line.startswith("| [")]
    assert table == [project.row for project in PROJECTS]


def test_a_project_is_called_as_its_folder_and_has_the_files_that_it_names() -> None:
    assert sorted(project.name for project in PROJECTS) == folders()
    for project in PROJECTS:
        assert (ROOT / "projects" / project.name / "README.md").is_file()
        for config in (project.example, project.reference):
            instseg.load_cfg(config, [*project.any_score, *project.fast])
        instseg.load_cfg(project.example, project.narrow)


def test_a_folder_is_found_without_another_installation(tmp_path: Path) -> None:
    """Beside instseg/ as in a checkout, and inside it as in a wheel."""
    names = ["first", "second"]
    for name, inside in (("checkout", "projects"), ("site", "instseg/projects")):
        root = tmp_path / name
        shutil.copytree(ROOT / "instseg", root / "instseg")
        for paper in names:  # without torch, which takes seconds to load
            (root / inside / paper).mkdir(parents=True)
            (root / inside / paper / "__init__.py").write_text(DECLARATION.format(name=paper))
        (root / inside / "leftover").mkdir()
        if name == "site":  # what a wheel has beside instseg/ is not its own
            (root / "projects" / "foreign").mkdir(parents=True)
            (root / "projects" / "foreign" / "__init__.py").touch()
        done = run(LIST, root)
        assert done.stdout.split() == names, done.stderr


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which this process finds packages; it forgets them afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_an_installed_package_is_found_and_a_broken_one_left_out_with_a_line_that_names_it(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "toy_paper", "toy_paper:PROJECT", DECLARATION.format(name="toy_paper"))
    broken = {
        "missing": ("missing:PROJECT", "import nothing_such", "No module named 'nothing_such'"),
        "no_python": ("no_python:PROJECT", "def f(:", "SyntaxError"),
        "raises": ("raises:PROJECT", "raise ValueError('sorry')", "ValueError: sorry"),
        "nothing": ("nothing:PROJECT", "", "has no attribute 'PROJECT'"),
        "module": ("module", "", "module is no instseg.projects.Project"),
        "twin": ("twin:PROJECT", DECLARATION.format(name="yolact"), "another project yolact"),
    }
    for name, (value, source, _) in broken.items():
        install(site, name, value, source)
    usable = projects.__wrapped__()  # the cache has those from before
    assert [x.name for x in usable] == [*(project.name for project in projects()), "toy_paper"]
    lines = dict(line.split(" is left out: ", 1) for line in caplog.messages)
    assert len(lines) == len(broken)
    for name, (_, _, reason) in broken.items():
        assert reason in lines[f"project {name} of the distribution {name}"]


def test_help_names_converters_whatever_is_installed(site: Path) -> None:
    before = converters()
    install(site, "fcis", "evil:PROJECT", "")
    (site / "evil").mkdir()
    for file in ("__init__.py", "convert.py"):
        (site / "evil" / file).touch()
    install(site, "gone", "no.such.module:PROJECT", "")
    install(site, "malformed", "", "")
    assert converters() == before


def test_the_names_of_the_folders_are_known_without_torch(tmp_path: Path) -> None:
    code = "import sys, instseg.projects as p; print(p.folders(), 'torch' in sys.modules)"
    done = run(code, tmp_path)
    assert done.stdout == f"{folders()} False\n", done.stderr


def test_a_row_has_a_cell_for_each_column() -> None:
    project = Project("a", "A", "B et al.", "top-down", "c", "e.yaml", "r.yaml", ap="1.0")
    assert project.row == "| [A](projects/a/README.md) | B et al. | top-down | c | 1.0 | | - |"
