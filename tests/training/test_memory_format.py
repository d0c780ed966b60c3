"""Feature maps are stored channels last where that is faster, and nothing else changes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import instseg
from instseg.checkpoint import Checkpointer, read_weights
from instseg.projects import Project, projects
from instseg.testing import SMALL_TRAINING, example_records, train_batches
from instseg.training.loop import TrainLoop
from instseg.training.memory_format import memory_format_on, set_memory_format
from instseg.training.trainer import Trainer

CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"
FORMATS = ["contiguous", "channels_last"]


def losses_and_gradient(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    with EventStorage(0):
        losses = torch.stack(list(model(batch).values()))
    losses.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return losses.detach(), torch.cat(gradients)


@pytest.mark.parametrize("project", projects(), ids=lambda project: project.name)
def test_a_system_computes_the_same_in_both_orders(project: Project, tmp_path: Path) -> None:
    """A wrong order gives unrelated gradients, which differ by 1.4 of their norm.

    Rounding differs too and selects other proposals here and there, which moved a gradient by up to
    12 %.
    """
    cfg = instseg.load_cfg(project.example, [*project.narrow, *SMALL_TRAINING])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    other = copy.deepcopy(model)
    set_memory_format(other, "channels_last")
    for batch in [*train_batches(cfg, example_records(tmp_path))][:2]:
        losses, gradient = losses_and_gradient(model, batch)
        other_losses, other_gradient = losses_and_gradient(other, batch)
        torch.testing.assert_close(other_losses, losses, rtol=0.1, atol=1e-3)
        assert (other_gradient - gradient).norm() <= 0.5 * gradient.norm()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 2, bias=False)
    )


class Fit(nn.Module):
    """Learns to give zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss_fit": self.network(batch).square().mean()}


def loop_of(memory_format: str, optimizer: str) -> TrainLoop:
    model = Fit()
    set_memory_format(model, memory_format)
    settings = {"momentum": 0.9} if optimizer == "SGD" else {"fused": True}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 6, 7, generator=generator) for _ in range(4)]
    kind = getattr(torch.optim, optimizer)
    return TrainLoop(model, batches, kind(model.parameters(), lr=0.01, **settings))


def train(loop: TrainLoop, first: int, last: int) -> None:
    for loop.iter in range(first, last):
        with EventStorage(loop.iter):
            loop.run_step()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize(("saved", "resumed"), [FORMATS, FORMATS[::-1], FORMATS[1:] * 2])
def test_a_training_goes_on_in_another_order(saved: str, resumed: str, optimizer: str) -> None:
    first, second = loop_of(saved, optimizer), loop_of(resumed, optimizer)
    train(first, 0, 2)
    weights = {name: value.contiguous() for name, value in first.model.state_dict().items()}
    second.model.load_state_dict(weights)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    next(second._data_loader_iter), next(second._data_loader_iter)
    for loop in (first, second):
        train(loop, 2, 4)
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == ours.grad.stride() or 1 in ours.shape


def test_a_checkpoint_does_not_show_the_order(tmp_path: Path) -> None:
    files = []
    for memory_format in FORMATS:
        model = network()
        model.append(model[0])  # shared weights
        set_memory_format(model, memory_format)
        Checkpointer(model, str(tmp_path)).save(memory_format)
        files.append(tmp_path / f"{memory_format}.pth")
        assert model[0].weight.is_contiguous() == (memory_format == "contiguous")
    first, second = (read_weights(str(file))["model"] for file in files)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert value.stride() == second[name].stride()
    assert second["0.weight"].data_ptr() == second["3.weight"].data_ptr()
    other = nn.Sequential(*network(), nn.Conv2d(3, 4, 3, bias=False))
    set_memory_format(other, "channels_last")
    Checkpointer(other).load(str(files[0]))
    assert torch.equal(other[0].weight, first["0.weight"])
    assert not other[0].weight.is_contiguous()


@pytest.mark.parametrize(
    ("capability", "chosen"), [("AVX512", "channels_last"), ("AVX2", "contiguous")]
)
def test_the_order_is_chosen_for_the_processor(
    capability: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert memory_format_on(torch.device("cpu"), "auto") == chosen
    assert memory_format_on(torch.device("cuda"), "auto") == "contiguous"
    assert memory_format_on(torch.device("cuda"), "channels_last") == "channels_last"


@pytest.mark.parametrize("choice", ["channels_last", "contiguous"])
def test_the_trainer_stores_weights_as_asked(choice: str, tmp_path: Path) -> None:
    words = ["SOLVER.MEMORY_FORMAT", choice, "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    words += ["DATASETS.TRAIN", ("shapes_val",)]
    trainer = Trainer(instseg.load_cfg(CONFIG, words))
    weight = trainer._trainer.model.backbone.bottom_up.stem.conv1.weight
    assert weight.is_contiguous() == (choice == "contiguous")
