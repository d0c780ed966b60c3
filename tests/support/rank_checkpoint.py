"""One of two processes that save a checkpoint and load it; see test_checkpoint.py.

torchrun --nproc-per-node=2 -m tests.support.rank_checkpoint FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from instseg.checkpoint import Checkpointer
from instseg.errors import CheckpointError

folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
# The second worker sees none of the files, as on a machine without a shared disk.
folder = folder if rank == 0 else folder + "/elsewhere"
torch.manual_seed(0)
model = DistributedDataParallel(nn.Linear(2, 2))
checkpointer = Checkpointer(model, folder)
model.module.weight.data.fill_(7)
checkpointer.save("m", iteration=4)
model.module.weight.data.zero_()
iteration = checkpointer.resume_or_load("", resume=True)["iteration"]
try:
    checkpointer.load(folder + "/missing.pth")
except CheckpointError as error:
    print(rank, iteration, model.module.weight.sum().item(), "does not exist" in str(error))
# Without a gradient to average, as in an evaluation.
plain = nn.Linear(2, 2)
Checkpointer(plain, folder, reads_once=True).resume_or_load("", resume=True)
print(rank, plain.weight.sum().item())
dist.destroy_process_group()
