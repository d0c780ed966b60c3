"""``zoo://NAME`` for code of stock Detectron2, which loads PyTorch files alone."""

import os
from typing import Any

import torch
from iopath.common.file_io import PathHandler, PathManager, get_cache_dir

from instseg.errors import CheckpointError
from instseg.files import atomic_write
from instseg.shipped import SCHEME, of_address


def register(manager: PathManager) -> None:
    """Make ``zoo://`` known to Detectron2's ``PathManager``; repeatable."""
    manager.register_handler(ZooHandler(), allow_override=True)


class ZooHandler(PathHandler):
    """Gives a PyTorch file with the float32 weights of a shipped model.

    The file lies in the cache of downloads (``$FVCORE_CACHE``).  instseg itself reads the shipped
    file, see :func:`instseg.downloads.local_path`.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [SCHEME]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        from instseg.checkpoint.reading import read_weights

        model = of_address(path)
        assert model is not None, path  # its prefix is ours
        name = f"{model.name}-{model.sha256[:16]}.pth"
        file = os.path.join(get_cache_dir(kwargs.get("cache_dir")), "instseg", name)
        if force or not os.path.isfile(file):
            content = read_weights(path)
            content["model"] = {
                key: value.float() if value.is_floating_point() else value
                for key, value in content["model"].items()
            }
            atomic_write(file, lambda stream: torch.save(content, stream))
        return file

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if mode not in ("r", "rb"):
            raise CheckpointError(f"{path} can only be read")
        return open(self._get_local_path(path), mode, buffering)
