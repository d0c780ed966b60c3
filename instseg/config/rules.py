"""Which values the keys of Detectron2 may have: what it or torch would refuse only while running.

Keys of instseg and of the projects are checked where they are read.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from instseg.categories import Categories
from instseg.data.images import CHANNELS
from instseg.errors import ConfigError, short
from instseg.modeling.augmented import check_augmentation


@dataclass(frozen=True)
class _Rule:
    """What a value must be, and how a message calls that."""

    fits: Callable[[Any], bool]
    expected: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(least: int, most: float = math.inf) -> _Rule:
    limit = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
    return _Rule(lambda x: _is_whole(x) and least <= x <= most, f"a whole number {limit}")


def _number(least: float, most: float = math.inf) -> _Rule:
    limit = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
    return _Rule(
        lambda x: _is_number(x) and math.isfinite(x) and least <= x <= most, f"a number {limit}"
    )


def _one_of(*values: object) -> _Rule:
    *others, last = map(str, values)
    return _Rule(lambda x: x in values, f"{', '.join(others)} or {last}")


def _several(rule: _Rule, name: str, least: int = 1) -> _Rule:
    """A list or tuple whose elements ``rule`` fits."""
    return _Rule(
        lambda x: isinstance(x, list | tuple) and len(x) >= least and all(map(rule.fits, x)), name
    )


_POSITIVE = _Rule(lambda x: _is_number(x) and 0 < x < math.inf, "a number above 0")
_FINITE = _Rule(lambda x: _is_number(x) and math.isfinite(x), "a finite number")
_NOT_NEGATIVE = _number(0)
_FRACTION = _number(0, 1)
_COUNT = _whole(1)
_SIZE = _whole(0)
_BOX_LOSS = _one_of("smooth_l1", "giou", "diou", "ciou")

_RULES = {
    "MODEL.DEVICE": _Rule(
        lambda x: isinstance(x, str) and re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", x) is not None,
        "cpu, cuda or cuda:NUMBER",
    ),
    "MODEL.PIXEL_MEAN": _several(_FINITE, "a list of numbers, one per channel"),
    "MODEL.PIXEL_STD": _several(_POSITIVE, "a list of numbers above 0, one per channel"),
    "MODEL.RESNETS.DEPTH": _one_of(18, 34, 50, 101, 152),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": _FRACTION,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _COUNT,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _FRACTION,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _COUNT,
    "INPUT.FORMAT": _one_of(*CHANNELS),
    "INPUT.MASK_FORMAT": _one_of("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": _one_of("horizontal", "vertical", "none"),
    # A side of 0 leaves pictures as they are.
    "INPUT.MIN_SIZE_TRAIN": _several(_SIZE, "one or more sides in pixels, such as (640, 800)"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _COUNT,
    "INPUT.MIN_SIZE_TEST": _SIZE,
    "INPUT.MAX_SIZE_TEST": _COUNT,
    "INPUT.CROP.TYPE": _one_of("relative", "relative_range", "absolute", "absolute_range"),
    "DATALOADER.NUM_WORKERS": _whole(0),
    # Detectron2's others need keys that it does not define.
    "DATALOADER.SAMPLER_TRAIN": _one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": _FRACTION,
    "SOLVER.IMS_PER_BATCH": _COUNT,
    "SOLVER.MAX_ITER": _COUNT,
    "SOLVER.CHECKPOINT_PERIOD": _COUNT,
    "SOLVER.BASE_LR": _NOT_NEGATIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.LR_SCHEDULER_NAME": _one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.STEPS": _Rule(
        lambda x: _several(_COUNT, "", 0).fits(x) and list(x) == sorted(set(x)),
        "iterations in ascending order, such as (6000, 8000)",
    ),
    "SOLVER.GAMMA": _POSITIVE,
    "SOLVER.NUM_DECAYS": _COUNT,
    "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
    "SOLVER.WARMUP_ITERS": _whole(0),
    "SOLVER.WARMUP_FACTOR": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "SOLVER.REFERENCE_WORLD_SIZE": _whole(0),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "TEST.DETECTIONS_PER_IMAGE": _whole(0),
    "TEST.PRECISE_BN.NUM_ITER": _COUNT,
    "TEST.AUG.MIN_SIZES": _several(_COUNT, "one or more sides in pixels, such as (400, 800)"),
    "TEST.AUG.MAX_SIZE": _COUNT,
    # Each process adds its number to it; NumPy takes 32 bits.
    "SEED": _Rule(lambda x: _is_whole(x) and x < 2**31, f"a whole number below {2**31}"),
}


def check_values(cfg: CfgNode) -> None:
    """Check the values of ``cfg``, alone and where one limits another.

    Args:
        cfg: complete, or a stock configuration of Detectron2.
    Raises:
        ConfigError: with the key, what was found and what was expected.
    """
    for key, rule in _RULES.items():
        _check(cfg, key, rule)
    configured_categories(cfg)
    channels = CHANNELS[cfg.INPUT.FORMAT]
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        expected = f"{channels} numbers, as INPUT.FORMAT is {cfg.INPUT.FORMAT}"
        _check(cfg, key, _Rule(lambda x: len(x) == channels, expected))
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        expected = "(smallest, largest) side, as INPUT.MIN_SIZE_TRAIN_SAMPLING is range"
        _check(cfg, "INPUT.MIN_SIZE_TRAIN", _Rule(_is_range, expected))
    if cfg.INPUT.CROP.ENABLED:
        _check(cfg, "INPUT.CROP.SIZE", _crop_size(cfg.INPUT.CROP.TYPE))
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        least = cfg.SOLVER.BASE_LR_END
        expected = f"above 0 and at least SOLVER.BASE_LR_END {least:g} for WarmupCosineLR"
        _check(cfg, "SOLVER.BASE_LR", _Rule(lambda x: x > 0 and x >= least, expected))
    check_augmentation(cfg)
    if cfg.SOLVER.NESTEROV:
        _check(cfg, "SOLVER.MOMENTUM", _Rule(lambda x: x > 0, "above 0 with SOLVER.NESTEROV"))


def configured_categories(cfg: CfgNode) -> Categories | None:
    """``MODEL.CATEGORIES``; None where it is empty, or ``cfg`` is one of stock Detectron2.

    Raises:
        ConfigError: it is no list of categories.
    """
    entries = cfg.MODEL.get("CATEGORIES")
    if entries is None or entries == [] or entries == ():
        return None
    try:
        return Categories.of_coco(entries)
    except ValueError as error:
        raise ConfigError(f"MODEL.CATEGORIES: {error}") from None


def check_colour(cfg: CfgNode, what: str) -> None:
    """Refuse images of one channel for what takes three.

    Args:
        what: takes them; the subject of the message.
    Raises:
        ConfigError: ``INPUT.FORMAT`` is not one of colour.
    """
    if CHANNELS.get(cfg.INPUT.FORMAT) != 3:
        colour = " or ".join(name for name, channels in CHANNELS.items() if channels == 3)
        raise ConfigError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; {what} needs {colour}")


def _check(cfg: CfgNode, key: str, rule: _Rule) -> None:
    value = functools.reduce(getattr, key.split("."), cfg)
    if not rule.fits(value):
        raise ConfigError(f"{key} is {short(value)}; expected {rule.expected}")


def _is_range(value: Sequence[float]) -> bool:
    return len(value) == 2 and value[0] <= value[1]


def _crop_size(kind: str) -> _Rule:
    """What ``INPUT.CROP.SIZE`` has to be for this ``INPUT.CROP.TYPE``."""
    if kind.startswith("relative"):
        part = _Rule(lambda x: _is_number(x) and 0 < x <= 1, "")
        expected = "[height, width], each above 0 and at most 1 of the picture's"
    else:
        part = _COUNT
        expected = "two whole numbers of pixels"
        if kind == "absolute_range":
            expected += ", in ascending order"
    several = _several(part, expected, 2)
    return _Rule(
        lambda x: several.fits(x) and len(x) == 2 and (kind != "absolute_range" or _is_range(x)),
        f"{expected}, as INPUT.CROP.TYPE is {kind}",
    )
