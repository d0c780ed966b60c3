"""Configuration keys of InstanceFCN; defaults are the paper's."""

from detectron2.config import CfgNode

from instseg.config.rules import COUNT, FRACTION, POSITIVE, Rule, declare, number, several, whole


def add_instance_fcn_config(cfg: CfgNode) -> None:
    """Add ``MODEL.INSTANCE_FCN``; its backbone is ``MODEL.VGG``.

    "Pixels" are those of the resized image that the network sees.
    """
    cfg.MODEL.INSTANCE_FCN = CfgNode()
    # Output of the backbone that both branches work on; its stride is the size of a cell in pixels.
    cfg.MODEL.INSTANCE_FCN.IN_FEATURE = "conv5"
    # Channels of the first convolution of either branch (section 3.2).
    cfg.MODEL.INSTANCE_FCN.CONV_DIM = 512
    # k: an object is divided into k x k parts, each with a map of its own (section 3.1; 5 in 4.1).
    cfg.MODEL.INSTANCE_FCN.PARTS = 5
    # m: side of a window in cells (section 3.1); any number, also one that k does not divide.
    cfg.MODEL.INSTANCE_FCN.WINDOW_SIZE = 21
    # Longer side in pixels of an object that fits the window best (section 3.3, from DeepMask).
    cfg.MODEL.INSTANCE_FCN.CANONICAL_SIZE = 128.0
    # A window is positive if its centre is at most so many pixels, in both directions, from the
    # centre of an object whose size is at most so many octaves from canonical (DeepMask's rule; it
    # has 0.25, which leaves gaps between scales that are 1.5 apart).
    cfg.MODEL.INSTANCE_FCN.POSITIVE_OFFSET = 16.0
    cfg.MODEL.INSTANCE_FCN.POSITIVE_OCTAVES = 0.3
    # It is negative if every object is at least so far away in one direction or so many octaves
    # from canonical.
    cfg.MODEL.INSTANCE_FCN.NEGATIVE_OFFSET = 32.0
    cfg.MODEL.INSTANCE_FCN.NEGATIVE_OCTAVES = 1.0
    # Windows drawn from each image, and the share of them that is positive if there are enough
    # (section 3.3).
    cfg.MODEL.INSTANCE_FCN.WINDOWS_PER_IMAGE_TRAIN = 256
    cfg.MODEL.INSTANCE_FCN.POSITIVE_FRACTION_TRAIN = 0.5
    # Shorter sides in pixels at which an image is searched (section 3.3), one or more;
    # INPUT.MAX_SIZE_TEST limits the longer side.
    cfg.MODEL.INSTANCE_FCN.SCALES_TEST = (119, 178, 267, 400, 600, 900)
    # Windows of each scale, by score, that enter the suppression of duplicates.
    cfg.MODEL.INSTANCE_FCN.PRE_NMS_TOPK_TEST = 2000
    # Intersection over union of the tight boxes of two masks from which on the one with the lower
    # score goes (section 3.3).  TEST.DETECTIONS_PER_IMAGE says how many are kept in the end.
    cfg.MODEL.INSTANCE_FCN.NMS_THRESH_TEST = 0.8
    # Probability from which on a pixel belongs to the mask.
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
