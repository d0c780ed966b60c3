"""Under autocast every system trains, and computes its losses in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

import instseg
from instseg.projects import Project, projects
from instseg.testing import SMALL_TRAINING, example_records, train_batches
from instseg.training.trainer import Trainer

LOSS_PARTS = (
    *(
        "softmax",
        "aten.log",
        "aten.exp.",
        "cross_entropy",
        "nll",
        "smooth_l1",
        "mse",
        "huber",
        "div",
    ),
    *("linalg_vector_norm", "square", "pow", "mean", "sum."),
)
"""Parts of the names of operators that compute losses; some networks use ``sigmoid`` too."""
BESIDE_LOSSES = {
    ("deepmask", "aten.div_.Scalar"),  # dropout
    ("fcis", "aten.mean.dim"),  # the log
    ("yolact_plus", "aten.sum.dim_IntList"),  # the strengths of deformable convolutions
    ("yolact_edge", "aten.div.Tensor"),  # the flow, in cells
}
"""What a project computes otherwise by an operator of that name."""


class HalfPrecision(TorchDispatchMode):
    """Names of the operators that get a bfloat16 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("project", projects(), ids=lambda project: project.name)
def test_losses_are_computed_in_float32(project: Project, tmp_path: Path) -> None:
    cfg = instseg.load_cfg(project.example, [*project.narrow, *SMALL_TRAINING])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    batch, without_instances = [*train_batches(cfg, example_records(tmp_path))][:2]
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16), HalfPrecision() as half:
        losses = model(batch)
    sum(losses.values()).backward()
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())
    assert any("convolution" in name for name in half.names), half.names
    in_losses = {name for name in half.names if any(part in name for part in LOSS_PARTS)}
    assert in_losses <= {name for known, name in BESIDE_LOSSES if known == project.name}
    # Losses that have nothing to count may be zeros of any type.
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16):
        losses = model(without_instances)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(loss.dtype == torch.float32 for loss in losses.values() if loss != 0)


def test_it_is_off_unless_asked_for() -> None:
    """A CPU without units for bfloat16 is slower with it."""
    assert not instseg.get_cfg().SOLVER.AMP.ENABLED
