"""Parts of networks that several papers share."""

from instseg.modeling.fast_nms import cross_class_nms, fast_nms
from instseg.modeling.vgg import VGG, add_vgg_config, build_vgg_backbone

__all__ = ["VGG", "add_vgg_config", "build_vgg_backbone", "cross_class_nms", "fast_nms"]
