"""Released FCIS checkpoints: the same numbers after conversion, bad files refused.

``golden/fcis_forward`` holds activations of the authors' own network; see the README there.
"""

import contextlib
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

import instseg
from instseg.checkpoint import Checkpointer
from instseg.cli import main
from instseg.convert import Options
from instseg.errors import CheckpointError
from instseg.projects.fcis import Maps, Regions, refine_boxes, to_rois
from instseg.projects.fcis import convert as fcis
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "fcis_forward"
CONFIG = "fcis/fcis_R_101_coco.yaml"
PARTIAL = Options(allow_partial=True)
SUFFIXES = {
    "_moving_var": ".running_var",
    "_moving_mean": ".running_mean",
    "_gamma": ".weight",
    "_beta": ".bias",
    "_weight": ".weight",
    "_bias": ".bias",
}
FACTORS = {
    "rpn_cls_score_weight": 1 / 64,
    "rpn_bbox_pred_weight": 1 / 64,
    "fcis_cls_seg_weight": 1 / 8,
    "fcis_bbox_weight": 1 / 16,
}
State = dict[str, torch.Tensor]
Writer = Callable[[dict[str, list[int]]], str]


def keys() -> dict[str, list[int]]:
    """Names and shapes of the arrays of the released COCO model."""
    shapes: dict[str, list[int]] = json.loads((FOLDER / "keys_mxnet_coco.json").read_text())
    return shapes


def write_params(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Write float32 arrays as MXNet 1.x does."""
    with open(path, "wb") as file:
        file.write(struct.pack("<QQQ", 0x112, 0, len(arrays)))
        for array in arrays.values():
            file.write(struct.pack("<IiI", 0xF993FAC9, 0, array.ndim))
            file.write(struct.pack(f"<{array.ndim}q", *array.shape))
            file.write(struct.pack("<iii", 1, 0, 0))
            file.write(np.ascontiguousarray(array, dtype="<f4").tobytes())
        file.write(struct.pack("<Q", len(arrays)))
        for name in arrays:
            file.write(struct.pack("<Q", len(name)) + name.encode())
    return str(path)


def fill(weights: ModuleType, name: str, shape: list[int]) -> np.ndarray:
    """The stand-in for one array, by the recipe of the README."""
    plain = name.partition(":")[2]
    suffix = next(suffix for suffix in SUFFIXES if plain.endswith(suffix))
    seed = int(np.load(FOLDER / "fcis_r101_features.npz")["seed"])
    array = weights.fill(plain.removesuffix(suffix) + SUFFIXES[suffix], shape, seed)
    filled: np.ndarray = array * np.float32(FACTORS.get(plain, 1))
    return filled


@pytest.fixture(scope="module")
def conversion(
    golden_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A whole file in the authors' layout through the command, and what was printed."""
    folder = tmp_path_factory.mktemp("released")
    arrays = {name: fill(golden_weights, name, shape) for name, shape in keys().items()}
    source = write_params(folder / "fcis_coco-0000.params", arrays)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["convert", "fcis", source, str(folder / "ours.safetensors")]) == 0
    Path(source).unlink()
    return folder / "ours.safetensors", printed.getvalue()


@pytest.fixture(scope="module")
def model(conversion: tuple[Path, str]) -> nn.Module:
    cfg = instseg.load_cfg(conversion[0].with_suffix(".yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    Checkpointer(model).load(str(conversion[0]))
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return {
        name: value
        for part in ("features", "heads")
        for name, value in np.load(FOLDER / f"fcis_r101_{part}.npz").items()
    }


@pytest.fixture(scope="module")
def activations(model: nn.Module, golden: dict[str, Any], golden_weights: ModuleType) -> State:
    """Outputs of every layer that there are numbers for, on the golden pixels."""
    size = int(golden["height"]), int(golden["width"])
    pixels = golden_weights.image(*size, int(golden["seed"]))
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    outputs: State = {}
    layers = {"pool1": "stem", "res2c_relu": "res2", "res3b3_relu": "res3"}
    hooks = [
        model.backbone.get_submodule(layer).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output})
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        batch = model.preprocess_image([{"image": image}])
        features = model.backbone(batch.tensor)
        heads = model.roi_heads
        rpn = model.proposal_generator.rpn_head([features["res4"]])
        maps = heads.maps(features["res5"])
        hidden = heads.conv_new_1(features["res5"]).relu()
    for hook in hooks:
        hook.remove()
    outputs |= {"res4b22_relu": features["res4"], "res5c_relu": features["res5"]}
    outputs |= {"relu_new_1": hidden, "objectness": rpn[0][0], "rpn_bbox_pred": rpn[1][0]}
    return {**outputs, "scores": maps.scores, "fcis_bbox": maps.boxes}


@pytest.fixture(scope="module")
def regions(model: nn.Module, activations: State, golden: dict[str, Any]) -> Regions:
    """Results of the head for the stored 600 regions."""
    maps = Maps(activations["scores"], activations["fcis_bbox"])
    with torch.no_grad():
        return model.roi_heads.regions(maps, torch.from_numpy(golden["rois"]))


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Differences relative to the largest absolute value."""
    assert actual.shape == expected.shape
    error = np.abs(actual.double().numpy() - expected).max() / np.abs(expected).max()
    assert error <= tolerance


@pytest.mark.parametrize("name", ["pool1", "res2c_relu", "res3b3_relu"])
def test_early_stages_equal_the_authors(
    activations: State, golden: dict[str, Any], name: str
) -> None:
    values = activations[name][0].flatten(1)
    close(values.double().mean(dim=1), golden[f"{name}_channel_mean"])
    close(values.amax(dim=1), golden[f"{name}_channel_max"])


@pytest.mark.parametrize(
    "name", ["res4b22_relu", "res5c_relu", "relu_new_1", "rpn_bbox_pred", "fcis_bbox"]
)
def test_features_and_maps_equal_the_authors(
    activations: State, golden: dict[str, Any], name: str
) -> None:
    close(activations[name], golden[name])


def test_objectness_is_the_difference_of_the_authors_scores(
    activations: State, golden: dict[str, Any]
) -> None:
    scores = golden["rpn_cls_score"]
    anchors = scores.shape[1] // 2
    close(activations["objectness"], scores[:, anchors:] - scores[:, :anchors])


def test_score_maps_equal_the_authors_in_another_order(
    activations: State, golden: dict[str, Any]
) -> None:
    """Ours are (cell, part, class), theirs (class, part, cell)."""
    ours = activations["scores"].unflatten(1, (49, 2, -1)).permute(0, 3, 2, 1, 4, 5).flatten(1, 3)
    assert ours.shape == tuple(golden["fcis_cls_seg_shape"])
    sample = ours.flatten()[torch.from_numpy(golden["fcis_cls_seg_sample_index"])]
    close(sample, golden["fcis_cls_seg_sample_value"])
    close(ours.double().mean(dim=(0, 2, 3)), golden["fcis_cls_seg_channel_mean"])


def test_probabilities_of_regions_equal_the_authors(
    regions: Regions, golden: dict[str, Any]
) -> None:
    difference = regions.scores.softmax(dim=1) - torch.from_numpy(golden["cls_prob"])
    assert difference.abs().max() <= 1e-5


def test_box_deltas_of_regions_equal_the_authors(regions: Regions, golden: dict[str, Any]) -> None:
    assert (regions.deltas - torch.from_numpy(golden["bbox_pred"])).abs().max() <= 1e-4


def test_masks_of_regions_equal_the_authors(regions: Regions, golden: dict[str, Any]) -> None:
    clear = torch.from_numpy(golden["best_prob_margin"]) > 1e-5
    assert clear.float().mean() > 0.8
    assert torch.equal(regions.classes[clear], torch.from_numpy(golden["best_class"])[clear])
    inside = regions.mask_logits.softmax(dim=1)[:, 1]
    difference = inside - torch.from_numpy(golden["seg_fg_prob"])
    assert difference[clear].abs().max() <= 1e-3


def test_refined_regions_equal_the_authors(
    model: nn.Module, regions: Regions, golden: dict[str, Any]
) -> None:
    rois = torch.from_numpy(golden["rois"])
    count = len(rois) // 2
    boxes = rois[:count, 1:] + torch.tensor([0.0, 0, 1, 1])
    size = int(golden["height"]), int(golden["width"])
    refined = refine_boxes(boxes, regions.deltas[:count], model.roi_heads.box_transform, size)
    assert (to_rois([refined]) - rois[count:]).abs().max() <= 1e-2


def test_proposals_are_mostly_those_of_the_authors(
    model: nn.Module, activations: State, golden: dict[str, Any]
) -> None:
    """Their order depends on ties of scores; 95 % of the boxes are there to 0.01 pixels."""
    generator = model.proposal_generator
    anchors = generator.anchor_generator([activations["res4b22_relu"]])
    logits = activations["objectness"].permute(0, 2, 3, 1).flatten(1)
    deltas = activations["rpn_bbox_pred"].unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
    size = int(golden["height"]), int(golden["width"])
    (proposals,) = generator.predict_proposals(anchors, [logits], [deltas.flatten(1, 3)], [size])
    ours = to_rois([proposals.proposal_boxes.tensor])
    theirs = torch.from_numpy(golden["rois"][: len(golden["rois"]) // 2])
    distances = torch.cdist(theirs, ours, p=float("inf"))
    assert (distances.amin(dim=1) < 0.01).float().mean() > 0.95


def test_the_report_accounts_for_every_tensor_of_the_file(conversion: tuple[Path, str]) -> None:
    lines = [line.split() for line in conversion[1].splitlines()]
    mapped = {line[1]: line[3] for line in lines if line[0] == "mapped"}
    assert mapped.keys() == keys().keys()
    assert mapped["arg:res4b22_branch2b_weight"] == "backbone.res4.22.conv2.weight"
    assert mapped["aux:bn5c_branch2c_moving_var"] == "backbone.res5.2.conv3.norm.running_var"
    assert "532 tensors mapped, 0 ignored, 0 left out, 0 missing" in conversion[1]


@pytest.fixture
def released(tmp_path: Path) -> Writer:
    """Writes arrays of ones."""

    def write(shapes: dict[str, list[int]]) -> str:
        arrays = {name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()}
        return write_params(tmp_path / "fcis-0008.params", arrays)

    return write


def test_a_file_with_nine_anchors_says_that_it_does_not_tell_their_sizes(released: Writer) -> None:
    path = released({"arg:rpn_bbox_pred_bias": [36], "arg:fcis_cls_seg_bias": [98 * 21]})
    _, report = fcis.convert(path, PARTIAL)
    assert report.config == "fcis/fcis_R_101_coco.yaml"
    sizes = [[128.0, 256.0, 512.0]]
    assert report.overrides == (
        *("MODEL.ROI_HEADS.NUM_CLASSES", 20, "MODEL.ANCHOR_GENERATOR.SIZES", sizes),
    )
    assert report.choice.untold["MODEL.ANCHOR_GENERATOR.SIZES"] == sizes
    assert f"does not tell MODEL.ANCHOR_GENERATOR.SIZES (taken: {sizes}" in str(report)


def test_the_voc_setting_is_known_by_the_name_of_the_file(released: Writer) -> None:
    path = released({"arg:rpn_bbox_pred_bias": [36], "arg:fcis_cls_seg_bias": [98 * 21]})
    path = str(Path(path).rename(Path(path).with_name("fcis_VOC-0022.params")))
    _, report = fcis.convert(path, PARTIAL)
    assert (report.config, report.overrides) == ("fcis/fcis_R_101_voc.yaml", ())
    assert "chosen by the name of the file" in str(report)


def test_a_file_of_a_shallower_trunk_is_recognised(released: Writer) -> None:
    names = [f"arg:bn4{block}_branch2a_beta" for block in "abcdef"]
    state, report = fcis.convert(released({name: [256] for name in names}), PARTIAL)
    assert report.config == "fcis/fcis_R_50_coco.yaml"
    assert set(state) == {f"backbone.res4.{i}.conv1.norm.bias" for i in range(6)}


def test_a_file_for_other_classes_says_which_key_to_set(released: Writer) -> None:
    state, report = fcis.convert(released({"arg:fcis_cls_seg_bias": [98 * 4]}), PARTIAL)
    assert report.overrides == ("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    assert state["roi_heads.cls_seg.bias"].shape == (98 * 4,)


def test_score_maps_are_left_out_on_request(released: Writer) -> None:
    path = released({"arg:fcis_cls_seg_bias": [98 * 81], "arg:fcis_bbox_bias": [392]})
    state, report = fcis.convert(path, Options(leave_out_classes=True, allow_partial=True))
    assert list(state) == ["roi_heads.bbox.bias"]
    assert list(report.left_out) == ["roi_heads.cls_seg.bias"]


def test_the_scaled_copies_of_the_box_layer_are_ignored_with_a_warning(
    released: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    scaled = {"arg:fcis_bbox_weight_test": [392, 1024, 1, 1], "arg:fcis_bbox_bias_test": [392]}
    state, report = fcis.convert(released({"arg:fcis_bbox_bias": [392], **scaled}), PARTIAL)
    assert list(state) == ["roi_heads.bbox.bias"]
    assert report.ignored.keys() == scaled.keys()
    assert "fcis_bbox_bias_test is ignored" in caplog.text


def test_the_objectness_of_an_anchor_is_foreground_minus_background(tmp_path: Path) -> None:
    bias = np.arange(24, dtype=np.float32) ** 2
    path = write_params(tmp_path / "a.params", {"arg:rpn_cls_score_bias": bias})
    state, _ = fcis.convert(path, PARTIAL)
    expected = bias[12:] - bias[:12]
    objectness = state["proposal_generator.rpn_head.objectness_logits.bias"]
    assert objectness.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["arg:fcis_seg_weight", "fcis_bbox_bias", "aux:bn2a_branch1_rho"])
def test_an_unknown_array_is_refused_by_name(released: Writer, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"1 of its 2 tensors .* {name}"):
        fcis.convert(released({name: [392], "arg:fcis_bbox_bias": [392]}), PARTIAL)


def test_an_array_of_another_shape_is_refused_with_both_shapes(released: Writer) -> None:
    with pytest.raises(
        CheckpointError, match=r"fcis_bbox_bias has shape \(8,\), .* needs \(392,\)"
    ):
        fcis.convert(released({"arg:fcis_bbox_bias": [8]}), PARTIAL)


@pytest.mark.parametrize("rows", [23, 25])
def test_an_impossible_number_of_scores_is_refused(released: Writer, rows: int) -> None:
    shapes = {"arg:rpn_cls_score_bias": [rows], "arg:rpn_bbox_pred_bias": [48]}
    with pytest.raises(CheckpointError, match=rf"\({rows},\), .* needs \(24,\)"):
        fcis.convert(released(shapes), PARTIAL)


def test_a_missing_array_is_refused_by_our_name(released: Writer) -> None:
    with pytest.raises(CheckpointError, match=r"missing: backbone\.stem\.conv1\.weight"):
        fcis.convert(released({"arg:fcis_bbox_bias": [392]}), Options())
