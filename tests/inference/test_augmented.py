"""``TEST.AUG.ENABLED``: honoured for two-stage models, refused for all others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation.testing import flatten_results_dict

import instseg
from instseg import Predictor
from instseg.data.dataset import load_all
from instseg.data.synthetic import shapes
from instseg.errors import ConfigError
from instseg.evaluation import metric_names
from instseg.training.trainer import Trainer
from tests.conftest import ROOT

TWO_STAGE = ["mask_rcnn/mask_rcnn_shapes.yaml", "mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml"]
OTHERS = sorted(
    path.relative_to(ROOT / "configs").as_posix()
    for path in (ROOT / "configs").glob("*/*_shapes*.yaml")
    if "mask_rcnn" not in path.name and "mask_scoring" not in path.name
)
SIDE = 64
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("TEST.DETECTIONS_PER_IMAGE", 10, "INPUT.MIN_SIZE_TEST", SIDE, "DATALOADER.NUM_WORKERS", 0),
    *("DATASETS.SHAPES_SIZE", SIDE, "TEST.AUG.MAX_SIZE", 4000),
]
SAME = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (SIDE,), "TEST.AUG.FLIP", False]
SEVERAL = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 96), "TEST.AUG.FLIP", True]


def predictor(config: str, *words: Any) -> Predictor:
    torch.manual_seed(0)
    return Predictor(config, overrides=[*TINY, *words])


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.parametrize("config", TWO_STAGE)
def test_one_size_alone_gives_what_there_is_without_augmentation(config: str) -> None:
    plain = predictor(config)(image())["instances"]
    augmented = predictor(config, *SAME)(image())["instances"]
    assert len(plain) > 2
    assert set(augmented.get_fields()) == set(plain.get_fields())
    for name, value in plain.get_fields().items():
        other = augmented.get(name)
        if name == "pred_boxes":
            value, other = value.tensor, other.tensor
        if name == "pred_masks":
            assert (other != value).float().mean() < 1e-3  # a pixel at one half
        else:
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("config", TWO_STAGE)
def test_with_flips_a_mirrored_image_gives_the_mirrored_result(config: str) -> None:
    words = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (SIDE,), "TEST.AUG.FLIP", True]
    model = predictor(config, *words)
    one = model(image())["instances"]
    other = model(np.ascontiguousarray(image()[:, ::-1]))["instances"]
    assert len(one) > 2
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)
    boxes = other.pred_boxes.tensor[:, [2, 1, 0, 3]]
    boxes[:, ::2] = SIDE - boxes[:, ::2]
    torch.testing.assert_close(one.pred_boxes.tensor, boxes, rtol=1e-3, atol=1e-1)
    alike = one.pred_masks == other.pred_masks.flip(2)
    assert alike.float().mean() > 0.98
    if one.has("mask_scores"):
        torch.testing.assert_close(one.mask_scores, other.mask_scores, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("config", TWO_STAGE)
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (1, 2000), (300, 7)])
def test_several_sizes_give_a_valid_result_and_draw_no_random_numbers(
    config: str, shape: tuple[int, int]
) -> None:
    model = predictor(config, *SEVERAL, "INPUT.MAX_SIZE_TEST", 2000)
    before = np.random.get_state()[1].copy()
    instances = model(np.full((*shape, 3), 99, np.uint8))["instances"]
    assert instances.pred_masks.shape == (len(instances), *shape)
    assert instances.pred_masks.dtype == torch.bool
    assert (np.random.get_state()[1] == before).all()
    assert len(instances) <= 10


@pytest.mark.parametrize("config", TWO_STAGE)
@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_gives_results_with_and_without(
    config: str, several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("shapes_val", "shapes_train") if several else ("shapes_val",)
    words = [*TINY, *SEVERAL, "DATASETS.TEST", names, "OUTPUT_DIR", str(tmp_path)]
    cfg = instseg.load_cfg(config, words)
    records = shapes.load("shapes_val", SIDE, range(2))
    for name in names:
        monkeypatch.setitem(DatasetCatalog.data, name, lambda: records)
    model = Trainer.build_model(cfg).eval()
    results = Trainer.test(cfg, model)
    assert not model.training and model.roi_heads.mask_on
    first = results["shapes_val"] if several else results
    assert list(first) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    measured = set(flatten_results_dict(results))
    assert measured and measured <= set(metric_names(cfg, model, load_all(cfg.DATASETS.TEST)))
    for folder in ("inference", "inference_TTA"):
        written = tmp_path / folder / "shapes_val" / "coco_instances_results.json"
        assert written.is_file()


@pytest.mark.parametrize("config", OTHERS)
def test_a_model_that_cannot_be_augmented_is_refused_with_the_key(config: str) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.AUG\.ENABLED is True, but .*set TEST.AUG.ENAB"):
        instseg.load_cfg(config, ["TEST.AUG.ENABLED", True])


@pytest.mark.parametrize("key", ["MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"])
def test_what_detectron2_would_only_assert_is_refused_with_the_key(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"TEST\.AUG\.ENABLED is True, but .*{key}"):
        instseg.load_cfg(TWO_STAGE[0], [*SAME, key, True])
