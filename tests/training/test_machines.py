"""Two machines, here two sets of processes that meet on the loopback, and ``docs/scale.md``."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from instseg.checkpoint import read_weights
from instseg.data.synthetic import shapes
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "scale.md").read_text()
# Programs of SLURM: the job has two nodes, both of them this machine.
SCONTROL = "#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n"
SRUN = '#!/bin/sh\n"$@" & first=$!\n"$@"; status=$?\nwait $first && exit $status\n'


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for two iterations on four images, and a test on four."""
    folder = tmp_path_factory.mktemp("machines")
    path = shapes.export("shapes_val", folder, limit=4)
    name = f"('coco:{path}:{folder / 'shapes_val'}',)"
    return [
        *("DATASETS.TRAIN", name, "DATASETS.TEST", name, "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SEED", "1", "MODEL.DEVICE", "cpu"),
        *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    ]


def run(scripts: list[str], words: list[str], folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The weights and the detections that ``scripts`` leave, which run at the same time."""
    folder.mkdir()
    programs = {"scontrol": SCONTROL, "srun": SRUN}
    programs["python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    programs["torchrun"] = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, content in programs.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | slurm | {"PATH": path, "OMP_NUM_THREADS": "1"}
    processes = []
    for script in scripts:
        script = script.replace("node0", "127.0.0.1").replace("29500", port)
        script = re.sub(r"(--num-gpus|--nproc-per-node) 8", r"\1 1", script).rstrip()
        command = [
            "bash",
            "-c",
            f'{script} "$@"',
            "bash",
            *words,
            "OUTPUT_DIR",
            str(folder / "out"),
        ]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        )
    try:
        errors = [process.communicate(timeout=280)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    assert [process.returncode for process in processes] == [0] * len(scripts), errors
    [results] = (folder / "out" / "inference").glob("*/coco_instances_results.json")
    weights = read_weights(str(folder / "out" / "model_final.pth"))["model"]
    return weights, results.read_text()


@pytest.fixture(scope="module")
def alone(
    small: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], str]:
    """What two processes of one machine leave."""
    command = blocks("bash")[2].replace("--nnodes 2", "--nnodes 1")
    command = command.replace("--nproc-per-node 8", "--nproc-per-node 2")
    return run([command], small, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.timeout(600)  # up to two runs of two processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU processes would meet over NCCL")
@pytest.mark.parametrize("way", ["launcher", "torchrun", "slurm"])
def test_two_machines_train_and_evaluate_as_two_processes_of_one(
    way: str, small: list[str], alone: tuple[dict[str, torch.Tensor], str], tmp_path: Path
) -> None:
    first, second, torchrun = blocks("bash")
    ways = {"launcher": [first, second], "torchrun": [torchrun] * 2, "slurm": blocks("slurm")}
    weights, detections = alone
    assert detections.count('"segmentation"') > 0
    other_weights, other_detections = run(ways[way], small, tmp_path / "run")
    assert other_weights.keys() == weights.keys()
    assert [k for k in weights if not torch.equal(weights[k], other_weights[k])] == []
    assert other_detections == detections
