"""Prediction with an exported network."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from instseg.config.files import parse_yaml
from instseg.config.nodes import CfgNode, get_cfg
from instseg.errors import CheckpointError, ConfigError
from instseg.export.engines import Engine, EngineNetwork
from instseg.export.exporting import BETWEEN, child_path
from instseg.inference.precision import FLOAT32
from instseg.inference.predictor import Predictor
from instseg.modeling import SplitModel, VideoModel, as_split, as_video


class ExportedPredictor(Predictor):
    """A :class:`~instseg.inference.predictor.Predictor` whose network runs in another engine.

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
        engine: str = "onnxruntime",
        threads: int | None = None,
        dtype: str = FLOAT32,
    ) -> None:
        """
        Args:
            path: the ``.onnx`` file.
            overrides: ``[KEY, VALUE, ...]``, such as thresholds; keys of the network itself must
                not change.
            masks: as for :class:`~instseg.inference.predictor.Predictor`.
            engine: "onnxruntime", or "openvino" with the extra of that name.
            threads: of the engine; None is its own number, usually that of the processor's cores.
            dtype: number type in which the network computes, other than what the file has in 8
                bits: "float32", or with OpenVINO "bfloat16"; OpenVINO computes in float32, which a
                warning says, where the processor has no instructions for bfloat16.
        Raises:
            CheckpointError: a missing or damaged file, or one that ``instseg export`` did not
                write.
            ConfigError: another kind of file, or an engine that is unknown or not installed.
            ImportError: onnxruntime is not installed.
        """
        self._path = Path(path)
        if self._path.suffix != ".onnx":
            raise ConfigError(
                f"{path}: expected a .onnx file; archives of torch.export can execute code, use "
                "torch.export.load(path).module() if you trust one"
            )
        self._engine = Engine(engine, threads, dtype)
        self._loaded, metadata = self._engine.load(self._path)
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
        # The network computes in what the engine and the file say.
        super().__init__(cfg, overrides=overrides, masks=masks, dtype=FLOAT32)

    @property
    def engine_dtype(self) -> str:
        """Number type in which the engine computes, other than what the file has in 8 bits."""
        return self._loaded.dtype

    def video(self) -> VideoModel | None:
        """The networks for key frames and for frames between; None for a model of images.

        Raises:
            CheckpointError: the file for frames between key frames is missing or damaged.
        """
        original = as_video(self.model)
        if original is None or not self._metadata.get("video"):
            return None
        between, _ = self._engine.load(child_path(self._path, BETWEEN))
        return _ExportedVideo(original, self._loaded, between)

    def _load(self, allow_partial: bool) -> dict[str, Any]:
        model = as_split(self.model, "exported")
        # The file of a model for videos has more outputs than these.
        self._network = lambda images: self._loaded(images)[: len(model.raw_names)]
        for name, path in self._parts.items():
            part, _ = self._engine.load(path)
            setattr(self.model, name, _Single(part))
        # Older files have only the names.
        keys = ("categories", "class_names", "largest_instance")
        stored = {key: self._metadata.get(key) for key in keys}
        return {key: value for key, value in stored.items() if value is not None}


class _ExportedVideo:
    """See :class:`instseg.modeling.VideoModel`; its networks run in another engine."""

    def __init__(self, model: VideoModel, key: EngineNetwork, between: EngineNetwork) -> None:
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

    def __init__(self, network: EngineNetwork) -> None:
        super().__init__()
        self._network = network

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._network(x)[0]
        return output
