"""Released YOLACT and YOLACT++ checkpoints: the authors' numbers once converted, bad files refused.

``golden/yolact`` holds stages, raw outputs and detections of the authors' own networks; see the
README there.  Compared within the limits that it suggests.
"""

import dataclasses
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor

import instseg
from instseg.convert import Options
from instseg.errors import CheckpointError
from instseg.projects.yolact import convert as yolact
from instseg.projects.yolact import level_sizes, mask_probabilities
from tests.conftest import close
from tests.support.yolact_common import (
    CONFIGS,
    FEATURES,
    RAW,
    SCORES,
    SEED,
    Case,
    build_case,
    detections_agree,
    keys,
    level_sums_agree,
    results_agree,
    sums_agree,
)

STRIDES = {"C3": (16, 5), "C4": (16, 5), "C5": (16, 5)} | {f"P{i}": (8, 3) for i in range(3, 8)}


@pytest.fixture(scope="module", params=[x for x in CONFIGS if "edge" not in x])
def case(
    request: pytest.FixtureRequest,
    golden_weights: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    return build_case(request.param, golden_weights, tmp_path_factory.mktemp("released"))


def test_the_input_equals_the_authors(case: Case, golden_weights: ModuleType) -> None:
    image = golden_weights.image(480, 640, SEED)
    assert zlib.crc32(image.tobytes()) == case.golden["input/image_crc32"]
    close(case.tensors["x"][0, :, ::11, ::11], case.golden["input/sub"], 5e-6)
    sums_agree(case.tensors["x"], case.golden, "input/x")


def test_an_image_that_opencv_stretched_is_only_normalised(
    case: Case, golden_weights: ModuleType
) -> None:
    """As in the authors' evaluation: in floating point, not rounded to bytes."""
    pixels = cv2.resize(golden_weights.image(480, 640, SEED).astype(np.float32), (550, 550))
    image = torch.from_numpy(pixels[:, :, ::-1].transpose(2, 0, 1).copy())
    x = case.model.preprocess([{"image": image}])
    close(x[0, :, ::11, ::11], case.golden["input/cv2_sub"], 5e-6)
    total = x.double().sum().item() - float(case.golden["input/cv2_sum"])
    assert abs(total) <= 1e-5 * x.double().abs().sum().item()


@pytest.mark.parametrize("stage", STRIDES)
def test_backbone_and_pyramid_equal_the_authors(case: Case, stage: str) -> None:
    channels, step = STRIDES[stage]
    x = case.tensors[stage]
    assert list(x.shape) == case.golden[f"stage/{stage}_shape"].tolist()
    close(x[0, ::channels, ::step, ::step], case.golden[f"stage/{stage}_sub"], FEATURES)
    sums_agree(x, case.golden, f"stage/{stage}")


def test_priors_equal_the_authors_exactly(case: Case) -> None:
    priors, golden = case.model.priors, case.golden
    assert torch.equal(priors, torch.from_numpy(golden["raw/priors"]))
    sums_agree(priors, golden, "raw/priors")
    cells = np.array(level_sizes(550, case.model.fpn.strides)) ** 2
    starts = np.cumsum([0, *cells]) * len(priors) // cells.sum()
    assert starts.tolist() == golden["raw/level_start"].tolist()


@pytest.mark.parametrize("output", ["loc", "conf", "mask"])
def test_the_heads_output_equals_the_authors(case: Case, output: str) -> None:
    x = case.tensors[output]
    close(x[0, :: int(case.golden["raw/row_stride"])], case.golden[f"raw/{output}_rows"], RAW)
    sums_agree(x, case.golden, f"raw/{output}")
    level_sums_agree(x, case.golden, f"raw/{output}")


def test_prototypes_equal_the_authors(case: Case) -> None:
    close(case.tensors["proto"][0, ::3, ::3], case.golden["raw/proto_sub"], RAW)
    sums_agree(case.tensors["proto"], case.golden, "raw/proto")


def test_semantic_logits_equal_the_authors(case: Case) -> None:
    close(case.tensors["segm"][0, ::2, ::4, ::4], case.golden["raw/segm_sub"], RAW)
    sums_agree(case.tensors["segm"], case.golden, "raw/segm")


@pytest.mark.parametrize(
    ("prefix", "nms", "limit"), [("det", "fast", 100), ("det_cc", "cross_class", 200)]
)
def test_detections_equal_the_authors(case: Case, prefix: str, nms: str, limit: int) -> None:
    model = case.model
    settings = model.detection_settings
    model.detection_settings = dataclasses.replace(settings, nms=nms, max_detections=limit)
    detections = model.detect(*(case.tensors[name][0] for name in ("loc", "conf", "mask")))
    model.detection_settings = settings
    detections_agree(detections, case.golden, prefix)


def test_as_many_anchors_are_candidates_as_with_the_authors(case: Case) -> None:
    """One may move across the threshold."""
    best = case.tensors["conf"][0].softmax(dim=1)[:, 1:].amax(dim=1)
    count = int((best > case.model.detection_settings.score_threshold).sum())
    assert abs(count - int(case.golden["det/num_candidates"])) <= 1


def test_masks_and_their_predicted_ious_equal_the_authors(case: Case) -> None:
    """At the resolution of the prototypes, of the authors' boxes and coefficients."""
    golden = case.golden
    boxes, coefficients = (torch.from_numpy(golden[f"det/{x}"]) for x in ("box_rel", "coef"))
    masks = mask_probabilities(case.tensors["proto"][0], coefficients, boxes)
    close(masks[:6, ::2, ::2], golden["det/prob_sub"], SCORES)
    sums = masks.double().sum(dim=(1, 2)).numpy()
    np.testing.assert_allclose(sums, golden["det/prob_sum"], rtol=SCORES)
    if "det/maskiou_all" in golden:
        with torch.no_grad():
            close(case.model.maskiou_net(masks), golden["det/maskiou_all"], RAW)


def test_what_default_predictor_gives_equals_the_authors(
    case: Case, golden_weights: ModuleType, request: pytest.FixtureRequest
) -> None:
    cfg = instseg.load_cfg(CONFIGS[request.node.callspec.params["case"]], ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.WEIGHTS = ""
    predictor = DefaultPredictor(cfg)
    predictor.model = case.model
    instances = predictor(golden_weights.image(480, 640, SEED))["instances"]
    ours, theirs = results_agree(instances, case.golden)
    if "post/score_mask" in case.golden:
        close(instances.mask_scores[ours], case.golden["post/score_mask"][theirs], SCORES)


@pytest.fixture
def released(tmp_path: Path) -> Any:
    """Writes a file of a released layout; zeros that take no space."""

    def write(name: str, changes: dict[str, Any] | None = None, file: str = "a.pth") -> str:
        types = {"float32": torch.float32, "int64": torch.int64}
        state = {
            key: torch.zeros((), dtype=types[dtype]).expand(shape)
            for key, (shape, dtype) in keys(name).items()
        }
        for key, value in (changes or {}).items():
            state.pop(key, None)
            if value is not None:
                state[key] = value
        torch.save(state, tmp_path / file)
        return str(tmp_path / file)

    return write


@pytest.mark.parametrize(
    ("layout", "file", "config"),
    [
        ("yolact_im700", "yolact_im700_54_800000.pth", "yolact/yolact_im700.yaml"),
        ("yolact_im700", "a.pth", "yolact/yolact_base.yaml"),
        (
            "yolact_resnet50_pascal",
            "yolact_resnet50_pascal_30_1.pth",
            "yolact/yolact_resnet50_pascal.yaml",
        ),
        ("yolact_plus_base", "a.pth", "yolact_plus/yolact_plus_base.yaml"),
    ],
)
def test_the_configuration_is_found_by_layout_and_name(
    released: Any, layout: str, file: str, config: str
) -> None:
    _, report = yolact.convert(released(layout, file=file), Options())
    assert (report.config, report.overrides) == (config, ())
    assert len(report.mapped) == len(keys(layout)) and not report.ignored


def test_another_number_of_classes_becomes_an_override(released: Any) -> None:
    changes = {
        "prediction_layers.0.conf_layer.weight": torch.zeros(3 * 5, 256, 3, 3),
        "prediction_layers.0.conf_layer.bias": torch.zeros(3 * 5),
        "semantic_seg_conv.weight": torch.zeros(4, 256, 1, 1),
        "semantic_seg_conv.bias": torch.zeros(4),
    }
    _, report = yolact.convert(released("yolact_resnet50", changes), Options())
    assert report.overrides == ("MODEL.YOLACT.NUM_CLASSES", 4)


def test_classes_are_left_out_on_request(released: Any) -> None:
    state, report = yolact.convert(released("yolact_resnet50"), Options(leave_out_classes=True))
    assert set(report.left_out) == {
        f"{layer}.{kind}"
        for layer in ("head.class_logits", "semantic")
        for kind in ("weight", "bias")
    }
    assert not set(report.left_out) & set(state)


def test_what_old_files_have_twice_is_ignored_and_counters_may_miss(released: Any) -> None:
    changes: dict[str, Any] = {
        "backbone.layer1.0.conv1.weight": torch.ones(64, 64, 1, 1),
        "fpn.downsample_layers.2.bias": torch.ones(256),
    }
    changes |= {key: None for key in keys("yolact_resnet50") if key.endswith("batches_tracked")}
    state, report = yolact.convert(released("yolact_resnet50", changes), Options())
    assert set(report.ignored) == {
        "backbone.layer1.0.conv1.weight",
        "fpn.downsample_layers.2.bias",
    }
    assert state["backbone.stem.conv1.norm.num_batches_tracked"] == 0


def test_a_layer_that_the_network_does_not_have_is_refused_by_name(released: Any) -> None:
    path = released("yolact_resnet50", {"proto_net.12.bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 of its 355 tensors .* proto_net\.12\.bias"):
        yolact.convert(path, Options())


def test_a_missing_layer_is_refused_by_name(released: Any) -> None:
    path = released("yolact_darknet53", {"backbone._preconv.0.weight": None})
    with pytest.raises(CheckpointError, match=r"missing: backbone\.stem\.weight"):
        yolact.convert(path, Options())


def test_values_that_are_not_finite_are_refused(released: Any) -> None:
    broken = torch.full((256,), float("nan"))
    path = released("yolact_resnet50", {"fpn.lat_layers.0.bias": broken})
    with pytest.raises(CheckpointError, match=r"not a number \(NaN\) for fpn\.lat_layers\.0\.bias"):
        yolact.convert(path, Options())


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    torch.save({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"do not belong .* prediction_layers"):
        yolact.convert(str(tmp_path / "a.pth"), Options(allow_partial=True))


def test_a_head_of_impossible_size_is_refused(released: Any) -> None:
    path = released("yolact_resnet50", {"prediction_layers.0.conf_layer.bias": torch.zeros(100)})
    with pytest.raises(CheckpointError, match="12 box and 100 class outputs"):
        yolact.convert(path, Options())
