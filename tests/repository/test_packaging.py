"""Needs and messages of a build, contents of a wheel, and ``make setup`` after failures."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
TORCH = "pip install torch==2.11.0 torchvision==0.26.0"


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in ``cwd``; return its result with both streams as text."""
    variables = {**os.environ, **environment}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True)


def copy_of_the_sources(folder: Path) -> Path:
    """Copy what a build reads, so that it leaves nothing in the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("instseg", "projects", "configs", "csrc", "zoo", "docs", "tools"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    names = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile")
    for path in (ROOT / name for name in (*names, "constraints.txt", "train_net.py")):
        if path.exists():
            shutil.copy(path, folder / path.name)
    return folder


def files(wheel: Path) -> set[str]:
    """Return the names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path, name: str) -> str:
    """Return one file of a wheel's dist-info folder."""
    with zipfile.ZipFile(wheel) as archive:
        [path] = [path for path in archive.namelist() if path.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()


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


def interpreter_with(torch: str | None, folder: Path) -> Path:
    """Make an interpreter that has setuptools and, by its metadata, this version of torch."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    [packages] = folder.glob("venv/lib/python*/site-packages")
    setuptools = find_spec("setuptools")
    assert setuptools and setuptools.origin
    for pattern in ("*distutils*", "pkg_resources", "setuptools*", "wheel*"):
        for path in Path(setuptools.origin).parents[1].glob(pattern):
            (packages / path.name).symlink_to(path)
    if torch:
        (packages / f"torch-{torch}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n"
        (packages / f"torch-{torch}.dist-info" / "METADATA").write_text(text)
    return folder / "venv" / "bin" / "python"


@pytest.mark.parametrize(
    ("torch", "version"),
    [(None, "sees none"), ("2.5.1", "2.5.1"), ("1.13.1+cu117", "1.13.1+cu117")],
)
def test_a_build_without_a_new_enough_torch_is_one_sentence_that_says_what_to_type(
    torch, version, tmp_path
):
    python = interpreter_with(torch, tmp_path)
    command = python, "setup.py", "-q", "bdist_wheel"
    asked = {} if torch else {"INSTSEG_OPERATORS": "compiled"}
    done = run(*command, cwd=copy_of_the_sources(tmp_path), **asked)
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert version in sentence
    assert f"`{TORCH}`, then `pip install --no-build-isolation -e .`" in sentence


STAND_IN = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext

class CppExtension(Extension): pass
class CUDAExtension(Extension): pass

class BuildExtension(build_ext):
    def run(self): print(*[(type(e).__name__, e.sources) for e in self.extensions])
    def get_outputs(self): return []
"""
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


def stand_in_for_torch(packages: Path, command: str = STAND_IN) -> None:
    """Write a package ``torch`` with which nothing is compiled.

    Args:
        command: the text of ``torch.utils.cpp_extension``, by default one that prints the plan.
    """
    (packages / "torch" / "utils").mkdir(parents=True)
    (packages / "torch" / "__init__.py").write_text(
        "class cuda: is_available = staticmethod(lambda: False)\nclass version: cuda = '13.0'\n"
    )
    (packages / "torch" / "utils" / "__init__.py").touch()
    (packages / "torch" / "utils" / "cpp_extension.py").write_text(command)


def plan_of_build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a build that compiles nothing and prints what it would."""
    python = interpreter_with("2.11.0", folder)
    stand_in_for_torch(next(folder.glob("venv/lib/python*/site-packages")))
    source = copy_of_the_sources(folder)
    return run(python, "setup.py", "-q", "build_ext", cwd=source, **environment)


@pytest.mark.parametrize("torch", ["2.6.0", "2.10.0", "2.11.0+cu130", "3.0.0a0+git1234567"])
def test_a_build_with_a_new_enough_torch_goes_on(torch, tmp_path):
    python = interpreter_with(torch, tmp_path)
    stand_in_for_torch(next(tmp_path.glob("venv/lib/python*/site-packages")))
    done = run(python, "setup.py", "-q", "build", cwd=copy_of_the_sources(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "csrc/register.cpp" in done.stdout


def test_a_machine_without_a_gpu_gets_operators_for_the_cpu(tmp_path):
    done = plan_of_build(tmp_path)
    assert "CppExtension" in done.stdout
    assert ".cu'" not in done.stdout


def test_force_cuda_adds_the_cuda_sources(tmp_path):
    done = plan_of_build(tmp_path, FORCE_CUDA="1", CUDA_HOME="/a/toolkit")
    assert "CUDAExtension" in done.stdout
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*.cu")}
    assert sources and all(source in done.stdout for source in sources)


@pytest.mark.parametrize("asked", ["FORCE_CUDA", "INSTSEG_SANITIZE"])
def test_a_build_that_asks_for_special_operators_is_not_one_without_any(asked, tmp_path):
    python = interpreter_with(None, tmp_path)
    command = python, "setup.py", "-q", "bdist_wheel"
    done = run(*command, cwd=copy_of_the_sources(tmp_path), **{asked: "1"})
    assert done.returncode == 1 and "sees none" in done.stderr


def test_force_cuda_without_a_toolkit_is_one_sentence_that_says_what_to_install(tmp_path):
    tools = tmp_path / "path"
    tools.mkdir()
    (tools / "c++").symlink_to("/bin/true")
    done = plan_of_build(
        tmp_path, FORCE_CUDA="1", PATH=str(tools), CUDA_HOME="", CUDA_PATH="", CXX="c++"
    )
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert "install the CUDA toolkit 13.0" in sentence


def test_the_toolkit_is_found_beside_the_real_nvcc(tmp_path):
    """The nvcc on PATH may be a script or a link; the real one tells where it lies."""
    tools = tmp_path / "path"
    tools.mkdir()
    nvcc = tools / "nvcc"
    nvcc.write_text("#!/bin/sh\necho '#$ _HERE_=/real/toolkit/bin' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "setup").mkdir()
    source = copy_of_the_sources(tmp_path / "setup")
    code = "import setup; print(setup.cuda_toolkit())"
    path = f"{tools}:{os.environ['PATH']}"
    environment = {"PATH": path, "CUDA_HOME": "", "CUDA_PATH": ""}
    done = run(sys.executable, "-c", code, "--version", cwd=source, **environment)
    assert done.stdout.splitlines()[-1] == "/real/toolkit", done.stderr


def test_a_machine_without_a_compiler_is_told_in_one_sentence(tmp_path):
    done = plan_of_build(tmp_path, CXX="no-such-compiler", INSTSEG_OPERATORS="compiled")
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert "there is no compiler 'no-such-compiler'" in sentence


def test_a_value_that_is_no_way_to_run_operators_is_refused(tmp_path):
    done = plan_of_build(tmp_path, INSTSEG_OPERATORS="fast")
    assert done.returncode == 1
    assert done.stderr == "INSTSEG_OPERATORS is 'fast'; expected compiled or python\n"


@pytest.mark.parametrize(
    ("torch", "environment", "reason"),
    [
        (None, {}, "sees none"),
        ("2.11.0", {"CXX": "no-such-compiler"}, "no compiler 'no-such-compiler'"),
        ("2.11.0", {"INSTSEG_OPERATORS": "python"}, ""),
    ],
)
def test_a_build_that_cannot_compile_makes_a_wheel_for_every_system(
    torch, environment, reason, tmp_path
):
    python = interpreter_with(torch, tmp_path)
    command = python, "setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path
    done = run(*command, cwd=copy_of_the_sources(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("instseg-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any("/_C" in name for name in files(wheel))
    assert "torch>=2.6" in message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist")
    assert reason in done.stderr and bool(reason) == ("will run in Python" in done.stderr)


@pytest.mark.parametrize(
    ("environment", "left"),
    [({}, ["_C.abi3.so"]), ({"INSTSEG_OPERATORS": "python"}, [])],
)
def test_a_build_removes_operators_of_earlier_ones_where_it_puts_the_package(
    environment, left, tmp_path
):
    python = interpreter_with("2.11.0", tmp_path)
    stand_in_for_torch(next(tmp_path.glob("venv/lib/python*/site-packages")))
    source = copy_of_the_sources(tmp_path)
    for folder in (source / "instseg", source / "aside" / "instseg"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("_C.abi3.so", "_C.cpython-311-x86_64-linux-gnu.so"):
            (folder / name).touch()
    command = python, "setup.py", "-q", "build", "--build-lib", "aside"
    done = run(*command, cwd=source, **environment)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in source.glob("aside/instseg/_C.*")] == left
    assert len(list(source.glob("instseg/_C.*"))) == 2  # another build put them there


def test_a_source_archive_needs_no_torch(tmp_path):
    python = interpreter_with(None, tmp_path)
    done = run(python, "setup.py", "-q", "sdist", cwd=copy_of_the_sources(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("dist/instseg-*.tar.gz"))


def fake_environment(folder: Path, script: str) -> Path:
    """Copy what ``make setup`` reads; put a shell script in the place of .venv/bin/python.

    Args:
        script: the body; its arguments are Python's.
    """
    copy_of_the_sources(folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >> calls\n{script}\n')
    python.chmod(0o755)
    return folder


def make_setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``make setup`` in ``folder`` as a user would, not as a part of a running make."""
    return run("make", "setup", *arguments, cwd=folder, MAKEFLAGS="", MAKELEVEL="")


def test_an_old_python_is_refused_by_make_in_one_sentence(tmp_path):
    done = make_setup(copy_of_the_sources(tmp_path), "PYTHON=false")
    assert done.returncode != 0
    assert done.stderr.startswith("error: instseg needs Python 3.10 or newer, and 'false' is not")
    assert not (tmp_path / ".venv").exists()


def test_a_setup_that_fails_is_not_taken_for_done(tmp_path):
    fake_environment(tmp_path, 'case "$*" in *torch*) exit 1;; esac')
    assert make_setup(tmp_path).returncode != 0
    assert not (tmp_path / ".venv" / ".setup-done").exists()


def test_a_second_setup_calls_nothing(tmp_path):
    fake_environment(tmp_path, "")
    assert make_setup(tmp_path).returncode == 0
    (tmp_path / "calls").unlink()
    assert make_setup(tmp_path).returncode == 0
    assert not (tmp_path / "calls").exists()


def test_a_setup_is_repeated_when_a_version_changes(tmp_path):
    fake_environment(tmp_path, "")
    assert make_setup(tmp_path).returncode == 0
    (tmp_path / "calls").unlink()
    later = (tmp_path / ".venv" / ".setup-done").stat().st_mtime + 1
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert make_setup(tmp_path).returncode == 0
    assert "--constraint constraints.txt" in (tmp_path / "calls").read_text()


def test_another_index_of_torch_is_asked_for_torch_alone(tmp_path):
    fake_environment(tmp_path, "")
    assert make_setup(tmp_path, "TORCH_INDEX=https://a.index/cpu").returncode == 0
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "index" in line]
    assert len(calls) == 1
    assert "--extra-index-url https://a.index/cpu ninja setuptools torch torchvision" in calls[0]


def test_a_checkout_is_set_up_without_make(tmp_path):
    fake_environment(tmp_path, "")
    command = sys.executable, "tools/dev.py", "setup"
    assert run(*command, cwd=tmp_path).returncode == 0
    assert "install_detectron2.py --constraint" in (tmp_path / "calls").read_text()
    (tmp_path / "calls").unlink()
    assert run(*command, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "calls").exists()
    assert make_setup(tmp_path).returncode == 0
    assert not (tmp_path / "calls").exists()
