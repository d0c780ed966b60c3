"""Mean intersection over union of a semantic map made from instances."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from instseg.data.dataset import DataSet
from instseg.errors import ConfigError
from instseg.evaluation.registry import Metric, register
from instseg.masks import decode
from instseg.modeling.contract import SemanticModel, architectures, offers

BACKGROUND = "background"


@register("semantic")
class SemanticEvaluator(Metric, DatasetEvaluator):
    """IoU of each class's region over all pixels of a data set, for models that give ``sem_seg``.

    The true region of a class is the union of its instances; pixels of crowds are ignored.  Where
    instances of different classes overlap, the smaller one is on top.

    Results are in per cent under ``sem_seg``: ``mIoU`` over the classes that occur, including
    background, the IoU of each (``IoU-NAME``), and ``pACC``, the fraction of correct pixels.
    """

    takes_cropped = True

    def __init__(self, dataset: DataSet) -> None:
        """
        Args:
            dataset: has classes, and its instances have masks.
        """
        self._records = {record["image_id"]: record for record in dataset.records}
        self._names = [BACKGROUND, *dataset.classes]
        self.reset()

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        class_metrics = [f"sem_seg/IoU-{name}" for name in (BACKGROUND, *dataset.classes)]
        return ["sem_seg/mIoU", "sem_seg/pACC", *class_metrics]

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        return cls(dataset)

    @classmethod
    def check(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> None:
        if not any(module.give_semantic for _, module in offers(model, SemanticModel)):
            raise _no_map()

    def reset(self) -> None:
        self._confusion = np.zeros((len(self._names), len(self._names)), dtype=np.int64)

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """
        Raises:
            ConfigError: the model gives no semantic map, or one of other classes.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if "sem_seg" not in output:
                raise _no_map()
            if len(output["sem_seg"]) != len(self._names):
                raise ConfigError(
                    f"the semantic map has {len(output['sem_seg'])} channels; expected background "
                    f"and the {len(self._names) - 1} classes of the data set"
                )
            predicted = output["sem_seg"].argmax(dim=0).cpu().numpy()
            gt_classes, counted = semantic_map(self._records[image["image_id"]])
            pairs = gt_classes[counted] * len(self._names) + predicted[counted]
            counts = np.bincount(pairs, minlength=self._confusion.size)
            self._confusion += counts.reshape(self._confusion.shape)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        gathered = comm.gather(self._confusion, dst=0)
        if not comm.is_main_process():
            return None
        confusion = np.sum(gathered, axis=0)
        right = confusion.diagonal()
        union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
        occurs = confusion.sum(axis=1) > 0
        iou = np.where(union > 0, 100 * right / np.maximum(union, 1), np.nan)
        total = confusion.sum()
        result = {
            "mIoU": float(iou[occurs].mean()) if occurs.any() else float("nan"),
            "pACC": 100 * float(right.sum()) / total if total else float("nan"),
        }
        for name, value in zip(self._names, iou, strict=True):
            result[f"IoU-{name}"] = float(value)
        return {"sem_seg": result}


def _no_map() -> ConfigError:
    able = architectures(lambda kind: hasattr(kind, "semantic_key"))
    keys = [f"{name} gives one with {kind.semantic_key} True" for name, kind in able.items()]
    return ConfigError(
        "TEST.METRICS has semantic, but the model gives no semantic map; leave semantic out "
        f"({', '.join(keys)})"
    )


def semantic_map(record: Mapping[str, Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(H, W) labels of a record, 0 for background, else class + 1; and (H, W) False in crowds."""
    size = record["height"], record["width"]
    labels = np.zeros(size, dtype=np.int64)
    counted = np.ones(size, dtype=bool)
    instances = []
    for annotation in record["annotations"]:
        mask = decode(annotation["segmentation"], *size)
        if annotation.get("iscrowd", 0):
            counted &= ~mask
        else:
            instances.append((mask.sum(), annotation["category_id"] + 1, mask))
    # Large ones first, so that small ones stay visible.  Instances are on top of crowds.
    for _, label, mask in sorted(instances, key=lambda item: -item[0]):
        labels[mask] = label
    return labels, counted | (labels > 0)
