"""Load training samples that a project draws by its own rules, instead of whole images.

``INPUT.SAMPLES`` names a class of :data:`SAMPLES_REGISTRY`.  Its arguments are the configuration,
the annotated records of ``DATASETS.TRAIN`` and ``batch_size``, the samples per process and batch.
It is an endless ``IterableDataset`` of dicts: ``batch_size`` successive samples of one worker are a
batch, which the model gets unchanged.
"""

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.registry import Registry
from torch.utils.data import IterableDataset

SAMPLES_REGISTRY = Registry("SAMPLES")


def build_samples(
    cfg: CfgNode, records: list[dict[str, Any]], batch_size: int
) -> IterableDataset[dict[str, Any]]:
    """The samples that ``INPUT.SAMPLES`` names, from ``records``.

    Raises:
        DatasetError: there is nothing to draw from the records.
    """
    samples: IterableDataset[dict[str, Any]] = SAMPLES_REGISTRY.get(cfg.INPUT.SAMPLES)(
        cfg, records, batch_size=batch_size
    )
    return samples


def build_sample_loader(
    cfg: CfgNode, records: list[dict[str, Any]]
) -> Iterable[list[dict[str, Any]]]:
    """Endless batches of :func:`build_samples`, ``SOLVER.IMS_PER_BATCH`` over all processes."""
    batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    loader: Iterable[list[dict[str, Any]]] = build_detection_train_loader(
        build_samples(cfg, records, batch_size),
        mapper=None,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,  # it would mix the samples of several batches
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return loader
