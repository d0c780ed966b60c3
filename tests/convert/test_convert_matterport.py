"""Weights of matterport/Mask_RCNN: the same numbers after conversion, bad files refused.

``golden/mask_rcnn/golden_matterport.npz`` was computed by a PyTorch port of matterport's code; see
the README there.
"""

import builtins
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.nn import functional as F

import instseg
from instseg.checkpoint import Checkpointer
from instseg.cli import main
from instseg.convert import Options
from instseg.errors import CheckpointError
from instseg.projects.mask_rcnn import SamePaddingStem
from instseg.projects.mask_rcnn import convert_matterport as matterport
from tests.conftest import GOLDEN, close, load_module

FOLDER = GOLDEN / "mask_rcnn"
CONFIG = "mask_rcnn/mask_rcnn_R_101_FPN_matterport.yaml"
LEVELS = {"p2": 4, "p3": 2, "p4": 1, "p5": 1, "p6": 1}
ROWS = {"p2": 7, "p3": 3, "p4": 1, "p5": 1, "p6": 1}
ENTRIES = json.loads((FOLDER / "keys_matterport_resnet101.json").read_text())
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FOLDER / "golden_matterport.npz")


@pytest.fixture(scope="module")
def conversion(
    golden_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A whole file in matterport's layout through the command: the result and what was printed."""
    folder = tmp_path_factory.mktemp("released")
    recipe = load_module(FOLDER / "inputs.py")
    with h5py.File(folder / "released.h5", "w") as file:
        for entry in ENTRIES:
            file[entry["dataset"]] = recipe.matterport_array(entry, golden_weights.fill)
    arguments = [str(folder / "released.h5"), str(folder / "ours.safetensors")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["convert", "matterport", *arguments]) == 0
    (folder / "released.h5").unlink()
    return folder / "ours.safetensors", printed.getvalue()


@pytest.fixture(scope="module")
def printed(conversion: tuple[Path, str]) -> str:
    return conversion[1]


@pytest.fixture(scope="module")
def model(conversion: tuple[Path, str]) -> nn.Module:
    model = build_model(instseg.load_cfg(CONFIG, ["MODEL.DEVICE", "cpu"])).eval()
    Checkpointer(model).load(str(conversion[0]))
    return model


@pytest.fixture(scope="module")
def features(model: nn.Module, golden_weights: ModuleType) -> State:
    """Results for an RGB image, which the model normalises by the means of its configuration."""
    image = golden_weights.image(128, 128)[:, :, ::-1].transpose(2, 0, 1).copy()
    with torch.no_grad():
        images = model.preprocess_image([{"image": torch.from_numpy(image)}])
        return model.backbone(images.tensor)


@pytest.fixture(scope="module")
def pooled(features: State, golden: Any) -> dict[int, torch.Tensor]:
    """Region features by matterport's pooling, which differs from RoIAlign."""
    boxes = torch.from_numpy(golden["rois_yxyx_normalised"])
    return {size: crop_and_resize(features, boxes, size) for size in (7, 14)}


def crop_and_resize(features: State, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow's pooling on the pyramid level that matterport chooses (128 x 128 images).

    Args:
        boxes: (R, 4) y1, x1, y2, x2, where 0 and 1 are the centres of the outermost cells.
    """
    out = []
    for y1, x1, y2, x2 in boxes:
        side = ((y2 - y1) * (x2 - x1)).sqrt()
        level = int((4 + (side / (224 / 128)).log2().round()).clamp(2, 5))
        map_ = features[f"p{level}"][0]
        height, width = map_.shape[-2:]
        rows = y1 * (height - 1) + torch.arange(size) * ((y2 - y1) * (height - 1) / (size - 1))
        columns = x1 * (width - 1) + torch.arange(size) * ((x2 - x1) * (width - 1) / (size - 1))
        inside = ((rows >= 0) & (rows <= height - 1))[:, None]
        inside = inside & (columns >= 0) & (columns <= width - 1)
        top, bottom = (f(rows).long().clamp(0, height - 1) for f in (torch.floor, torch.ceil))
        left, right = (f(columns).long().clamp(0, width - 1) for f in (torch.floor, torch.ceil))
        across, down = columns - columns.floor(), (rows - rows.floor())[:, None]
        upper = map_[:, top][:, :, left].lerp(map_[:, top][:, :, right], across)
        lower = map_[:, bottom][:, :, left].lerp(map_[:, bottom][:, :, right], across)
        out.append(upper.lerp(lower, down) * inside)
    return torch.stack(out)


@pytest.mark.parametrize("level", LEVELS)
def test_pyramid_and_rpn_equal_matterports(
    model: nn.Module, features: State, golden: Any, level: str
) -> None:
    """Their objectness is two logits per anchor, their deltas begin with y."""
    step, rows = LEVELS[level], ROWS[level]
    close(features[level][0, ::8, ::step, ::step], golden[level])
    with torch.no_grad():
        (objectness,), (deltas,) = model.proposal_generator.rpn_head([features[level]])
    objectness = objectness[0].permute(1, 2, 0).flatten()[::rows]
    background, foreground = golden[f"rpn_logits_{level}"].T
    close(objectness, foreground - background)
    close(objectness.sigmoid(), golden[f"rpn_fg_prob_{level}"])
    deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)[::rows]
    close(deltas[:, [1, 0, 3, 2]], golden[f"rpn_bbox_{level}"])


def test_anchors_equal_matterports(model: nn.Module, features: State, golden: Any) -> None:
    """Stored are the first six of each level, as y1, x1, y2, x2 in pixels."""
    anchors = model.proposal_generator.anchor_generator([features[level] for level in LEVELS])
    first = torch.cat([boxes.tensor[:6] for boxes in anchors])
    close(first[:, [1, 0, 3, 2]], golden["anchors_first_cells"], 1e-4)


def test_pooled_features_equal_matterports(pooled: dict[int, torch.Tensor], golden: Any) -> None:
    close(pooled[7][:, ::16], golden["pooled7"])
    close(pooled[14][:, ::32], golden["pooled14"])


def test_the_box_head_equals_matterports(
    model: nn.Module, pooled: dict[int, torch.Tensor], golden: Any
) -> None:
    heads = model.roi_heads
    with torch.no_grad():
        logits, deltas = heads.box_predictor(heads.box_head(pooled[7]))
    close(logits.roll(1, dims=1), golden["class_logits"])
    close(logits.softmax(1).roll(1, dims=1), golden["class_probs"])
    close(deltas.unflatten(1, (-1, 4))[..., [1, 0, 3, 2]], golden["bbox_deltas"][:, 1:])


def test_the_mask_head_equals_matterports(
    model: nn.Module, pooled: dict[int, torch.Tensor], golden: Any
) -> None:
    """Stored are their classes 0, 5, ..., 80; class 0 is the background."""
    with torch.no_grad():
        masks = model.roi_heads.mask_head.layers(pooled[14][: len(golden["mask_probs"])]).sigmoid()
    close(masks[:, 4::5], golden["mask_probs"][:, 1:])


def test_the_regression_weights_are_matterports(model: nn.Module) -> None:
    """It multiplies deltas by 0.1, 0.1, 0.2, 0.2 in the RPN as well."""
    assert tuple(model.proposal_generator.box2box_transform.weights) == (10, 10, 5, 5)
    assert tuple(model.roi_heads.box_predictor.box2box_transform.weights) == (10, 10, 5, 5)


@pytest.mark.parametrize(("size", "before"), [(8, 0), (7, 1), (9, 1)])
def test_the_stem_pools_as_tensorflow_does(size: int, before: int) -> None:
    """ "same" pads an even size behind only, an odd one on both sides, with minus infinity."""
    stem = SamePaddingStem(in_channels=3, out_channels=4, norm="")
    image = torch.randn(2, 3, 2 * size, 2 * size)
    with torch.no_grad():
        padded = F.pad(stem.conv1(image).relu(), (before, 1, before, 1), value=-torch.inf)
        assert torch.equal(stem(image), F.max_pool2d(padded, 3, 2))


@pytest.mark.parametrize("freeze_at", [0, 1])
def test_the_stem_is_frozen_as_the_configuration_says(freeze_at: int) -> None:
    overrides = ["MODEL.BACKBONE.NAME", "build_matterport_resnet_fpn_backbone"]
    overrides += ["MODEL.BACKBONE.FREEZE_AT", str(freeze_at)]
    stem = build_backbone(
        instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", overrides)
    ).bottom_up.stem
    assert isinstance(stem, SamePaddingStem)
    assert stem.conv1.weight.requires_grad == (freeze_at == 0)
    assert isinstance(stem.conv1.norm, FrozenBatchNorm2d) == (freeze_at == 1)


Shapes = dict[str, tuple[int, ...]]


def everything() -> Shapes:
    return {entry["dataset"]: tuple(entry["h5_shape"]) for entry in ENTRIES}


def only(*layers: str) -> Shapes:
    return {name: shape for name, shape in everything().items() if name.split("/")[-2] in layers}


@pytest.fixture
def released(tmp_path: Path) -> Callable[[Shapes], str]:
    """Writes a file of zeros, which take no space on the disk."""

    def write(shapes: Shapes) -> str:
        with h5py.File(tmp_path / "released.h5", "w") as file:
            for name, shape in shapes.items():
                file.create_dataset(name, shape, "f4")
        return str(tmp_path / "released.h5")

    return write


PARTIAL = Options(allow_partial=True)


def test_the_report_accounts_for_every_tensor_of_the_file(printed: str) -> None:
    lines = [line.split() for line in printed.splitlines() if line.startswith("mapped ")]
    sources = {word for line in lines for word in line[1:-2]} - {"+"}
    assert sources == everything().keys()
    assert len(lines) == 562
    assert "562 tensors mapped, 0 ignored, 0 left out, 0 missing" in printed
    assert f"\nfits {CONFIG}\n" in printed


def test_a_backbone_alone_is_refused_unless_a_part_is_asked_for(
    released: Callable[[Shapes], str],
) -> None:
    path = released(only("conv1", "bn_conv1"))
    with pytest.raises(CheckpointError, match=r"holds 5 of the 562 .*lateral2.*--allow-partial"):
        matterport.convert(path, Options())
    state, report = matterport.convert(path, PARTIAL)
    assert len(state) == 5
    assert len(report.missing) == 562 - 5


def test_a_shallower_backbone_is_recognised_by_its_last_block(
    released: Callable[[Shapes], str],
) -> None:
    stage = [f"{kind}4{block}_branch2{part}" for kind in ("res", "bn") for block in "abcdef"
             for part in "abc"]  # fmt: skip
    _, report = matterport.convert(released(only(*stage)), PARTIAL)
    assert report.overrides == ("MODEL.RESNETS.DEPTH", 50)


def test_the_biases_of_the_backbone_move_into_the_running_means(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, shape in only("conv1", "bn_conv1").items():
            file[name] = np.ones(shape, np.float32)
        file["bn_conv1/bn_conv1/moving_mean:0"][...] = 5
        file["conv1/conv1/bias:0"][...] = 2
    state, _ = matterport.convert(str(tmp_path / "a.h5"), PARTIAL)
    assert (state["backbone.bottom_up.stem.conv1.norm.running_mean"] == 3).all()
    variance = state["backbone.bottom_up.stem.conv1.norm.running_var"]
    torch.testing.assert_close(variance, torch.full((64,), 1 + 1e-3 - 1e-5))


def test_a_convolution_without_bias_counts_as_one_with_zeros(
    released: Callable[[Shapes], str],
) -> None:
    shapes = only("fpn_p2")
    del shapes["fpn_p2/fpn_p2/bias:0"]
    state, report = matterport.convert(released(shapes), PARTIAL)
    assert not state["backbone.fpn_output2.bias"].any()
    assert report.mapped["backbone.fpn_output2.bias"] == ()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model_weights/{name}",
        lambda name: name.removesuffix(":0"),
        lambda name: name.replace("kernel:0", "fpn_p2_W_1:0").replace("bias:0", "fpn_p2_b_1:0"),
    ],
    ids=["an outer group", "no :0", "names of old Keras"],
)
def test_other_ways_of_keras_to_name_tensors_are_understood(
    released: Callable[[Shapes], str], rename: Callable[[str], str]
) -> None:
    shapes = {rename(name): shape for name, shape in only("fpn_p2").items()}
    state, _ = matterport.convert(released(shapes), PARTIAL)
    assert sorted(state) == ["backbone.fpn_output2.bias", "backbone.fpn_output2.weight"]


def test_the_state_of_the_optimizer_is_ignored_whatever_it_holds(
    released: Callable[[Shapes], str],
) -> None:
    path = released(only("fpn_p2"))
    with h5py.File(path, "a") as file:
        file["optimizer_weights/SGD/iterations:0"] = np.int64(3)
        file.create_group("input_image")
    _, report = matterport.convert(path, PARTIAL)
    assert report.ignored == {"optimizer_weights/SGD/iterations:0": "state of the optimizer"}


def test_class_layers_are_left_out_on_request_and_reported(
    released: Callable[[Shapes], str],
) -> None:
    path = released(only("mrcnn_mask", "mrcnn_mask_deconv"))
    state, report = matterport.convert(path, Options(leave_out_classes=True, allow_partial=True))
    assert sorted(state) == ["roi_heads.mask_head.deconv.bias", "roi_heads.mask_head.deconv.weight"]
    assert report.left_out["roi_heads.mask_head.predictor.bias"] == (
        "mrcnn_mask/mrcnn_mask/bias:0",
    )


def test_a_file_for_other_classes_says_which_key_to_set(released: Callable[[Shapes], str]) -> None:
    name = "mrcnn_class_logits/mrcnn_class_logits"
    path = released({f"{name}/kernel:0": (1024, 3), f"{name}/bias:0": (3,)})
    _, report = matterport.convert(path, PARTIAL)
    assert report.overrides == ("MODEL.ROI_HEADS.NUM_CLASSES", 2)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("block6/block6/kernel:0", (1, 1, 4, 4), "1 of its 3 tensors .* block6/block6/kernel:0"),
        ("fpn_p2/fpn_p2/gamma:0", (256,), "1 of its 3 tensors .* fpn_p2/fpn_p2/gamma:0"),
        ("fpn_p2/fpn_p2/kernel:0", (3, 3, 256, 9), r"\(9, 256, 3, 3\).* needs \(256, 256, 3, 3\)"),
        ("fpn_p2/fpn_p2/kernel:0", (256,), "expected 2 or 4 axes"),
        ("fpn_p2/fpn_p2/bias:0", (255,), r"has shape \(255,\); expected shape \(256,\)"),
        ("copy/fpn_p2/kernel:0", (3, 3, 256, 256), "are the same tensor of a layer"),
        ("rpn_model/rpn_class_raw/kernel:0", (1, 1, 512, 5), r"needs \(3, 512, 1, 1\)"),
        ("rpn_model/rpn_bbox_pred/kernel:0", (1, 1, 512, 10), r"needs \(12, 512, 1, 1\)"),
        ("conv1/conv1/kernel:0", (7, 7, 3, 64), "layer bn_conv1 is incomplete, .* moving_mean"),
        ("fpn_p2/fpn_p2/weights:0", (2**40,), "bytes of tensors; expected at most"),
        ("mrcnn_class_logits/mrcnn_class_logits/kernel:0", (), "the classifier has 1 outputs"),
        ("a/b/c/d/e/f/g/h/kernel:0", (1,), "neither a layer nor a tensor"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    released: Callable[[Shapes], str], name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        matterport.convert(released({**only("fpn_p2"), name: shape}), PARTIAL)


def external_link(file: h5py.File, secret: Path) -> None:
    file["fpn_p2/fpn_p2/bias:0"] = h5py.ExternalLink(str(secret), "secret")


def soft_link(file: h5py.File, secret: Path) -> None:
    file["fpn_p2/fpn_p2/bias:0"] = h5py.SoftLink("/fpn_p2/fpn_p2/kernel:0")


def hard_link(file: h5py.File, secret: Path) -> None:
    file["fpn_p2/fpn_p2/fpn_p2"] = file["fpn_p2"]


def external_storage(file: h5py.File, secret: Path) -> None:
    file.create_dataset("fpn_p2/fpn_p2/bias:0", (8,), "f4", external=[(str(secret), 0, 32)])


def virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((8,), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "secret", shape=(8,))
    file.create_virtual_dataset("fpn_p2/fpn_p2/bias:0", layout)


def plugin(file: h5py.File, secret: Path) -> None:
    """Optional, or HDF5 would look for the plugin when the data set is made."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((8,))
    settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    parts = h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((8,)), settings
    h5py.h5d.create(file["fpn_p2/fpn_p2"].id, b"bias:0", *parts)


def python_objects(file: h5py.File, secret: Path) -> None:
    file.create_dataset("fpn_p2/fpn_p2/bias:0", data=["a"], dtype=h5py.string_dtype())


def references(file: h5py.File, secret: Path) -> None:
    file.create_dataset("fpn_p2/fpn_p2/bias:0", data=file.ref, dtype=h5py.ref_dtype)


def integers(file: h5py.File, secret: Path) -> None:
    file["fpn_p2/fpn_p2/bias:0"] = np.ones(256, np.int32)


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        (external_link, "has a link in place of fpn_p2/fpn_p2/bias:0"),
        (soft_link, "has a link in place of fpn_p2/fpn_p2/bias:0"),
        (hard_link, "under another name"),
        (external_storage, "keeps the data of .* in another file"),
        (virtual, "keeps the data of .* in another file"),
        (plugin, r"needs the HDF5 plugins \[32015\] for fpn_p2/fpn_p2/bias:0"),
        (python_objects, "of type object; expected numbers"),
        (references, "of type object; expected numbers"),
        (integers, "of type int32; expected numbers"),
    ],
)
def test_a_file_that_is_more_than_numbers_is_refused(
    released: Callable[[Shapes], str], tmp_path: Path, trick: Callable[..., None], message: str
) -> None:
    path = released({"fpn_p2/fpn_p2/kernel:0": (3, 3, 256, 256)})
    with h5py.File(tmp_path / "secret.h5", "w") as secret:
        secret["secret"] = np.ones(8, np.float32)
    with h5py.File(path, "a") as file:
        trick(file, tmp_path / "secret.h5")
    with pytest.raises(CheckpointError, match=message):
        matterport.convert(path, PARTIAL)


@pytest.mark.parametrize("kept", [0, 100, 3000, -1])
def test_a_truncated_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name, shape in only("fpn_p2").items():
            file[name] = np.ones(shape, np.float32)
    path.write_bytes(path.read_bytes()[:kept])
    status = main(["convert", "matterport", "--allow-partial", str(path), str(tmp_path / "b")])
    error = capsys.readouterr().err
    assert status == 2
    assert "damaged or truncated" in error and error.count("\n") == 1
    assert not (tmp_path / "b.safetensors").exists()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, shape in only("fpn_p2").items():
            file[name] = np.full(shape, np.nan, np.float32)
    with pytest.raises(CheckpointError, match=r"not finite for backbone\.fpn_output2\.weight"):
        matterport.convert(str(tmp_path / "a.h5"), PARTIAL)


def test_without_h5py_the_command_names_what_to_install(
    released: Callable[[Shapes], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = released(only("fpn_p2"))
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "h5py":
            raise ModuleNotFoundError("No module named 'h5py'", name="h5py")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    status = main(["convert", "matterport", path, str(tmp_path / "b")])
    assert status == 2
    assert "type: pip install h5py" in capsys.readouterr().err
