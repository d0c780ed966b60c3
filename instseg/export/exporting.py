"""``instseg export``: the network of a model as ONNX or as an archive of ``torch.export``.

A file holds the raw network only, from the normalised square pictures to what the head gives, with
any batch size.  What follows depends on the data; :meth:`instseg.modeling.SplitModel.postprocess`
does it.  Small networks that the post-processing calls are in files of their own beside it.
"""

import io
import json
import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import instseg
from instseg.checkpoint import atomic_write
from instseg.engine.predictor import Predictor
from instseg.errors import ConfigError
from instseg.modeling import Network, as_split

logger = logging.getLogger(__name__)

INPUT = "images"
METADATA = "instseg"
"""Name of the JSON object that every file carries."""
_OPSET = 19
"""The first with DeformConv."""


def export(predictor: Predictor, format_name: str, path: Path) -> list[Path]:
    """Write the network of ``predictor``.

    The file carries the configuration and the class names, so that
    :class:`~instseg.export.ExportedPredictor` needs nothing else.  Its input ``images`` is (B, 3,
    S, S) float32: pictures stretched to the square of ``INPUT.SQUARE_SIZE``, channels in the order
    of ``INPUT.FORMAT``, minus ``MODEL.PIXEL_MEAN``, divided by ``MODEL.PIXEL_STD``.  Its outputs
    are the model's ``raw_names``.

    Args:
        predictor: with the trained model, not compiled.
        format_name: a key of :data:`FORMATS`.
        path: ends in ``.onnx`` or ``.pt2``.
    Returns:
        the files written: ``path``, and ``STEM.CHILD.EXTENSION`` for every network that the
        post-processing calls.
    Raises:
        ConfigError: an unknown format, another extension, or a model that declares no network.
        ImportError: the format needs packages that are not installed.
        OutputError: a file cannot be written.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"--format is {format_name!r}; expected one of {', '.join(FORMATS)}")
    extension, write = FORMATS[format_name]
    if path.suffix != extension:
        raise ConfigError(f"{path}: the name of a {format_name} file must end in {extension}")
    model = as_split(predictor.model, "exported")
    square = torch.zeros(3, 8, 8, device=predictor.cfg.MODEL.DEVICE)
    example = model.preprocess([{"image": square}] * 2)
    children = model.extra_networks()
    metadata = _metadata(predictor, list(children))
    write(path, Network(model), example, model.raw_names, metadata)
    paths = [path]
    for name, rows in children.items():
        paths.append(child_path(path, name))
        part = predictor.model.get_submodule(name)
        write(paths[-1], part, rows, (name,), metadata)
    return paths


def child_path(path: Path, name: str) -> Path:
    """The file beside ``path`` with the child ``name`` of its model."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def _metadata(predictor: Predictor, children: list[str]) -> str:
    cfg = predictor.cfg.clone()
    cfg.defrost()
    # Of the machine that exported, not of the network.
    cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS_SHA256 = cfg.OUTPUT_DIR = ""
    cfg.MODEL.DEVICE = "cpu"
    return json.dumps(
        {
            "version": instseg.__version__,
            "config": cfg.dump(),
            "class_names": predictor.class_names,
            "children": children,
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


def _traced(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """``network`` as a graph for any number of rows."""
    network = network.eval()
    rows = torch.export.Dim("batch", min=0)
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=({0: rows},))


def _write_onnx(
    path: Path, network: nn.Module, example: Tensor, names: tuple[str, ...], metadata: str
) -> None:
    for package in ("onnx", "onnxscript"):
        import_optional(package)
    program = torch.onnx.export(
        _traced(network, example),
        (example,),
        input_names=[INPUT],
        output_names=list(names),
        # Of a program that is traced already, only the name is taken.
        dynamic_shapes=({0: "batch"},),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props[METADATA] = metadata
    content = program.model_proto.SerializeToString()
    atomic_write(path, lambda file: file.write(content))


def _write_torch_export(
    path: Path, network: nn.Module, example: Tensor, names: tuple[str, ...], metadata: str
) -> None:
    buffer = io.BytesIO()
    torch.export.save(
        _traced(network, example), buffer, extra_files={METADATA: metadata, "outputs": str(names)}
    )
    atomic_write(path, lambda file: file.write(buffer.getbuffer()))


FORMATS: dict[str, tuple[str, Callable[[Path, nn.Module, Tensor, tuple[str, ...], str], None]]] = {
    "onnx": (".onnx", _write_onnx),
    "torch_export": (".pt2", _write_torch_export),
}
"""Extension of the file, and what writes it."""
