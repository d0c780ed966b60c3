"""Declare which values keys may have, and check all of them.

Rules stand beside their keys: ``declare("MODEL.PAPER", {"STRIDE": one_of(4, 8)})``.  They cover
values that Detectron2, torch or a paper's code would refuse only while running, or misunderstand.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.utils.registry import Registry

from instseg.errors import ConfigError, short


@dataclass(frozen=True)
class Rule:
    """A test of a value, and the description of fitting values in messages."""

    fits: Callable[[Any], bool]
    expected: str


Dependent = Callable[[CfgNode], Rule | None]
"""Gives a rule that depends on other values of a configuration, or raises a ConfigError itself."""

_REGISTRIES: dict[str, Registry] = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}
"""Key that names a class → where the class is registered."""
_declared: dict[str, tuple[Rule | Dependent, ...]] = {}
"""Full name of a key → its rules."""


def declare(
    node: str, rules: Mapping[str, Rule | Dependent | tuple[Rule | Dependent, ...]]
) -> None:
    """Add rules for :func:`check_values`; the modules that define the keys call it.

    A paper may also add rules for keys of others, which then keep those that they have.

    Args:
        node: the group of the keys, such as ``MODEL.PAPER``; "" is the whole configuration.
        rules: name of a key in the group → one or several rules.
    """
    for key, of_key in rules.items():
        name = f"{node}.{key}" if node else key
        key_rules = of_key if isinstance(of_key, tuple) else (of_key,)
        _declared[name] = (*_declared.get(name, ()), *key_rules)


def check_values(cfg: CfgNode) -> None:
    """Check the values of ``cfg``: first each alone, then those that limit each other.

    Args:
        cfg: complete, or a stock configuration of Detectron2.
    Raises:
        ConfigError: names the key, its value and the expected values.
    """
    dependent: list[tuple[str, Dependent]] = []
    for key, rules in _declared.items():
        for rule in rules:
            if isinstance(rule, Rule):
                _check(cfg, key, rule)
            else:
                dependent.append((key, rule))
    for key, make in dependent:
        limit = make(cfg) if _value(cfg, key) is not None else None
        if limit is not None:
            _check(cfg, key, limit)


def _check(cfg: CfgNode, key: str, rule: Rule) -> None:
    value = _value(cfg, key)
    if value is not None and not rule.fits(value):
        raise ConfigError(f"{key} is {short(value)}; expected {rule.expected}")


def _value(cfg: CfgNode, key: str) -> Any:
    """Value of a key; None if a stock configuration of Detectron2 does not have it."""
    *nodes, name = key.split(".")
    node = functools.reduce(lambda inside, part: inside.get(part, {}), nodes, cfg)
    return node.get(name)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number and no bool."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and math.isfinite(value)


def whole(least: int, greatest: float = math.inf, expected: str = "") -> Rule:
    """A whole number from ``least`` to ``greatest``."""
    limit = f"from {least} to {greatest}" if greatest < math.inf else f"of at least {least}"
    return Rule(
        lambda x: is_whole(x) and least <= x <= greatest, expected or f"a whole number {limit}"
    )


def number(least: float = -math.inf, greatest: float = math.inf, expected: str = "") -> Rule:
    """A finite number from ``least`` to ``greatest``."""
    limit = f"from {least:g} to {greatest:g}" if greatest < math.inf else f"of at least {least:g}"
    return Rule(lambda x: is_number(x) and least <= x <= greatest, expected or f"a number {limit}")


def one_of(*values: object, reason: str = "") -> Rule:
    """One of these values; ``reason`` ends the description."""
    *others, last = map(str, values)
    listing = f"{', '.join(others)} or {last}" if others else last
    return Rule(lambda x: x in values, f"{listing}{reason}")


def some_of(*values: object) -> Rule:
    """A list of one or more of these values."""
    return Rule(
        lambda x: len(x) > 0 and set(x) <= set(values), f"some of {', '.join(map(str, values))}"
    )


def several(rule: Rule, expected: str, least: int = 1, greatest: float = math.inf) -> Rule:
    """A list or tuple of ``least`` to ``greatest`` elements that ``rule`` fits."""
    return Rule(
        lambda x: (
            isinstance(x, list | tuple) and least <= len(x) <= greatest and all(map(rule.fits, x))
        ),
        expected,
    )


def ordered(rule: Rule, expected: str) -> Rule:
    """Two values that ``rule`` fits, the second at least as large as the first."""
    two = several(rule, expected, 2, 2)
    return Rule(lambda x: two.fits(x) and x[0] <= x[1], expected)


def where(key: str, value: str, rule: Rule | Dependent) -> Dependent:
    """``rule`` only in configurations where another key has a value.

    Args:
        key: the other key, such as ``MODEL.META_ARCHITECTURE``.
        value: its value; an architecture or ROI heads derived from the class of that name count
            too.
        rule: what holds there.
    """

    def limit(cfg: CfgNode) -> Rule | None:
        if value not in _names(key, _value(cfg, key)):
            return None
        return rule if isinstance(rule, Rule) else rule(cfg)

    return limit


def _names(key: str, value: Any) -> list[Any]:
    """A value, and the names of the classes from which the class of that name derives."""
    registry = _REGISTRIES.get(key)
    kind = registry.get(value) if registry is not None and value in registry else None
    return [value, *(base.__name__ for base in getattr(kind, "__mro__", ()))]


POSITIVE = Rule(lambda x: is_number(x) and x > 0, "a number above 0")
FRACTION = number(0, 1)
COUNT = whole(1)
