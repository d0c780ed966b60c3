"""The rules that say which values a key may have."""

import math
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg

import instseg
from instseg.config import rules
from instseg.config.rules import (
    Rule,
    check_values,
    declare,
    number,
    one_of,
    ordered,
    several,
    some_of,
    where,
    whole,
)
from instseg.errors import ConfigError


@pytest.mark.parametrize(
    ("rule", "good", "bad", "expected"),
    [
        (whole(1), [1, 99], [0, 1.0, True, "1"], "a whole number of at least 1"),
        (whole(0, 5), [0, 5], [-1, 6], "a whole number from 0 to 5"),
        (number(0), [0, 0.5], [-0.1, math.nan, math.inf, False], "a number of at least 0"),
        (number(0, 1, "a share"), [0, 1.0], [1.1], "a share"),
        (one_of(4, 8), [4], [5], "4 or 8"),
        (one_of("a", "b", "c"), ["b"], ["d", 1], "a, b or c"),
        (one_of(1, reason=", as so"), [1], [2], "1, as so"),
        (some_of("a", "b"), [["a"], ["b", "a"]], [[], ["c"]], "some of a, b"),
        (several(whole(1), "sides"), [[1], (1, 2)], [[], [0], 1], "sides"),
        (several(whole(1), "a pair", 2, 2), [[1, 2]], [[1], [1, 2, 3]], "a pair"),
        (ordered(whole(1), "a range"), [[1, 1], (1, 3)], [[3, 1], [1], [0, 1]], "a range"),
    ],
)
def test_a_rule_knows_what_fits_and_says_so(
    rule: Rule, good: list[Any], bad: list[Any], expected: str
) -> None:
    assert [value for value in good if not rule.fits(value)] == []
    assert [value for value in bad if rule.fits(value)] == []
    assert rule.expected == expected


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """A configuration with the keys of a paper, which declares what they may be."""
    cfg = instseg.get_cfg()  # first, as it imports the projects, which declare their rules once
    monkeypatch.setattr(rules, "_declared", dict(rules._declared))
    cfg.MODEL.TOY = CfgNode({"STRIDE": 4, "SIDE": 8})
    declare(
        "MODEL.TOY",
        {
            "STRIDE": one_of(4, 8),
            "SIDE": (whole(1), lambda cfg: whole(cfg.MODEL.TOY.STRIDE, expected="STRIDE or more")),
        },
    )
    return cfg


def test_a_paper_declares_the_values_of_its_keys(paper: CfgNode) -> None:
    check_values(paper)
    paper.MODEL.TOY.STRIDE = 5
    with pytest.raises(ConfigError, match=r"^MODEL\.TOY\.STRIDE is 5; expected 4 or 8$"):
        check_values(paper)


def test_a_value_may_limit_another(paper: CfgNode) -> None:
    paper.MODEL.TOY.SIDE = 3
    with pytest.raises(ConfigError, match=r"^MODEL\.TOY\.SIDE is 3; expected STRIDE or more$"):
        check_values(paper)
    paper.MODEL.TOY.SIDE = 0
    with pytest.raises(ConfigError, match="SIDE is 0; expected a whole number of at least 1"):
        check_values(paper)


def test_a_paper_adds_rules_for_keys_of_others_that_hold_for_its_models_alone(
    paper: CfgNode,
) -> None:
    key, name = "INPUT.MAX_SIZE_TEST", "MODEL.META_ARCHITECTURE"
    declare("", {key: where(name, "GeneralizedRCNN", whole(50, expected="50 for an R-CNN"))})
    paper.INPUT.MAX_SIZE_TEST = 0
    with pytest.raises(ConfigError, match="MAX_SIZE_TEST is 0; expected a whole number of at lea"):
        check_values(paper)
    paper.INPUT.MAX_SIZE_TEST = 49
    for derived in ("GeneralizedRCNN", "FCIS"):
        paper.MODEL.META_ARCHITECTURE = derived
        with pytest.raises(ConfigError, match="MAX_SIZE_TEST is 49; expected 50 for an R-CNN"):
            check_values(paper)
    paper.MODEL.META_ARCHITECTURE = "SGN"
    check_values(paper)


def test_a_stock_configuration_of_detectron2_needs_no_key_of_ours(paper: CfgNode) -> None:
    check_values(get_cfg())


def test_all_declared_keys_exist() -> None:
    cfg = instseg.get_cfg()
    assert [key for key in rules._declared if rules._value(cfg, key) is None] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("fcis/fcis_shapes.yaml", "MODEL.FCIS.SAMPLING", "x"),
        ("sgn/sgn_shapes.yaml", "MODEL.SGN.LINES", "diagonal"),
        ("yolact/yolact_shapes.yaml", "MODEL.YOLACT.NMS", "x"),
    ],
)
def test_a_configuration_is_checked_where_it_is_loaded(overrides: tuple[str, str, str]) -> None:
    """Whoever builds the model: Detectron2's predictor checks nothing."""
    config, key, value = overrides
    with pytest.raises(ConfigError, match=f"{key} is '{value}'; expected"):
        instseg.load_cfg(config, [key, value])
