"""Parts of networks that several papers share."""

from instseg.modeling.vgg import VGG, add_vgg_config, build_vgg_backbone

__all__ = ["VGG", "add_vgg_config", "build_vgg_backbone"]
