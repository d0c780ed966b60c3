"""Shared by the converters: the check of a file against the model it is for, and the report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from instseg.checkpoint.fit import few
from instseg.config.classes import class_count
from instseg.convert.configuration import Choice, Layout, Options, choose
from instseg.errors import CheckpointError
from instseg.modeling.building import building

Shape = tuple[int, ...]

_NAMED = 8
"""Largest number of names that an error lists."""


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a file.

    Attributes:
        choice: the configuration of the model that the result fits.
        mapped: our name → names in the file it was computed from; none where the tensor is zero.
        ignored: name in the file → why it is not needed.
        left_out: as ``mapped``, tensors that were left out on request.
        missing: our names for which the file has nothing.
    """

    choice: Choice
    mapped: Mapping[str, tuple[str, ...]]
    ignored: Mapping[str, str]
    left_out: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]

    @property
    def config(self) -> str:
        """A file, or its name inside ``configs/``."""
        return self.choice.config

    @property
    def overrides(self) -> tuple[Any, ...]:
        """``(KEY, VALUE, ...)`` beside it."""
        return self.choice.overrides

    def __str__(self) -> str:
        lines = [f"mapped    {_origin(old)} -> {new}" for new, old in self.mapped.items()]
        lines += [f"ignored   {old} ({reason})" for old, reason in self.ignored.items()]
        lines += [f"left out  {_origin(old)} -> {new}" for new, old in self.left_out.items()]
        lines += [f"missing   {new}" for new in self.missing]
        lines.append(
            f"{len(self.mapped)} tensors mapped, {len(self.ignored)} ignored, "
            f"{len(self.left_out)} left out, {len(self.missing)} missing"
        )
        lines.append(str(self.choice))
        return "\n".join(lines)


class Converter(Protocol):
    """Reads a file of one authors' format."""

    def __call__(self, path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
        """
        Returns:
            tensors under our names, on the CPU in float32, and what became of the file's.
        Raises:
            CheckpointError: unreadable, of another format, or partial without ``allow_partial``.
            ConfigError: see :func:`~instseg.convert.configuration.choose`.
        """


class Conversion:
    """Collects converted tensors and decides whether they make up the model.

    Attributes:
        expected: our name → shape, of every tensor of the model.
    """

    def __init__(self, path: str, layout: Layout, options: Options) -> None:
        """
        Args:
            path: of the file, for messages.
            layout: what the shapes in the file tell.
            options: the user's.
        """
        self.path = path
        self.options = options
        self.choice = choose(path, layout, options)
        self.expected = _shapes(self.choice.cfg)
        self._values: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[str, ...]] = {}
        self._ignored: dict[str, str] = {}

    def check_shape(self, source: str, shape: Sequence[int], expected: Sequence[int]) -> None:
        """Raise a CheckpointError if a tensor of the file has another shape than expected."""
        if tuple(shape) != tuple(expected):
            raise CheckpointError(
                f"{self.path}: {source} has shape {tuple(shape)}, but {self._model()} needs "
                f"{tuple(expected)}"
            )

    def put(self, name: str, value: Tensor, *sources: str) -> None:
        """Take ``value``, computed from the tensors ``sources`` of the file, as our ``name``."""
        self.check_shape(" + ".join(sources), value.shape, self.expected[name])
        self._values[name] = value.float()
        self._sources[name] = sources

    def _model(self) -> str:
        return " ".join(map(str, (self.choice.config, *self.choice.overrides)))

    def ignore(self, source: str, reason: str) -> None:
        """Note that the model does not need the tensor ``source`` of the file."""
        self._ignored[source] = reason

    def finish(self, names: Iterable[str], example: str) -> tuple[dict[str, Tensor], Report]:
        """Check that nothing is unknown, missing or broken.

        Args:
            names: of every tensor in the file.
            example: a name that files of this format have, for messages.
        Raises:
            CheckpointError: with the names that do not fit.
        """
        names = list(names)
        used_sources = {source for sources in self._sources.values() for source in sources}
        unknown = [name for name in names if name not in used_sources and name not in self._ignored]
        if unknown:
            raise CheckpointError(
                f"{self.path}: {len(unknown)} of its {len(names)} tensors do not belong to "
                f"{self._model()}: {few(unknown, _NAMED)}; expected names like {example}"
            )
        missing = [name for name in self.expected if name not in self._values]
        unwanted = class_tensors(self.choice.cfg) if self.options.leave_out_classes else set()
        missing = [name for name in missing if name not in unwanted]
        if not self._values or (missing and not self.options.allow_partial):
            raise CheckpointError(
                f"{self.path} holds {len(self._values)} of the {len(self.expected)} tensors of "
                f"{self._model()}; missing: {few(missing, _NAMED)}"
                + ("; convert these alone with --allow-partial" if self._values else "")
            )
        broken = [name for name, value in self._values.items() if not value.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"{self.path} has values that are not finite for {few(broken, _NAMED)}"
            )
        report = Report(
            choice=self.choice,
            mapped={k: v for k, v in self._sources.items() if k not in unwanted},
            ignored=self._ignored,
            left_out={k: v for k, v in self._sources.items() if k in unwanted},
            missing=tuple(missing),
        )
        return {k: v for k, v in self._values.items() if k not in unwanted}, report


def class_tensors(cfg: CfgNode) -> set[str]:
    """Names of the tensors of ``cfg``'s model whose shape depends on the number of classes."""
    classes = class_count(cfg)
    if classes is None:
        return set()
    other = cfg.clone()
    other.merge_from_list([classes.key, classes.count + 1])
    return {name for name, _ in _shapes(cfg).items() - _shapes(other).items()}


def _shapes(cfg: CfgNode) -> dict[str, Shape]:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"  # only shapes matter
    with torch.device("meta"), building():
        model = build_model(cfg)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def background_last(rows: Tensor) -> Tensor:
    """(C + 1, ...) with the background first → the same with the background last."""
    return torch.cat([rows[1:], rows[:1]])


def _origin(sources: Sequence[str]) -> str:
    return " + ".join(sources) or "zeros"
