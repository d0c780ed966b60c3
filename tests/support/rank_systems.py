"""One of two processes that train each system on an image with an instance and one without.

torchrun --nproc-per-node=2 -m tests.support.rank_systems FOLDER CONFIG...
"""

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

import instseg
from instseg.testing import SMALL_TRAINING, example_records, train_batches
from instseg.training.loop import TrainLoop


def train(config: str, folder: Path) -> str:
    """Train two steps with an instance on one rank only; return the sum of all weights."""
    torch.manual_seed(0)
    cfg = instseg.load_cfg(config, SMALL_TRAINING)
    rank = comm.get_rank()
    rank_folder = folder / str(rank)
    rank_folder.mkdir(exist_ok=True)
    model = DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
    batches = list(train_batches(cfg, example_records(rank_folder)))
    mine = batches[rank:] + batches[:rank]
    parameters = [p for p in model.parameters() if p.requires_grad]
    loop = TrainLoop(model, mine, torch.optim.SGD(parameters, lr=1e-4))
    with EventStorage(0):
        for loop.iter in range(2):
            loop.run_step()
    return str(sum(p.detach().double().sum() for p in parameters).item())


if __name__ == "__main__":
    folder, *configs = sys.argv[1:]
    dist.init_process_group("gloo")
    comm.create_local_process_group(2)
    for config in configs:
        try:
            outcome = train(config, Path(folder))
        except Exception:
            outcome = "failed"
            traceback.print_exc()
        print(config, outcome, flush=True)
    dist.destroy_process_group()
