"""``instseg export``: the network of a model as ONNX or as an archive of ``torch.export``.

A file holds the raw network only, from the normalised square images to what the head gives, with
any batch size.  What follows depends on the data; :meth:`instseg.modeling.SplitModel.postprocess`
does it.  Small networks that the post-processing calls get a file each beside it, and so does the
network for the frames of a video between key frames.
"""

import io
import json
import logging
from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import instseg
from instseg.data.intensity import CHANNELS
from instseg.errors import ConfigError
from instseg.files import atomic_write
from instseg.inference.precision import FLOAT32
from instseg.inference.predictor import Predictor
from instseg.modeling import Network, SplitModel, VideoModel, as_split, as_video

logger = logging.getLogger(__name__)

INPUT = "images"
STATE = "state"
"""Inputs and outputs that hold the state of a key frame are called state0, state1, ..."""
BETWEEN = "between"
"""End of the name of the file for frames between key frames."""
METADATA = "instseg"
"""Name of the JSON object that every file carries."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch notes the modules around each node, as a list in Python's notation."""
_OLDEST_FOR_ONNX = (2, 8)
"""PyTorch 2.6 fails to translate batch normalisation; 2.7 is not tried."""
_OPSET = 19
"""The first with DeformConv."""


def export(predictor: Predictor, format_name: str, path: Path) -> list[Path]:
    """Write the network of ``predictor``.

    The file carries the configuration and the categories, so that
    :class:`~instseg.export.ExportedPredictor` needs nothing else.  Its input ``images`` is (B, C,
    S, S) float32: images stretched to the square of ``INPUT.SQUARE_SIZE``, channels in the order
    of ``INPUT.FORMAT``, minus ``MODEL.PIXEL_MEAN``, divided by ``MODEL.PIXEL_STD``.  Its outputs
    are the model's ``raw_names``.

    A model for videos gets two files.  The first gives the state that a key frame leaves behind as
    further outputs, ``state0``, ``state1``, ...; the second takes that state beside ``images``.

    Args:
        predictor: with the trained model, not compiled.
        format_name: a key of :data:`FORMATS`.
        path: ends in ``.onnx`` or ``.pt2``.
    Returns:
        the files written: ``path``, ``STEM.between.EXTENSION`` of a model for videos, and
        ``STEM.CHILD.EXTENSION`` for every network that the post-processing calls.
    Raises:
        ConfigError: an unknown format, another extension, a model that declares no network, or one
            in bfloat16.
        ImportError: the format needs packages that are not installed.
        OutputError: a file cannot be written.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"--format is {format_name!r}; expected one of {', '.join(FORMATS)}")
    extension, write = FORMATS[format_name]
    if path.suffix != extension:
        raise ConfigError(f"{path}: the name of a {format_name} file must end in {extension}")
    if format_name == "onnx":
        _check_torch(torch.__version__)
    model = as_split(predictor.model, "exported")
    if predictor.dtype != FLOAT32:
        raise ConfigError(
            f"a network in {predictor.dtype} cannot be exported; make the predictor with "
            "dtype='float32'"
        )
    cfg = predictor.cfg
    square = torch.zeros(CHANNELS[cfg.INPUT.FORMAT], 8, 8, device=cfg.MODEL.DEVICE)
    example = model.preprocess([{"image": square}] * 2)
    children = model.extra_networks()
    video = as_video(predictor.model)
    metadata = _metadata(predictor, list(children), video is not None)
    graphs = _graphs(path, model, video, example)
    for name, rows in children.items():
        part = predictor.model.get_submodule(name)
        graphs.append(Graph(child_path(path, name), part, (rows,), (INPUT,), (name,)))
    for graph in graphs:
        write(graph, metadata)
    return [graph.path for graph in graphs]


def _check_torch(version: str) -> None:
    """Raise a ConfigError if this version of PyTorch cannot write ONNX."""
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_FOR_ONNX:
        oldest = ".".join(map(str, _OLDEST_FOR_ONNX))
        raise ConfigError(
            f"--format onnx needs torch >= {oldest} and this is {version}; install a newer one, or "
            "choose --format torch_export"
        )


@dataclass(frozen=True)
class Graph:
    """A network to be written to a file, with examples of its inputs of two rows each."""

    path: Path
    network: nn.Module
    examples: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Keyframe(nn.Module):
    """Outputs of a key frame, then its state."""

    def __init__(self, model: VideoModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs, state = self.model.keyframe(images)
        return *outputs, *state


class _Between(nn.Module):
    """Outputs of a frame between key frames."""

    def __init__(self, model: VideoModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return self.model.between(images, state)


def _graphs(
    path: Path, model: SplitModel, video: VideoModel | None, example: Tensor
) -> list[Graph]:
    """The graphs of the model itself: one, or two for a model for videos."""
    if video is None:
        return [Graph(path, Network(model), (example,), (INPUT,), model.raw_names)]
    with torch.no_grad():
        _, state = video.keyframe(example)
    names = tuple(f"{STATE}{i}" for i in range(len(state)))
    key = Graph(path, _Keyframe(video), (example,), (INPUT,), (*model.raw_names, *names))
    inputs, examples = (INPUT, *names), (example, *state)
    between = child_path(path, BETWEEN)
    return [key, Graph(between, _Between(video), examples, inputs, model.raw_names)]


def child_path(path: Path, name: str) -> Path:
    """The file beside ``path`` with the child ``name`` of its model."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def _metadata(predictor: Predictor, children: list[str], video: bool) -> str:
    cfg = predictor.cfg.clone()
    cfg.defrost()
    # These belong to the machine that exported, not to the network.
    cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS_SHA256 = cfg.OUTPUT_DIR = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.pop("CATEGORIES", None)  # the predictor's, written below, count
    return json.dumps(
        {
            "version": instseg.__version__,
            "config": cfg.dump(),
            "categories": predictor.categories.as_coco() if predictor.categories.named else None,
            "largest_instance": predictor.largest_instance,
            "children": children,
            "video": video,
        }
    )


def import_optional(name: str) -> Any:
    """An optional package.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    if find_spec(name) is None:
        raise ImportError(
            f"this needs {name}, which is not installed; type: pip install onnx onnxruntime "
            "onnxscript (the extra 'export')"
        )
    return import_module(name)


def _traced(graph: Graph) -> torch.export.ExportedProgram:
    """The network as a graph for any number of rows."""
    network = graph.network.eval()
    rows = {0: torch.export.Dim("batch", min=0)}
    shapes: dict[str, Any] = {}
    for parameter in signature(network.forward).parameters.values():
        several = parameter.kind is Parameter.VAR_POSITIONAL
        shapes[parameter.name] = (rows,) * (len(graph.examples) - len(shapes)) if several else rows
    with torch.no_grad():
        return torch.export.export(network, graph.examples, dynamic_shapes=shapes)


def _write_onnx(graph: Graph, metadata: str) -> None:
    for package in ("onnx", "onnxscript"):
        import_optional(package)
    program = torch.onnx.export(
        _traced(graph),
        graph.examples,
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        # The program is traced already: torch takes only the name of the axis.
        dynamic_shapes=tuple({0: "batch"} for _ in graph.examples),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        scopes = literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        # The name begins with the part of the model, by which other tools can choose a precision.
        node.name = "/".join(filter(None, [*scopes[-2:-1], node.name]))
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props[METADATA] = metadata
    content = program.model_proto.SerializeToString()
    atomic_write(graph.path, lambda file: file.write(content))


def _write_torch_export(graph: Graph, metadata: str) -> None:
    buffer = io.BytesIO()
    extra = {METADATA: metadata, "outputs": str(graph.outputs)}
    torch.export.save(_traced(graph), buffer, extra_files=extra)
    atomic_write(graph.path, lambda file: file.write(buffer.getbuffer()))


FORMATS: dict[str, tuple[str, Callable[[Graph, str], None]]] = {
    "onnx": (".onnx", _write_onnx),
    "torch_export": (".pt2", _write_torch_export),
}
"""Name of a format → extension of its files, and the function that writes one."""
