"""Weights for inference fit a model completely, or one line names what does not fit and why."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import instseg
import train_net
from instseg import Predictor, VideoPredictor, cli
from instseg.checkpoint import Checkpointer, Fit
from instseg.config.classes import class_count
from instseg.errors import CheckpointError
from instseg.modeling.contract import unused_in_inference
from instseg.testing import PHOTO, SMALL
from tests.inference.test_predictor import tiny_cfg
from tests.support.yolact_tiny import tiny_cfg as yolact_cfg
from tests.test_systems import SYSTEMS, build

State = dict[str, Tensor]


class ReadTensors(TorchDispatchMode):
    """Notes which memory operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.addresses.add(value.untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_declares_exactly_the_tensors_that_inference_does_not_read(name: str) -> None:
    predictor = build(name)
    with ReadTensors() as read:
        frames = VideoPredictor(predictor)
        frames(PHOTO)
        frames(PHOTO)
    state = predictor.model.state_dict()
    unread = {k for k, v in state.items() if v.untyped_storage().data_ptr() not in read.addresses}
    counters = {k for k in state if k.endswith("num_batches_tracked")}
    assert set(unused_in_inference(predictor.model)) == unread - counters


def state_of(cfg: CfgNode) -> State:
    return build_model(cfg).state_dict()


def without(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if not k.startswith(prefixes)}


def refused(cfg: CfgNode, state: State, folder: Path) -> str:
    """The one line by which a predictor refuses the weights."""
    torch.save({"model": state}, folder / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        Predictor(cfg, folder / "w.pth")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder / "w.pth"))
    assert "--allow-partial" in str(caught.value)
    return str(caught.value)


CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_head.predictor.")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (without("roi_heads.mask_head.predictor.bias"), ["missing in the file: roi_heads.mask_he"]),
        (
            without(*CLASS_LAYERS),
            [
                "missing in the file: roi_heads.box_predictor, roi_heads.mask_head.predictor (6 t",
                "most likely weights to start a training from",
            ],
        ),
        (
            without("proposal_generator", "roi_heads", "backbone.fpn"),
            ["in the file: roi_heads, proposal_generator, backbone.fpn_l", "train with them first"],
        ),
        (
            lambda state: {**state, "neck.weight": torch.ones(2), "neck.bias": torch.ones(2)},
            ["unknown to the model: neck (2 tensors)", "weights of another model"],
        ),
        (
            lambda state: {
                **state,
                **{f"ema.{name}": value for name, value in state.items() if "roi_heads" in name},
            },
            ["unknown to the model: ema (", "allow_partial=True), which ignores unknown tensors"],
        ),
        (
            lambda state: {**state, "backbone.bottom_up.res4.6.conv1.weight": torch.ones(2)},
            [
                "unknown to the model: backbone.bottom_up.res4.6.conv1.weight (1 tensor)",
                "another depth (backbone.bottom_up.res4 has 7 blocks in the file, 6 here)",
                "--config-file",
            ],
        ),
        (
            without("backbone.bottom_up.res5.2"),
            [
                "missing in the file: backbone.bottom_up.res5.2 (",
                "another depth (backbone.bottom_up.res5 has 2 blocks in the file, 3 here)",
            ],
        ),
        (
            lambda state: {**state, "proposal_generator.rpn_head.conv.bias": torch.ones(1, 3)},
            ["other shape: proposal_generator.rpn_head.conv.bias (1, 3) in the file, (32,) here"],
        ),
        (lambda state: {"w": torch.ones(2)}, ["0 of", "unknown to the model: w (1 tensor)"]),
    ],
)
def test_weights_that_do_not_fit_completely_are_refused_for_inference_with_the_likely_cause(
    change: Callable[[State], State], messages: list[str], tmp_path: Path
) -> None:
    error = refused(tiny_cfg(), change(state_of(tiny_cfg())), tmp_path)
    for message in messages:
        assert message in error


@pytest.mark.parametrize(
    "name", [n for n in SYSTEMS if not n.startswith(("deepmask", "sharpmask", "instance"))]
)
def test_the_number_of_classes_in_the_file_is_told_with_the_key_to_set(name: str) -> None:
    cfg = instseg.load_cfg(name, [*SMALL, *SYSTEMS[name]])
    classes = class_count(cfg)
    assert classes is not None
    other = instseg.load_cfg(name, [*SMALL, *SYSTEMS[name], classes.key, 7])
    fit = Fit.measure(build_model(cfg), state_of(other), False, inference=True, classes=classes)
    assert fit.remedy == (
        f"the file is for 7 classes, {classes.key} is {classes.count}: set {classes.key} 7"
    )


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (80, 1), (1, 80), (20, 80)])
def test_numbers_of_classes_that_divide_each_other_are_told_apart(
    counts: tuple[int, int], tmp_path: Path
) -> None:
    ours, theirs = (tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", count) for count in counts)
    message = f"the file is for {counts[1]} classes, MODEL.ROI_HEADS.NUM_CLASSES is {counts[0]}"
    assert message in refused(ours, state_of(theirs), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        without("semantic."),
        lambda state: {**state, "semantic.weight": torch.ones(9, 16, 1, 1)},
        lambda state: {**state, "priors": torch.ones(4, 4), "pixel_mean": torch.ones(3, 1, 1)},
        lambda state: {k: v for k, v in state.items() if "num_batches_tracked" not in k},
        lambda state: {**state, "fpn.lateral3.num_batches_tracked": torch.tensor(1)},
        lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    ],
    ids=["no semantic layer", "another", "old buffers", "no counters", "more counters", "half"],
)
def test_what_only_training_uses_may_be_missing_or_different(
    change: Callable[[State], State], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(change(state_of(yolact_cfg("yolact"))), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "instseg"):
        Predictor(yolact_cfg("yolact"), tmp_path / "w.pth")
    assert "(100%), 0 missing, 0 unexpected, 0 of another shape" in caplog.text


def test_allow_partial_predicts_and_says_what_stays_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(without(*CLASS_LAYERS)(state_of(tiny_cfg())), tmp_path / "w.pth")
    Predictor(tiny_cfg(), tmp_path / "w.pth", allow_partial=True)(PHOTO)
    assert "roi_heads.mask_head.predictor (6 tensors); missing tensors stay random" in caplog.text


def test_fine_tuning_takes_a_backbone_and_says_which_parts_start_from_scratch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(tiny_cfg())
    backbone = without("proposal_generator", "roi_heads")(model.state_dict())
    torch.save(backbone, tmp_path / "w.pth")
    Checkpointer(model).load(str(tmp_path / "w.pth"))
    assert "missing in the file: roi_heads, proposal_generator (18 tensors)" in caplog.text
    assert "; missing tensors start from scratch" in caplog.text
    assert len(caplog.text) < 1000


def test_fine_tuning_on_other_classes_says_which_layers_start_from_scratch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state_of(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 7)), tmp_path / "w.pth")
    Checkpointer(build_model(tiny_cfg())).load(str(tmp_path / "w.pth"))
    assert "; roi_heads.box_predictor, roi_heads.mask_head.predictor (6 tensors) start from" in (
        caplog.text
    )


def test_a_layer_that_the_model_declares_unused_is_so_below_any_parent() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.extra = nn.Linear(1, 1), nn.Linear(1, 1)

        def unused_in_inference(self) -> tuple[str, ...]:
            return ("extra",)

    model = nn.ModuleDict({"head": Head(), "extra": nn.Linear(1, 1)})
    assert unused_in_inference(model) == ["head.extra.weight", "head.extra.bias"]


@pytest.fixture
def files(tmp_path: Path) -> SimpleNamespace:
    """Configurations and weights of which something is missing, and an image's name."""
    for name, cfg in (("yolact", yolact_cfg("yolact")), ("rcnn", tiny_cfg())):
        (tmp_path / f"{name}.yaml").write_text(cfg.dump())
        state = state_of(cfg)
        state.pop(next(iter(state)))
        torch.save({"model": state}, tmp_path / f"{name}.pth")
    return SimpleNamespace(
        yolact=["--config-file", str(tmp_path / "yolact.yaml")],
        weights=str(tmp_path / "yolact.pth"),
        output=str(tmp_path / "out"),
    )


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "--input", "docs/coins.png", "--output", "OUT", "--weights", "W"],
        ["export", "--format", "onnx", "--output", "OUT.onnx", "--weights", "W"],
        ["benchmark", "models", "--repeats", "1", "--", "MODEL.WEIGHTS", "W"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_refuses_weights_that_do_not_fit_in_one_line(
    command: list[str], files: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"W": files.weights, "OUT": files.output, "OUT.onnx": f"{files.output}.onnx"}
    words = [named.get(word, word) for word in command]
    at = words.index("--") if "--" in words else len(words)
    assert cli.main([*words[:at], *files.yolact, *words[at:]]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "1 missing" in error and error.endswith("which leaves the rest random")


def test_nothing_is_exported_without_weights_unless_that_is_asked_for(
    files: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", *files.yolact, "--format", "onnx", "--output", f"{files.output}.onnx"]
    assert cli.main(command) == 2
    assert "error: no weights to export" in capsys.readouterr().err


def test_evaluation_alone_refuses_weights_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_cfg("DATASETS.TEST", ("shapes_val",), "OUTPUT_DIR", str(tmp_path))
    torch.save(without(*CLASS_LAYERS)(state_of(cfg)), tmp_path / "w.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    monkeypatch.setattr(train_net, "setup", lambda _: cfg)
    monkeypatch.setattr(train_net.Trainer, "test", lambda *_: None)
    arguments = SimpleNamespace(eval_only=True, resume=False, allow_partial=False)
    with pytest.raises(CheckpointError, match=r"missing in the file: roi_heads\.box_predictor"):
        train_net.run(arguments)
    arguments.allow_partial = True
    train_net.run(arguments)


def test_evaluation_of_the_last_checkpoint_refuses_one_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_cfg("DATASETS.TEST", ("shapes_val",), "OUTPUT_DIR", str(tmp_path))
    state = without(*CLASS_LAYERS)(state_of(cfg))
    torch.save({"model": state, "iteration": 3}, tmp_path / "model_final.pth")
    monkeypatch.setattr(train_net, "setup", lambda _: cfg)
    arguments = SimpleNamespace(eval_only=True, resume=True, allow_partial=False)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*roi_heads\.box_predictor"):
        train_net.run(arguments)
