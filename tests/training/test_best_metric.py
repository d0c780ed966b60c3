"""Metrics that keys name are looked for among the measured ones before training."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import EventStorage
from torch import nn

import instseg
from instseg.checkpoint import Checkpointer, read_weights
from instseg.data.dataset import DataSet, load_all
from instseg.data.synthetic import shapes, shapes_video
from instseg.errors import ConfigError
from instseg.evaluation import lower_is_better, metric_names
from instseg.evaluation.mask_scores import MaskScoreCOCOEvaluator
from instseg.training.hooks import (
    BestCheckpoint,
    ValidationLoss,
    check_best_metric,
    check_expected_results,
)
from instseg.training.trainer import Trainer
from tests.support.video_data import annotated_instances

CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"
TINY = ["SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0]
TINY += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32]


class Annotated(nn.Module):
    """A model that finds the annotations."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
        self.change = change
        self.gives_mask_scores = change is add_mask_scores

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results = []
        for item in inputs:
            instances = annotated_instances(self.records[item["image_id"]])
            self.change(instances)
            sem_seg = torch.zeros(4, *instances.image_size)
            results.append({"instances": instances, "sem_seg": sem_seg})
        return results


def nothing(instances: Any) -> None:
    pass


def add_mask_scores(instances: Any) -> None:
    instances.mask_scores = instances.scores / 2


def remove_masks(instances: Any) -> None:
    instances.remove("pred_masks")


def config(names: tuple[str, ...], *words: Any) -> Any:
    return instseg.load_cfg(
        CONFIG, [*TINY, "DATASETS.TRAIN", names[:1], "DATASETS.TEST", names, *words]
    )


def sets(cfg: Any) -> list[DataSet]:
    return load_all(cfg.DATASETS.TEST)


@pytest.fixture
def two_images(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Two data sets of two images."""
    instseg.get_cfg()  # registers them
    names = ("shapes_val", "shapes_train")
    records = shapes.load("shapes_val", shapes.DEFAULT_SIZE, range(2))
    for name in names:
        monkeypatch.setitem(DatasetCatalog.data, name, lambda: records)
    return names


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ([], nothing),
        ([], add_mask_scores),
        (["MODEL.MASK_ON", False], remove_masks),
        (["TEST.METRICS", ("proposals", "contest")], nothing),
        (["TEST.METRICS", ("coco", "contest", "leaves", "voc")], nothing),
        (["TEST.METRICS", ("semantic",)], nothing),
    ],
)
def test_what_is_declared_is_what_an_evaluation_gives(
    two_images: tuple[str, ...], tmp_path: Path, words: list[Any], change: Callable[[Any], None]
) -> None:
    cfg = config(two_images[:1], "OUTPUT_DIR", str(tmp_path), *words)
    model = Annotated(two_images[0], change)
    measured = flatten_results_dict(Trainer.test(cfg, model))
    measured.pop("leaves/DiC", None)  # has no best value
    assert set(metric_names(cfg, model, sets(cfg))) == set(measured)


def test_what_is_declared_of_tracks_is_what_an_evaluation_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackers")
    instseg.get_cfg()
    name = "shapes_video_val"
    records = shapes_video.load(name, shapes.DEFAULT_SIZE, [0])
    monkeypatch.setitem(DatasetCatalog.data, name, lambda: records)
    cfg = config((name,), "TEST.METRICS", ("coco", "tracks"), "OUTPUT_DIR", str(tmp_path))
    model = Annotated(name, nothing)
    assert set(metric_names(cfg, model, sets(cfg))) == set(
        flatten_results_dict(Trainer.test(cfg, model))
    )


def test_with_two_data_sets_each_metric_begins_with_the_name_of_one(
    two_images: tuple[str, ...], tmp_path: Path
) -> None:
    cfg = config(two_images, "OUTPUT_DIR", str(tmp_path))
    names = metric_names(cfg, nn.Identity(), sets(cfg))
    assert {"shapes_val/segm/AP", "shapes_train/segm/AP-circle"} <= set(names)
    storage = EventStorage()
    model = nn.Module()
    model.forward = lambda inputs: [  # type: ignore[method-assign]
        {"instances": annotated_instances(DatasetCatalog.get("shapes_val")[0])} for _ in inputs
    ]
    storage.put_scalars(**flatten_results_dict(Trainer.test(cfg, model)))
    assert set(storage.latest()) == set(names)


EVALUATED = ["TEST.EVAL_PERIOD", 1]


@pytest.mark.parametrize(
    ("metric", "words", "message"),
    [
        ("segm/APP", EVALUATED, "is segm/APP, which is not measured; did you mean segm/AP"),
        ("SEGM/ap", EVALUATED, "did you mean segm/AP,"),
        ("AP", EVALUATED, "did you mean bbox/AP, segm/AP"),
        ("segm/AP-person", EVALUATED, "did you mean segm/AP"),
        ("segm/rho_by_score", EVALUATED, "did you mean segm/rho"),
        ("nonsense", EVALUATED, "measured are bbox/AP, bbox/AP50"),
        ("total_loss", EVALUATED, "which is not measured"),
        ("contest/AP", EVALUATED, "which is not measured"),
        ("segm/AP", [*EVALUATED, "DATASETS.TEST", ("shapes_val", "shapes_hard_val")],
         "did you mean shapes_val/segm/AP, shapes_hard_val/segm/AP"),
        ("shapes_val/segm/AP", EVALUATED, "did you mean segm/AP"),
        ("segm/AP", [*EVALUATED, "DATASETS.TEST", ()], "DATASETS.TEST is empty"),
        ("segm/AP", [], "set TEST.EVAL_PERIOD to a number"),
        ("leaves/DiC", [*EVALUATED, "TEST.METRICS", ("leaves",)], r"did you mean leaves/\|DiC\|"),
        ("segm/AP", [*EVALUATED, "MODEL.MASK_ON", False], "measured are bbox/AP"),
        ("bbox/AP", [*EVALUATED, "TEST.METRICS", ("proposals",)], "which is not measured"),
        ("val/total_loss", EVALUATED, "set TEST.VAL_LOSS_PERIOD to a number"),
    ],
)  # fmt: skip
def test_a_metric_that_nothing_measures_is_refused_with_close_names(
    metric: str, words: list[Any], message: str
) -> None:
    cfg = config(("shapes_val",), *words, "TEST.BEST_METRIC", metric)
    with pytest.raises(ConfigError, match=message):
        check_best_metric(cfg, nn.Identity(), sets(cfg), None)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("segm/AP-circle", []),
        ("segm/rho", []),
        ("contest/AP85", ["TEST.METRICS", ("coco", "contest")]),
        ("shapes_val_apart/bbox/AP", ["DATASETS.TEST", ("shapes_val", "shapes_val_apart")]),
        ("proposals_segm/AR75@100", ["TEST.METRICS", ("proposals",)]),
    ],
)
def test_a_metric_that_will_be_measured_is_taken(metric: str, words: list[Any]) -> None:
    cfg = config(("shapes_val",), *EVALUATED, *words, "TEST.BEST_METRIC", metric)
    assert check_best_metric(cfg, nn.Identity(), sets(cfg), None) is False


class OneLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss_fit": self.weight}


@pytest.mark.parametrize("metric", ["val/total_loss", "val/loss_fit"])
def test_losses_are_measured_without_evaluations_and_the_lowest_is_the_best(metric: str) -> None:
    losses = ValidationLoss(1, OneLoss(), lambda: [[{}]])
    cfg = config(("shapes_val",), "TEST.BEST_METRIC", metric, "TEST.VAL_LOSS_PERIOD", 1)
    assert check_best_metric(cfg, nn.Identity(), sets(cfg), losses) is True


def test_a_loss_that_the_model_does_not_have_is_refused() -> None:
    losses = ValidationLoss(1, OneLoss(), lambda: [[{}]])
    cfg = config(("shapes_val",), "TEST.BEST_METRIC", "val/loss_fat", "TEST.VAL_LOSS_PERIOD", 1)
    with pytest.raises(ConfigError, match="did you mean val/loss_fit"):
        check_best_metric(cfg, nn.Identity(), sets(cfg), losses)


def test_a_class_with_loss_in_its_name_is_no_loss(
    two_images: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = MetadataCatalog.get(two_images[0])
    monkeypatch.setitem(metadata.__dict__, "thing_classes", ["floss", "glossy", "b/c"])
    for metric in ("segm/AP-floss", "segm/AP-b/c"):
        cfg = config(two_images[:1], *EVALUATED, "TEST.BEST_METRIC", metric)
        assert check_best_metric(cfg, nn.Identity(), sets(cfg), None) is False


@pytest.mark.parametrize("metric", ["leaves/|DiC|", "a_set/leaves/|DiC|"])
def test_of_the_difference_in_count_the_lowest_value_is_kept(metric: str, tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    hook = BestCheckpoint(
        Checkpointer(model, str(tmp_path)), metric, lower_is_better=lower_is_better(metric)
    )
    hook.trainer = type("FakeTrainer", (), {})()
    with EventStorage() as hook.trainer.storage:
        for iteration, value in enumerate([3.0, 1.0, 2.0]):
            hook.trainer.storage.iter = iteration
            hook.trainer.storage.put_scalar(metric, value, smoothing_hint=False)
            hook.after_step()
    assert read_weights(str(tmp_path / "model_best.pth"))["best_value"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["TEST.BEST_METRIC", "segm/APP", *EVALUATED], "did you mean segm/AP"),
        (["TEST.BEST_METRIC", "val/loss_masks", "TEST.VAL_LOSS_PERIOD", 1], "val/loss_mask"),
    ],
)
def test_a_trainer_refuses_it_before_the_first_iteration(
    two_images: tuple[str, ...], tmp_path: Path, words: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(config(two_images[:1], "OUTPUT_DIR", str(tmp_path), *words))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["segm", "APP", 30.0, 1.0], "has segm/APP, which is not measured; did you mean segm/AP"),
        (["segn", "AP", 30.0, 1.0], "did you mean segm/AP"),
        (["segm", "AP", 30.0], r"has \['segm', 'AP', 30.0\]; expected \[TASK, METRIC, VALUE, TOL"),
        (["segm", "AP", "30", 1.0], r"expected \[TASK, METRIC, VALUE, TOLERANCE\]"),
        ("segm", r"has 'segm'; expected \[TASK"),
    ],
)
def test_expected_results_that_cannot_be_compared_are_refused(entry: Any, message: str) -> None:
    cfg = config(("shapes_val",), "TEST.EXPECTED_RESULTS", [entry])
    with pytest.raises(ConfigError, match=message):
        check_expected_results(cfg, nn.Identity(), sets(cfg))


@pytest.mark.parametrize("names", [(), ("shapes_val", "shapes_val_apart")])
def test_expected_results_are_of_one_data_set(names: tuple[str, ...]) -> None:
    cfg = config(names, "TEST.EXPECTED_RESULTS", [["segm", "AP", 30.0, 1.0]])
    with pytest.raises(ConfigError, match=f"is for one data set, DATASETS.TEST has {len(names)}"):
        check_expected_results(cfg, nn.Identity(), sets(cfg))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["TEST.EXPECTED_RESULTS", [["segm", "APP", 30.0, 1.0]]], "did you mean segm/AP"),
        (["TEST.METRICS", ("coco", "semantic")], "the model gives no semantic map"),
    ],
)
def test_a_trainer_refuses_what_its_model_or_data_do_not_give(
    two_images: tuple[str, ...], tmp_path: Path, words: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(config(two_images[:1], "OUTPUT_DIR", str(tmp_path), *words))


def test_a_best_checkpoint_that_cannot_be_used_does_not_stop_a_resumed_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(1, 1)
    hook = BestCheckpoint(Checkpointer(model, str(tmp_path)), "segm/AP")
    hook.trainer = SimpleNamespace(start_iter=5)  # type: ignore[assignment]
    path = tmp_path / "model_best.pth"
    path.write_bytes(b"cut off")
    hook.before_train()
    torch.save({"model": model.state_dict()}, path)  # somebody else's
    hook.before_train()
    assert hook.best_metric is None
    lines = [line for line in caplog.messages if "does not count as the best so far" in line]
    assert len(lines) == 2 and all(line.startswith(str(path)) for line in lines)


def test_the_metrics_of_keypoints_can_be_the_best(two_images: tuple[str, ...]) -> None:
    cfg = config(two_images[:1], "MODEL.KEYPOINT_ON", True)
    names = MaskScoreCOCOEvaluator.measures(cfg, sets(cfg)[0], nn.Identity())
    assert {"keypoints/AP", "keypoints/AP50", "keypoints/AP-circle"} <= set(names)
