"""Samples that a project draws for training instead of whole images."""

from collections.abc import Iterator
from typing import Any

import pytest
from detectron2.config import CfgNode
from torch.utils.data import IterableDataset, get_worker_info

import instseg
from instseg.config.nodes import check_names
from instseg.data.samples import SAMPLES_REGISTRY, build_sample_loader
from instseg.errors import ConfigError
from instseg.training.trainer import Trainer

CONFIG = "instance_fcn/instance_fcn_shapes.yaml"


class Counted(IterableDataset[dict[str, Any]]):
    """Samples that say which worker made them and when."""

    def __init__(self, cfg: CfgNode, records: list[dict[str, Any]], *, batch_size: int) -> None:
        self.names = [record["file_name"] for record in records]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        for i in range(1000):
            yield {"worker": info.id if info else None, "number": i, "file_name": self.names[0]}


@pytest.fixture
def counted() -> Iterator[None]:
    SAMPLES_REGISTRY.register(Counted)
    yield
    del SAMPLES_REGISTRY._obj_map["Counted"]


def test_successive_samples_of_one_worker_make_a_batch(counted: None) -> None:
    overrides = ["INPUT.SAMPLES", "Counted", "SOLVER.IMS_PER_BATCH", 3, "DATALOADER.NUM_WORKERS", 2]
    cfg = instseg.load_cfg(CONFIG, overrides)
    batches = iter(build_sample_loader(cfg, [{"file_name": "a.png"}]))
    identities = [[(x["worker"], x["number"]) for x in next(batches)] for _ in range(3)]
    assert identities == [
        [(0, 0), (0, 1), (0, 2)],
        [(1, 0), (1, 1), (1, 2)],
        [(0, 3), (0, 4), (0, 5)],
    ]


def test_the_trainer_draws_from_the_annotated_records(counted: None) -> None:
    overrides = ["INPUT.SAMPLES", "Counted", "DATASETS.SHAPES_SIZE", 32]
    cfg = instseg.load_cfg(CONFIG, [*overrides, "DATASETS.TRAIN", "('shapes_val',)"])
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len(batch) == cfg.SOLVER.IMS_PER_BATCH
    assert batch[0]["file_name"] == "shapes://shapes_val/32/0"


def test_unknown_samples_are_refused_with_the_names_there_are(counted: None) -> None:
    cfg = instseg.get_cfg()
    cfg.INPUT.SAMPLES = "Countd"
    with pytest.raises(ConfigError, match="INPUT.SAMPLES: nothing is registered as 'Countd'.*Cou"):
        check_names(cfg)


def test_validation_losses_of_samples_are_refused(counted: None) -> None:
    overrides = ["INPUT.SAMPLES", "Counted", "TEST.VAL_LOSS_PERIOD", 10]
    with pytest.raises(ConfigError, match="set TEST.VAL_LOSS_PERIOD 0"):
        Trainer.build_train_loader(instseg.load_cfg(CONFIG, overrides))
