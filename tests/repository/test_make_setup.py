"""``make setup``: what it refuses, and when it works again."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.building import copy_of_the_sources, run


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
