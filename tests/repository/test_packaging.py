"""What a wheel and a source archive hold and ask for."""

import ast
import importlib
import re
import sys
import tarfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.building import (
    TORCH,
    copy_of_the_sources,
    files,
    interpreter_with,
    metadata,
    run,
    stand_in_for_torch,
)

# Where the name of a project differs from that of the package it installs.
PROJECT_OF = {
    "PIL": "pillow",
    "cv2": "opencv-python",  # or opencv-python-headless
    "faster_coco_eval": "faster-coco-eval",
    "huggingface_hub": "huggingface-hub",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
BUILT = f"""
import shutil
from setuptools import Extension
from setuptools.command.build_ext import build_ext

class CppExtension(Extension): pass
CUDAExtension = CppExtension

class BuildExtension(build_ext):
    def build_extension(self, extension):
        assert extension.name == "instseg._C"
        compiled = {importlib.import_module("instseg._C").__file__!r}
        shutil.copy(compiled, self.get_ext_fullpath(extension.name))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive made from the checkout."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "source").mkdir()
    source = copy_of_the_sources(folder / "source")
    done = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=source)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("instseg-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(archive: Path) -> Path:
    """The wheel built from the source archive, with the operators that the checkout has."""
    folder = archive.parent / "unpacked"
    with tarfile.open(archive) as contents:
        contents.extractall(folder, filter="data")
    [source] = folder.iterdir()
    python = interpreter_with("2.11.0", folder)
    stand_in_for_torch(next(folder.glob("venv/lib/python*/site-packages")), BUILT)
    done = run(python, "setup.py", "-q", "bdist_wheel", "--dist-dir", folder, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("instseg-*.whl")
    return wheel


def test_a_wheel_with_operators_serves_every_python_and_the_torch_it_was_built_for(wheel):
    assert "-cp310-abi3-" in wheel.name
    assert any(re.fullmatch(r"instseg/_C\.(abi3\.so|pyd)", name) for name in files(wheel))
    required = message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist") or []
    assert "torch==2.11.*" in required and not any(line.startswith("torch>") for line in required)


def test_the_long_description_links_to_nothing_beside_it(wheel):
    text = metadata(wheel, "METADATA")
    message = message_from_string(text)
    assert message["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    [repository] = [url for url in message.get_all("Project-URL") if url.startswith("Repository")]
    address = repository.partition(", ")[2]
    assert f"{address}/raw/main/docs/gallery.png" in links
    assert f"{address}/blob/main/CONTRIBUTING.md" in links
    assert message["License-Expression"] == "Apache-2.0" and message["Keywords"]


def test_the_archives_pass_the_checks_of_pypi(archive, wheel):
    pytest.importorskip("twine")
    done = run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_a_source_archive_holds_every_file_that_is_compiled(archive):
    with tarfile.open(archive) as contents:
        held = {name.partition("/")[2] for name in contents.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.*")}
    assert "csrc/register.cpp" in expected
    assert expected <= held


@pytest.mark.slow  # compiles every operator
def test_the_operators_are_compiled_from_the_source_archive_alone(archive, tmp_path):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path]
    done = run(sys.executable, "-m", "pip", "wheel", *options, archive, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("instseg-*.whl")
    check_installed(wheel, tmp_path)


def test_a_wheel_holds_every_module_of_instseg_and_of_the_projects(wheel):
    expected = {str(p.relative_to(ROOT)) for p in ROOT.glob("instseg/**/*.py")}
    expected |= {f"instseg/{p.relative_to(ROOT)}" for p in ROOT.glob("projects/**/*.py")}
    assert "instseg/projects/mask_rcnn/__init__.py" in expected
    assert expected <= files(wheel)


def test_a_wheel_holds_every_configuration(wheel):
    expected = {f"instseg/{p.relative_to(ROOT)}" for p in ROOT.glob("configs/**/*.yaml")}
    assert expected
    assert expected <= files(wheel)


def test_a_wheel_holds_the_shipped_models_and_their_manifest(wheel):
    shipped = [*ROOT.glob("zoo/*.json"), *ROOT.glob("zoo/*.safetensors")]
    assert [path.name for path in shipped if path.suffix == ".json"] == ["manifest.json"]
    assert {f"instseg/{path.relative_to(ROOT)}" for path in shipped} <= files(wheel)


def test_a_wheel_holds_the_marker_of_a_typed_package(wheel):
    assert "instseg/py.typed" in files(wheel)


def test_a_wheel_holds_the_licence(wheel):
    assert any(re.search(r"\.dist-info/(licenses/)?LICENSE$", name) for name in files(wheel))


def test_a_wheel_installs_the_instseg_command(wheel):
    assert "instseg = instseg.cli:main" in metadata(wheel, "entry_points.txt")


def test_an_installed_wheel_works_from_another_directory(wheel, tmp_path):
    check_installed(wheel, tmp_path)


def check_installed(wheel: Path, tmp_path: Path) -> None:
    """Install a wheel into a folder of its own and import it from another one."""
    options = ["--no-deps", "--no-index", "--target", tmp_path / "site"]
    done = run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, instseg, instseg._C, instseg.configs\n"
        "import instseg.projects.mask_rcnn as project\n"
        "instseg.get_cfg()\n"
        "for m in (instseg, instseg._C, instseg.configs, project): print(m.__file__)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done = run(
        sys.executable, "-c", code, cwd=tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "site")
    )
    assert done.returncode == 0, done.stderr
    # An editable installation of the checkout must not have stepped in for a missing module.
    assert len(done.stdout.splitlines()) == 4
    assert all(line.startswith(str(tmp_path / "site")) for line in done.stdout.splitlines())


def test_a_source_archive_holds_the_tested_versions_and_the_documents(archive):
    with tarfile.open(archive) as contents:
        held = {name.partition("/")[2] for name in contents.getnames()}
    assert {"constraints.txt", "docs/faults.md", "docs/gallery.png"} <= held


def third_party_imports() -> Iterator[tuple[str, Path]]:
    """Yield (top-level package, file) of every absolute import in instseg/ and projects/."""
    for path in [*ROOT.glob("instseg/**/*.py"), *ROOT.glob("projects/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                if (top := name.split(".")[0]) not in sys.stdlib_module_names:
                    yield top, path


def distribution_name(requirement: str) -> str:
    """Return the normalised project name at the start of a requirement."""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_every_imported_package_is_a_declared_dependency(wheel):
    declared = message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist") or []
    known = {distribution_name(requirement) for requirement in declared}
    for package, path in third_party_imports():
        if package not in ("instseg", "detectron2"):
            assert PROJECT_OF.get(package, package) in known, f"{path} imports {package}"


def test_every_declared_dependency_has_a_tested_version(wheel):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {distribution_name(line) for line in lines if line and not line.startswith("#")}
    declared = message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist") or []
    assert {distribution_name(requirement) for requirement in declared} <= pinned


def test_the_command_that_messages_recommend_installs_the_tested_torch():
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert {"torch==2.11.0", "torchvision==0.26.0"} <= set(pins)
    for name in ("setup.py", "instseg/__init__.py"):
        assert TORCH in (ROOT / name).read_text("utf-8")
