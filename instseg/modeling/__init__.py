"""Parts of networks that several papers share."""

from instseg.modeling.checks import check_finite
from instseg.modeling.contract import (
    ComparedModel,
    Comparison,
    Network,
    SplitModel,
    VideoModel,
    as_split,
    as_video,
    gives_mask_scores,
)
from instseg.modeling.dense_decoder import DenseDecoder, conv_relu
from instseg.modeling.dense_losses import dice_loss, semantic_loss
from instseg.modeling.dense_maps import at_size, padded_batch, resized_index
from instseg.modeling.dense_targets import IGNORED, NONE, DenseTargets, centres, dense_targets
from instseg.modeling.fast_nms import cross_class_nms, fast_nms
from instseg.modeling.pixels import PixelModel
from instseg.modeling.rcnn import is_rcnn, predict_rcnn
from instseg.modeling.stages import now, stage, stage_times
from instseg.modeling.vgg import VGG, add_vgg_config, build_vgg_backbone
from instseg.modeling.warp import warp

__all__ = [
    "IGNORED",
    "NONE",
    "VGG",
    "ComparedModel",
    "Comparison",
    "DenseDecoder",
    "DenseTargets",
    "Network",
    "PixelModel",
    "SplitModel",
    "VideoModel",
    "add_vgg_config",
    "as_split",
    "as_video",
    "at_size",
    "build_vgg_backbone",
    "centres",
    "check_finite",
    "conv_relu",
    "cross_class_nms",
    "dense_targets",
    "dice_loss",
    "fast_nms",
    "gives_mask_scores",
    "is_rcnn",
    "now",
    "padded_batch",
    "predict_rcnn",
    "resized_index",
    "semantic_loss",
    "stage",
    "stage_times",
    "warp",
]
