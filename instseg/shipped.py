"""The models that instseg ships: weights in ``zoo/``, and ``zoo/manifest.json``, which lists them.

``zoo://NAME`` is the address of such a model, as ``MODEL.WEIGHTS`` and as a configuration.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from instseg.errors import CheckpointError, short
from instseg.files import atomic_write

SCHEME = "zoo://"
MANIFEST = "manifest.json"
RESULTS = ("proposals_segm/AR@1000", "contest/AP50", "segm/AP")
"""Names of the number that tells most about a model, the most telling first."""
_REPAIR = "install instseg again"


@dataclass(frozen=True)
class Measurement:
    """Numbers, and the command that gives them.

    Attributes:
        command: as typed in a checkout.
        values: by name, such as ``contest/AP50`` (per cent) or ``ms`` (milliseconds an image).
    """

    command: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class ShippedModel:
    """An entry of the manifest.

    Attributes:
        name: such as ``PAPER_nuclei``.
        system: name of its project.
        file: name of its weights in the folder of the manifest.
        sha256: of that file, in lower case.
        size: of that file in bytes.
        config: configuration, by its name in ``configs/``.
        overrides: ``(KEY, VALUE, ...)`` on top of it.
        data: data set of the training.
        licence: of that data set.
        commit: of the code that trained it.
        command: that trained it.
        minutes: wall time of the training.
        machine: of the training and of the measured times.
        classes: their names.
        trunk: the model that the training started from; "" if from scratch.
        parameters: their number.
        measurements: on the test set of ``config``.
        other_seeds: the same of trainings with other seeds, to tell the spread.
        check: numbers on the first ``check_images`` images of that set, for tests.
        check_images: number of these images.
    """

    name: str
    system: str
    file: str
    sha256: str
    size: int
    config: str
    overrides: tuple[str, ...]
    data: str
    licence: str
    commit: str
    command: str
    minutes: float
    machine: str
    classes: tuple[str, ...]
    trunk: str
    parameters: int
    measurements: tuple[Measurement, ...]
    other_seeds: tuple[Measurement, ...]
    check: Mapping[str, float]
    check_images: int

    @property
    def address(self) -> str:
        """``zoo://NAME``."""
        return f"{SCHEME}{self.name}"

    @property
    def settings(self) -> list[str]:
        """``[KEY, VALUE, ...]`` that make ``config`` the configuration of this model."""
        own_weights = ("MODEL.WEIGHTS", self.address, "MODEL.WEIGHTS_SHA256", "")
        return [*self.overrides, *own_weights]

    def value(self, name: str) -> float | None:
        """A measured number; None if it was not measured."""
        values = (part.values[name] for part in self.measurements if name in part.values)
        return next(values, None)

    def first_of(self, names: Sequence[str]) -> tuple[str, float] | None:
        """The first of these numbers that was measured, with its name."""
        pairs = ((name, self.value(name)) for name in names)
        return next(((name, value) for name, value in pairs if value is not None), None)


def zoo_folder() -> Path:
    """The folder of the manifest; an editable installation keeps it beside the package."""
    installed = Path(__file__).parent / "zoo"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "zoo"


def shipped_models(folder: Path | None = None) -> tuple[ShippedModel, ...]:
    """The models of a manifest, in its order.

    Args:
        folder: of the manifest; None is :func:`zoo_folder`.
    Raises:
        CheckpointError: the manifest is missing or malformed.
    """
    path = (folder or zoo_folder()) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {_REPAIR}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}; {_REPAIR}") from None
    entries = content.get("models") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise CheckpointError(f'{path}: expected {{"models": [...]}}, found {short(content)}')
    models = tuple(_model(entry, f"{path}: models[{n}]") for n, entry in enumerate(entries))
    names = [model.name for model in models]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise CheckpointError(f"{path}: two models are called {repeated}")
    return models


def shipped_model(name: str) -> ShippedModel:
    """The model of this name.

    Raises:
        CheckpointError: there is none; the message has names that are close.
    """
    models = {model.name: model for model in shipped_models()}
    if name in models:
        return models[name]
    close = difflib.get_close_matches(name, models, n=3, cutoff=0.5)
    if not models:
        hint = f"{zoo_folder() / MANIFEST} lists none"
    elif close:
        hint = f"did you mean {', '.join(close)}?"
    else:
        hint = f"there are {', '.join(models)}"
    raise CheckpointError(f"no shipped model is called {short(name)}; {hint}")


def of_address(address: str) -> ShippedModel | None:
    """The model of ``zoo://NAME``; None for any other path or URL.

    Raises:
        CheckpointError: see :func:`shipped_model`.
    """
    return shipped_model(address.removeprefix(SCHEME)) if address.startswith(SCHEME) else None


def weights_file(model: ShippedModel) -> Path:
    """The file with the weights of a model.

    Raises:
        CheckpointError: there is no such file.
    """
    path = zoo_folder() / model.file
    if not path.is_file():
        raise CheckpointError(
            f"{zoo_folder() / MANIFEST} lists {model.file} for {model.name}, but there is no such "
            f"file beside it; {_REPAIR}"
        )
    return path


def write_manifest(folder: Path, models: Sequence[ShippedModel]) -> None:
    """Write the manifest of ``folder``.

    Raises:
        CheckpointError: a value that could not be read again.
        OutputError: the file cannot be written.
    """
    entries = [asdict(model) for model in models]
    for entry in entries:
        _model(json.loads(json.dumps(entry)), str(entry["name"]))
    text = json.dumps({"models": entries}, indent=2) + "\n"
    atomic_write(folder / MANIFEST, lambda file: file.write(text.encode()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\n" not in value


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_values(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_measurements(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and item.keys() == {"command", "values"}
        and _is_text(item["command"])
        and _are_values(item["values"])
        for item in value
    )


_TEXT = (_is_text, "a line of text")
_NAME = (_matches("[A-Za-z0-9_]+"), "letters, digits and _")
_COUNT = (_is_count, "a whole number above 0")
_VALUES = (_are_values, '{"NAME": NUMBER, ...}')
_MEASUREMENTS = (_are_measurements, '[{"command": ..., "values": {"NAME": NUMBER, ...}}, ...]')
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": _NAME,
    "system": _NAME,
    "file": (_matches(r"[A-Za-z0-9_]+\.safetensors"), "NAME.safetensors"),
    "sha256": (_matches("[0-9a-f]{64}"), "64 hexadecimal digits in lower case"),
    "size": _COUNT,
    "config": _TEXT,
    "overrides": (lambda x: _are_texts(x) and len(x) % 2 == 0, "[KEY, VALUE, ...], all texts"),
    "data": _TEXT,
    "licence": _TEXT,
    "commit": (_matches("[0-9a-f]{7,40}"), "7 to 40 hexadecimal digits"),
    "command": _TEXT,
    "minutes": (lambda x: _is_number(x) and x >= 0, "a number of minutes"),
    "machine": _TEXT,
    "classes": (lambda x: _are_texts(x) and bool(x), "a list of names"),
    "trunk": (lambda x: x == "" or _is_text(x), 'the name of a model, or ""'),
    "parameters": _COUNT,
    "measurements": _MEASUREMENTS,
    "other_seeds": _MEASUREMENTS,
    "check": _VALUES,
    "check_images": _COUNT,
}
"""Key of an entry → what its value has to be, as a test and in words."""


def _model(entry: Any, where: str) -> ShippedModel:
    """An entry of the manifest as an object.

    Args:
        entry: as read.
        where: where it stands, for messages.
    Raises:
        CheckpointError: a key is missing, unknown or has a value of another kind.
    """
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is {short(entry)}; expected an object")
    if different := sorted(set(entry) ^ set(_FIELDS)):
        problem = "unknown" if different[0] in entry else "missing"
        raise CheckpointError(f"{where}: the key {short(different[0])} is {problem}")
    for key, (fits, expected) in _FIELDS.items():
        if not fits(entry[key]):
            raise CheckpointError(f"{where}.{key} is {short(entry[key])}; expected {expected}")
    lists = {key: tuple(entry[key]) for key in ("overrides", "classes")}
    measured = {
        key: tuple(Measurement(**item) for item in entry[key])
        for key in ("measurements", "other_seeds")
    }
    return ShippedModel(**{**entry, **lists, **measured})
