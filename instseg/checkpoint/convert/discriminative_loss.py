"""Weights of ``Wizaron/instance-segmentation-pytorch``, a plain state dict in a ``.pth``.

Against ours the names differ.  Classes are in the same order: the background is class 0 with us
too.  Which network it is, with coordinates or without, is found out from the names, its dimensions
from the shapes.
"""

import re
from typing import Any

from torch import Tensor

from instseg.checkpoint.convert.common import Conversion, Options, Report
from instseg.checkpoint.reading import read_released

_NODE = "MODEL.DISCRIMINATIVE_LOSS"
_CONFIG = "discriminative_loss/discriminative_loss_{}_cvppp.yaml"
_DIRECTIONS = {"hor": "horizontal", "ver": "vertical"}
# What the option for coordinates puts into names.
_WRAPPERS = re.compile(r"\b(cnn_model|conv_layer)\.")
_COUNTER = (
    (r"^cnn\.conv(\d)\.", lambda m: f"counter.convs.{int(m[1]) - 1}."),
    (r"^output\.linear\.", "counter.linear."),
)
_RESEG = (
    (r"^cnn\.model\.cnn\.(\d+)\.", r"vgg.features.\1."),
    (r"^renet(\d)\.rnn_(hor|ver)\.", lambda m: f"renet{m[1]}.{_DIRECTIONS[m[2]]}."),
    (r"^upsampling(\d)\.", r"up\1."),
    (r"^sem_seg_output\.", "semantic."),
    (r"^ins_seg_output\.", "embedding."),
)
_HOURGLASS = (
    (r"^base_cnn\.cnn\.(\d+)\.", r"vgg.features.\1."),
    (r"^enc_stacked_hourglass\.Hourglass_(\d)\.", r"hourglass\1."),
    (r"\.convgru_cell\.conv_gates\.", ".gru.gates."),
    (r"\.convgru_cell\.conv_ct\.", ".gru.candidate."),
    (r"\.(pre|post)_conv_layers\.", r".\1."),
    (
        r"^stacked_renet\.ReNet_(\d)\.rnn_(hor|ver)\.",
        lambda m: f"renet{m[1]}.{_DIRECTIONS[m[2]]}.",
    ),
    (r"^decoder\.ConvTranspose_(\d)\.", r"up\1."),
    (r"^semantic_seg\.Conv_1\.", "semantic."),
    (r"^instance_seg\.Conv_1\.", "embedding."),
)
_COUNTERS = re.compile(r"^(ins_cls_cnn|instance_count)\.")


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a checkpoint; see :class:`~instseg.checkpoint.convert.common.Converter`."""
    weights = read_released(path)
    reseg = any(name.startswith("cnn.model.") for name in weights)
    config = _CONFIG.format("reseg" if reseg else "hourglass")
    conversion = Conversion(path, config, _overrides(weights))
    for name, value in weights.items():
        target = _our_name(name, reseg)
        if target in conversion.expected:
            conversion.put(target, value, name)
    example = "cnn.model.cnn.0.weight" if reseg else "base_cnn.cnn.0.weight"
    return conversion.finish(weights, example, options)


def _overrides(weights: dict[str, Tensor]) -> list[Any]:
    """What the file has other than the configurations: coordinates, classes, dimension."""
    overrides: list[Any] = []
    if any(_WRAPPERS.search(name) for name in weights):
        overrides += [f"{_NODE}.COORDINATES", True]
    for names, key, usual, background in (
        (("sem_seg_output.bias", "semantic_seg.Conv_1.bias"), "NUM_CLASSES", 1, 1),
        (("ins_seg_output.bias", "instance_seg.Conv_1.bias"), "EMBEDDING_DIM", 32, 0),
    ):
        found = [weights[name].numel() - background for name in names if name in weights]
        if found and found[0] != usual and found[0] > 0:
            overrides += [f"{_NODE}.{key}", found[0]]
    return overrides


def _our_name(name: str, reseg: bool) -> str:
    """Our name for the authors'; something the model does not have where it is unknown."""
    name = _WRAPPERS.sub("", name)
    inner, counts = _COUNTERS.subn("", name)
    rules = _RESEG if reseg else _HOURGLASS
    for pattern, replacement in _COUNTER if counts else rules:
        inner = re.sub(pattern, replacement, inner)
    return f"network.{inner}"
