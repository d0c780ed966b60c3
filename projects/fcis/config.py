"""Configuration keys of FCIS; defaults are those of the authors' COCO configuration."""

from detectron2.config import CfgNode

from instseg.config.rules import Rule, declare, one_of, where, whole


def add_fcis_config(cfg: CfgNode) -> None:
    """Add the keys of ``META_ARCHITECTURE`` FCIS.

    Detectron2's keys keep their meaning: ``MODEL.RPN``, ``MODEL.PROPOSAL_GENERATOR.MIN_SIZE`` (used
    for detections too), ``MODEL.ROI_HEADS`` (classes, IoU thresholds, regions per image, NMS and
    score thresholds) and ``MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS``.
    """
    cfg.MODEL.FCIS = CfgNode()
    # Output channels of conv_new_1, the 1x1 convolution between res5 and the score maps.
    cfg.MODEL.FCIS.CONV_DIM = 1024
    # Factor on the learning rate of that convolution, weight and bias (authors' code).
    cfg.MODEL.FCIS.CONV_LR_FACTOR = 3.0
    # k of the k x k position-sensitive parts that a region is cut into (section 2.2: 7); 1 is the
    # paper's ablation without position sensitivity.
    cfg.MODEL.FCIS.GROUP_SIZE = 7
    # Side of the pooled maps, and so of a mask, in bins (authors' code: 21).
    cfg.MODEL.FCIS.POOLED_SIZE = 21
    # Training regions: "ohem" takes the ROI_HEADS.BATCH_SIZE_PER_IMAGE candidates with the largest
    # loss, "random" draws as many with ROI_HEADS.POSITIVE_FRACTION (section 3).
    cfg.MODEL.FCIS.SAMPLING = "ohem"
    # Weight of loss_mask; it makes up for dividing by all regions instead of the positive ones.
    cfg.MODEL.FCIS.MASK_LOSS_WEIGHT = 10.0
    # Least foreground probability inside a mask: for mask targets, voting masks, their average and
    # the final mask.
    cfg.MODEL.FCIS.MASK_THRESH = 0.4
    # Mask voting (section 2.3): "image" is the authors' GPU procedure, behind the published
    # numbers; "box" is their CPU procedure; "none" keeps each region's own mask.
    cfg.MODEL.FCIS.VOTING_TEST = "image"
    # Least box IoU with a detection at which a region votes on its mask.
    cfg.MODEL.FCIS.MERGE_THRESH_TEST = 0.5


def _group_size(cfg: CfgNode) -> Rule:
    bins = cfg.MODEL.FCIS.POOLED_SIZE
    return whole(1, bins, f"1 to POOLED_SIZE, which is {bins}, since each part needs a bin")


declare(
    "MODEL.FCIS",
    {
        "GROUP_SIZE": _group_size,
        "SAMPLING": one_of("ohem", "random"),
        "VOTING_TEST": one_of("image", "box", "none"),
    },
)
declare(
    "MODEL.ROI_HEADS",
    {
        "IN_FEATURES": where(
            "MODEL.ROI_HEADS.NAME",
            "FCISROIHeads",
            Rule(lambda x: len(x) == 1, "one name, as FCIS works on one feature map"),
        )
    },
)
