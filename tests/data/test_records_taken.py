"""Records of functions registered with Detectron2 in every form that can be understood."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn
from torch.utils.data import Dataset

from instseg.check_data import check_data
from instseg.data.dataset import load, load_all
from instseg.evaluation import build_evaluator, check_evaluation
from instseg.training.trainer import Trainer
from tests.support.coco_data import HEIGHT, SQUARE, WIDTH
from tests.support.records import MASK, RLE, Change, Records, changing, config, each, image


class _Map(Dataset[Any]):
    """Without an end that ``iter`` would find."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index % len(self.records)]


BOX = [5.0, 5.0, 15.0, 15.0]
PARTS = [5 / WIDTH, 5 / HEIGHT, 10 / WIDTH, 10 / HEIGHT]
TAKEN: dict[str, Change] = {
    "as Detectron2 wants it": lambda r: None,
    "a tuple": tuple,
    "a generator": lambda r: (record for record in r),
    "a data set of torch": _Map,
    "paths": image(file_name=Path),
    "text of NumPy": image(file_name=np.str_),
    "no size": image(height=KeyError, width=KeyError),
    "a size of NumPy": image(height=np.int64, width=np.float32),
    "a size as text": image(height=str, width=str),
    "no ids": image(image_id=KeyError),
    "ids of NumPy": image(image_id=np.int32),
    "ids as text": image(image_id=str),
    "annotations in a tuple": image(annotations=tuple),
    "no annotations in one": lambda r: r[1].pop("annotations") and None,
    "None for annotations in one": lambda r: r[1].update(annotations=None),
    "a box of NumPy": each(bbox=np.array(BOX, np.float32)),
    "a box of numbers of NumPy": each(bbox=[np.float32(value) for value in BOX]),
    "a box in a tuple": each(bbox=tuple(BOX)),
    "a box of torch": each(bbox=torch.tensor(BOX)),
    "a box of int": each(bbox=[5, 5, 15, 15]),
    "x, y, width, height": each(bbox=[5, 5, 10, 10], bbox_mode=BoxMode.XYWH_ABS),
    "a mode as a number": each(bbox=[5, 5, 10, 10], bbox_mode=1),
    "parts of the image": each(bbox=PARTS, bbox_mode=BoxMode.XYWH_REL),
    "corners as parts": each(
        bbox=[5 / WIDTH, 5 / HEIGHT, 15 / WIDTH, 15 / HEIGHT], bbox_mode=BoxMode.XYXY_REL
    ),
    "a rotated box": each(bbox=[10, 10, 10, 10, 90], bbox_mode=BoxMode.XYWHA_ABS),
    "no box": each(bbox=KeyError),
    "no box and no mode": each(bbox=KeyError, bbox_mode=KeyError),
    "no box beside an array": each(bbox=KeyError, segmentation=MASK),
    "a mask of bool": each(segmentation=MASK),
    "a mask of uint8": each(segmentation=MASK.astype(np.uint8) * 255),
    "a mask of int64": each(segmentation=MASK.astype(np.int64)),
    "a mask of 0.0 and 1.0": each(segmentation=MASK.astype(np.float32)),
    "a mask with a channel": each(segmentation=MASK[:, :, None]),
    "a mask of torch": each(segmentation=torch.as_tensor(MASK)),
    "an RLE": each(segmentation=RLE),
    "an RLE as text": each(segmentation={**RLE, "counts": RLE["counts"].decode()}),
    "an RLE without compression": each(
        segmentation={"size": [HEIGHT, WIDTH], "counts": [155, *[10, 20] * 9, 10, 1200 - 435]}
    ),
    "an RLE of NumPy": each(
        segmentation={
            "size": np.array([HEIGHT, WIDTH]),
            "counts": np.array([155, *[10, 20] * 9, 10, 1200 - 435]),
        }
    ),
    "an RLE with a tuple": each(segmentation={**RLE, "size": (HEIGHT, WIDTH)}),
    "polygons of NumPy": each(segmentation=[np.array(SQUARE, np.float32)]),
    "points of NumPy": each(segmentation=[np.array(SQUARE).reshape(4, 2)]),
    "an array of polygons": each(segmentation=np.array([SQUARE])),
    "an array of points": each(segmentation=np.array(SQUARE).reshape(4, 2)),
    "polygons in tuples": each(segmentation=(tuple(SQUARE),)),
    "pairs": each(segmentation=[[(5, 5), (15, 5), (15, 15), (5, 15)]]),
    "one outline": each(segmentation=SQUARE),
    "a class of NumPy": each(category_id=np.int64(0)),
    "a class 0.0": each(category_id=0.0),
    "no crowd": each(iscrowd=KeyError),
    "a crowd of bool": each(iscrowd=False),
    "a crowd of NumPy": each(iscrowd=np.bool_(False)),
    "None for a crowd": each(iscrowd=None),
    "an image without instances": lambda r: r[1].update(annotations=[]),
}


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN)
def test_what_can_be_understood_trains_and_evaluates(
    tmp_path: Path, registered: Callable[..., str], change: Change
) -> None:
    name = registered(changing(tmp_path, change))
    cfg = config(tmp_path, "INPUT.MASK_FORMAT", "bitmask", test=True)
    for sample in next(iter(Trainer.build_train_loader(cfg))):
        assert len(sample["instances"]) == 1
        assert bool(torch.isfinite(sample["instances"].gt_boxes.tensor).all())
    check_evaluation(cfg, nn.Identity(), load_all(cfg.DATASETS.TEST))
    evaluator = build_evaluator(cfg, load(name))
    evaluator.reset()
    masks = torch.as_tensor(MASK)[None]
    instances = Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.tensor([BOX])),
        scores=torch.ones(1),
        pred_classes=torch.zeros(1, dtype=torch.int64),
        pred_masks=masks,
    )
    annotated = [record for record in DatasetCatalog.get(name) if record["annotations"]]
    for record in annotated:
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)
    assert [checked.report.ids for checked in check_data([name])] == [{}]


@pytest.mark.parametrize("metric", ["contest", "voc", "proposals"])
def test_every_evaluator_reads_the_checked_records(
    tmp_path: Path, registered: Callable[..., str], metric: str
) -> None:
    odd = each(segmentation=MASK, bbox=KeyError, category_id=np.int64(0))
    name = registered(changing(tmp_path, lambda r: [image(image_id=KeyError)(r), odd(r)] and None))
    cfg = config(tmp_path, "INPUT.MASK_FORMAT", "bitmask", "TEST.METRICS", (metric,), test=True)
    evaluator = build_evaluator(cfg, load(name))
    evaluator.reset()
    instances = Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.tensor([BOX])),
        scores=torch.ones(1),
        pred_classes=torch.zeros(1, dtype=torch.int64),
        pred_masks=torch.as_tensor(MASK)[None],
    )
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results is not None and results
