"""Removes what training code puts around the weights of a model: entries, and parts of names."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

Rename = Callable[[str], str]

_ENTRIES = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network"),
    *("module", "weights", "params"),
)
"""Entries that may hold the weights of a file; the first that does counts."""
_WRAPPERS = frozenset(
    {
        "module",  # DataParallel, DistributedDataParallel, AveragedModel
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning Fabric
    }
)
"""Parts of names that stand for no layer, at any position."""
_ATTRIBUTES = frozenset({"model", "net", "network"})
"""Attributes that hold a network, as in a Lightning module; the first part of all names."""
_DEEPEST = 4
"""Deepest nesting of entries and of attributes."""


def find_weights(content: dict[Any, Any]) -> dict[Any, Any]:
    """The content of a file with its weights under ``"model"``, whatever the name of their entry.

    If exactly one entry is a dict of tensors, its name does not matter.  A file without weights
    stays as it is.
    """
    weights = _weights_in(content, _DEEPEST)
    if weights is None:
        return content if isinstance(content.get("model"), dict) else {"model": content}
    if weights is content:
        return {"model": content}
    others = {key: value for key, value in content.items() if value is not weights}
    return {**others, "model": weights}


def _weights_in(content: dict[Any, Any], depth: int) -> dict[Any, Any] | None:
    if _is_weights(content):
        return content
    if not depth:
        return None
    for name in _ENTRIES:
        entry = content.get(name)
        if isinstance(entry, dict) and (inner := _weights_in(entry, depth - 1)) is not None:
            return inner
    entries = [value for value in content.values() if isinstance(value, dict)]
    weights = [value for value in entries if _is_weights(value)]
    return weights[0] if len(weights) == 1 else None


def _is_weights(value: dict[Any, Any]) -> bool:
    items = dict.items(value)
    return bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items)


def plain_names(
    weights: "OrderedDict[str, Tensor]", names: Collection[str] | None
) -> "OrderedDict[str, Tensor]":
    """Remove from the names of weights the parts that wrappers around a model put there.

    These are ``module.`` and the like at any position, and the name of the attribute that held the
    model (``model.``).

    Args:
        weights: as in the file.
        names: of the tensors of the target model; the renaming that matches most of these is
            taken.  None if the model is unknown.
    """
    if not weights:
        return weights
    if names is None:
        rename = _for_any_model(weights)
    else:
        known = frozenset(names)
        renames = [_without_attributes(weights, known, first) for first in (_inner, _same)]
        rename = max(renames, key=lambda candidate: _hits(weights, known, candidate))
    renamed = OrderedDict((rename(name), value) for name, value in weights.items())
    changed = [(old, new) for old, new in zip(weights, renamed, strict=True) if old != new]
    if not changed:
        return weights
    logger.info(
        "%d names lose the parts that a wrapper added: %s becomes %s", len(changed), *changed[0]
    )
    if any(name.startswith("module.") for name in weights):
        renamed.pop("n_averaged", None)  # a counter of torch's AveragedModel
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        renamed._metadata = OrderedDict(  # type: ignore[attr-defined]
            (rename(name), version) for name, version in versions.items()
        )
    return renamed


def _for_any_model(names: Iterable[str]) -> Rename:
    rename: Rename = _inner if _distinct(names, _inner) else _same
    for _ in range(_DEEPEST):
        first = {rename(name).partition(".")[0] for name in names}
        if len(first) != 1 or not first <= _ATTRIBUTES:
            break
        rename = _then(rename, *first)
    return rename


def _without_attributes(names: Collection[str], known: frozenset[str], rename: Rename) -> Rename:
    """``rename``, then drop leading parts, as many as match most names in ``known``."""
    renames: list[Rename] = []
    while len(renames) <= _DEEPEST and _distinct(names, rename):
        renames.append(rename)
        first = Counter(rename(name).partition(".")[0] for name in names)
        rename = _then(rename, first.most_common(1)[0][0])
    return max(renames, key=lambda candidate: _hits(names, known, candidate), default=_same)


def _same(name: str) -> str:
    return name


def _inner(name: str) -> str:
    """The name without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _then(rename: Rename, part: str) -> Rename:
    return lambda name: rename(name).removeprefix(f"{part}.")


def _distinct(names: Iterable[str], rename: Rename) -> bool:
    renamed = [rename(name) for name in names]
    return len(set(renamed)) == len(renamed) and all(renamed)


def _hits(names: Iterable[str], known: frozenset[str], rename: Rename) -> int:
    return sum(rename(name) in known for name in names)
