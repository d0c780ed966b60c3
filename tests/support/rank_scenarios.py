"""One of two processes that train together, scenario by scenario; see test_ranks.py.

torchrun --nproc-per-node=2 -m tests.support.rank_scenarios FOLDER
"""

import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instseg.checkpoint import Checkpointer
from instseg.errors import ImageError
from instseg.training.averaging import AveragedWeights
from instseg.training.interruption import Interruption
from instseg.training.loop import TrainLoop

Batch = list[dict[str, Any]]


class Line(nn.Module):
    """A model with the loss weight * x; a batch is [{"x", "file_name"}], or "raise" is raised."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if "raise" in batch[0]:
            raise batch[0]["raise"]
        return {"loss_fit": self.linear(torch.tensor([batch[0]["x"]])).sum()}


class Data:
    """Good batches without end, except that the third is another one or an exception."""

    def __init__(self, third: Any) -> None:
        self.third = third

    def __iter__(self) -> Any:
        for number in range(100):
            if number == 2 and isinstance(self.third, Exception):
                raise self.third
            yield self.third if number == 2 and self.third else [{"x": 1.0, "file_name": "ok.png"}]


class Loop(TrainLoop):
    """A loop that, if asked to, sends this process a signal in the third iteration."""

    number: signal.Signals | None = None

    def run_step(self) -> None:
        if self.iter == 2 and self.number is not None:
            os.kill(os.getpid(), self.number)
        super().run_step()


def train(third: Any = None, number: signal.Signals | None = None, folder: str = "") -> str:
    """How training ends if this rank gets ``third`` as its third batch, or a signal."""
    model = DistributedDataParallel(Line())
    loop = Loop(model, Data(third), torch.optim.SGD(model.parameters(), lr=0.1))
    loop.number = number
    loop.register_hooks([Interruption(Checkpointer(model, folder))])
    start = time.monotonic()
    try:
        loop.train(0, 6)
    except (Exception, SystemExit) as end:
        seconds = time.monotonic() - start
        return f"{type(end).__name__}: {end} [{'soon' if seconds < 10 else seconds}]"
    return "done"


def averages(third: Any = None) -> str:
    """The weight after six iterations, and its average, on this rank."""
    model = DistributedDataParallel(Line())
    average = AveragedWeights(model.module, 0.5)
    loop = TrainLoop(model, Data(third), torch.optim.SGD(model.parameters(), lr=0.1))
    loop.register_hooks([average])
    loop.train(0, 6)
    trained = model.module.linear.weight.item()
    with average.used():
        return f"{trained} {model.module.linear.weight.item()}"


def main(folder: str) -> None:
    """Print how each scenario ends, one line each."""
    dist.init_process_group("gloo")
    comm.create_local_process_group(2)
    is_second = dist.get_rank() == 1
    nan = [{"x": float("nan"), "file_name": "bad.png"}]
    broken = ImageError("cut.png: the file is truncated")
    scenarios: dict[str, dict[str, Any]] = {
        "nan": {"third": nan},
        "image": {"third": broken},
        "defect": {"third": [{"raise": KeyError("proposal_boxes")}]},
        "signal": {"number": signal.SIGTERM, "folder": folder},
    }
    for name, what in scenarios.items():
        outcome = train(**what) if is_second else train(folder=what.get("folder", ""))
        print(name, outcome, flush=True)
    third = [{"x": 7.0, "file_name": "ok.png"}] if is_second else None
    print("average", averages(third), flush=True)
    # Last, as nothing is left to go on with.
    if is_second:
        train(third=None, number=signal.SIGKILL)
    print("killed", train(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # the process group cannot be left in order once a process is gone
