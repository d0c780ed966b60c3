"""Register metrics, and find them by ``TEST.METRICS`` or by the kind of a data set.

A metric is an evaluator of Detectron2 that also derives from :class:`Metric`::

    @register("contest")
    class ContestEvaluator(Metric, DatasetEvaluator): ...
"""

import difflib
from collections.abc import Callable
from typing import ClassVar, TypeVar

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from instseg.data.dataset import DataSet
from instseg.errors import ConfigError, short

_COCO = "coco"
_METRICS: dict[str, type["Metric"]] = {}
_OF_KIND: dict[str, str] = {}
"""Kind of a data set → name of the metric for it."""


class Metric:
    """The class methods of an evaluator that an evaluation calls before it builds one.

    Attributes:
        excludes: names of metrics that no model can have together with this one.
        alone: whether data sets of its kind are evaluated by this metric only.
        takes_cropped: whether it reads ``pred_masks`` that are
            :class:`instseg.masks.CroppedMasks`.  If a metric does not, models give dense ones.
    """

    excludes: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[bool] = False
    takes_cropped: ClassVar[bool] = False

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        """Names ``TASK/METRIC`` of its numbers, except those whose best value is no extreme."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        """The evaluator of ``dataset``; its files go to ``folder``.

        Raises:
            ConfigError, DatasetError: the data set does not support the metric.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> None:
        """Find before a training the problems that would stop the evaluation after it.

        Raises:
            ConfigError, DatasetError: ``model`` or ``dataset`` does not support the metric.
        """


Class = TypeVar("Class", bound=type[Metric])


def register(name: str, *, kind: str | None = None) -> Callable[[Class], Class]:
    """Register a metric under its name in ``TEST.METRICS``.

    Args:
        kind: of data sets that always use this metric.
    """

    def add(metric: Class) -> Class:
        if _METRICS.setdefault(name, metric) is not metric:
            raise ValueError(f"there is a metric {name!r} already")
        if kind is not None:
            _OF_KIND[kind] = name
        return metric

    return add


def metrics_of(cfg: CfgNode, dataset: DataSet) -> list[type[Metric]]:
    """The metrics that ``TEST.METRICS`` names or that the data set asks for.

    Raises:
        ConfigError: names are unknown or exclude each other, or there are none.
    """
    if dataset.kind not in (_COCO, *_OF_KIND):
        raise ConfigError(
            f"data set {dataset.name} asks for the evaluator {dataset.kind!r}; there are only "
            f"{', '.join(map(repr, (_COCO, *_OF_KIND)))}"
        )
    asked = _OF_KIND.get(dataset.kind)
    if asked is not None and _METRICS[asked].alone:
        return [_METRICS[asked]]
    names = list(dict.fromkeys(cfg.TEST.METRICS))
    for name in names:
        if name not in _METRICS:
            close = difflib.get_close_matches(str(name), _METRICS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(_METRICS)}"
            raise ConfigError(f"TEST.METRICS has {short(name)}{hint}")
        excluded = next((other for other in _METRICS[name].excludes if other in names), None)
        if excluded is not None:
            raise ConfigError(
                f"TEST.METRICS has {excluded}, for models without classes, and {name}, which needs "
                "classes; leave one of them out"
            )
    if asked is not None and not set(_METRICS[asked].excludes) & set(names):
        names = list(dict.fromkeys((*names, asked)))
    if not names:
        raise ConfigError(
            f"TEST.METRICS is empty, so that nothing is measured on {dataset.name}; name a metric, "
            "e.g. ('coco',)"
        )
    return [_METRICS[name] for name in names]
