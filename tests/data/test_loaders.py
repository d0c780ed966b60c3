"""Loaders prepare whole batches ahead of a training."""

from itertools import islice
from typing import Any

import numpy as np
import pytest

import instseg
from instseg.data.build import register_datasets
from instseg.data.dataset import load_all
from instseg.data.loaders import build_train_loader


def loader_of(*overrides: Any) -> Any:
    words = ["DATASETS.TRAIN", ("shapes_val",), "DATASETS.SHAPES_SIZE", 32, *overrides]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)
    register_datasets(cfg)
    return build_train_loader(cfg, load_all(cfg.DATASETS.TRAIN))


@pytest.mark.parametrize(
    ("workers", "batch", "images"), [(1, 8, 16), (3, 8, 6), (4, 1, 2), (0, 8, None)]
)
def test_two_batches_are_prepared_ahead(workers: int, batch: int, images: int | None) -> None:
    words = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", batch)
    loader = loader_of(*words, "MODEL.DEVICE", "cpu").dataset  # of single images
    assert loader.prefetch_factor == images
    assert not loader.pin_memory
    assert loader_of(*words, "MODEL.DEVICE", "cuda").dataset.pin_memory


def test_torch_prepares_two_batches_where_workers_send_batches() -> None:
    loader = loader_of("DATALOADER.ASPECT_RATIO_GROUPING", False)
    assert (loader.batch_size, loader.prefetch_factor) == (8, 2)


def test_the_order_of_images_does_not_depend_on_the_processes_that_read_them() -> None:
    orders = []
    for workers in (0, 1):
        np.random.seed(0)
        batches = islice(loader_of("DATALOADER.NUM_WORKERS", workers), 3)
        orders.append([sample["file_name"] for batch in batches for sample in batch])
    assert orders[0] == orders[1]
