"""What a weight file has for a model, found out before the model is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn


@dataclass(frozen=True)
class Fit:
    """How the tensors of a file meet those of a model.

    Attributes:
        total: tensors of the model that a file can initialise; batch counters are left out, and so
            are the statistics of frozen normalisations that the file has as scale and shift only.
        missing: names in the model that the file has nothing for.
        unexpected: names in the file that the model has no place for.
        reshaped: name -> shapes in the file and in the model, where they differ.
    """

    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def measure(cls, model: nn.Module, weights: Mapping[str, Tensor], by_suffix: bool) -> "Fit":
        """Compare names and shapes.

        Args:
            model: its state dict gives the names and shapes asked for.
            weights: named as in the model.
            by_suffix: names were matched by suffix, so a tensor of another shape kept its own.
        """
        ours = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        for name, module in model.named_modules():
            if isinstance(module, FrozenBatchNorm2d) and f"{name}.weight" in weights:
                for statistic in ("running_mean", "running_var"):
                    if f"{name}.{statistic}" not in weights:
                        ours.pop(f"{name}.{statistic}", None)
        ours = {k: v for k, v in ours.items() if not k.endswith("num_batches_tracked")}
        same = {k for k, v in ours.items() if k in weights and weights[k].shape == v.shape}
        reshaped = {
            k: (tuple(weights[k].shape), tuple(v.shape))
            for k, v in ours.items()
            if k in weights and k not in same
        }
        # A tensor that the model holds under two names is initialised through either.
        filled = {(ours[k].data_ptr(), ours[k].shape) for k in same}
        missing = [k for k, v in ours.items() if k not in reshaped and k not in same]
        missing = [k for k in missing if (ours[k].data_ptr(), ours[k].shape) not in filled]
        # Buffers outside the state dict (pixel mean, anchors) were saved by older versions.
        known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
        unexpected = [k for k in weights if k not in known and "num_batches_tracked" not in k]
        if by_suffix:  # tensors of another shape were left under the name they have in the file
            pairs = [(k, u) for u in unexpected for k in missing if k.endswith(f".{u}")]
            reshaped |= {k: (tuple(weights[u].shape), tuple(ours[k].shape)) for k, u in pairs}
            missing = [k for k in missing if k not in reshaped]
            unexpected = [u for u in unexpected if u not in dict(pairs).values()]
        return cls(len(ours), tuple(missing), tuple(unexpected), reshaped)

    @property
    def initialised(self) -> int:
        """Tensors of the model that the file gives a value."""
        return self.total - len(self.missing) - len(self.reshaped)

    @property
    def complete(self) -> bool:
        """Whether file and model have the same tensors."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        summary = (
            f"{self.initialised} of {self.total} tensors of the model initialised from the file "
            f"({self.initialised / max(self.total, 1):.0%}), {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.reshaped)} of another shape"
        )
        parts = [summary]
        if self.missing:
            parts.append(f"missing in the file: {few(self.missing)}")
        if self.unexpected:
            parts.append(f"unknown to the model: {few(self.unexpected)}")
        if self.reshaped:
            shapes = [f"{k} {a} in the file, {b} here" for k, (a, b) in self.reshaped.items()]
            parts.append(f"other shape: {few(shapes)}")
            if all(a[1:] == b[1:] and a != b for a, b in self.reshaped.values()):
                parts.append("most likely the number of classes differs (NUM_CLASSES)")
        return "; ".join(parts)


def few(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list and, if there are more, how many there are."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if names[limit:] else "")
