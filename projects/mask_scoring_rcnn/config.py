"""Configuration keys of Mask Scoring R-CNN; defaults are the paper's."""

from detectron2.config import CfgNode

from instseg.config.rules import COUNT, Rule, declare, one_of, where


def add_mask_scoring_rcnn_config(cfg: CfgNode) -> None:
    """Add the keys of the MaskIoU head, which ``ROI_HEADS.NAME`` MaskScoringROIHeads reads.

    The names are those of the authors' code and of earlier ports.
    """
    # Whether there is a MaskIoU head; without it MaskScoringROIHeads is plain Mask R-CNN.
    cfg.MODEL.MASKIOU_ON = True
    # Weight of loss_maskiou in the total loss (section 3.3; 1 in the authors' code).
    cfg.MODEL.MASKIOU_LOSS_WEIGHT = 1.0

    cfg.MODEL.ROI_MASKIOU_HEAD = CfgNode()
    # Class of the head, from ROI_MASKIOU_HEAD_REGISTRY.
    cfg.MODEL.ROI_MASKIOU_HEAD.NAME = "MaskIoUHead"
    # 3x3 convolutions, the last one with stride 2, and their channels (section 3.2, figure 3).
    cfg.MODEL.ROI_MASKIOU_HEAD.NUM_CONV = 4
    cfg.MODEL.ROI_MASKIOU_HEAD.CONV_DIM = 256
    # Outputs of the two fully connected layers after them (section 3.2, figure 3).
    cfg.MODEL.ROI_MASKIOU_HEAD.FC_DIM = 1024
    # True: the loss of the head trains the head alone, and the rest is plain Mask R-CNN.  False: it
    # also trains the mask head and the backbone, as in the paper (section 3.3).
    cfg.MODEL.ROI_MASKIOU_HEAD.STOP_GRADIENT = False


def _mask_on(cfg: CfgNode) -> Rule | None:
    if not cfg.MODEL.MASKIOU_ON:
        return None
    return one_of(True, reason=", as MODEL.MASKIOU_ON scores masks; set MODEL.MASK_ON True")


declare(
    "MODEL",
    {
        "ROI_MASKIOU_HEAD.NUM_CONV": COUNT,
        "MASK_ON": where("MODEL.ROI_HEADS.NAME", "MaskScoringROIHeads", _mask_on),
    },
)
