"""Reads weights that Keras saved as HDF5, without opening what the file refers to.

HDF5 can refer to other files (external links and storage, virtual data sets), load filter plugins,
hold Python objects as pickles, and claim sizes it does not have.  A file that Keras wrote has none
of these; the reader refuses a file with any of them before it reads data.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg.downloads import local_path
from instseg.errors import CheckpointError

_MAX_BYTES = 2**30
"""Limit of all tensors together; matterport's ResNet-101 has 0.25 GiB."""
_MAX_DEPTH = 6
# Deflate, shuffle, Fletcher's checksum and LZF are part of HDF5 and h5py; others are plugins.
_FILTERS = {1, 2, 3, 32000}


def read_keras_hdf5(path: str, skipped: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Read every tensor of a file.

    Args:
        path: local path or URL.
        skipped: names of groups whose content is not read.
    Returns:
        {name with the groups around it: CPU tensor in float32}, and the names in skipped groups.
    Raises:
        CheckpointError: missing, damaged or truncated file, or one that holds more than numbers.
        ImportError: h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ImportError(
            "reading .h5 files needs h5py, which is not installed; type: pip install h5py "
            "(the extra 'convert')"
        ) from error
    local = local_path(path)
    try:
        with h5py.File(local, "r") as file:
            arrays = dict(_datasets(file, set()))
            weights = {
                name: data for name, data in arrays.items() if not skipped & {*name.split("/")}
            }
            for name, data in weights.items():
                _check(name, data)
            size = sum(data.size * data.dtype.itemsize for data in weights.values())
            if size > _MAX_BYTES:
                raise CheckpointError(
                    f"claims {size} bytes of tensors; expected at most {_MAX_BYTES}"
                )
            tensors = {
                name: torch.from_numpy(np.asarray(data[()], dtype=np.float32))
                for name, data in weights.items()
            }
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # a damaged file can make the parser raise anything
        raise CheckpointError(
            f"{path} is no HDF5 file, damaged or truncated: {' '.join(str(error).split())[:200]}"
        ) from error
    return tensors, [name for name in arrays if name not in tensors]


def _datasets(group: Any, addresses: set[int], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every HDF5 data set below ``group`` with its name; none may have two names."""
    import h5py

    for key in group:
        name = f"{prefix}{key}"
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise CheckpointError(f"has a link in place of {name}; expected plain data")
        item = group[key]
        address = h5py.h5o.get_info(item.id).addr
        if address in addresses:
            raise CheckpointError(f"holds {name} under another name as well")
        addresses.add(address)
        if isinstance(item, h5py.Dataset):
            yield name, item
        elif isinstance(item, h5py.Group) and name.count("/") < _MAX_DEPTH:
            yield from _datasets(item, addresses, f"{name}/")
        else:
            raise CheckpointError(f"has {name}, which is neither a layer nor a tensor")


def _check(name: str, data: Any) -> None:
    """Refuse anything but an array of floating-point numbers that is stored in this file."""
    if data.dtype.kind != "f" or data.dtype.itemsize > 8 or data.shape is None:
        raise CheckpointError(f"holds {name} of type {data.dtype}; expected numbers")
    if data.is_virtual or data.external:
        raise CheckpointError(f"keeps the data of {name} in another file")
    settings = data.id.get_create_plist()
    filters = {settings.get_filter(i)[0] for i in range(settings.get_nfilters())}
    if not filters <= _FILTERS:
        raise CheckpointError(
            f"needs the HDF5 plugins {sorted(filters - _FILTERS)} for {name}; save it without"
        )
