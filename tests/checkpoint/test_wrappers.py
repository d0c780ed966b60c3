"""Weights are found inside the wrappers of any training code."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instseg import Predictor
from instseg.checkpoint import Checkpointer, read_weights
from instseg.convert import Options, convert_file
from instseg.errors import CheckpointError
from tests.checkpoint.test_checkpoint import net, same
from tests.inference.test_predictor import tiny_cfg

State = dict[str, Tensor]

ENTRIES: dict[str, Callable[[State], Any]] = {
    "Lightning": lambda s: {
        "state_dict": s,
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}]}],
    },
    "model_state_dict": lambda s: {
        "epoch": 1,
        "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    },
    "net": lambda s: {"net": s, "acc": 0.5},
    "network": lambda s: {"network": s},
    "a name and the weights": lambda s: {"model": "net50", "state_dict": s},
    "nested": lambda s: {"model": {"state_dict": s}, "epoch": 1},
    "beside a copy": lambda s: {"model_ema": {k: 0 * v for k, v in s.items()}, "model": s},
    "copy alone": lambda s: {"ema": s, "updates": 7},
    "of another name": lambda s: {"segmentor": s, "step": 7},
}
PREFIXES: dict[str, Callable[[str], str]] = {
    prefix: lambda name, prefix=prefix: f"{prefix}{name}"  # type: ignore[misc]
    for prefix in (
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "module.module.",
        "model.",
        "model.module.",
        "model._orig_mod.",
        "module.model.",
        "net.",
        "_forward_module.model.",
    )
} | {
    "inside": lambda name: name.replace("stem.", "stem._orig_mod."),
    "module inside": lambda name: name.replace("stem.", "stem.module."),
    "everywhere": lambda name: "model." + name.replace(".", "._orig_mod._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_loads_its_weights_from_any_entry(entry: str, tmp_path: Path) -> None:
    torch.save(ENTRIES[entry](net(seed=1).state_dict()), tmp_path / "w.pth")
    model = net()
    Checkpointer(model, inference=True).load(str(tmp_path / "w.pth"))
    assert same(model, net(seed=1))


@pytest.mark.parametrize("prefix", [*PREFIXES, "detector.", "model.detector."])
def test_a_model_loads_its_weights_under_any_prefix(prefix: str, tmp_path: Path) -> None:
    rename = PREFIXES.get(prefix, lambda name: f"{prefix}{name}")
    torch.save({rename(k): v for k, v in net(seed=1).state_dict().items()}, tmp_path / "w.pth")
    model = net()
    Checkpointer(model, inference=True).load(str(tmp_path / "w.pth"))
    assert same(model, net(seed=1))


def test_a_predictor_takes_a_lightning_checkpoint_and_says_what_it_renamed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = Predictor(tiny_cfg()).model.state_dict()
    wrapped = {f"model.{name}": value for name, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 1}, tmp_path / "w.ckpt")
    with caplog.at_level(logging.INFO, "instseg"):
        predictor = Predictor(tiny_cfg(), tmp_path / "w.ckpt")
    assert all(torch.equal(v, state[k]) for k, v in predictor.model.state_dict().items())
    assert "names lose the parts that a wrapper added: model.backbone." in caplog.text


def test_weights_of_an_averaged_model_lose_its_counter(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net(seed=1))
    torch.save(averaged.state_dict(), tmp_path / "w.pth")
    model = net()
    Checkpointer(model, inference=True).load(str(tmp_path / "w.pth"))
    assert same(model, net(seed=1))


@pytest.mark.parametrize("name", ["model", "module", "network", "_orig_mod"])
def test_a_model_whose_own_names_look_wrapped_keeps_them(name: str, tmp_path: Path) -> None:
    model, other = nn.Sequential(), nn.Sequential()
    for parent, seed in ((model, 0), (other, 1)):
        parent.add_module(name, net(seed=seed))
        parent.add_module("extra", nn.ModuleDict({name: nn.Linear(2, 2)}))
    torch.save({f"module.{k}": v for k, v in other.state_dict().items()}, tmp_path / "ddp.pth")
    torch.save(other.state_dict(), tmp_path / "plain.pth")
    for file in ("plain.pth", "ddp.pth"):
        model.load_state_dict({k: 0 * v for k, v in model.state_dict().items()})
        Checkpointer(model, inference=True).load(str(tmp_path / file))
        assert same(model, other)


def test_two_models_in_a_file_are_told_apart_by_what_fits(tmp_path: Path) -> None:
    state = {f"student.{k}": v for k, v in net(seed=1).state_dict().items()}
    state |= {f"criterion.{k}": v for k, v in nn.Linear(2, 2).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    model = net()
    Checkpointer(model).load(str(tmp_path / "w.pth"))
    assert same(model, net(seed=1))
    with pytest.raises(CheckpointError, match=r"unknown to the model: criterion \(2 tensors\)"):
        Checkpointer(model, inference=True).load(str(tmp_path / "w.pth"))


def test_names_that_would_become_the_same_stay_as_they_are(tmp_path: Path) -> None:
    state = {"stem.weight": torch.ones(2), "module.stem.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"unknown to the model: module\.stem\.weight"):
        Checkpointer(net(), inference=True).load(str(tmp_path / "w.pth"))


def test_versions_of_modules_are_renamed_with_them(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(net(seed=1)).state_dict(), tmp_path / "w.pth")
    checkpoint = Checkpointer(net())._read(str(tmp_path / "w.pth"))
    assert checkpoint["model"]._metadata["norm"] == {"version": 2}


def test_a_file_with_several_sets_of_weights_under_unknown_names_is_refused(tmp_path: Path) -> None:
    content = {name: net().state_dict() for name in ("generator", "discriminator")}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="keys: generator, discriminator"):
        read_weights(tmp_path / "w.pth")


# A tensor of each authors' format of PyTorch.
EXAMPLES = {
    "yolact": ("backbone.conv1.weight", (64, 3, 7, 7)),
    "yolact_edge": ("backbone.conv1.weight", (64, 3, 7, 7)),
    "maskscoring_rcnn": ("backbone.body.stem.conv1.weight", (64, 3, 7, 7)),
    "discriminative_loss": ("cnn.model.cnn.0.weight", (64, 3, 3, 3)),
}


@pytest.mark.parametrize("format_name", EXAMPLES)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.net._orig_mod."])
def test_every_converter_takes_wrapped_weights(
    format_name: str, prefix: str, tmp_path: Path
) -> None:
    name, shape = EXAMPLES[format_name]
    key_sets = []
    for file, old in (("plain.pth", name), ("wrapped.pth", f"{prefix}{name}")):
        torch.save({"net": {old: torch.ones(shape)}, "epoch": 3}, tmp_path / file)
        _, report = convert_file(
            format_name, str(tmp_path / file), tmp_path / "ours", Options(allow_partial=True)
        )
        key_sets.append(report.mapped.keys())
    assert key_sets[0] == key_sets[1] and len(key_sets[0])
