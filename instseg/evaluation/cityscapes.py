"""The metric of Cityscapes, computed by the authors' own code."""

import importlib.util

from detectron2.config import CfgNode
from detectron2.evaluation import CityscapesInstanceEvaluator, DatasetEvaluator
from torch import nn

from instseg.data.dataset import DataSet
from instseg.errors import ConfigError
from instseg.evaluation.registry import Metric, register

_KIND = "cityscapes_instance"


@register("cityscapes", kind=_KIND)
class CityscapesEvaluator(Metric, CityscapesInstanceEvaluator):
    """AP and AP50 of masks, instead of COCO's metric."""

    alone = True

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        return ["segm/AP", "segm/AP50"]

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        cls.check(cfg, dataset, nn.Identity())
        return cls(dataset.name)

    @classmethod
    def check(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> None:
        if dataset.kind != _KIND:
            raise ConfigError(
                f"TEST.METRICS has cityscapes, but {dataset.name} is no set of Cityscapes; leave "
                "cityscapes out"
            )
        if importlib.util.find_spec("cityscapesscripts") is None:
            raise ConfigError(
                f"data set {dataset.name} needs the package cityscapesscripts; pip install "
                "cityscapesscripts"
            )
