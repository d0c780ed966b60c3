"""Files that appear whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from instseg.errors import OutputError
from instseg.files import is_device

TEMPORARY = ".instseg-tmp"
"""End of the names of temporary files, by which leftovers of a killed process are known."""


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill the file ``path`` so that it is never seen half-written.

    The content goes to a temporary file in the same folder (made if needed), which takes the place
    of ``path`` once it is on the disk.  A device or pipe, such as ``/dev/stdout``, is written to
    instead: a file in its place would take it from every other program.

    Raises:
        OutputError: the system refused; ``path`` is as it was, the temporary file is gone.
    """
    path = Path(path)
    # Not tempfile: its files are private to the user, these get the usual permissions.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        if is_device(path):
            with open(path, "wb") as device:
                write(device)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError of a full disk behind a RuntimeError about file positions.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OutputError(f"cannot write {path}: {cause} ({_free(path)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot sync a folder; the file itself is complete
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_safetensors(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write weights as a safetensors file, atomically.

    Args:
        path: the file to write; the extension ``.safetensors`` tells the reader its format.
        state_dict: tensors of any device, layout in memory and sharing.
        metadata: JSON-able values that :func:`read_weights` gives back beside ``"model"``.
    """
    if metadata and "model" in metadata:
        raise ValueError("metadata cannot hold 'model', the key of the weights")
    # Cloned, since the format refuses tensors that share memory or are not contiguous.
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in state_dict.items()
    }
    header = {"instseg": json.dumps(dict(metadata or {}))}
    atomic_write(path, lambda file: file.write(safetensors.torch.save(tensors, header)))


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free} bytes free in {path.parent}"
    except OSError:
        return f"{path.parent} is no folder that can be used"
