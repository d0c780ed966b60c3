"""Other processes, in which nothing has run but ``import``.

They are forked from a server that has loaded torch once: new interpreters would take the time of
most tests that need them.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.support.programs import Done

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["setuptools", "instseg.cli", "instseg.training.trainer"])


def run_forked(script: str, *words: str) -> Done:
    """What ``python SCRIPT WORDS`` leaves.

    Args:
        script: a file inside the repository, or a module.
    """
    [done] = _run_all([{}], script, *words)
    return done


def run_ranks(script: str, *words: str, count: int = 2) -> list[Done]:
    """What each rank of ``torchrun --nproc-per-node=COUNT SCRIPT WORDS`` leaves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _run_all(ranks, script, *words)


def _run_all(environments: list[dict[str, str]], script: str, *words: str) -> list[Done]:
    """What processes leave that run at the same time, each with an environment of its own."""
    with tempfile.TemporaryDirectory() as name:
        outputs, processes = [], []
        for number, environment in enumerate(environments):
            files = Path(name) / f"{number}.out", Path(name) / f"{number}.err"
            process = SERVER.Process(target=_run, args=(files, environment, script, *words))
            process.start()
            outputs.append(files)
            processes.append(process)
        end = time.monotonic() + 280
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, f"{script} {words} takes too long"
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
