"""instseg: the classic line of instance-segmentation papers as one Detectron2 extension.

Importing the package touches neither the GPU nor the disk and changes no global setting; names are
resolved on first use, so that ``instseg.install_detectron2`` runs where Detectron2 is still
missing.
"""

from importlib import import_module
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
        if error.name in ("detectron2", "torch", "torchvision"):
            raise ImportError(
                f"instseg needs {error.name}, which is not installed; type: "
                + (
                    "python -m instseg.install_detectron2"
                    if error.name == "detectron2"
                    else "pip install torch==2.11.0 torchvision==0.26.0"
                )
            ) from error
        raise
