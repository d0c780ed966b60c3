"""What the converters share: checking a file against the model it is for, and the report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from detectron2.modeling import build_model
from torch import Tensor

from instseg.categories import Categories
from instseg.checkpoint.fit import few
from instseg.config import load_cfg
from instseg.errors import CheckpointError

Shape = tuple[int, ...]

CLASS_LAYERS = (
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.predictor.",
    "roi_heads.maskiou_head.maskiou.",
    "roi_heads.cls_seg.",
    "head.class_logits.",
    "semantic.",
    "maskiou_net.predictor.",
    "network.semantic.",
)
"""Layers whose size depends on the number of classes."""
_MAX_CLASSES = 100_000
_NAMED = 8
"""How many names an error lists."""


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a file.

    Attributes:
        config: configuration, inside ``configs/``, of the model that the result fits.
        overrides: ``(KEY, VALUE, ...)`` that the file needs beside it, e.g. its class count.
        mapped: our name → names in the file it was computed from; none where it became zero.
        ignored: name in the file → why it is not needed.
        left_out: as ``mapped``, tensors that were left out on request.
        missing: our names for which the file has nothing.
    """

    config: str
    overrides: tuple[Any, ...]
    mapped: Mapping[str, tuple[str, ...]]
    ignored: Mapping[str, str]
    left_out: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"mapped    {_origin(old)} -> {new}" for new, old in self.mapped.items()]
        lines += [f"ignored   {old} ({reason})" for old, reason in self.ignored.items()]
        lines += [f"left out  {_origin(old)} -> {new}" for new, old in self.left_out.items()]
        lines += [f"missing   {new}" for new in self.missing]
        lines.append(
            f"{len(self.mapped)} tensors mapped, {len(self.ignored)} ignored, "
            f"{len(self.left_out)} left out, {len(self.missing)} missing"
        )
        lines.append(f"fits {' '.join(map(str, (self.config, *self.overrides)))}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Options:
    """What the user may ask of any converter.

    Attributes:
        leave_out_classes: drop the layers whose size depends on the number of classes, for training
            on other classes.
        allow_partial: accept a file that holds only some layers of the model.
        classes: what the classes are called; None where the file's data set is to tell.
    """

    leave_out_classes: bool = False
    allow_partial: bool = False
    classes: Categories | None = None


class Converter(Protocol):
    """Reads a file of one authors' format."""

    def __call__(self, path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
        """
        Returns:
            tensors under our names, on the CPU in float32, and what became of the file's.
        Raises:
            CheckpointError: unreadable, of another format, or partial without ``allow_partial``.
        """


class Conversion:
    """Collects converted tensors and decides whether they make up the model.

    Attributes:
        expected: our name → shape, of every tensor of the model.
    """

    def __init__(self, path: str, config: str, overrides: Sequence[Any]) -> None:
        """
        Args:
            path: of the file, for messages.
            config: of the model that the file is for.
            overrides: ``[KEY, VALUE, ...]`` for it.
        """
        self.path = path
        self.config = config
        self.overrides = tuple(overrides)
        cfg = load_cfg(config, [*overrides, "MODEL.DEVICE", "meta"])
        with torch.device("meta"):  # shapes alone are wanted
            model = build_model(cfg)
        self.expected: dict[str, Shape] = {
            name: tuple(value.shape) for name, value in model.state_dict().items()
        }
        self._values: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[str, ...]] = {}
        self._ignored: dict[str, str] = {}

    def check_shape(self, source: str, found: Sequence[int], expected: Sequence[int]) -> None:
        """Raise a CheckpointError if a tensor of the file has not the shape it needs."""
        if tuple(found) != tuple(expected):
            raise CheckpointError(
                f"{self.path}: {source} has shape {tuple(found)}, but {self.config} "
                f"{' '.join(map(str, self.overrides))} needs {tuple(expected)}"
            )

    def put(self, name: str, value: Tensor, *sources: str) -> None:
        """Take ``value``, computed from the tensors ``sources`` of the file, as our ``name``."""
        self.check_shape(" + ".join(sources), value.shape, self.expected[name])
        self._values[name] = value.float()
        self._sources[name] = sources

    def ignore(self, source: str, reason: str) -> None:
        """Note that the model does not need the tensor ``source`` of the file."""
        self._ignored[source] = reason

    def finish(
        self, names: Iterable[str], example: str, options: Options
    ) -> tuple[dict[str, Tensor], Report]:
        """Check that nothing is unknown, missing or broken.

        Args:
            names: of every tensor in the file.
            example: a name that files of this format have, for messages.
            options: see there.
        Raises:
            CheckpointError: with the names that do not fit.
        """
        names = list(names)
        used = {source for sources in self._sources.values() for source in sources}
        unknown = [name for name in names if name not in used and name not in self._ignored]
        if unknown:
            raise CheckpointError(
                f"{self.path}: {len(unknown)} of its {len(names)} tensors do not belong to "
                f"{self.config}: {few(unknown, _NAMED)}; expected names like {example}"
            )
        missing = [name for name in self.expected if name not in self._values]
        if options.leave_out_classes:
            missing = [name for name in missing if not name.startswith(CLASS_LAYERS)]
        if not self._values or (missing and not options.allow_partial):
            raise CheckpointError(
                f"{self.path} holds {len(self._values)} of the {len(self.expected)} tensors of "
                f"{self.config}; missing: {few(missing, _NAMED)}"
                + ("; convert what is there with --allow-partial" if self._values else "")
            )
        broken = [name for name, value in self._values.items() if not value.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"{self.path} has values that are not finite for {few(broken, _NAMED)}"
            )
        dropped = {
            name
            for name in self._values
            if options.leave_out_classes and name.startswith(CLASS_LAYERS)
        }
        report = Report(
            config=self.config,
            overrides=self.overrides,
            mapped={k: v for k, v in self._sources.items() if k not in dropped},
            ignored=self._ignored,
            left_out={k: v for k, v in self._sources.items() if k in dropped},
            missing=tuple(missing),
        )
        return {k: v for k, v in self._values.items() if k not in dropped}, report


def class_override(path: str, rows: int | None) -> list[Any]:
    """The override for a file whose classifier has ``rows`` outputs, one of them background.

    Nothing if the file has none (None) or has COCO's classes, for which the configurations are.

    Raises:
        CheckpointError: an impossible number.
    """
    if rows is None or rows == 81:
        return []
    if not 2 <= rows <= _MAX_CLASSES:
        raise CheckpointError(
            f"{path}: the classifier has {rows} outputs; expected background and at least one class"
        )
    return ["MODEL.ROI_HEADS.NUM_CLASSES", rows - 1]


def background_last(rows: Tensor) -> Tensor:
    """(C + 1, ...) with the background first → the same with the background last."""
    return torch.cat([rows[1:], rows[:1]])


def _origin(sources: Sequence[str]) -> str:
    return " + ".join(sources) or "zeros"
