"""Weights of matterport/Mask_RCNN and of Keras' ResNet-50 (HDF5, Keras ``save_weights``).

Differences from Detectron2: kernels are (height, width, in, out); convolutions before a batch
normalisation have biases, and its epsilon is 1e-3; the heads are normalised too; objectness is a
pair of logits; deltas are (dy, dx, log dh, log dw); the background is class 0.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from torch import Tensor

from instseg.checkpoint.keras_hdf5 import read_keras_hdf5
from instseg.convert.common import Conversion, Report, background_last
from instseg.convert.configuration import (
    RCNN_UNTOLD,
    Fact,
    Layout,
    Options,
    anchor_facts,
    classifier_classes,
    resnet_facts,
)
from instseg.errors import CheckpointError

_CONFIG = "mask_rcnn/mask_rcnn_R_101_FPN_matterport.yaml"
_EXAMPLE = "res2a_branch2a/res2a_branch2a/kernel:0"
_KERAS_EPS = 1e-3
_FROZEN_EPS = 1e-5
"""The epsilon that Detectron2's FrozenBatchNorm2d adds to the variance."""
_NOT_NEEDED = {
    "anchors": "anchors follow from the configuration",
    "fc1000": "classifier of ImageNet",
    "optimizer_weights": "state of the optimizer",
}
_SIZES = {
    "fpn_c5p5": "MODEL.FPN.OUT_CHANNELS",
    "rpn_conv_shared": "MODEL.RPN.CONV_DIMS",
    "mrcnn_class_conv1": "MODEL.ROI_BOX_HEAD.FC_DIM",
    "mrcnn_mask_conv1": "MODEL.ROI_MASK_HEAD.CONV_DIM",
}
"""Layer → key that holds the number of its outputs."""
_OLD_LEAVES = {
    "W": "kernel",
    "b": "bias",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",  # a wrong name: it always was the variance
}


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a weight file; see :class:`~instseg.convert.common.Converter`.

    Layers may lie at the root or inside groups; a convolution's bias and the suffix ``:0`` may be
    missing.

    Raises:
        ImportError: h5py is not installed.
    """
    tensors, ignored = read_keras_hdf5(path, set(_NOT_NEEDED))
    layers = _Layers(path, *_by_layer(path, tensors))
    conversion = Conversion(path, _layout(path, layers), options)
    for name in ignored:
        reasons = [reason for part, reason in _NOT_NEEDED.items() if part in name.split("/")]
        conversion.ignore(name, reasons[0])
    _backbone(conversion, layers)
    _rpn(conversion, layers)
    _heads(conversion, layers)
    return conversion.finish([*tensors, *ignored], _EXAMPLE)


def _layout(path: str, layers: "_Layers") -> Layout:
    blocks = [match[1] for name in layers.names if (match := re.match(r"res4([a-z])_", name[0]))]
    outputs = {
        layer: kernel.shape[-1:].numel()
        for (layer, leaf), kernel in layers.tensors.items()
        if leaf == "kernel"
    }

    def facts(cfg: CfgNode) -> Iterator[Fact]:
        depth = (50 if max(blocks) == "f" else 101) if blocks else None
        layers = "conv1", "res2a_branch2a", "res2a_branch2c"
        yield from resnet_facts(depth, *map(outputs.get, layers))
        classes = classifier_classes(path, outputs.get("mrcnn_class_logits"))
        if classes is not None:
            yield Fact("MODEL.ROI_HEADS.NUM_CLASSES", classes, f"{classes} classes")
        for layer, key in _SIZES.items():
            if count := outputs.get(layer):
                value = [count] if key.endswith("CONV_DIMS") else count
                yield Fact(key, value, f"{count} outputs of {layer}")
        if (logits := outputs.get("rpn_class_raw")) is not None and logits % 2 == 0:
            yield from anchor_facts(path, logits // 2, cfg)

    return Layout(_CONFIG, lambda cfg: list(facts(cfg)), RCNN_UNTOLD)


@dataclass(frozen=True)
class _Layers:
    """Tensors of the file by layer and kind.

    Attributes:
        path: of the file, for messages.
        tensors: (layer, leaf) → tensor, e.g. ("conv1", "kernel").
        names: (layer, leaf) → name in the file.
    """

    path: str
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)

    def has(self, *layers: str) -> bool:
        """Whether the file has anything of one of the layers."""
        return any(layer in layers for layer, _ in self.names)

    def kernel(self, layer: str) -> Tensor:
        """Weight with Detectron2's order of axes.

        (out, in, kh, kw) of a convolution, (in, out, kh, kw) of a transposed one, (out, in) of a
        dense layer.
        """
        kernel = self._get(layer, "kernel")
        if kernel.ndim not in (2, 4):
            raise self._misshapen(layer, "kernel", "2 or 4 axes")
        return kernel.T if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1)

    def bias(self, layer: str, size: int) -> Tensor:
        """Bias of ``size`` outputs; zero if the file has none."""
        if (layer, "bias") not in self.tensors:
            return torch.zeros(size)
        return self.vector(layer, "bias", size)

    def vector(self, layer: str, leaf: str, size: int) -> Tensor:
        """A tensor with one number for each of ``size`` outputs."""
        vector = self._get(layer, leaf)
        if vector.shape != (size,):
            raise self._misshapen(layer, leaf, f"shape {(size,)}")
        return vector

    def origin(self, layer: str, *leaves: str) -> list[str]:
        """Names in the file of the leaves that it has."""
        return [self.names[layer, leaf] for leaf in leaves if (layer, leaf) in self.names]

    def _get(self, layer: str, leaf: str) -> Tensor:
        try:
            return self.tensors[layer, leaf]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: the layer {layer} is incomplete, it has no {leaf}"
            ) from None

    def _misshapen(self, layer: str, leaf: str, expected: str) -> CheckpointError:
        shape = tuple(self.tensors[layer, leaf].shape)
        return CheckpointError(
            f"{self.path}: {self.names[layer, leaf]} has shape {shape}; expected {expected}"
        )


def _by_layer(
    path: str, tensors: dict[str, Tensor]
) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], str]]:
    """Sort by layer and leaf; the groups around a layer do not matter.

    Raises:
        CheckpointError: two tensors have the same layer and leaf.
    """
    values: dict[tuple[str, str], Tensor] = {}
    names: dict[tuple[str, str], str] = {}
    for name, value in tensors.items():
        layer, _, leaf = f"/{name}".rpartition("/")
        layer = layer.rpartition("/")[2]
        leaf = leaf.partition(":")[0]
        # Old Keras repeats the layer and counts its models: conv1/conv1_W_1:0.
        leaf = re.sub(r"_\d+$", "", leaf.removeprefix(f"{layer}_"))
        key = layer, _OLD_LEAVES.get(leaf, leaf)
        if key in names:
            raise CheckpointError(f"{path}: {names[key]} and {name} are the same tensor of a layer")
        values[key], names[key] = value, name
    return values, names


def _backbone(conversion: Conversion, layers: _Layers) -> None:
    """ResNet and FPN."""
    for target in conversion.expected:
        match = re.fullmatch(r"(backbone\.bottom_up\..*)(?<!norm)\.weight", target)
        if match:
            _normalised(conversion, layers, *_resnet_names(match[1]), match[1])
    for level in range(2, 6):
        _plain(conversion, layers, f"fpn_c{level}p{level}", f"backbone.fpn_lateral{level}")
        _plain(conversion, layers, f"fpn_p{level}", f"backbone.fpn_output{level}")


def _resnet_names(ours: str) -> tuple[str, str]:
    """Our name of a convolution → the layers of convolution and batch normalisation."""
    match = re.fullmatch(r"backbone\.bottom_up\.res(\d)\.(\d+)\.(conv(\d)|shortcut)", ours)
    if match is None:
        return "conv1", "bn_conv1"
    branch = f"branch2{'abc'[int(match[4]) - 1]}" if match[4] else "branch1"
    block = f"{match[1]}{chr(ord('a') + int(match[2]))}_{branch}"
    return f"res{block}", f"bn{block}"


def _rpn(conversion: Conversion, layers: _Layers) -> None:
    head = "proposal_generator.rpn_head"
    _plain(conversion, layers, "rpn_conv_shared", f"{head}.conv")
    _plain(conversion, layers, "rpn_class_raw", f"{head}.objectness_logits", _objectness)
    _plain(conversion, layers, "rpn_bbox_pred", f"{head}.anchor_deltas", _xy_deltas)


def _heads(conversion: Conversion, layers: _Layers) -> None:
    for k in (1, 2):
        names = f"mrcnn_class_conv{k}", f"mrcnn_class_bn{k}"
        _folded(conversion, layers, *names, f"roi_heads.box_head.fc{k}")
    predictor = "roi_heads.box_predictor"
    _plain(conversion, layers, "mrcnn_class_logits", f"{predictor}.cls_score", background_last)
    _plain(
        conversion, layers, "mrcnn_bbox_fc", f"{predictor}.bbox_pred", lambda x: _xy_deltas(x)[4:]
    )
    for k in range(1, 5):
        names = f"mrcnn_mask_conv{k}", f"mrcnn_mask_bn{k}"
        _folded(conversion, layers, *names, f"roi_heads.mask_head.mask_fcn{k}")
    mask_head = "roi_heads.mask_head"
    _plain(conversion, layers, "mrcnn_mask_deconv", f"{mask_head}.deconv")
    _plain(conversion, layers, "mrcnn_mask", f"{mask_head}.predictor", lambda x: x[1:])


def _plain(
    conversion: Conversion,
    layers: _Layers,
    layer: str,
    target: str,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """A layer without normalisation; ``change`` rearranges its outputs."""
    if not layers.has(layer):
        return
    kernel = layers.kernel(layer)
    conversion.put(f"{target}.weight", change(kernel), *layers.origin(layer, "kernel"))
    # A transposed convolution keeps its inputs first.
    bias = layers.bias(layer, kernel.shape[1] if target.endswith(".deconv") else len(kernel))
    conversion.put(f"{target}.bias", change(bias), *layers.origin(layer, "bias"))


def _normalised(
    conversion: Conversion, layers: _Layers, layer: str, norm: str, target: str
) -> None:
    """A convolution of the backbone; the mean of its normalisation absorbs its bias."""
    if not layers.has(layer, norm):
        return
    kernel = layers.kernel(layer)
    conversion.put(f"{target}.weight", kernel, *layers.origin(layer, "kernel"))
    size = len(kernel)
    mean = layers.vector(norm, "moving_mean", size) - layers.bias(layer, size)
    variance = layers.vector(norm, "moving_variance", size) + (_KERAS_EPS - _FROZEN_EPS)
    values = {
        "weight": (layers.vector(norm, "gamma", size), layers.origin(norm, "gamma")),
        "bias": (layers.vector(norm, "beta", size), layers.origin(norm, "beta")),
        "running_mean": (
            mean,
            [*layers.origin(norm, "moving_mean"), *layers.origin(layer, "bias")],
        ),
        "running_var": (variance, layers.origin(norm, "moving_variance")),
    }
    for name, (value, origin) in values.items():
        conversion.put(f"{target}.norm.{name}", value, *origin)


def _folded(conversion: Conversion, layers: _Layers, layer: str, norm: str, target: str) -> None:
    """A layer of a head; its normalisation, which Detectron2 lacks, is multiplied into the weights.

    A convolution over the whole 7x7 region becomes a fully connected layer, inputs ordered C, H, W.
    """
    if not layers.has(layer, norm):
        return
    kernel = layers.kernel(layer)
    size = len(kernel)
    gamma, beta, mean, variance = (
        layers.vector(norm, leaf, size)
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    scale = gamma / (variance + _KERAS_EPS).sqrt()
    weight = kernel * scale.view(-1, *[1] * (kernel.ndim - 1))
    bias = (layers.bias(layer, size) - mean) * scale + beta
    if len(conversion.expected[f"{target}.weight"]) == 2:
        weight = weight.flatten(1)
    scaling = layers.origin(norm, "gamma", "moving_variance")
    shifting = layers.origin(norm, "gamma", "beta", "moving_mean", "moving_variance")
    conversion.put(f"{target}.weight", weight, *layers.origin(layer, "kernel"), *scaling)
    conversion.put(f"{target}.bias", bias, *layers.origin(layer, "bias"), *shifting)


def _objectness(rows: Tensor) -> Tensor:
    """Rows (background, foreground) of each anchor → their difference.

    The softmax of two logits is the sigmoid of their difference.
    """
    return rows[1::2] - rows[: 2 * (len(rows) // 2) : 2]


def _xy_deltas(rows: Tensor) -> Tensor:
    """Rows (dy, dx, log dh, log dw) of each box → (dx, dy, log dw, log dh)."""
    groups = rows[: 4 * (len(rows) // 4)].unflatten(0, (-1, 4))
    return groups[:, [1, 0, 3, 2]].flatten(0, 1)
