"""Read JSON files of users in any encoding, and the numbers and names in them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from instseg.errors import DatasetError
from instseg.files import is_device

_EXACT = 2**53
"""Below this every whole number has its own floating-point number."""
_DIGITS = re.compile(r"\s*(\d{1,9})(\.0*)?\s*", re.ASCII)


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """Content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Args:
        what: name of the file in messages, which begin with it.
    Raises:
        DatasetError: the file cannot be read, or is no JSON.
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
    """Beginning of messages about a data set's file; a ``coco:PATH`` name already has the file."""
    file = os.fspath(json_file)
    return f"data set {file}" if file in name else f"data set {name}: {file}"


def whole(value: Any) -> Any:
    """The int for ``value`` (7.0, or an integer of NumPy); ``value`` itself if there is none."""
    if type(value) is int:
        return value
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return int(number) if abs(number) < _EXACT and number.is_integer() else value
    return value


def size_in_pixels(value: Any) -> Any:
    """:func:`whole` for a width or height, which may also be text such as "96"."""
    digits = _DIGITS.fullmatch(value) if isinstance(value, str) else None
    return int(digits[1]) if digits else whole(value)


def crowd_flag(value: Any) -> Any:
    """0 or 1 for null, true, "0", 1.0 and the like; ``value`` itself for anything else."""
    if value is None or isinstance(value, bool | np.bool_):
        return int(bool(value))
    return {"0": 0, "1": 1}.get(value, value) if isinstance(value, str) else whole(value)


def slashes(file: str, folder: str) -> str:
    """``file`` with slashes for backslashes, if only the former names a file in ``folder``."""
    if "\\" not in file or os.path.exists(os.path.join(folder, file)):
        return file
    turned = file.replace("\\", "/")
    return turned if os.path.exists(os.path.join(folder, turned)) else file
