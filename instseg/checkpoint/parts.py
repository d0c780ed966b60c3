"""Loads a part of the weights of one model into the same part of another."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from instseg.checkpoint.fit import few
from instseg.errors import CheckpointError

_OPTION = re.compile(r"(?:matching_heuristics=(?:True|False)|part=.*)")


def split_options(path: str) -> tuple[str, dict[str, str]]:
    """A path, and the options ``matching_heuristics`` and ``part`` that stand at its end.

    Other words of a query stay in the path.  ``part`` beside them is the server's own.

    Raises:
        CheckpointError: an empty part, or two.
    """
    file, _, query = path.rpartition("?")
    words = query.split("&") if file else []
    ours = [word for word in words if _OPTION.fullmatch(word)]
    if len(ours) < len(words):
        ours = [word for word in ours if not word.startswith("part=")]
    if not ours:
        return path, {}
    options = dict(word.split("=", 1) for word in ours)
    if options.get("part") == "" or len(options) < len(ours):
        raise CheckpointError(f"{path}: expected one part of a model, such as {file}?part=backbone")
    rest = "&".join(word for word in words if word not in ours)
    return f"{file}?{rest}" if rest else file, options


def rename_part(
    weights: Mapping[str, Tensor], part: str, model: Mapping[str, Tensor], file: str
) -> dict[str, Tensor]:
    """The tensors of a part, named as in the part of ``model`` that has the same tensors.

    That is the part of the same name if the model has one, else the one with the most tensors of
    the same names and shapes.

    Args:
        weights: of the file, all.
        part: such as ``backbone.bottom_up``.
        model: the state dict to load into.
        file: for messages.
    Raises:
        CheckpointError: the file has no such part, or the model has none or two like it.
    """
    start = f"{part}."
    tensors = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    if not tensors:
        parts = sorted({".".join(name.split(".")[:-1][:2]) for name in weights if "." in name})
        raise CheckpointError(f"{file} has no part {part!r}; it has {few(parts) or 'no parts'}")
    target = start if any(start + name in model for name in tensors) else _like(tensors, model)
    if target is None:
        raise CheckpointError(
            f"{file}: the model has no part, or two, with the tensors of {part!r}, such as "
            f"{few(sorted(tensors))}; change the part in MODEL.WEIGHTS"
        )
    return {target + name: value for name, value in tensors.items()}


def _like(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str | None:
    """Beginning of the names of the part of ``model`` with most of ``tensors``; None if unclear."""
    counts: Counter[str] = Counter()
    for name, value in model.items():
        steps = name.split(".")
        for depth in range(len(steps)):
            theirs = tensors.get(".".join(steps[depth:]))
            if theirs is not None and theirs.shape == value.shape:
                counts["".join(f"{step}." for step in steps[:depth])] += 1
    best = counts.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return None
    return best[0][0]
