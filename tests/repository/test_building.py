"""What a build needs, what it compiles, and what it says if it cannot."""

import os
import subprocess
import sys
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
