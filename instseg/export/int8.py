"""``instseg export --int8``: exported networks that compute with 8-bit whole numbers.

Calibration runs a network on images and notes the range of every number in it; onnxruntime then
rounds weights (by channel) and what flows between layers to 8 bits.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

from instseg.data.images import read_image
from instseg.errors import ConfigError
from instseg.export.exporting import BETWEEN, INPUT, METADATA, STATE, child_path, import_optional
from instseg.export.predictor import ExportedPredictor
from instseg.files import atomic_write
from instseg.inference.predictor import Predictor
from instseg.inference.video import VideoPredictor
from instseg.modeling import as_split, as_video, cropped

LEAST_IMAGES = 10
"""Number of images without which ranges mean nothing."""
_MEASURED = 5
"""Every so many-th image is not calibrated on; what 8 bits change is measured on it."""
_OPERATORS = ["Add", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "MaxPool"]
"""Names of ONNX's operators that compute in 8 bits; the others take little time."""
_SAME = 0.5
"""Least IoU of the masks of one instance as two networks see it."""

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Int8Report:
    """What 8 bits change, on images that were not calibrated on.

    Attributes:
        calibrated: number of images calibrated on.
        measured: number of the other images.
        detections: those of the network in float32 in the other images.
        kept: the share of them that the 8-bit network finds as well, with a mask of IoU 0.5 or
            more and the same class.
        mask_iou: mean IoU of the masks of these.
    """

    calibrated: int
    measured: int
    detections: int
    kept: float
    mask_iou: float

    def __str__(self) -> str:
        return (
            f"int8: calibrated on {self.calibrated} images; in {self.measured} others it keeps "
            f"{self.kept:.1%} of {self.detections} instances, with masks of mean IoU "
            f"{self.mask_iou:.3f}"
        )


def to_int8(
    path: Path,
    predictor: Predictor,
    images: Sequence[np.ndarray],
    keep_float: Sequence[str] = (),
    confidence: float = 0.3,
) -> Int8Report:
    """Replace the network that ``export`` wrote to ``path`` by one that computes in 8 bits.

    The one for frames between key frames is replaced too; it is calibrated on each image with the
    state that the one before it leaves.  Small networks that the post-processing calls stay.

    Args:
        path: the ``.onnx`` file; it then carries the report.
        predictor: the one that was exported.
        images: see :func:`calibration_images`; of a video in the order of its frames.
        keep_float: beginnings of names of nodes, such as "head", which stay in float32.
        confidence: least score of the instances that are counted.
    Returns:
        what changes.
    Raises:
        ConfigError: a beginning that no node has; no instance in any image.
        ImportError: onnxruntime or onnx is not installed.
        OutputError: a file cannot be written.
    """
    onnx, _ = import_optional("onnx"), import_optional("onnxruntime")
    measured = images[_MEASURED - 1 :: _MEASURED]
    calibrated = [x for i, x in enumerate(images) if i % _MEASURED != _MEASURED - 1]
    files = [path]
    if as_video(predictor.model) is not None:
        files.append(child_path(path, BETWEEN))
    networks = [onnx.load(str(file)) for file in files]
    kept_nodes = [*_nodes(networks, keep_float), *_positions(networks)]
    expected = _results(predictor, measured)
    quantized = [
        _quantized(file, feeds, kept_nodes)
        for file, feeds in zip(files, _feeds(predictor, calibrated), strict=False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for file in path.parent.glob(f"{path.stem}.*onnx"):
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        for file, network, original in zip(files, quantized, networks, strict=True):
            network.metadata_props.clear()
            network.metadata_props.extend(original.metadata_props)
            onnx.save(network, str(Path(folder) / file.name))
        rounded = _results(ExportedPredictor(Path(folder) / path.name), measured)
    report = _compared(expected, rounded, len(calibrated), confidence)
    for file, network in zip(files, quantized, strict=True):
        _write(file, network, {**asdict(report), "keep_float": list(keep_float)})
    return report


def calibration_images(
    images: Sequence[str | os.PathLike[str]], predictor: Predictor
) -> list[np.ndarray]:
    """The images to calibrate on, as ``predictor`` reads them.

    Raises:
        ConfigError: they are too few, or one has a single colour.
        ImageError: an image that cannot be read.
    """
    if len(images) < LEAST_IMAGES:
        raise ConfigError(
            f"--calibrate gives {len(images)} images; expected at least {LEAST_IMAGES}, such as "
            "the network will see, or the ranges of its numbers mean nothing"
        )
    arrays = []
    for file in images:
        array = read_image(file, format=predictor.cfg.INPUT.FORMAT, intensity=predictor.intensity)
        if array.min() == array.max():
            raise ConfigError(
                f"{file}: every pixel has the value {array.min()}; calibrate on images such as the "
                "network will see, or it finds nothing"
            )
        arrays.append(array)
    return arrays


def _nodes(networks: Sequence[Any], beginnings: Sequence[str]) -> list[str]:
    """Names of the nodes that begin so.

    Raises:
        ConfigError: there is none; with the parts that there are.
    """
    names = [node.name for network in networks for node in network.graph.node]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            parts = sorted({name.partition("/")[0] for name in names if "/" in name})
            raise ConfigError(
                f"--keep-float {beginning}: no part of the network has that name; its parts begin "
                f"with {', '.join(parts)}"
            )
    return [name for name in names if name.startswith(tuple(beginnings))]


def _positions(networks: Sequence[Any]) -> list[str]:
    """Names of the nodes between a convolution and the positions that are sampled at.

    In 8 bits a position would be a cell off.
    """
    names: list[str] = []
    for network in networks:
        makers = {output: node for node in network.graph.node for output in node.output}
        grids = [node.input[1] for node in network.graph.node if node.op_type == "GridSample"]
        while grids:
            node = makers.get(grids.pop())
            if node is not None and node.op_type != "Conv" and node.name not in names:
                names.append(node.name)
                grids.extend(node.input)
    return names


def _feeds(predictor: Predictor, arrays: Sequence[np.ndarray]) -> list[Iterator[Feed]]:
    """The inputs of the network for each image, and of the one for frames between."""
    model, video = as_split(predictor.model, "exported"), as_video(predictor.model)

    def batches() -> Iterator[Tensor]:
        return (model.preprocess([predictor.model_input(array)]) for array in arrays)

    def single() -> Iterator[Feed]:
        return ({INPUT: batch.cpu().numpy()} for batch in batches())

    def pairs() -> Iterator[Feed]:
        assert video is not None
        state: tuple[Tensor, ...] | None = None
        for batch in batches():
            if state is not None:
                named = {f"{STATE}{i}": x.cpu().numpy() for i, x in enumerate(state)}
                yield {INPUT: batch.cpu().numpy(), **named}
            with torch.no_grad():
                _, state = video.keyframe(batch)

    return [single(), pairs()]


class _Reader:
    """onnxruntime's ``CalibrationDataReader`` of some inputs."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _quantized(path: Path, feeds: Iterable[Feed], kept_nodes: Sequence[str]) -> Any:
    """The network in ``path``, in 8 bits."""
    onnx = import_optional("onnx")
    quantization = import_optional("onnxruntime.quantization")
    network = onnx.load(str(path))
    # Without this mark onnxruntime asks for steps that the export and optimize() have taken.
    network.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        original, file = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(network, str(original))
        quantization.quantize_static(
            str(original),
            str(file),
            _Reader(feeds),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
            # Weights of 7 bits: processors without VNNI add two products in 16 bits.
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=list(kept_nodes),
        )
        quantized = onnx.load(str(file))
    # onnxruntime gives two nodes one name where a tensor is rounded twice, and refuses that.
    for number, node in enumerate(quantized.graph.node):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.name = f"{node.name}_{number}"
    return quantized


def _results(predictor: Predictor, arrays: Sequence[np.ndarray]) -> list[Instances]:
    """Instances in each image; of a model for videos, in every second as between key frames.

    Their masks are cropped, as those of all images are held at once.
    """
    if predictor.video() is None:
        return [result["instances"] for result in predictor.stream(arrays, masks="cropped")]
    frames = VideoPredictor(predictor, keyframe_interval=2)
    same_size = arrays[0].shape
    # A frame of another size would be a key frame.
    return [cropped(frames(x))["instances"] for x in arrays if x.shape == same_size]


def _compared(
    expected: Sequence[Instances], rounded: Sequence[Instances], calibrated: int, confidence: float
) -> Int8Report:
    ious: list[float] = []
    detections = 0
    for one, other in zip(expected, rounded, strict=True):
        one, other = (x[x.scores >= confidence] for x in (one, other))
        detections += len(one)
        ious += _matched(one, other)
    if not detections:
        raise ConfigError(
            f"the network in float32 finds no instance with a score of {confidence} in "
            f"{len(expected)} images, so what 8 bits change cannot be measured; calibrate on "
            "images such as it was trained on"
        )
    kept = [iou for iou in ious if iou >= _SAME]
    return Int8Report(
        calibrated=calibrated,
        measured=len(expected),
        detections=detections,
        kept=len(kept) / detections,
        mask_iou=float(np.mean(kept)) if kept else 0.0,
    )


def _matched(one: Instances, other: Instances) -> list[float]:
    """IoU of each mask of ``one`` with the best one of its class in ``other`` not taken yet.

    Those that are not the same instance (an IoU below ``_SAME``) take none.
    """
    if not len(one) or not len(other):
        return []
    ious = one.pred_masks.ious(other.pred_masks)
    ious[(one.pred_classes[:, None] != other.pred_classes).numpy()] = 0
    matched = []
    for row in ious:
        best = int(row.argmax())
        matched.append(float(row[best]))
        if row[best] >= _SAME:
            ious[:, best] = 0
    return matched


def _write(path: Path, network: Any, report: dict[str, Any]) -> None:
    for entry in network.metadata_props:
        if entry.key == METADATA:
            entry.value = json.dumps({**json.loads(entry.value), "int8": report})
    content = network.SerializeToString()
    atomic_write(path, lambda file: file.write(content))
