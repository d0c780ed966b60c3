"""Processes that train together, in which nothing has run but ``import``.

They are forked from a server that has loaded torch once: new interpreters would take the time
of most such tests.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.programs import Done

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["setuptools", "instseg.cli", "instseg.training.trainer"])


def run_ranks(script: str, *words: str, count: int = 2) -> list[Done]:
    """What each rank of ``torchrun --nproc-per-node=COUNT SCRIPT WORDS`` leaves.

    Args:
        script: a file inside the repository, or a module.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as name:
        outputs = [
            (Path(name) / f"{rank}.out", Path(name) / f"{rank}.err") for rank in range(count)
        ]
        processes = []
        for rank, files in enumerate(outputs):
            environment = {**group, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = SERVER.Process(target=_run, args=(files, environment, script, *words))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(280)
            if process.is_alive():
                process.kill()
                pytest.fail(f"{script} {words} takes too long")
        return [
            Done(process.exitcode or 0, output.read_text(), errors.read_text())
            for process, (output, errors) in zip(processes, outputs, strict=True)
        ]


def _run(files: tuple[Path, Path], environment: dict[str, str], script: str, *words: str) -> None:
    for number, path in enumerate(files, 1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [script, *words]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__")
