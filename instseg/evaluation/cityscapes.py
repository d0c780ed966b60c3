"""The metric of Cityscapes, computed by the authors' own code."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import CityscapesInstanceEvaluator, DatasetEvaluator
from detectron2.structures import Instances
from torch import Tensor, nn

from instseg.data.dataset import DataSet
from instseg.errors import ConfigError
from instseg.evaluation.registry import Metric, register
from instseg.masks import CroppedMasks

_KIND = "cityscapes_instance"


@register("cityscapes", kind=_KIND)
class CityscapesEvaluator(Metric, CityscapesInstanceEvaluator):
    """AP and AP50 of masks, instead of COCO's metric."""

    alone = True
    takes_cropped = True

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add the results of a batch; see Detectron2, which reads one dense mask at a time."""
        shown = []
        for output in outputs:
            instances = output["instances"]
            fields = instances.get_fields()
            fields = fields | {"pred_masks": _DenseOneByOne(CroppedMasks.of(fields["pred_masks"]))}
            shown.append({"instances": Instances(instances.image_size, **fields)})
        super().process(inputs, shown)

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


class _DenseOneByOne:
    """Cropped masks that give one dense mask (H, W) at a time."""

    def __init__(self, masks: CroppedMasks) -> None:
        self._masks = masks

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> Tensor:
        return self._masks[index].to_dense()[0]
