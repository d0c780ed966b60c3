"""Reads weight files of any kind without executing anything they contain.

A pickle may call any function while it is read, and the usual weight formats are pickles.  Here
PyTorch files go through its ``weights_only`` reader, safetensors files hold no code, and the
``.pkl`` files of Detectron's model zoos go through :mod:`instseg.pickles`.  The caller
gets a :class:`CheckpointError` for any damaged or hostile file.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from instseg.checkpoint.fit import few
from instseg.checkpoint.wrappers import find_weights, plain_names
from instseg.downloads import hash_in_name, local_path, suffix_of
from instseg.errors import CheckpointError, reason_of
from instseg.pickles import SCALARS, BlockedGlobal, load_arrays
from instseg.shipped import of_address

logger = logging.getLogger(__name__)

_KEY = "MODEL.WEIGHTS_SHA256"
# Limit of the bytes by which tensors may exceed their storage; views repeat values.
_MOST_REPEATED = 2**30
_NOT_WEIGHTS = (
    (b"<!doctype", "it is an HTML page, so the download failed"),
    (b"<html", "it is an HTML page, so the download failed"),
    (b"<?xml", "it is an XML page, so the download failed"),
    (b"version https://git-lfs", "it is a Git LFS pointer; fetch the file with `git lfs pull`"),
)


def read_weights(path: str | os.PathLike[str], sha256: str = "") -> dict[str, Any]:
    """Read a weight file into Detectron2's form.

    Args:
        path: a local path or an address, see :mod:`instseg.downloads`.  ``.safetensors``
            and ``.pkl`` (Detectron2 zoo, Caffe2) are told by their extension; any other file is a
            PyTorch file (``.pyth``: pycls).
        sha256: the expected SHA-256 of the file in hexadecimal; "" for that in the manifest
            of shipped models or in the name of a downloaded file, otherwise for any.
    Returns:
        ``{"model": {name: CPU tensor}, ...}``; the other entries are those that the file holds
        beside its weights, in a safetensors file the JSON object under ``"instseg"`` in its
        metadata.  A PyTorch file may hold its weights under another name, see
        :func:`~instseg.checkpoint.wrappers.find_weights`.
    Raises:
        CheckpointError: the file is missing, corrupt, unsafe, not the expected one, holds no
            weights, or holds NaN.
    """
    path = os.fspath(path)
    local = local_path(path)
    try:
        with open(local, "rb") as file:
            # One open handle for hash and content, so that the verified file is the file read.
            digest = _verify(file, path, local, sha256)
            return _parse(file, path, local, suffix_of(path, local), digest)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def read_released(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a file of other authors, named as their model names them.

    Raises:
        CheckpointError: see :func:`read_weights`.
    """
    return plain_names(read_weights(path)["model"], None)


def peek_iteration(path: str | os.PathLike[str]) -> int | None:
    """The iteration a training checkpoint was written at, without reading its tensors.

    Returns:
        None if the file is unreadable (missing, truncated, no checkpoint), -1 if it names none.
    """
    try:
        loaded = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
        iteration = loaded.get("iteration", -1)
        return iteration if "model" in loaded and isinstance(iteration, int) else None
    except Exception:  # a damaged file can make the parser raise anything
        return None


def _verify(file: BinaryIO, path: str, local: str, sha256: str) -> str:
    """Compare the SHA-256 of ``file`` with the expected one; returns it, "" if none is expected."""
    expected, source = sha256.strip().lower(), _KEY
    if expected and not re.fullmatch("[0-9a-f]{64}", expected):
        raise CheckpointError(f"{_KEY} is {sha256!r}; expected 64 hexadecimal digits")
    if not expected and (model := of_address(path)) is not None:
        expected, source = model.sha256, f"that of {model.file} in the manifest"
    elif not expected:
        expected, source = hash_in_name(path), "the beginning of it in the name"
    if not expected:
        return ""
    digest = _digest(file)
    if not digest.startswith(expected):
        raise CheckpointError(
            f"checkpoint {path} has SHA-256 {digest}, but {source} is {expected}; "
            f"it is another file, or damaged" + _cached(path, local)
        )
    logger.info("%s has the expected SHA-256 %s", path, digest)
    return digest


def _parse(file: BinaryIO, path: str, local: str, suffix: str, digest: str) -> dict[str, Any]:
    """Read ``file``, turning every failure into a CheckpointError that names ``path``."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(64).lstrip().lower()
    hints = [hint for magic, hint in _NOT_WEIGHTS if start.startswith(magic)]
    try:
        if not size or hints:
            raise ValueError(hints[0] if hints else "it is empty")
        file.seek(0)
        return {".pkl": _read_pkl, ".safetensors": _read_safetensors, ".pyth": _read_pycls}.get(
            suffix, _read_torch
        )(file)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} {error}") from error
    except BlockedGlobal as error:
        raise CheckpointError(
            f"checkpoint {path} refers to {error}, which is not plain data and could execute code; "
            f"it was blocked, nothing was executed (SHA-256 {digest or _digest(file)}); "
            f"if you trust the file, save its tensors alone, as a dict or as .safetensors"
        ) from error
    except Exception as error:  # a damaged file can make the parsers raise anything
        raise CheckpointError(
            f"checkpoint {path} is corrupt ({size} bytes): {reason_of(error)}"
            + _cached(path, local)
        ) from error


def _load_torch(file: BinaryIO) -> dict[Any, Any]:
    if zipfile.is_zipfile(file):
        # PyTorch writes a checksum of every tensor, but does not check it when reading.
        with zipfile.ZipFile(file) as archive:
            packed = [
                entry.filename
                for entry in archive.infolist()
                if entry.compress_type != zipfile.ZIP_STORED
                or entry.compress_size != entry.file_size
            ]
            # A few compressed bytes may become gigabytes; PyTorch compresses nothing.
            damaged = None if packed else archive.testzip()
        if packed:
            raise ValueError(f"its part {packed[0]} is compressed, which torch.save does not do")
        if damaged:
            raise ValueError(f"the checksum of its part {damaged} is wrong")
    file.seek(0)
    try:
        with torch.serialization.safe_globals(SCALARS):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise BlockedGlobal(blocked[1]) from error
        # The rest of PyTorch's message advises to turn its protection off.
        reason = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
        raise ValueError(reason[1] if reason else "it is no pickle of tensors") from error
    except RuntimeError as error:
        if "weights_only" in str(error):  # this message advises the same
            raise ValueError(
                "it is a TorchScript archive or a tar file; expected a dict"
            ) from error
        raise
    if not isinstance(loaded, dict):
        raise CheckpointError(f"holds a {type(loaded).__name__}; expected a dict of tensors")
    return loaded


def _read_torch(file: BinaryIO) -> dict[str, Any]:
    return _checked(find_weights(_load_torch(file)))


def _read_pycls(file: BinaryIO) -> dict[str, Any]:
    loaded = _load_torch(file)
    if not isinstance(loaded.get("model_state"), dict):
        raise CheckpointError("has no 'model_state'; a .pyth file is expected to come from pycls")
    weights = {k: v for k, v in loaded["model_state"].items() if "num_batches_tracked" not in k}
    return _checked({"model": weights, "__author__": "pycls", "matching_heuristics": True})


def _read_safetensors(file: BinaryIO) -> dict[str, Any]:
    content = file.read()
    weights = safetensors.torch.load(content)
    # The package gives the metadata of files only by path; it has just validated this header.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    extra = json.loads(header.get("__metadata__", {}).get("instseg", "{}"))
    return _checked({**extra, "model": weights})


def _read_pkl(file: BinaryIO) -> dict[str, Any]:
    loaded = load_arrays(file)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"holds a {type(loaded).__name__}; expected a dict of arrays")
    if "model" in loaded and "__author__" in loaded:
        weights = loaded["model"]
        extra = {k: v for k, v in loaded.items() if isinstance(v, str | int | float)}
    else:  # Caffe2; files of whole detectors have "blobs", those of classifiers do not
        blobs = loaded.get("blobs", loaded)
        weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
        extra = {"__author__": "Caffe2", "matching_heuristics": True}
    tensors = {
        k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in weights.items()
    }
    return _checked({**extra, "model": tensors})


def _checked(checkpoint: dict[Any, Any]) -> dict[str, Any]:
    """The checkpoint with "model" as a new dict of dense tensors, or an error that says what it is.

    Keeps module versions (``_metadata`` of a state dict), but no other attributes.
    """
    source = checkpoint["model"]
    weights: OrderedDict[str, Tensor] = OrderedDict()
    claimed = 0
    for name, value in dict.items(source):
        if not isinstance(name, str) or not isinstance(value, Tensor):
            keys = ", ".join(map(str, list(source)[:5]))
            raise CheckpointError(
                f"is no dict of tensors: {name!r} is a {type(value).__name__} (keys: {keys}); "
                f"expected names with tensors, alone or under the key 'model'"
            )
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(
                f"holds {name!r} as a tensor that is not dense; expected dense ones"
            )
        claimed += max(value.numel() * value.itemsize - value.untyped_storage().nbytes(), 0)
        if claimed > _MOST_REPEATED:
            raise CheckpointError(
                f"holds {name!r} as a tensor of {value.numel()} values, but stores fewer; "
                "expected each value by itself, as .contiguous() makes it"
            )
        weights[name] = value
    # Infinity may be intended, as in a mask; torch cannot look for NaN in types of one byte.
    broken = [
        name
        for name, value in weights.items()
        if value.is_floating_point() and value.itemsize > 1 and value.isnan().any()
    ]
    if broken:
        raise CheckpointError(
            f"has values that are not a number (NaN) for {few(broken)}; it is damaged, or comes "
            "from a training that diverged"
        )
    metadata = getattr(source, "_metadata", None)
    if isinstance(metadata, dict):
        versions = {k: v.get("version") for k, v in metadata.items() if isinstance(v, dict)}
        weights._metadata = OrderedDict(  # type: ignore[attr-defined]
            (k, {"version": v}) for k, v in versions.items() if isinstance(v, int)
        )
    return {**checkpoint, "model": weights}


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _cached(path: str, local: str) -> str:
    """The end of an error about a downloaded file: a bad one stays cached until deleted."""
    if of_address(path) is not None:
        return "; install instseg again"
    return "" if local == path else f"; delete {local} to download it again"
