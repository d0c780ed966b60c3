"""Keras files in matterport/Mask_RCNN's layout: other ways to write them, and bad ones refused."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from instseg.cli import main
from instseg.convert import Options
from instseg.errors import CheckpointError
from instseg.projects.mask_rcnn import convert_matterport as matterport
from tests.conftest import GOLDEN

ENTRIES = json.loads((GOLDEN / "mask_rcnn" / "keys_matterport_resnet101.json").read_text())
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
