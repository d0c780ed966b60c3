"""Cropped masks of every system: those of dense results, on real images and in evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from PIL import Image

import instseg
from instseg import Predictor, VideoPredictor, cli
from instseg.data.dataset import load
from instseg.data.synthetic import shapes
from instseg.errors import ConfigError
from instseg.evaluation import take_cropped
from instseg.export.predictor import ExportedPredictor
from instseg.masks import CroppedMasks, encode
from instseg.testing import PHOTO, SMALL
from instseg.training.trainer import Trainer
from tests.test_systems import SYSTEMS, build

MASK_RCNN = "mask_rcnn/mask_rcnn_shapes.yaml"


@pytest.mark.parametrize("name", SYSTEMS)
def test_masks_of_real_images_are_the_dense_ones(name: str, data_root: Path) -> None:
    instseg.load_cfg(name)  # registers the built-in data sets
    files = [
        record["file_name"]
        for dataset in ("coco_mini_val", "nuclei_val")
        for record in load(dataset).records[:2]
    ]
    wanted = ("TEST.DETECTIONS_PER_IMAGE", 20)
    dense = build(name, *wanted)(files)
    cropped = build(name, *wanted, "TEST.MASKS", "cropped")(files)
    assert sum(len(result["instances"]) for result in cropped) > 4
    for one, other in zip(dense, cropped, strict=True):
        masks = other["instances"].pred_masks
        assert isinstance(masks, CroppedMasks)
        assert masks.to_rle() == [encode(mask) for mask in one["instances"].pred_masks]
        boxes = other["instances"].pred_boxes.tensor
        assert torch.equal(boxes, one["instances"].pred_boxes.tensor)


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    records = shapes.load("shapes_val", 64, range(2))
    instseg.load_cfg(MASK_RCNN)  # registers the built-in data sets
    monkeypatch.setitem(DatasetCatalog.data, "shapes_val", lambda: records)


@pytest.mark.parametrize("name", SYSTEMS)
def test_evaluation_gives_the_same_numbers_to_the_digit(
    name: str, few_shapes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, *SYSTEMS[name], "DATASETS.TEST", ("shapes_val",), "TEST.VIDEO", False]
    cfg = instseg.load_cfg(name, [*words, "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", 0])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    scores = str(Trainer.test(cfg, model))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    monkeypatch.setattr("instseg.training.trainer.take_cropped", lambda *_: False)
    # As text, since areas without instances give NaN.
    assert str(Trainer.test(cfg, model)) == scores
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == files


class Looks(DatasetEvaluator):
    """Keeps the type of masks that it gets."""

    def process(self, inputs: Any, outputs: Any) -> None:
        self.kind = type(outputs[0]["instances"].pred_masks)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], torch.Tensor),
        (["TEST.MASKS", "cropped"], CroppedMasks),
        (["TEST.AUG.ENABLED", True, "TEST.MASKS", "cropped"], CroppedMasks),
    ],
)
def test_an_evaluator_from_elsewhere_gets_what_the_configuration_says(
    few_shapes: None, words: list[Any], kind: type
) -> None:
    small = [*SMALL, *SYSTEMS[MASK_RCNN], "DATASETS.TEST", ("shapes_val",)]
    small += ["TEST.AUG.MIN_SIZES", (48,), "DATALOADER.NUM_WORKERS", 0]
    cfg = instseg.load_cfg(MASK_RCNN, [*small, *words])
    evaluator = Looks()
    Trainer.test(cfg, Trainer.build_model(cfg).eval(), [evaluator])
    assert evaluator.kind is kind


def test_every_metric_of_ours_reads_cropped_masks() -> None:
    cfg = instseg.load_cfg(MASK_RCNN)
    for name in ("coco", "contest", "leaves", "voc", "semantic", "tracks", "proposals"):
        cfg.defrost()
        cfg.TEST.METRICS = (name,)
        assert take_cropped(cfg, [load("shapes_val")]), name


def test_dense_masks_of_a_model_from_elsewhere_are_cropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = build(MASK_RCNN)
    expected = dense(PHOTO)["instances"]
    monkeypatch.setattr("instseg.modeling.rcnn.wants_cropped", lambda _: False)
    instances = build(MASK_RCNN, "TEST.MASKS", "cropped")(PHOTO)["instances"]
    assert len(instances) and isinstance(instances.pred_masks, CroppedMasks)
    assert torch.equal(instances.pred_masks.to_dense(), expected.pred_masks)


def test_every_predictor_takes_the_form_of_masks() -> None:
    words = [*SMALL, *SYSTEMS[MASK_RCNN]]
    results = Predictor(MASK_RCNN, overrides=words, masks="cropped")([PHOTO, PHOTO[:1, :1]])
    for result in results:
        assert isinstance(result["instances"].pred_masks, CroppedMasks)
    video = VideoPredictor(MASK_RCNN, overrides=words, masks="cropped")
    assert isinstance(video(PHOTO)["instances"].pred_masks, CroppedMasks)
    with pytest.raises(ConfigError, match="has its weights, overrides and masks already"):
        VideoPredictor(video.predictor, masks="dense")
    with pytest.raises(ConfigError, match="TEST.MASKS is 'soft'; expected dense or cropped"):
        Predictor(MASK_RCNN, overrides=words, masks="soft")


def test_a_stream_takes_the_form_of_masks() -> None:
    dense = build(MASK_RCNN)
    (result,) = dense.stream([PHOTO], masks="cropped")
    assert isinstance(result["instances"].pred_masks, CroppedMasks)
    assert isinstance(next(dense.stream([PHOTO]))["instances"].pred_masks, torch.Tensor)
    with pytest.raises(ConfigError, match="masks is 'soft'; expected dense or cropped"):
        next(dense.stream([PHOTO], masks="soft"))


def test_an_image_without_a_pixel_left_has_no_cropped_masks() -> None:
    thin = np.zeros((1, 9000, 3), dtype=np.uint8)
    instances = build(MASK_RCNN, "TEST.MASKS", "cropped")(thin)["instances"]
    assert isinstance(instances.pred_masks, CroppedMasks)
    assert instances.pred_masks.image_size == (1, 9000)


def test_an_exported_network_gives_cropped_masks(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    name = "yolact/yolact_shapes.yaml"
    predictor = build(name)
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "weights.pth")
    words = [str(word) for word in (*SMALL, *SYSTEMS[name])]
    arguments = ["--config-file", name, "--weights", str(tmp_path / "weights.pth")]
    arguments += ["--format", "onnx", "--output", str(tmp_path / "yolact.onnx"), "--", *words]
    assert cli.main(["export", *arguments]) == 0
    path = tmp_path / "yolact.onnx"
    dense = ExportedPredictor(path)(PHOTO)["instances"].pred_masks
    cropped = ExportedPredictor(path, masks="cropped")(PHOTO)["instances"].pred_masks
    assert len(cropped) and cropped.to_rle() == [encode(mask) for mask in dense]


def test_the_command_line_has_no_limit_but_the_configured_number(tmp_path: Path) -> None:
    """Room for no dense mask at all."""
    predictor = build(MASK_RCNN)
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "weights.pth")
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    words = [*SMALL, *SYSTEMS[MASK_RCNN], "TEST.MASK_MEMORY", 1e-9]
    arguments = ["--config-file", MASK_RCNN, "--weights", str(tmp_path / "weights.pth")]
    arguments += ["--input", str(tmp_path / "photo.png"), "--output", str(tmp_path / "out")]
    arguments += ["--confidence", "0", "--no-overlay", "--", *map(str, words)]
    assert cli.main(["predict", *arguments]) == 0
    text = (tmp_path / "out" / "predictions.json").read_text()
    assert text.count('"segmentation"') == 8
