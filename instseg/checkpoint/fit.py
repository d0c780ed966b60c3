"""Compares a weight file with a model before the model is changed."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from instseg.categories import ClassCount
from instseg.modeling.contract import unused_in_inference

Shape = tuple[int, ...]

_FEW_PARTS = 6
"""Number of parts of a model that a message names."""
_CLASSIFIER = 4
"""Largest number of tensors that a released backbone has and ours lacks: classifier, bias."""


@dataclass(frozen=True)
class Fit:
    """How well the tensors of a file fit those of a model.

    It does not count batch counters, nor the statistics of frozen normalisations of which the file
    has only scale and shift.

    Attributes:
        ours: name -> shape of the tensors of the model that a file can initialise.
        theirs: name -> shape of the tensors of the file, named as in the model if it has them.
        missing: names in the model that are not in the file.
        unexpected: names in the file that are not in the model.
        reshaped: name -> shapes in the file and in the model, if they differ.
        classes: of the model, None if unknown.
        classes_there: numbers of classes that a file with these shapes may be for; none if shapes
            differ in other ways.
    """

    ours: Mapping[str, Shape]
    theirs: Mapping[str, Shape]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: Mapping[str, tuple[Shape, Shape]]
    classes: ClassCount | None = None
    classes_there: tuple[int, ...] = ()

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        by_suffix: bool,
        *,
        inference: bool = False,
        classes: ClassCount | None = None,
    ) -> "Fit":
        """Compare names and shapes.

        Args:
            model: its state dict gives the expected names and shapes.
            weights: named as in the model.
            by_suffix: names were matched by suffix, so a tensor of another shape kept the
                name that it has in the file.
            inference: do not ask for the tensors that
                :func:`~instseg.modeling.contract.unused_in_inference` names.
            classes: of the model, for messages.
        """
        tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        for name, module in model.named_modules():
            if isinstance(module, FrozenBatchNorm2d) and f"{name}.weight" in weights:
                for statistic in ("running_mean", "running_var"):
                    if f"{name}.{statistic}" not in weights:
                        tensors.pop(f"{name}.{statistic}", None)
        tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
        fitting = {k for k, v in tensors.items() if k in weights and weights[k].shape == v.shape}
        reshaped = {
            k: (tuple(weights[k].shape), tuple(v.shape))
            for k, v in tensors.items()
            if k in weights and k not in fitting
        }
        shapes = dict(reshaped)
        for name in unused_in_inference(model) if inference else ():
            if name not in fitting:
                tensors.pop(name, None)
                reshaped.pop(name, None)
        # A tensor that the model holds under two names is initialised through either.
        filled = {_storage(tensors[k]) for k in fitting} - {None}
        missing = [k for k in tensors if k not in reshaped and k not in fitting]
        missing = [k for k in missing if _storage(tensors[k]) not in filled]
        # Buffers outside the state dict (pixel mean, anchors) were saved by older versions.
        known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
        unexpected = [k for k in weights if k not in known and "num_batches_tracked" not in k]
        if by_suffix:  # tensors of another shape kept their name in the file
            pairs = [(k, u) for u in unexpected for k in missing if k.endswith(f".{u}")]
            reshaped |= {k: (tuple(weights[u].shape), tuple(tensors[k].shape)) for k, u in pairs}
            missing = [k for k in missing if k not in reshaped]
            unexpected = [u for u in unexpected if u not in dict(pairs).values()]
        return cls(
            {k: tuple(v.shape) for k, v in tensors.items()},
            {k: tuple(v.shape) for k, v in weights.items() if "num_batches_tracked" not in k},
            tuple(missing),
            tuple(unexpected),
            reshaped,
            classes,
            _possible_classes((shapes | reshaped).values(), classes.count) if classes else (),
        )

    @property
    def total(self) -> int:
        """Tensors of the model that a file can initialise."""
        return len(self.ours)

    @property
    def initialised(self) -> int:
        """Tensors of the model that the file gives a value."""
        return self.total - len(self.missing) - len(self.reshaped)

    @property
    def complete(self) -> bool:
        """Whether file and model have the same tensors."""
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def from_scratch(self) -> str:
        """The parts of the model that the file does not initialise."""
        return parts([*self.missing, *self.reshaped], self.ours)

    @property
    def remedy(self) -> str:
        """The most likely cause of a misfit, and what to change."""
        if self.classes and self.reshaped and self.classes_there:
            key, counts = self.classes.key, " or ".join(map(str, self.classes_there))
            ours = self.classes.count
            return f"the file is for {counts} classes, {key} is {ours}: set {key} {counts}"
        one_size = all(len(_difference(*pair)) == 1 for pair in self.reshaped.values())
        if self.reshaped and one_size and not self.classes:
            return "most likely the number of classes differs: set NUM_CLASSES"
        if lengths := _other_lengths(self.theirs, self.ours):
            return (
                f"most likely a model of another depth ({lengths}): give the --config-file that "
                "the weights were trained with"
            )
        if self.missing and not self.reshaped and len(self.unexpected) <= _CLASSIFIER:
            return (
                "most likely weights to start a training from, of a backbone or without the layers "
                "that depend on the classes: train with them first"
            )
        return (
            "most likely weights of another model: give the --config-file that they were trained "
            "with"
        )

    def __str__(self) -> str:
        summary = (
            f"{self.initialised} of {self.total} tensors of the model initialised from the file "
            f"({self.initialised / max(self.total, 1):.0%}), {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.reshaped)} of another shape"
        )
        texts = [summary]
        if self.missing:
            texts.append(f"missing in the file: {parts(self.missing, self.ours)}")
        if self.unexpected:
            texts.append(f"unknown to the model: {parts(self.unexpected, self.theirs)}")
        if self.reshaped:
            shapes = [f"{k} {a} in the file, {b} here" for k, (a, b) in self.reshaped.items()]
            texts.append(f"other shape: {few(shapes)}")
        return "; ".join(texts)


def parts(names: Sequence[str], among: Collection[str]) -> str:
    """Describe ``names`` by the modules that hold no other tensors, the largest first.

    Args:
        names: of tensors, all of them in ``among``.
        among: names of all tensors.
    """
    all_below, named_below = _counts(among), _counts(names)
    modules: dict[str, None] = {}
    for name in names:
        steps = name.split(".")
        prefixes = [".".join(steps[:i]) for i in range(1, len(steps) + 1)]
        whole_modules = (p for p in prefixes if 1 < named_below[p] == all_below.get(p))
        modules[next(whole_modules, name)] = None
    largest_first = sorted(modules, key=lambda module: -named_below[module])
    tensors = "tensor" if len(names) == 1 else "tensors"
    return f"{few(largest_first, _FEW_PARTS)} ({len(names)} {tensors})"


def few(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list and, if there are more, their number."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if names[limit:] else "")


def _difference(theirs: Shape, ours: Shape) -> list[tuple[int, int]]:
    """Pairs of sizes that differ; none if the shapes have different numbers of axes."""
    if len(theirs) != len(ours):
        return []
    return [(a, b) for a, b in zip(theirs, ours, strict=True) if a != b]


def _possible_classes(pairs: Iterable[tuple[Shape, Shape]], count: int) -> tuple[int, ...]:
    """Numbers of classes with which the model's tensors would have the shapes of the file.

    A layer has the same number of outputs for each of C classes, or of C + 1 with background.

    Args:
        pairs: shapes in the file and in the model.
        count: classes of the model.
    """
    possible: set[int] | None = None
    for pair in pairs:
        if len(_difference(*pair)) != 1:
            return ()
        ((their_size, our_size),) = _difference(*pair)
        numbers = set()
        for extra in (0, 1):
            per_class, rest = divmod(our_size, count + extra)
            if not rest and per_class and not their_size % per_class:
                numbers.add(their_size // per_class - extra)
        possible = numbers if possible is None else possible & numbers
    return tuple(sorted(number for number in possible or () if number > 0 and number != count))


def _storage(tensor: Tensor) -> tuple[int, Shape] | None:
    """Address and shape of a tensor's values; None if there are none."""
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.data_ptr() else None


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Name of a tensor or module → number of its tensors."""
    counts: dict[str, int] = {}
    for name in names:
        steps = name.split(".")
        for i in range(1, len(steps) + 1):
            prefix = ".".join(steps[:i])
            counts[prefix] = counts.get(prefix, 0) + 1
    return counts


def _other_lengths(theirs: Iterable[str], ours: Iterable[str]) -> str:
    """Describes the first list of modules whose lengths in the file and the model differ."""
    their_lengths, our_lengths = _lengths(theirs), _lengths(ours)
    for name, length in our_lengths.items():
        if their_lengths.get(name, length) != length:
            return f"{name} has {their_lengths[name]} blocks in the file, {length} here"
    return ""


def _lengths(names: Iterable[str]) -> dict[str, int]:
    """Name of a list of modules → its length, by the highest number in it."""
    lengths: dict[str, int] = {}
    for name in names:
        for match in re.finditer(r"\.(\d{1,4})(?=\.)", name):
            prefix = name[: match.start()]
            lengths[prefix] = max(lengths.get(prefix, 0), int(match[1]) + 1)
    return lengths
