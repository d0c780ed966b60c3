"""Warping, and predictions that equal the annotations, for tests on videos."""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from torch.nn import functional as F


def warp(images: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """``images`` (B, C, H, W) sampled at pixel + ``flow`` (B, 2, H, W), which is in pixels."""
    height, width = flow.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([x, y]).float() + flow
    sides = torch.tensor([width - 1.0, height - 1.0])[:, None, None]
    grid = (2 * at / sides - 1).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def annotated_instances(record: dict[str, Any]) -> Instances:
    """The annotations as predictions of score 0.9."""
    annotations = record["annotations"]
    masks = [mask_util.decode(a["segmentation"]).astype(bool) for a in annotations]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    size = record["height"], record["width"]
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.full((len(annotations),), 0.9),
        pred_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        pred_masks=torch.from_numpy(np.array(masks).reshape(-1, *size)),
    )
