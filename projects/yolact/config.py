"""Configuration keys of YOLACT; defaults are the authors' for COCO at 550 pixels."""

from detectron2.config import CfgNode

from instseg.config.rules import POSITIVE, Rule, declare, one_of, several, where, whole
from instseg.projects.yolact.boxes import anchors_by_level


def add_yolact_config(cfg: CfgNode) -> None:
    """Add the keys of YOLACT and of its DarkNet-53.

    The side of the square that images are stretched to is ``INPUT.SQUARE_SIZE``, the largest
    number of detections ``TEST.DETECTIONS_PER_IMAGE``.
    """
    cfg.MODEL.YOLACT = CfgNode()
    node = cfg.MODEL.YOLACT
    # Foreground classes.
    node.NUM_CLASSES = 80

    # Sides of the anchors in pixels of the square, a list for each level P3..P7 (section 3.3).
    node.ANCHOR_SCALES = [[24], [48], [96], [192], [384]]
    # Width / height of the anchors, the same for all scales; or such a list for each level P3..P7.
    node.ANCHOR_RATIOS = [1.0, 0.5, 2.0]
    # Give every anchor its width as height too, as the first release did by mistake; all weights
    # released for COCO need it, except those of YOLACT++.
    node.SQUARE_ANCHORS = False

    # One head for all levels (section 3.1); off gives every level its own, as the authors'
    # share_prediction_module, and levels may then differ in their number of anchors.
    node.SHARE_HEAD = True

    # Channels of the pyramid, of the prototype network and of the head (section 4.1).
    node.CHANNELS = 256
    # Normalisation after the convolutions of pyramid and prototype network; "" is none.
    node.NORM = ""
    # The same after the head's shared convolution; "GN" helps training from scratch.
    node.HEAD_NORM = ""
    # 3x3 convolutions of the prototype network before its upsampling (figure 3).
    node.PROTO_CONVS = 3
    # Prototypes k, and coefficients of each anchor (section 3.1).
    node.NUM_PROTOTYPES = 32

    # An anchor is positive from this IoU with its instance on ...
    node.POSITIVE_IOU = 0.5
    # ... and background below this one; in between it is ignored.
    node.NEGATIVE_IOU = 0.4
    # Anchors with more than this part of their area in a crowd are no background.
    node.CROWD_IOU = 0.7
    # Background anchors for each positive one, the hardest of their image.
    node.NEGATIVE_RATIO = 3
    # Weights of the losses (section 3.1; authors' code for the semantic loss of section 3.4, whose
    # layer is left out at 0).
    node.BOX_WEIGHT = 1.5
    node.CLASS_WEIGHT = 1.0
    node.MASK_WEIGHT = 6.125
    node.SEMANTIC_WEIGHT = 1.0
    # Positive anchors of an image that the mask loss looks at, a random choice if there are more.
    node.MASKS_TRAIN = 100

    # Least probability of the best class of an anchor.
    node.SCORE_THRESH_TEST = 0.05
    # "fast" (Fast NMS for each class by itself, section 3.3) or "cross_class" (for all together,
    # every anchor with its best class alone).
    node.NMS = "fast"
    # Anchors suppressed above this IoU.
    node.NMS_THRESH_TEST = 0.5
    # Anchors with the best scores that Fast NMS looks at, for each class.
    node.NMS_TOP_K_TEST = 200
    # Least score of a detection.  At 0, as released, nearly every image has
    # TEST.DETECTIONS_PER_IMAGE detections, most of them with tiny scores.
    node.DETECTION_SCORE_THRESH_TEST = 0.0
    # Cut the coordinates of boxes down to whole pixels, as the authors' code does.
    node.TRUNCATE_BOXES_TEST = True
    # Crop masks with their boxes (section 3.2); off as with the authors' --no_crop.
    node.CROP_MASKS_TEST = True

    cfg.MODEL.DARKNET = CfgNode()
    # Residual blocks of the five stages of DarkNet-53 (YOLOv3, table 1) and channels of its stem.
    cfg.MODEL.DARKNET.DEPTHS = [1, 2, 8, 8, 4]
    cfg.MODEL.DARKNET.STEM_CHANNELS = 32
    # Normalisation after every convolution; "FrozenBN" for batches of few images.
    cfg.MODEL.DARKNET.NORM = "BN"


_LEVELS = 5
_NUMBERS = several(POSITIVE, "numbers")
_EACH = several(_NUMBERS, "", _LEVELS, _LEVELS)


def _anchors(cfg: CfgNode) -> Rule | None:
    """As many for every level, if all of them share one head."""
    node = cfg.MODEL.YOLACT
    if not node.SHARE_HEAD:
        return None
    counts = anchors_by_level(node.ANCHOR_SCALES, node.ANCHOR_RATIOS)
    return Rule(
        lambda x: len(set(counts)) == 1,
        f"lists of equal length, as all levels share one head and ANCHOR_RATIOS "
        f"{node.ANCHOR_RATIOS} gives P3..P7 {counts} anchors a cell; or set SHARE_HEAD False",
    )


declare(
    "MODEL.YOLACT",
    {
        "ANCHOR_SCALES": (Rule(_EACH.fits, f"{_LEVELS} lists, for P3..P7"), _anchors),
        "ANCHOR_RATIOS": Rule(
            lambda x: _NUMBERS.fits(x) or _EACH.fits(x),
            f"numbers, or {_LEVELS} lists of numbers, for P3..P7",
        ),
        "NMS": one_of("fast", "cross_class"),
    },
)
declare(
    "",
    {
        "INPUT.SQUARE_SIZE": where(
            "MODEL.META_ARCHITECTURE",
            "YOLACT",
            whole(1, expected="the side in pixels of the square that YOLACT needs, e.g. 550"),
        )
    },
)
