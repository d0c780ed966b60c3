"""The README's commands of installation run as they stand, in an environment of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.building import copy_of_the_sources

PROGRAMS = ("pip install", "python -m instseg.install_detectron2", "instseg --version")
SHELLS = [shell for shell in ("sh", "zsh") if shutil.which(shell)]


def commands() -> list[str]:
    """Every command that installs something, in the order of the README, each once."""
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(pip install [^`]* [^`]*|pip install '[^`]*)`", text)
    return list(dict.fromkeys(x for x in (*lines, *inline) if x.startswith(PROGRAMS)))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment that has what is installed here, but for instseg."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    [packages] = home.glob("lib/python*/site-packages")
    folders = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "these.pth").write_text("\n".join(folders))
    (home / "bin" / "pip").write_text(f'#!/bin/sh\nexec {home}/bin/python -m pip "$@"\n')
    (home / "bin" / "pip").chmod(0o755)
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "INSTSEG_OPERATORS": "python"}


def test_the_readme_names_every_extra_that_users_need() -> None:
    assert "instseg --version" in commands()
    text = "".join(commands())
    for extra in ("convert", "export", "hub", "microscopy", "video"):
        assert f"'instseg[{extra}]'" in text
    assert "-e .[" not in (ROOT / "README.md").read_text("utf-8")  # zsh would expand it


@pytest.mark.parametrize(
    "without_network",
    [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.network)],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_the_commands_install_instseg(
    shell: str, without_network: bool, environment: dict[str, str], tmp_path: Path
) -> None:
    if without_network:
        environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    source = copy_of_the_sources(tmp_path)
    for command in commands():
        done = subprocess.run(
            [shell, "-c", command], cwd=source, env=environment, capture_output=True, text=True
        )
        lacking = re.search(r"No matching distribution found for (.*)", done.stderr)
        if without_network and lacking and "'instseg[" in command:
            print(f"{command}: {lacking[1]} is not installed here")
            continue
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if command == "instseg --version":
            assert done.stdout.startswith("instseg ") and "operators in Python" in done.stdout
