"""Optional parts of training: accumulation, best checkpoint, validation loss, mixed precision."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase, TrainerBase
from detectron2.evaluation import inference_context
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import instseg
from instseg.checkpoint import Checkpointer, read_weights
from instseg.data.mappers import build_train_mapper
from instseg.data.synthetic import shapes
from instseg.errors import CheckpointError, ConfigError, ImageError, OutputError, TrainingError
from instseg.inference.predictor import Predictor
from instseg.modeling import EvaluatedRCNN
from instseg.training.hooks import BestCheckpoint, ValidationLoss
from instseg.training.loop import TrainLoop
from instseg.training.trainer import Trainer
from tests.inference.test_predictor import tiny_cfg

CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"


class Line(nn.Module):
    """Fits y = weight * x; a batch is a list of {"x", "y", "file_name"}."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        self.norm = nn.BatchNorm1d(1)
        nn.init.ones_(self.linear.weight)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        x = torch.tensor([[sample["x"]] for sample in batch])
        y = torch.tensor([[sample["y"]] for sample in batch])
        self.norm(x)
        return {"loss_fit": (self.linear(x) - y).square().mean()}


def samples(*values: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"x": x, "y": y, "file_name": f"{i}.png"} for i, (x, y) in enumerate(values)]


FIRST, SECOND = samples((1.0, 3.0), (2.0, 1.0)), samples((3.0, 0.0), (1.0, 1.0))


def step(batches: Any, **settings: Any) -> float:
    model = Line()
    loop = TrainLoop(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    loop.iter = 0
    with EventStorage(0):
        loop.run_step()
    return model.linear.weight.item()


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    assert step([FIRST, SECOND], accumulate=2) == pytest.approx(step([FIRST + SECOND]))
    assert step([FIRST, SECOND], accumulate=2) != pytest.approx(step([FIRST]))


def test_bfloat16_runs_on_a_cpu_and_float16_is_refused_there() -> None:
    assert step([FIRST], amp_dtype="bfloat16") == pytest.approx(step([FIRST]), rel=0.02)
    with pytest.raises(ConfigError, match="float16 needs a GPU, the model is on cpu"):
        step([FIRST], amp_dtype="float16")


def test_a_loss_that_is_not_finite_names_iteration_term_and_images() -> None:
    with pytest.raises(TrainingError) as caught:
        step([samples((1.0, 1.0), (1.0, float("nan")))])
    for part in ("iteration 0", "loss_fit = nan", "images 0.png, 1.png", "SOLVER.BASE_LR"):
        assert part in str(caught.value)


def test_a_model_that_finds_itself_diverged_is_reported_likewise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Detectron2's RPN raises before there is a loss."""

    def diverged(self: Line, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    monkeypatch.setattr(Line, "forward", diverged)
    with pytest.raises(TrainingError, match="iteration 0: rank 0: Predicted boxes.*images 0.png"):
        step([FIRST])


class Broken(Dataset[Any]):
    """An image that cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise ImageError("cut.png: the file is truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line_wherever_it_was_read(workers: int) -> None:
    loader = DataLoader(Broken(), batch_size=None, num_workers=workers)
    with pytest.raises(ImageError, match=r"^cut\.png: the file is truncated$"):
        step(loader)


class FakeTrainer(TrainerBase):
    """Runs hooks over iterations whose metric is given."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def run_step(self) -> None:
        self.storage.put_scalar("segm/AP", self.values[self.iter], smoothing_hint=False)


def run_with(hook: HookBase, values: list[float], start: int = 0) -> FakeTrainer:
    trainer = FakeTrainer(values)
    trainer.register_hooks([hook])
    trainer.train(start, len(values))
    return trainer


def test_the_best_checkpoint_is_kept_and_resuming_does_not_forget_it(tmp_path: Path) -> None:
    def best() -> dict[str, Any]:
        return read_weights(str(tmp_path / "model_best.pth"))

    def hook() -> BestCheckpoint:
        return BestCheckpoint(Checkpointer(Line(), str(tmp_path)), "segm/AP")

    run_with(hook(), [20.0, 40.0, float("nan"), 30.0])
    assert (best()["iteration"], best()["best_value"]) == (1, 40.0)
    run_with(hook(), [0.0] * 4 + [35.0], start=4)
    assert best()["best_value"] == 40.0
    run_with(hook(), [0.0] * 5 + [45.0], start=5)
    assert (best()["iteration"], best()["best_value"]) == (5, 45.0)


def test_of_a_loss_the_lowest_value_is_the_best(tmp_path: Path) -> None:
    hook = BestCheckpoint(
        Checkpointer(Line(), str(tmp_path)), "val/total_loss", lower_is_better=True
    )
    hook.trainer = FakeTrainer([])
    with EventStorage() as hook.trainer.storage:
        for iteration, value in enumerate([3.0, 1.0, 2.0]):
            hook.trainer.storage.iter = iteration
            hook.trainer.storage.put_scalar("val/total_loss", value, smoothing_hint=False)
            hook.after_step()
    assert read_weights(str(tmp_path / "model_best.pth"))["best_value"] == 1.0


def test_a_metric_that_is_never_measured_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_with(BestCheckpoint(Checkpointer(Line(), str(tmp_path)), "segm/APs50"), [1.0])
    assert "TEST.BEST_METRIC segm/APs50 was never measured" in caplog.text
    assert "measured were segm/AP" in caplog.text


def test_gradients_are_clipped_after_loss_scaling_is_taken_back() -> None:
    """A gradient of 2e-3 is far below the limit, but not while it is multiplied by 65536."""

    class Clipping(torch.optim.AdamW):
        largest = 0.0

        def step(self, closure: Any = None) -> None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            type(self).largest = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            super().step(closure)

    model = Line()
    loop = TrainLoop(
        model, [samples((1.0, 0.999), (1.0, 0.999))], Clipping(model.parameters(), fused=True)
    )
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    loop.iter = 0
    with EventStorage(0):
        loop.run_step()
    assert Clipping.largest == pytest.approx(2e-3, rel=1e-3)


def test_a_brightness_that_is_no_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected .smallest, largest. factor"):
        instseg.load_cfg(CONFIG, ["INPUT.RANDOM_BRIGHTNESS", (2.0,)])


def test_cropping_polygons_without_the_package_for_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.MASK_FORMAT"]
    build_train_mapper(instseg.load_cfg(CONFIG, [*crop, "bitmask"]), augment=True)
    with pytest.raises(ConfigError, match="pip install shapely, or set INPUT.MASK_FORMAT bitmask"):
        build_train_mapper(instseg.load_cfg(CONFIG, [*crop, "polygon"]), augment=True)


def test_validation_loss_is_written_and_changes_neither_norms_nor_random_numbers() -> None:
    model = Line().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    hook = ValidationLoss(2, model, lambda: [FIRST, SECOND])
    trainer = run_with(hook, [0.0, 0.0, 0.0])
    expected = (model(FIRST)["loss_fit"] + model(SECOND)["loss_fit"]).item() / 2
    history = trainer.storage.history("val/loss_fit").values()
    assert [iteration for _, iteration in history] == [1, 2]
    assert history[0][0] == pytest.approx(expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.norm.training
    model.load_state_dict(before)  # the two forward passes above did update the statistics
    run_with(hook, [0.0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_trainer_switches_each_extra_on_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0),
        *(
            "SOLVER.ACCUMULATE_BATCHES",
            2,
            "TEST.EVAL_PERIOD",
            1,
            "TEST.BEST_METRIC",
            "val/total_loss",
        ),
        *("TEST.VAL_LOSS_PERIOD", 1, "OUTPUT_DIR", str(tmp_path)),
    ]
    cfg = instseg.load_cfg(CONFIG, settings)
    records = DatasetCatalog.get("shapes_val")[:2]
    for name in ("shapes_train", "shapes_val"):
        monkeypatch.setitem(DatasetCatalog.data, name, lambda: records)
    trainer = Trainer(cfg)
    trainer.train()
    metrics: dict[str, float] = {}
    for line in (tmp_path / "metrics.json").read_text().splitlines():
        metrics.update(json.loads(line))
    assert all(np.isfinite(metrics[f"val/{name}"]) for name in ("loss_mask", "total_loss"))
    assert (tmp_path / "best" / "model_best.pth").is_file()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_resuming_continues_iteration_optimizer_schedule_and_loss_scale(tmp_path: Path) -> None:
    name = f"coco:{shapes.export('shapes_val', tmp_path, limit=2)}:{tmp_path / 'shapes_val'}"
    settings = [
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0),
        *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path)),
    ]
    trainers = []
    for _ in range(2):
        trainer = Trainer(instseg.load_cfg(CONFIG, settings))
        trainer._trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        trainers.append(trainer)
    first, second = trainers
    first.train()
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    assert second.scheduler.state_dict() == first.scheduler.state_dict()
    assert second.scheduler.last_epoch == 2
    assert second._trainer.scaler.state_dict() == first._trainer.scaler.state_dict()
    assert second._trainer.scaler.get_scale() == 16.0
    for ours, theirs in zip(
        second.optimizer.state.values(), first.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_a_training_that_was_killed_before_its_end_was_saved_saves_it(tmp_path: Path) -> None:
    name = f"coco:{shapes.export('shapes_val', tmp_path, limit=2)}:{tmp_path / 'shapes_val'}"
    settings = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path)]
    cfg = instseg.load_cfg(CONFIG, [*settings, "SOLVER.MAX_ITER", 3])
    trainer = Trainer(cfg)
    trainer.iter = 2
    trainer.checkpointer.save("model_0000002", iteration=2)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert read_weights(str(tmp_path / "model_final.pth"))["iteration"] == 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A trainer and its checkpoint after iteration 2."""
    folder = tmp_path_factory.mktemp("stopped")
    name = f"coco:{shapes.export('shapes_val', folder, limit=2)}:{folder / 'shapes_val'}"
    words = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "OUTPUT_DIR", str(folder)]
    trainer = Trainer(instseg.load_cfg(CONFIG, words))
    trainer.iter = 2
    trainer.checkpointer.save("model_0000002", iteration=2)
    return trainer, folder / "model_0000002.pth"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iteration", "abc"),
        ("iteration", float("nan")),
        ("iteration", -(10**30)),
        ("iteration", 10**30),
        ("hooks", 5),
        ("_trainer", []),
    ],
)
def test_a_damaged_state_of_a_training_is_not_resumed(
    stopped: tuple[Trainer, Path], key: str, value: object
) -> None:
    trainer, file = stopped
    content = torch.load(file, weights_only=True)
    torch.save({**content, "trainer": {**content["trainer"], key: value}}, file)
    with pytest.raises(CheckpointError, match="the state of 'trainer' in .* does not fit"):
        trainer.resume_or_load(resume=True)
    torch.save(content, file)


@pytest.mark.parametrize(("saved", "set_now"), [("AdamW", "SGD"), ("SGD", "AdamW")])
def test_the_state_of_another_optimizer_is_refused(saved: str, set_now: str) -> None:
    def loop(optimizer: str) -> TrainLoop:
        model = Line()
        kind = getattr(torch.optim, optimizer)
        made = TrainLoop(model, [FIRST], kind(model.parameters(), lr=0.1))
        made.iter = 0
        return made

    first = loop(saved)
    with EventStorage(0):
        first.run_step()
    state = first.state_dict()
    loop(saved).load_state_dict(state)
    with pytest.raises(ValueError, match=f"for {set_now}.*another optimizer's.*set SOLVER.OPTIM"):
        loop(set_now).load_state_dict(state)
    with pytest.raises(
        ValueError, match=f"no 'param_groups' for {saved}, .*another optimizer's, or"
    ):
        loop(saved).load_state_dict({**state, "optimizer": {"state": {}}})


def test_a_rate_that_resuming_does_not_take_is_told(
    stopped: tuple[Trainer, Path], caplog: pytest.LogCaptureFixture
) -> None:
    trainer, path = stopped
    same = Trainer(trainer.cfg)
    same.resume_or_load(resume=True)
    assert "SOLVER" not in caplog.text
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR /= 10
    Trainer(cfg).resume_or_load(resume=True)
    assert f"goes on with the checkpoint's {trainer.cfg.SOLVER.BASE_LR:g}" in caplog.text
    assert caplog.text.count("SOLVER.BASE_LR differs from the checkpoint's") == 1
    assert "WEIGHT_DECAY" not in caplog.text


def test_a_best_metric_without_evaluations_is_refused(tmp_path: Path) -> None:
    cfg = instseg.load_cfg(CONFIG, ["TEST.BEST_METRIC", "segm/AP", "OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(ConfigError, match="set TEST.EVAL_PERIOD"):
        Trainer(cfg)


def test_random_brightness_scales_training_images_only_and_keeps_masks() -> None:
    cfg = instseg.load_cfg(
        CONFIG, ["INPUT.RANDOM_FLIP", "none", "INPUT.RANDOM_BRIGHTNESS", (0.5, 0.5)]
    )
    record = DatasetCatalog.get("shapes_val")[0]
    dark = build_train_mapper(cfg, augment=True)(record)
    plain = build_train_mapper(cfg, augment=False)(record)
    difference = dark["image"].float() - plain["image"].float() / 2
    assert difference.abs().max() <= 1
    assert torch.equal(dark["instances"].gt_masks.tensor, plain["instances"].gt_masks.tensor)


class Stopped(Trainer):
    """A training whose first step raises ``error``."""

    def __init__(self, error: Exception) -> None:
        TrainerBase.__init__(self)
        self.max_iter = 1
        self.error = error

    def run_step(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [ImageError("a.png: cannot be decoded"), TrainingError("not finite"), OutputError("no space")],
)
def test_a_mistake_that_ends_a_training_is_logged_without_a_traceback(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(type(error)):
        Stopped(error).train()
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_defect_that_ends_a_training_is_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):  # a mistake before it changes nothing
        with pytest.raises(ImageError):
            Stopped(ImageError("a.png")).train()
        with pytest.raises(ZeroDivisionError):
            Stopped(ZeroDivisionError()).train()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
        ZeroDivisionError
    ] * 2


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_leaves_a_two_stage_model_in_its_mode(mode: bool) -> None:
    model = Predictor(tiny_cfg()).model.train(mode)
    with inference_context(EvaluatedRCNN(model)):
        assert not model.training
    assert model.training == mode
