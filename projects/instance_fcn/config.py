"""Configuration keys of InstanceFCN; defaults are the paper's."""

from detectron2.config import CfgNode

from instseg.config.rules import (
    COUNT,
    FRACTION,
    POSITIVE,
    Rule,
    declare,
    number,
    one_of,
    several,
    where,
    whole,
)


def add_instance_fcn_config(cfg: CfgNode) -> None:
    """Add ``MODEL.INSTANCE_FCN``; its backbone is ``MODEL.VGG``.

    "Pixels" are those of the resized image that the network sees.
    """
    cfg.MODEL.INSTANCE_FCN = CfgNode()
    # Output of the backbone that both branches work on; its stride is the size of a cell in pixels.
    cfg.MODEL.INSTANCE_FCN.IN_FEATURE = "conv5"
    # Channels of the first convolution of either branch (section 3.2).
    cfg.MODEL.INSTANCE_FCN.CONV_DIM = 512
    # k: an instance has k x k parts, each with a map of its own (section 3.1; 5 in 4.1).
    cfg.MODEL.INSTANCE_FCN.PARTS = 5
    # m: side of a window in cells (section 3.1); k need not divide it.
    cfg.MODEL.INSTANCE_FCN.WINDOW_SIZE = 21
    # Longer side in pixels of the instance that fits the window best (section 3.3, from DeepMask).
    cfg.MODEL.INSTANCE_FCN.CANONICAL_SIZE = 128.0
    # A window is positive if an instance's centre is at most POSITIVE_OFFSET pixels away in both
    # directions and its size at most POSITIVE_OCTAVES from canonical (DeepMask's rule; its 0.25
    # leaves gaps between scales that are 1.5 apart).
    cfg.MODEL.INSTANCE_FCN.POSITIVE_OFFSET = 16.0
    cfg.MODEL.INSTANCE_FCN.POSITIVE_OCTAVES = 0.3
    # A window is negative if every instance is at least NEGATIVE_OFFSET pixels away in one
    # direction or its size NEGATIVE_OCTAVES from canonical.
    cfg.MODEL.INSTANCE_FCN.NEGATIVE_OFFSET = 32.0
    cfg.MODEL.INSTANCE_FCN.NEGATIVE_OCTAVES = 1.0
    # Windows drawn from each image, and their positive share if there are enough (section 3.3).
    cfg.MODEL.INSTANCE_FCN.WINDOWS_PER_IMAGE_TRAIN = 256
    cfg.MODEL.INSTANCE_FCN.POSITIVE_FRACTION_TRAIN = 0.5
    # Shorter sides in pixels at which an image is searched (section 3.3), one or more;
    # INPUT.MAX_SIZE_TEST limits the longer side.
    cfg.MODEL.INSTANCE_FCN.SCALES_TEST = (119, 178, 267, 400, 600, 900)
    # Best windows of each scale that enter the suppression of duplicates.
    cfg.MODEL.INSTANCE_FCN.PRE_NMS_TOPK_TEST = 2000
    # Least IoU of the tight boxes of two masks at which the one with the lower score is removed
    # (section 3.3).  TEST.DETECTIONS_PER_IMAGE limits the final number.
    cfg.MODEL.INSTANCE_FCN.NMS_THRESH_TEST = 0.8
    # Least probability of a pixel of the mask.
    cfg.MODEL.INSTANCE_FCN.MASK_THRESH_TEST = 0.5


def _window_size(cfg: CfgNode) -> Rule:
    parts = cfg.MODEL.INSTANCE_FCN.PARTS
    return whole(parts, expected=f"at least PARTS, which is {parts}")


declare(
    "MODEL.INSTANCE_FCN",
    {
        "PARTS": COUNT,
        "WINDOW_SIZE": _window_size,
        "CANONICAL_SIZE": Rule(POSITIVE.fits, "a length in pixels"),
        "POSITIVE_FRACTION_TRAIN": FRACTION,
        "SCALES_TEST": several(number(1), "one or more lengths in pixels"),
        # Cells outside the map have the logit -10 and must stay outside every mask.
        "MASK_THRESH_TEST": number(0.001, 0.999, "a probability, 0.001 to 0.999"),
    },
)
declare(
    "",
    {
        "INPUT.MASK_FORMAT": where(
            "MODEL.META_ARCHITECTURE",
            "InstanceFCN",
            one_of("bitmask", reason=", as InstanceFCN trains on bit masks"),
        ),
        "MODEL.RESNETS.DEPTH": where(
            "MODEL.BACKBONE.NAME",
            "build_stride8_resnet_backbone",
            one_of(50, 101, 152, reason=", as dilated stages need bottleneck blocks"),
        ),
    },
)
