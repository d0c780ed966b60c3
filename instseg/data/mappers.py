"""Mappers from data set records to what a model trains on."""

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation

from instseg.errors import ConfigError


def build_train_mapper(cfg: CfgNode, *, augment: bool) -> DatasetMapper:
    """Detectron2's mapper, with annotations, plus ``INPUT.RANDOM_BRIGHTNESS``.

    Args:
        cfg: the ``INPUT`` node says what happens to pictures.
        augment: False resizes as for testing and changes nothing else, for validation losses.
    Raises:
        ConfigError: ``INPUT.RANDOM_BRIGHTNESS`` is no range.
    """
    brightness = tuple(cfg.INPUT.RANDOM_BRIGHTNESS)
    if len(brightness) != 2 or not 0 <= brightness[0] <= brightness[1]:
        raise ConfigError(
            f"INPUT.RANDOM_BRIGHTNESS is {brightness}; expected (smallest, largest) factor"
        )
    settings = DatasetMapper.from_config(cfg, is_train=True)
    if not augment:
        settings["augmentations"] = build_augmentation(cfg, is_train=False)
        settings["recompute_boxes"] = False
    elif brightness != (1.0, 1.0):
        settings["augmentations"] = [*settings["augmentations"], T.RandomBrightness(*brightness)]
    return DatasetMapper(**settings)
