"""Configuration keys of SharpMask; defaults are the paper's."""

from detectron2.config import CfgNode

from instseg.config.rules import Rule, declare, one_of, where


def add_sharpmask_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SHARPMASK``; all keys but those of the refinement are in ``MODEL.DEEPMASK``."""
    cfg.MODEL.SHARPMASK = CfgNode()
    # k: channels of the coarsest mask; every stage halves them (section 3.2: 32).
    cfg.MODEL.SHARPMASK.MASK_DIM = 32
    # Channels of the horizontal nets' second convolution in the first stage; halved likewise.
    cfg.MODEL.SHARPMASK.SKIP_DIM = 32
    # Channels of the first convolution of each horizontal net, which reduces the trunk's map, from
    # the coarsest stage to the finest.
    cfg.MODEL.SHARPMASK.REDUCED_DIMS = (64, 64, 64, 32)
    # Compute the horizontal nets once for an image, not once for each window (section 3.1).
    cfg.MODEL.SHARPMASK.REFACTORED_TEST = True


def _train_mask_size(cfg: CfgNode) -> Rule:
    size = cfg.MODEL.DEEPMASK.PATCH_SIZE
    reason = ", which is PATCH_SIZE, as refined masks have every pixel of the window"
    return one_of(size, reason=reason)


declare(
    "MODEL.DEEPMASK",
    {
        "TRAIN_MASK_SIZE": where("MODEL.META_ARCHITECTURE", "SharpMask", _train_mask_size),
        "SCORE_FRACTION": where(
            "MODEL.META_ARCHITECTURE",
            "SharpMask",
            one_of(0.0, reason=", as SharpMask trains the mask alone"),
        ),
    },
)
