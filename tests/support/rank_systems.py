"""One of two processes that train each system on a picture with an object and one without.

python -m tests.support.rank_systems RANK PORT FOLDER CONFIG...
"""

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel

import instseg
from instseg.training.loop import TrainLoop
from tests.config.test_configs import train_batches

# As small as the systems of one stage allow.
SMALL = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.SQUARE_SIZE", 160]


def records(folder: Path) -> list[dict[str, Any]]:
    """A picture with a square, and one with nothing."""
    picture = Image.new("RGB", (96, 96))
    path = folder / f"{comm.get_rank()}.png"
    ImageDraw.Draw(picture).rectangle((24, 24, 71, 71), fill=(255, 200, 0))
    picture.save(path)
    square = {
        "bbox": [24, 24, 72, 72],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "segmentation": [[24, 24, 72, 24, 72, 72, 24, 72]],
    }
    common = {"file_name": str(path), "height": 96, "width": 96, "image_id": 0}
    return [{**common, "annotations": [square]}, {**common, "annotations": []}]


def train(config: str, folder: Path) -> str:
    """Train two steps, each with an object on one rank only; the sum of all weights afterwards."""
    torch.manual_seed(0)
    cfg = instseg.load_cfg(config, SMALL)
    model = DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
    batches = list(train_batches(cfg, records(folder)))
    rank = comm.get_rank()
    mine = batches[rank:] + batches[:rank]
    parameters = [p for p in model.parameters() if p.requires_grad]
    loop = TrainLoop(model, mine, torch.optim.SGD(parameters, lr=1e-4))
    with EventStorage(0):
        for loop.iter in range(2):
            loop.run_step()
    return str(sum(p.detach().double().sum() for p in parameters).item())


if __name__ == "__main__":
    rank, port, folder, *configs = sys.argv[1:]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
    comm.create_local_process_group(2)
    for config in configs:
        try:
            outcome = train(config, Path(folder))
        except Exception:
            outcome = "failed"
            traceback.print_exc()
        print(config, outcome, flush=True)
    dist.destroy_process_group()
