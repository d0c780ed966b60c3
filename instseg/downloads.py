"""Find the local file for a path or an address.

Addresses are ``zoo://NAME`` (:mod:`instseg.shipped`), ``hf://ORG/REPO/FILE[@REVISION]``, and the
URLs that Detectron2's ``PathManager`` knows, such as ``https://`` and ``detectron2://``.
"""

import difflib
import os
import re
from pathlib import Path, PurePosixPath

from detectron2.utils.file_io import PathManager

from instseg.errors import CheckpointError, reason_of
from instseg.shipped import SCHEME, of_address, weights_file

_HUB = "hf://"
_WEB = ("https://", "http://", "ftp://")
_PYTORCH = "https://download.pytorch.org/"


def local_path(path: str) -> str:
    """The local file for ``path``; that of an address is downloaded (once).

    Raises:
        CheckpointError: no such file, or the download failed.
    """
    local = path
    if (model := of_address(path)) is not None:
        return str(weights_file(model))
    if "://" in path:
        download = _from_hub if path.startswith(_HUB) else PathManager.get_local_path
        try:
            local = download(path)
        except CheckpointError:
            raise
        except Exception as error:  # every URL handler raises its own exceptions
            raise CheckpointError(
                f"weights {path} cannot be downloaded ({reason_of(error)}); "
                f'give a local path instead, or MODEL.WEIGHTS "" to train from scratch'
            ) from error
    if os.path.isfile(local):
        return local
    if os.path.isdir(local):
        raise CheckpointError(f"checkpoint {path} is a folder; name a weight file in it")
    if os.path.lexists(local):
        raise CheckpointError(f"checkpoint {path} is a device, a pipe, or a link to no file")
    raise CheckpointError(f"checkpoint {path} does not exist" + _nearest(Path(local)))


def suffix_of(path: str, local: str) -> str:
    """The extension of a file, in lower case.

    Args:
        path: its path or address.
        local: the local file.  Its name does not tell the extension if a query ended the URL.
    """
    is_ours = path.startswith((SCHEME, _HUB))
    return PurePosixPath(local if is_ours else path.partition("?")[0]).suffix.lower()


def hash_in_name(path: str) -> str:
    """The first digits of the SHA-256 of a file of PyTorch's own, where its name has them.

    ``vgg16-397923af.pth`` has; elsewhere such digits may be a date.

    Returns:
        8 to 64 hexadecimal digits in lower case; "" if there are none.
    """
    name = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", path.partition("?")[0])
    return name[1] if name is not None and path.startswith(_PYTORCH) else ""


def require_hash(path: str, sha256: str) -> None:
    """Refuse a file that anybody could replace unless its SHA-256 is known.

    Args:
        path: its path or address.
        sha256: as the user gave it, "" for none.
    Raises:
        CheckpointError: a file on the Internet without a hash.
    """
    if not sha256 and path.startswith((_HUB, *_WEB)) and not hash_in_name(path):
        raise CheckpointError(
            f"weights {path} need the SHA-256 that their owner states, as the file there may be "
            "replaced at any time; set MODEL.WEIGHTS_SHA256 to it"
        )


def _from_hub(address: str) -> str:
    """The local copy of ``hf://ORG/REPO/FILE[@REVISION]``."""
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)/([^@]+?)(?:@([^@]+))?", address)
    if match is None:
        raise CheckpointError(f"weights {address}: expected hf://ORG/REPO/FILE or ...FILE@REVISION")
    repository, file, revision = match.groups()
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(
            f"weights {address} need the package huggingface_hub: pip install 'instseg[hub]', or "
            "pip install huggingface_hub"
        ) from None
    # The package reads the variable when it is imported, which may be too early.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    return str(hf_hub_download(repository, file, revision=revision, endpoint=endpoint))


def _nearest(file: Path) -> str:
    """The end of an error about a missing file, with the most similar name in its folder."""
    if not file.parent.is_dir():
        return f": there is no folder {file.parent}"
    similar = difflib.get_close_matches(file.name, os.listdir(file.parent), n=1)
    return f"; did you mean {file.parent / similar[0]}?" if similar else f" in {file.parent}"
