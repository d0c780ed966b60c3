"""Mappers from data set records to what a model trains on."""

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation


def build_train_mapper(cfg: CfgNode, *, augment: bool) -> DatasetMapper:
    """Detectron2's mapper, with annotations, plus ``INPUT.RANDOM_BRIGHTNESS``.

    Args:
        cfg: the ``INPUT`` node says what happens to pictures.
        augment: False resizes as for testing and changes nothing else, for validation losses.
    """
    settings = DatasetMapper.from_config(cfg, is_train=True)
    if not augment:
        settings["augmentations"] = build_augmentation(cfg, is_train=False)
        settings["recompute_boxes"] = False
    elif tuple(cfg.INPUT.RANDOM_BRIGHTNESS) != (1.0, 1.0):
        brightness = T.RandomBrightness(*cfg.INPUT.RANDOM_BRIGHTNESS)
        settings["augmentations"] = [*settings["augmentations"], brightness]
    return DatasetMapper(**settings)
