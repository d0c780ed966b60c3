"""Weights of ``Wizaron/instance-segmentation-pytorch``, a plain state dict in a ``.pth``.

Only the names differ from ours.  Classes are in the same order: the background is class 0 in both.
The names tell which network it is, with coordinates or without; the shapes tell its dimensions.
"""

import re
from collections.abc import Iterator

from torch import Tensor

from instseg.checkpoint.reading import read_released
from instseg.convert.common import Conversion, Report
from instseg.convert.configuration import Fact, Layout, Options

_NODE = "MODEL.DISCRIMINATIVE_LOSS"
_CONFIG = "discriminative_loss/discriminative_loss_{}_cvppp.yaml"
_UNTOLD = (
    *("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.MIN_SIZE_TEST", f"{_NODE}.MAX_COUNT"),
    *(f"{_NODE}.CLUSTERING", f"{_NODE}.BANDWIDTH_TEST", f"{_NODE}.MIN_PIXELS_TEST"),
)
_DIRECTIONS = {"hor": "horizontal", "ver": "vertical"}
# Parts of names that the option for coordinates adds.
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
    """Convert a checkpoint; see :class:`~instseg.convert.common.Converter`."""
    weights = read_released(path)
    reseg = any(name.startswith("cnn.model.") for name in weights)
    config = _CONFIG.format("reseg" if reseg else "hourglass")
    layout = Layout(config, lambda _: list(_facts(weights, reseg, options)), _UNTOLD)
    conversion = Conversion(path, layout, options)
    for name, value in weights.items():
        target = _our_name(name, reseg)
        if target in conversion.expected:
            conversion.put(target, value, name)
    example = "cnn.model.cnn.0.weight" if reseg else "base_cnn.cnn.0.weight"
    return conversion.finish(weights, example)


def _facts(weights: dict[str, Tensor], reseg: bool, options: Options) -> Iterator[Fact]:
    """Network, coordinates, classes, dimension."""
    if weights and not options.allow_partial:
        yield Fact("MODEL.META_ARCHITECTURE", "DiscriminativeLoss", "its layers")
        yield Fact(f"{_NODE}.NETWORK", "reseg" if reseg else "hourglass", "its layers")
    coordinates = any(_WRAPPERS.search(name) for name in weights)
    reason = "layers that coordinates are shown to" if coordinates else "no layers of coordinates"
    yield Fact(f"{_NODE}.COORDINATES", coordinates, reason)
    for names, key, background, what in (
        (("sem_seg_output.bias", "semantic_seg.Conv_1.bias"), "NUM_CLASSES", 1, "classes"),
        (("ins_seg_output.bias", "instance_seg.Conv_1.bias"), "EMBEDDING_DIM", 0, "dimensions"),
    ):
        for count in (weights[name].numel() - background for name in names if name in weights):
            if count > 0:
                yield Fact(f"{_NODE}.{key}", count, f"{count} {what}")


def _our_name(name: str, reseg: bool) -> str:
    """Our name for the authors'; an unknown one becomes a name that the model does not have."""
    name = _WRAPPERS.sub("", name)
    inner, counts = _COUNTERS.subn("", name)
    rules = _RESEG if reseg else _HOURGLASS
    for pattern, replacement in _COUNTER if counts else rules:
        inner = re.sub(pattern, replacement, inner)
    return f"network.{inner}"
