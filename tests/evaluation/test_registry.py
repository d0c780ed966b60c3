"""Metrics by their names in ``TEST.METRICS``."""

from typing import Any

import pytest

import instseg
from instseg.errors import ConfigError
from instseg.evaluation.registry import Metric, metrics_of, register
from tests.support.data_sets import data_set


def names(kind: str, *metrics: Any) -> list[str]:
    cfg = instseg.get_cfg()
    cfg.merge_from_list(["TEST.METRICS", metrics])
    return [metric.__name__ for metric in metrics_of(cfg, data_set([], kind=kind))]


@pytest.mark.parametrize(
    ("kind", "metrics", "expected"),
    [
        ("coco", ("contest", "coco", "contest"), ["ContestEvaluator", "MaskScoreCOCOEvaluator"]),
        ("voc_instances", ("coco",), ["MaskScoreCOCOEvaluator", "VOCEvaluator"]),
        ("voc_instances", ("voc", "coco"), ["VOCEvaluator", "MaskScoreCOCOEvaluator"]),
        ("voc_instances", ("proposals",), ["ProposalEvaluator"]),
        ("youtube_vis", (), ["TrackEvaluator"]),
        ("cityscapes_instance", ("coco", "contest"), ["CityscapesEvaluator"]),
    ],
)
def test_the_configuration_and_the_data_set_choose(
    kind: str, metrics: tuple[str, ...], expected: list[str]
) -> None:
    assert names(kind, *metrics) == expected


@pytest.mark.parametrize(
    ("kind", "metrics", "message"),
    [
        ("coco", ("contst",), "TEST.METRICS has 'contst'; did you mean contest"),
        ("coco", ("x",), "TEST.METRICS has 'x'; there are .*coco"),
        ("coco", (3,), "TEST.METRICS has 3; there are"),
        ("coco", (), "TEST.METRICS is empty, so that nothing is measured on test"),
        ("coco", ("proposals", "voc"), "has proposals, for models without classes, and voc"),
        ("lvis", ("coco",), "data set test asks for the evaluator 'lvis'; there are only 'coco'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    kind: str, metrics: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        names(kind, *metrics)


def test_a_name_stands_for_one_metric() -> None:
    with pytest.raises(ValueError, match="there is a metric 'coco' already"):
        register("coco")(type("Another", (Metric,), {}))
