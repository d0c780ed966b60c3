"""Choose the mapper that turns records into samples, by the configuration."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation

from instseg.data.appearance import build_appearance
from instseg.data.augmentations import build_ssd_augmentations
from instseg.data.image_mapper import Mapper, SSDMapper
from instseg.data.intensity import Intensity
from instseg.data.video_mapper import VideoMapper
from instseg.data.windows import build_geometry, has_windows
from instseg.errors import ConfigError, ImageError

logger = logging.getLogger(__name__)


Map = Callable[[dict[str, Any]], dict[str, Any]]


class ImageMapper:
    """A mapper that replaces unusable images, so that training goes on.

    It replaces up to ``max_unreadable`` images by the last usable record and logs each of them.
    Each process that loads data counts for itself.
    """

    def __init__(self, mapper: Map, max_unreadable: int = 0) -> None:
        """
        Args:
            mapper: turns a record into a sample.
            max_unreadable: 0 replaces no image.
        """
        self.mapper = mapper
        self.max_unreadable = max_unreadable
        self.unreadable: set[str] = set()
        self._last: dict[str, Any] | None = None

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ImageError: the image cannot be used, and no further one may be replaced.
        """
        try:
            sample = self.mapper(dataset_dict)
        except ImageError as error:
            self.unreadable.add(dataset_dict["file_name"])
            if self._last is None or len(self.unreadable) > self.max_unreadable:
                raise
            logger.warning(
                "%s; replaced by another image, %d of at most %d (DATALOADER.MAX_UNREADABLE)",
                error,
                len(self.unreadable),
                self.max_unreadable,
            )
            return self.mapper(self._last)
        self._last = dataset_dict
        return sample


def build_test_mapper(cfg: CfgNode) -> ImageMapper:
    """A mapper without annotations."""
    settings = DatasetMapper.from_config(cfg, is_train=False)
    return ImageMapper(Mapper(**settings, intensity=Intensity.of(cfg)))


def build_train_mapper(cfg: CfgNode, *, augment: bool) -> ImageMapper:
    """The mapper that ``INPUT.AUGMENTATION`` names, with annotations.

    Both augmentations support the steps of :mod:`instseg.data.windows` (before their own) and
    :mod:`instseg.data.appearance` (after them); ``ssd`` also supports videos
    (``INPUT.VIDEO_REFERENCE``).

    Args:
        cfg: its ``INPUT`` node says what happens to images.
        augment: False only resizes, as for testing; used for validation losses.
    Raises:
        ConfigError: values of ``INPUT`` cannot be used.
    """
    _check_crop(cfg)
    settings = DatasetMapper.from_config(cfg, is_train=True)
    settings["intensity"] = Intensity.of(cfg)
    settings["cache_mib"] = cfg.DATALOADER.CACHE_MIB if augment else 0
    mapper: type[Mapper] = Mapper
    crop = None
    if cfg.INPUT.AUGMENTATION == "ssd":
        mapper = SSDMapper
        settings["augmentations"] = build_ssd_augmentations(cfg)
        settings["plain_augmentations"] = settings["augmentations"][-1:]  # the stretching
        settings["recompute_boxes"] = False
        if cfg.INPUT.VIDEO_REFERENCE:
            mapper = VideoMapper
            settings["reference_range"] = tuple(cfg.INPUT.VIDEO_REFERENCE)
            settings["with_flow"] = cfg.INPUT.VIDEO_FLOW
    elif cfg.INPUT.CROP.ENABLED:
        crop = settings["augmentations"].pop(0)
    if augment:
        before, after = build_geometry(cfg, crop), build_appearance(cfg)
        settings["augmentations"] = [*before, *settings["augmentations"], *after]
        # A rotated box is larger than the box of the rotated instance.
        settings["recompute_boxes"] |= has_windows(cfg) and cfg.MODEL.MASK_ON
    else:
        settings["augmentations"] = build_augmentation(cfg, is_train=False)
        settings["recompute_boxes"] = False
    return ImageMapper(mapper(**settings), cfg.DATALOADER.MAX_UNREADABLE if augment else 0)


def _check_crop(cfg: CfgNode) -> None:
    """Refuse to crop polygons without shapely, which Detectron2 uses but does not install."""
    polygons = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
    crops = cfg.INPUT.CROP.ENABLED and cfg.INPUT.AUGMENTATION == "detectron2"
    crops = crops or has_windows(cfg)
    if crops and polygons and importlib.util.find_spec("shapely") is None:
        key = "INPUT.CROP.ENABLED" if cfg.INPUT.CROP.ENABLED else "INPUT.RANDOM_ROTATION or _SCALE"
        raise ConfigError(
            f"{key} needs the package shapely to crop polygons: pip install shapely, or set "
            "INPUT.MASK_FORMAT bitmask"
        )
