"""instseg: the classic line of instance-segmentation papers as one Detectron2 extension.

Importing the package touches neither the GPU nor the disk and changes no global setting; names are
resolved on first use, so that ``instseg.install_detectron2`` runs where Detectron2 is still
missing.  Detectron2 learns the addresses ``zoo://NAME`` of shipped models (:mod:`instseg.stock`),
at once or when it is imported.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "get_cfg": "instseg.config.nodes",
    "load_cfg": "instseg.config.nodes",
    "Predictor": "instseg.inference.predictor",
    "VideoPredictor": "instseg.inference.video",
}
__all__ = ["Predictor", "VideoPredictor", "__version__", "get_cfg", "load_cfg"]

if TYPE_CHECKING:
    from instseg.config.nodes import get_cfg, load_cfg
    from instseg.inference.predictor import Predictor
    from instseg.inference.video import VideoPredictor


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'instseg' has no attribute {name!r}")
    try:
        return getattr(import_module(_EXPORTS[name]), name)
    except ModuleNotFoundError as error:
        if error.name in ("cv2", "detectron2", "torch", "torchvision"):
            raise ImportError(
                f"instseg needs {error.name}, which is not installed; type: "
                + (
                    "pip install torch==2.11.0 torchvision==0.26.0"
                    if error.name.startswith("torch")
                    else "python -m instseg.install_detectron2"
                )
            ) from error
        raise


_FILE_IO = "detectron2.utils.file_io"


class _AddressesLater(MetaPathFinder):
    """Has ``zoo://`` registered as soon as Detectron2's ``PathManager`` exists."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _FILE_IO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_addresses(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_addresses(file_io: ModuleType) -> None:
    import_module("instseg.stock").register(file_io.PathManager)


if _FILE_IO in sys.modules:
    _register_addresses(sys.modules[_FILE_IO])
else:
    sys.meta_path.insert(0, _AddressesLater())
