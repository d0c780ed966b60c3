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
from instseg.modeling.dense import (
    DenseInstances,
    DenseModel,
    at_size,
    padded_batch,
    renumbered,
    resized_index,
)
from instseg.modeling.dense_network import DenseDecoder, DenseNetwork, conv_relu
from instseg.modeling.dense_targets import IGNORED, NONE, DenseTargets, centres, dense_targets
from instseg.modeling.fast_nms import cross_class_nms, fast_nms
from instseg.modeling.finest_level import (
    FinestLevel,
    build_resnet_finest_level_backbone,
    build_unet_finest_level_backbone,
)
from instseg.modeling.losses import NEITHER, attached_zero, dice_loss, semantic_loss
from instseg.modeling.pixels import PixelModel
from instseg.modeling.rcnn import EvaluatedRCNN, is_rcnn, predict_rcnn
from instseg.modeling.results import (
    CROPPED,
    DENSE,
    MASK_FORMS,
    PlacedMask,
    cropped,
    masks_of,
    result_size,
    wants_cropped,
)
from instseg.modeling.stages import now, stage, stage_times
from instseg.modeling.unet import UNetEncoder, build_unet_backbone
from instseg.modeling.vgg import VGG, build_vgg_backbone
from instseg.modeling.warp import warp

__all__ = [
    "IGNORED",
    "NEITHER",
    "NONE",
    "UNetEncoder",
    "VGG",
    "ComparedModel",
    "Comparison",
    "DenseDecoder",
    "DenseInstances",
    "DenseModel",
    "DenseNetwork",
    "DenseTargets",
    "FinestLevel",
    "Network",
    "PixelModel",
    "SplitModel",
    "VideoModel",
    "as_split",
    "as_video",
    "at_size",
    "attached_zero",
    "build_resnet_finest_level_backbone",
    "build_unet_backbone",
    "build_unet_finest_level_backbone",
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
    "renumbered",
    "resized_index",
    "result_size",
    "masks_of",
    "wants_cropped",
    "PlacedMask",
    "CROPPED",
    "cropped",
    "DENSE",
    "MASK_FORMS",
    "EvaluatedRCNN",
    "semantic_loss",
    "stage",
    "stage_times",
    "warp",
]
