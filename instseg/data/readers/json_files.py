"""JSON files of users, whatever encoding the tool that wrote them chose."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from instseg.errors import DatasetError
from instseg.files import is_device

_EXACT = 2**53
"""Floating-point numbers below this tell whole numbers apart."""
_DIGITS = re.compile(r"\s*(\d{1,9})(\.0*)?\s*", re.ASCII)


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """Content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Args:
        what: the file belongs to; messages begin with it.
    Raises:
        DatasetError: it cannot be read, or is no JSON.
    """
    if is_device(path):
        raise DatasetError(f"{what} cannot be read: it is no regular file")
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DatasetError(f"{what} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{what} is not JSON: {error}") from None


def file_of(name: str, json_file: str | os.PathLike[str]) -> str:
    """What messages about the file of a data set begin with; a coco:PATH name is its file."""
    file = os.fspath(json_file)
    return f"data set {file}" if file in name else f"data set {name}: {file}"


def whole(value: Any) -> Any:
    """The int that ``value`` stands for (7.0, or one of NumPy's), or ``value`` itself if none."""
    if type(value) is int:
        return value
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return int(number) if abs(number) < _EXACT and number.is_integer() else value
    return value


def size_in_pixels(value: Any) -> Any:
    """As :func:`whole`, for a width or height, which may also be written as text: "96"."""
    digits = _DIGITS.fullmatch(value) if isinstance(value, str) else None
    return int(digits[1]) if digits else whole(value)


def crowd_flag(value: Any) -> Any:
    """0 or 1 for what stands for them: null, true, "0", 1.0; or ``value`` itself if none."""
    if value is None or isinstance(value, bool | np.bool_):
        return int(bool(value))
    return {"0": 0, "1": 1}.get(value, value) if isinstance(value, str) else whole(value)


def slashes(file: str, folder: str) -> str:
    """``file`` with / for the backslashes of Windows, if only that names a file in ``folder``."""
    if "\\" not in file or os.path.exists(os.path.join(folder, file)):
        return file
    turned = file.replace("\\", "/")
    return turned if os.path.exists(os.path.join(folder, turned)) else file
