"""Forms of a network that ``instseg benchmark models`` measures."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from instseg.benchmark.peak import INT8
from instseg.errors import ConfigError
from instseg.export import ExportedPredictor, export, to_int8
from instseg.export.int8 import LEAST_IMAGES
from instseg.inference.precision import BFLOAT16, FLOAT32
from instseg.inference.predictor import Predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A form of a network.

    Attributes:
        options: of our predictor, which also makes the network that is exported.
        dtype: number type of its convolutions.
        engine: that runs the exported network; None for a network in torch.
    """

    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = FLOAT32
    engine: str | None = None


VARIANTS: dict[str, Variant] = {
    "eager": Variant(),
    "folded": Variant({"optimize": True}),
    "bf16": Variant({"optimize": True, "dtype": BFLOAT16}, BFLOAT16),
    "compiled": Variant({"optimize": True, "compile": True}),
    "onnx": Variant(engine="onnxruntime"),
    "int8": Variant({"optimize": True}, INT8, "onnxruntime"),
    "openvino": Variant(engine="openvino"),
    "openvino_bf16": Variant(dtype=BFLOAT16, engine="openvino"),
    "openvino_int8": Variant({"optimize": True}, INT8, "openvino"),
}
"""Name of a variant → its form."""

Options = dict[str, Any]
"""What :func:`opened` takes: options of a predictor, with ``path`` those of an exported one."""


def prepared(
    variant: Variant,
    cfg: CfgNode,
    images: Sequence[np.ndarray],
    folder: Path,
    build: Callable[[Callable[[], Predictor]], Predictor],
    allow_partial: bool,
) -> Options:
    """Options of the predictor to be measured; the network is exported first if need be.

    Args:
        images: the network in 8 bits is calibrated on.
        folder: for exported networks.
        build: makes a predictor by a function, with the same random weights in every call.
        allow_partial: see :class:`Predictor`.
    Raises:
        ConfigError: a model that cannot be exported, or another device than a CPU to run it on.
        ImportError: packages of the extra ``export`` are not installed.
    """
    options = {**variant.options, "allow_partial": allow_partial}
    if variant.engine is None:
        return options
    if cfg.MODEL.DEVICE != "cpu":
        raise ConfigError(
            f"exported networks run on the CPU and MODEL.DEVICE is {cfg.MODEL.DEVICE}; set "
            "MODEL.DEVICE cpu, or leave out --variant onnx, int8 and openvino"
        )
    predictor = build(lambda: Predictor(cfg, **options, dtype=FLOAT32))
    path = folder / ("int8.onnx" if variant.dtype == INT8 else "float32.onnx")
    if not path.exists():
        export(predictor, "onnx", path)
        if variant.dtype == INT8:
            # Times depend neither on ranges nor on what is found.
            enough = [*images] * -(-LEAST_IMAGES // len(images))
            logger.info(str(to_int8(path, predictor, enough, confidence=0.0)))
    dtype = BFLOAT16 if variant.dtype == BFLOAT16 else FLOAT32
    threads = torch.get_num_threads()
    return {"path": str(path), "engine": variant.engine, "threads": threads, "dtype": dtype}


def opened(cfg: CfgNode, options: Options) -> Predictor:
    """The predictor of :func:`prepared` options."""
    return ExportedPredictor(**options) if "path" in options else Predictor(cfg, **options)
