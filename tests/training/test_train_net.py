"""``train_net.py`` as a user types it: train, resume, evaluate, several processes, mistakes."""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

import instseg
from instseg.checkpoint.reading import read_weights
from instseg.data.synthetic import shapes
from instseg.errors import ConfigError, DatasetError, OutputError
from instseg.training import launch
from instseg.training.trainer import Trainer
from tests.conftest import ROOT
from tests.support import programs
from tests.support.forking import run_forked, run_ranks
from tests.support.programs import Done

CONFIG = "configs/mask_rcnn/mask_rcnn_shapes.yaml"
QUICK = [
    "SOLVER.IMS_PER_BATCH",
    "2",
    "SOLVER.MAX_ITER",
    "2",
    "DATALOADER.NUM_WORKERS",
    "0",
    "SEED",
    "1",
]
# Loss terms that are sums over images divided by constants, so that the mean over ranks is the
# mean over the batch: no statistics of a batch, and 2 instances and 8 sampled regions of
# each image.  Few anchors, so that rounding does not swap proposals of nearly equal score, and
# few layers, as without normalisation each one magnifies rounding.
ADDITIVE = [
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", ""),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.25"),
    *("MODEL.RPN.IN_FEATURES", "['p5', 'p6']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]"),
    *("INPUT.RANDOM_FLIP", "none", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "4"),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.02", "SOLVER.WARMUP_ITERS", "0"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that train and test on six exported images, named without any registration."""
    folder = tmp_path_factory.mktemp("tiny")
    name = f"coco:{shapes.export('shapes_val', folder, limit=6)}:{folder / 'shapes_val'}"
    return [*QUICK, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]


def train_net(*words: str) -> Done:
    return programs.train_net("--config-file", str(ROOT / CONFIG), *words)


@pytest.fixture(scope="module")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run of two iterations."""
    folder = tmp_path_factory.mktemp("trained")
    result = train_net(*tiny, "OUTPUT_DIR", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_leaves_checkpoint_config_metrics_and_tensorboard_events(trained: Path) -> None:
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"
    assert instseg.load_cfg(trained / "config.yaml").SOLVER.MAX_ITER == 2
    metrics = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    assert {"total_loss", "loss_mask", "lr", "segm/AP", "bbox/AP"} <= set().union(*metrics)
    assert list(trained.glob("events.out.tfevents.*"))


def test_a_checkpoint_and_the_config_beside_it_know_the_categories(trained: Path) -> None:
    expected = [{"id": 1, "name": "circle"}, {"id": 2, "name": "square"}]
    expected.append({"id": 3, "name": "triangle"})
    assert read_weights(str(trained / "model_final.pth"))["categories"] == expected
    assert instseg.load_cfg(trained / "config.yaml").MODEL.CATEGORIES == expected


def test_a_checkpoint_knows_the_largest_instance_of_its_training(trained: Path) -> None:
    largest = read_weights(str(trained / "model_final.pth"))["largest_instance"]
    assert 10 < largest <= 128  # in images of 128 x 128 pixels


def test_resume_goes_on_where_the_run_ended(trained: Path, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(trained, folder)
    result = train_net("--resume", *tiny, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", str(folder))
    assert result.returncode == 0, result.stderr
    assert "Starting training from iteration 2" in result.stdout + result.stderr
    assert read_weights(str(folder / "model_final.pth"))["iteration"] == 3


def test_a_signal_to_all_processes_of_a_training_saves_it_and_resume_goes_on(
    tiny: list[str], tmp_path: Path
) -> None:
    """The worker that loads data gets the signal as well, as from a scheduler of jobs."""
    words = [*tiny, "DATALOADER.NUM_WORKERS", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
    words += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "DATASETS.TEST", "()"]
    words += ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER"]
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", CONFIG, *words, "1000"]
    with open(tmp_path / "output.txt", "w") as output:  # a pipe would fill up
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
    try:
        while process.poll() is None and not (tmp_path / "last_checkpoint").exists():
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=120)
    finally:
        process.kill()
    printed = (tmp_path / "output.txt").read_text()
    assert process.returncode == 143, printed
    last = int(re.findall(r"SIGTERM: training ends after iteration (\d+)", printed)[0])
    result = train_net("--resume", *words, str(last + 2))
    assert result.returncode == 0, result.stderr
    assert f"Starting training from iteration {last + 1}" in result.stdout
    assert read_weights(str(tmp_path / "model_final.pth"))["iteration"] == last + 1


def test_evaluation_alone_prints_box_and_mask_ap(
    trained: Path, tiny: list[str], tmp_path: Path
) -> None:
    weights = str(trained / "model_final.pth")
    result = train_net("--eval-only", *tiny, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path))
    assert result.returncode == 0, result.stderr
    tables = re.findall(r"copypaste: Task: (\w+)", result.stdout)
    assert tables == ["bbox", "segm"]


def test_two_processes_equal_one_with_the_double_batch(tiny: list[str], tmp_path: Path) -> None:
    """Weights after two steps: two gloo ranks with two images each, one process with four."""
    driver = "tests/support/train_deterministically.py"
    words = [*tiny, *ADDITIVE, "MODEL.WEIGHTS", str(tmp_path / "start.pth")]
    cfg = instseg.load_cfg(CONFIG, ADDITIVE)
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, tmp_path / "start.pth")
    states = {}
    for name, count in {"one": 1, "two": 2}.items():
        words_of_run = ["--config-file", CONFIG, *words, "OUTPUT_DIR", str(tmp_path / name)]
        ranks = run_ranks(driver, *words_of_run, count=count)
        assert [rank.returncode for rank in ranks] == [0] * count, ranks[0].stderr
        states[name] = read_weights(str(tmp_path / name / "model_final.pth"))["model"]
    start = read_weights(str(tmp_path / "start.pth"))["model"]
    assert {one.dtype for one in states["one"].values()} == {torch.float64}
    # Rounding is some 1e-17 here, whatever the processor and however little a tensor moved; a wrong
    # mean, rate or share of the images changes all steps by much of their length. Boxes stay
    # float32: one that rounds to its neighbour would change a step by some 1e-7 of its length.
    moved = {key: (one - start[key]).abs().max() for key, one in states["one"].items()}
    for key, one in states["one"].items():
        assert (states["two"][key] - one).abs().max() <= 1e-6 * moved[key] + 1e-14, key
    trained = [key for key, length in moved.items() if length > 0]
    assert min(moved[key] for key in trained) > 1e-7, "too short a step to compare"
    assert max(moved.values()) > 0.01


@pytest.mark.timeout(600)  # four runs, two of them of two processes
def test_two_processes_evaluate_and_resume_as_one_does(tiny: list[str], tmp_path: Path) -> None:
    """Everything optional is on; what two ranks measured is what their checkpoint gives."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    extras = [
        *(
            "TEST.EVAL_PERIOD",
            "1",
            "TEST.BEST_METRIC",
            "val/total_loss",
            "TEST.VAL_LOSS_PERIOD",
            "1",
        ),
        *("SOLVER.ACCUMULATE_BATCHES", "2", "TEST.METRICS", "('coco', 'contest')"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20"),
        *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
        *("OUTPUT_DIR", str(tmp_path)),
    ]
    words = [str(ROOT / "train_net.py"), "--config-file", CONFIG, *tiny, *extras]
    command = [sys.executable, *torchrun, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "best" / "model_best.pth").is_file()
    words = ["--config-file", CONFIG, "--resume", *tiny, *extras, "SOLVER.MAX_ITER", "3"]
    result, other = run_ranks("train_net.py", *words)
    assert (result.returncode, other.returncode) == (0, 0), result.stderr
    assert read_weights(str(tmp_path / "model_final.pth"))["iteration"] == 2
    measured = re.findall(r"copypaste: ([\d.,nan-]+)$", result.stdout, flags=re.MULTILINE)[-3:]
    result = train_net("--eval-only", "--resume", *tiny, *extras)
    alone = re.findall(r"copypaste: ([\d.,nan-]+)$", result.stdout, flags=re.MULTILINE)
    assert len(alone) == 3
    assert alone == measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-gpus", "8"], "--num-gpus 8: this machine has"),
        (
            ["--num-gpus", "x"],
            "argument --num-gpus: invalid int value: 'x'; see `train_net.py --he",
        ),
        (["--resume"], "--resume: there is no checkpoint in OUTPUT_DIR"),
        (["--eval-only"], "--eval-only would evaluate random weights; pass MODEL.WEIGHTS FILE"),
        (["--eval-only", "DATASETS.TEST", "()"], "--eval-only: DATASETS.TEST is empty"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty; name a data set"),
        (
            [
                *("DATASETS.TRAIN", "('shapes_val',)", "DATASETS.TEST", "()"),
                *("TEST.VAL_LOSS_PERIOD", "1"),
            ],
            "TEST.VAL_LOSS_PERIOD is set, but DATASETS.TEST is empty",
        ),
        (["SOLVER.MAX_ITR", "3"], "unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"),
        (["DATASETS.TRAIN", "('shape_train',)"], "did you mean shapes_train"),
        (["MODEL.META_ARCHITECTURE", "GeneralisedRCNN"], "did you mean GeneralizedRCNN"),
        (
            ["DATASETS.TRAIN", "('shapes_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "80"],
            "shapes_val has 3 classes, MODEL.ROI_HEADS.NUM_CLASSES is 80",
        ),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_two(
    words: list[str], message: str, tmp_path: Path
) -> None:
    opts = [] if words[0].startswith("--") else words
    flags = words if words[0].startswith("--") else []
    result = train_net(*flags, *QUICK, "OUTPUT_DIR", str(tmp_path), *opts)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr + result.stdout
    assert "usage" not in result.stderr


def test_a_damaged_image_ends_a_training_with_one_line(tmp_path: Path) -> None:
    """Its traceback is in log.txt alone."""
    name = f"coco:{shapes.export('shapes_val', tmp_path, limit=2)}:{tmp_path / 'shapes_val'}"
    for file in (tmp_path / "shapes_val").iterdir():
        file.write_bytes(file.read_bytes()[:-900])
    words = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)]
    words = ["--config-file", CONFIG, *QUICK, *words, "DATALOADER.NUM_WORKERS", "1"]
    result = run_forked("train_net.py", *words)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "shapes_val" in line]
    assert len(errors) == 1
    assert re.fullmatch(r"error: /\S+\.png: cannot be decoded: .*truncated", errors[0])
    assert "Traceback" not in result.stderr + result.stdout
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_options_come_before_the_keys_and_values() -> None:
    words = ["--config-file", CONFIG, "--eval-only", "SOLVER.MAX_ITER", "3", "SEED", "-1"]
    args = launch.argument_parser().parse_args(words)
    assert args.eval_only and args.opts == words[3:]


def arguments(**changes: object) -> argparse.Namespace:
    args = launch.argument_parser().parse_args(["--config-file", CONFIG])
    vars(args).update(changes)
    return args


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="OUTPUT_DIR .*file/inside cannot be written"):
        launch.setup(arguments(opts=["OUTPUT_DIR", str(tmp_path / "file" / "inside")]))


def test_an_output_folder_with_a_null_character_is_refused() -> None:
    with pytest.raises(OutputError, match="cannot be written: embedded null byte; choose another"):
        launch.setup(arguments(opts=["OUTPUT_DIR", "a\0b"]))


def test_a_full_disk_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", ("shapes_val",)]
    cfg = instseg.load_cfg(CONFIG, words)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="has 1 MiB free, a checkpoint needs about"):
        Trainer(cfg)


def test_what_detectron2_asserts_about_a_model_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be built: Must set MODEL.RESNETS.RES2_OUT"):
        Trainer.build_model(instseg.load_cfg(CONFIG, ["MODEL.RESNETS.DEPTH", 18]))


def test_a_second_run_in_a_folder_is_refused_before_it_writes_anything(tmp_path: Path) -> None:
    code = "import sys; from instseg.files import lock_folder; lock_folder(sys.argv[1]); "
    command = [sys.executable, "-c", code + "print('locked', flush=True); input()", str(tmp_path)]
    first = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert first.stdout is not None and first.stdout.readline()
    with pytest.raises(
        OutputError, match=f"OUTPUT_DIR {tmp_path} is in use by process {first.pid}"
    ):
        launch.setup(arguments(opts=["OUTPUT_DIR", str(tmp_path)]))
    first.communicate("\n")
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_training_without_a_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="no configuration; pass --config-file FILE"):
        launch.setup(arguments(config_file=""))


def test_a_machine_has_a_number_below_that_of_the_machines() -> None:
    with pytest.raises(ConfigError, match="--machine-rank 2 must be below --num-machines 2"):
        launch.launch(print, arguments(num_machines=2, machine_rank=2))


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the only process of torchrun, which is this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    for name, value in (group | dict.fromkeys(("RANK", "LOCAL_RANK"), "0")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "end_with", lambda parent: None)  # other tests come after this
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)  # to be as it was afterwards
    comm.create_local_process_group.cache_clear()
    return monkeypatch


@pytest.mark.parametrize("failure", [None, ConfigError("a mistake")])
def test_a_rank_of_torchrun_is_in_a_group_while_it_runs(
    torchrun: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    groups: list[tuple[object, ...]] = []

    def main(args: argparse.Namespace) -> None:
        groups.append((comm.get_world_size(), comm.get_local_rank(), dist.get_backend()))
        if failure is not None:
            raise failure

    with nullcontext() if failure is None else pytest.raises(ConfigError, match="a mistake"):
        launch.launch(main, arguments(opts=["MODEL.DEVICE", "cpu"]))
    assert groups == [(1, 0, "gloo")]
    assert not dist.is_initialized()


def test_torchrun_with_more_processes_than_gpus_is_refused(torchrun: pytest.MonkeyPatch) -> None:
    torchrun.setenv("LOCAL_WORLD_SIZE", "99")
    with pytest.raises(ConfigError, match="torchrun starts 99 processes, this machine has . GPUs"):
        launch.launch(print, arguments(opts=["MODEL.DEVICE", "cuda"]))


def test_a_busy_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "detectron2_launch", lambda *_, **__: pytest.fail("it started"))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        args = arguments(num_machines=2, dist_url=f"tcp://127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=f"port {port} is busy"):
            launch.launch(print, args)


@pytest.mark.parametrize("url", ["auto", "tcp://127.0.0.1:99999", "tcp://a:b", "nonsense", ""])
def test_a_url_where_machines_cannot_meet_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--dist-url.*; expected tcp://HOST:PORT"):
        launch.launch(print, arguments(num_machines=2, dist_url=url))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the mistake is to ask for a GPU where there is none"
)
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this machine has no usable GPU; set MODEL.DEVICE cpu"):
        launch.setup(arguments(opts=["MODEL.DEVICE", "cuda", "OUTPUT_DIR", str(tmp_path)]))


def test_instances_without_masks_are_refused_before_training(tmp_path: Path) -> None:
    path = shapes.export("shapes_val", tmp_path, limit=2)
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = []
    path.write_text(json.dumps(content))
    name = f"coco:{path}:{tmp_path / 'shapes_val'}"
    cfg = instseg.load_cfg(
        CONFIG, ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path)]
    )
    with pytest.raises(
        DatasetError, match=r"1 of 2 images have instances without a segmentation.*000000\.png"
    ):
        Trainer(cfg)
