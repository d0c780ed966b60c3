"""Prediction with an exported network."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instseg.config.files import parse_yaml
from instseg.config.nodes import CfgNode, get_cfg
from instseg.errors import CheckpointError, ConfigError, ProcessError
from instseg.export.exporting import (
    BETWEEN,
    INPUT,
    METADATA,
    STATE,
    child_path,
    import_optional,
)
from instseg.inference.predictor import Predictor
from instseg.modeling import SplitModel, VideoModel, as_split, as_video

_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
"""onnxruntime's name of a number type → NumPy's type."""


class ExportedPredictor(Predictor):
    """A :class:`~instseg.inference.predictor.Predictor` whose network runs in onnxruntime.

    It takes the same images and gives the same results.  It needs only the file that
    ``instseg export --format onnx`` wrote, and those beside it.

    Files that another tool has converted to float16 run as well, as long as it kept their metadata.

    It does not read archives of ``torch.export``, since loading one can execute code.  For an
    archive that you trust, ``torch.export.load(path).module()`` gives the network.

    Example::

        masks = ExportedPredictor("yolact.onnx")("photo.jpg")["instances"].pred_masks
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overrides: tuple[Any, ...] | list[Any] = (),
        masks: str | None = None,
    ) -> None:
        """
        Args:
            path: the ``.onnx`` file.
            overrides: ``[KEY, VALUE, ...]``, such as thresholds; keys of the network itself must
                not change.
            masks: as for :class:`~instseg.inference.predictor.Predictor`.
        Raises:
            CheckpointError: a missing or damaged file, or one that ``instseg export`` did not
                write.
            ConfigError: another kind of file.
            ImportError: onnxruntime is not installed.
        """
        self._path = Path(path)
        if self._path.suffix != ".onnx":
            raise ConfigError(
                f"{path}: expected a .onnx file; archives of torch.export can execute code, use "
                "torch.export.load(path).module() if you trust one"
            )
        self._loaded, metadata = _load(self._path)
        try:
            self._metadata = json.loads(metadata)
            text = self._metadata["config"]
            self._parts = {
                name: child_path(self._path, name) for name in self._metadata["children"]
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} was not written by `instseg export`: it carries no configuration"
            ) from error
        cfg = get_cfg()
        cfg.merge_from_other_cfg(CfgNode(parse_yaml(str(text), f"the configuration in {path}")))
        # The network computes in what the file says.
        super().__init__(cfg, overrides=overrides, masks=masks, dtype="float32")

    def video(self) -> VideoModel | None:
        """The networks for key frames and for frames between; None for a model of images.

        Raises:
            CheckpointError: the file for frames between key frames is missing or damaged.
        """
        original = as_video(self.model)
        if original is None or not self._metadata.get("video"):
            return None
        between, _ = _load(child_path(self._path, BETWEEN))
        return _ExportedVideo(original, self._loaded, between)

    def _load(self, allow_partial: bool) -> dict[str, Any]:
        model = as_split(self.model, "exported")
        # The file of a model for videos has more outputs than these.
        self._network = lambda images: self._loaded(images)[: len(model.raw_names)]
        for name, path in self._parts.items():
            part, _ = _load(path)
            setattr(self.model, name, _Single(part))
        # Older files have only the names.
        keys = ("categories", "class_names", "largest_instance")
        stored = {key: self._metadata.get(key) for key in keys}
        return {key: value for key, value in stored.items() if value is not None}


class _Session(nn.Module):
    """A network in onnxruntime.

    It takes and gives float32, whatever precision other tools have converted the file to.
    """

    def __init__(self, session: Any) -> None:
        """
        Raises:
            ValueError: the network takes something other than floating-point numbers.
        """
        super().__init__()
        self._session = session
        self._process = os.getpid()
        self._dtypes: dict[str, type[np.floating[Any]]] = {}
        for value in session.get_inputs():
            if value.type not in _DTYPES:
                raise ValueError(
                    f"its input {value.name} is {value.type}, expected one of {', '.join(_DTYPES)}"
                )
            self._dtypes[value.name] = _DTYPES[value.type]

    def forward(self, images: Tensor, *state: Tensor) -> list[Tensor]:
        if os.getpid() != self._process:
            raise ProcessError(
                "an exported network was opened before this process was forked, and a fork does "
                "not copy the threads of onnxruntime: make the ExportedPredictor in the process "
                "that uses it, or start that process by multiprocessing.get_context('spawn')"
            )
        names = (INPUT, *(f"{STATE}{i}" for i in range(len(state))))
        inputs = {
            name: np.ascontiguousarray(x.cpu().numpy(), dtype=self._dtypes.get(name))
            for name, x in zip(names, (images, *state), strict=True)
        }
        try:
            outputs = self._session.run(None, inputs)
        except Exception as error:  # onnxruntime's, see _load()
            raise CheckpointError(
                "an exported network cannot be run; its file is damaged, or overrides change what "
                f"the network takes, such as INPUT.SQUARE_SIZE: {error}"
            ) from error
        return [torch.from_numpy(x).float() for x in outputs]


class _ExportedVideo:
    """See :class:`instseg.modeling.VideoModel`; its networks run in onnxruntime."""

    def __init__(self, model: VideoModel, key: _Session, between: _Session) -> None:
        self.keyframe_interval = model.keyframe_interval
        self._model = model
        self._key = key
        self._between = between

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        return self._model.preprocess(batched_inputs)

    def keyframe(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        values = tuple(self._key(images))
        assert isinstance(self._model, SplitModel)  # or it could not have been exported
        count = len(self._model.raw_names)
        return values[:count], values[count:]

    def between(self, images: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self._between(images, *state))

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        return self._model.postprocess(outputs, batched_inputs)


class _Single(nn.Module):
    """Replaces a child of the model by a network with one output."""

    def __init__(self, network: _Session) -> None:
        super().__init__()
        self._network = network

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._network(x)[0]
        return output


def _load(path: Path) -> tuple[_Session, str]:
    """The network in ``path``, and our metadata."""
    onnxruntime = import_optional("onnxruntime")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; `instseg export` writes it")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        network = _Session(session)
    except Exception as error:  # the runtime has a class for every status, none of them public
        hint = ""
        if "DeformConv" in str(error):
            hint = f"; DeformConv needs onnxruntime 1.25, found {onnxruntime.__version__}"
        raise CheckpointError(f"{path} cannot be run{hint}: {error}") from error
    return network, session.get_modelmeta().custom_metadata_map.get(METADATA, "")
