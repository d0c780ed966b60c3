"""Configuration keys of SharpMask; defaults are the paper's."""

from detectron2.config import CfgNode


def add_sharpmask_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SHARPMASK``; everything but the refinement is in ``MODEL.DEEPMASK``."""
    cfg.MODEL.SHARPMASK = CfgNode()
    # k: channels of the coarsest mask, halved by every stage (section 3.2: 32).
    cfg.MODEL.SHARPMASK.MASK_DIM = 32
    # Channels of the second convolution of the horizontal nets in the first stage, likewise.
    cfg.MODEL.SHARPMASK.SKIP_DIM = 32
    # Channels that the first convolution of each horizontal net reduces the trunk's map to, from
    # the coarsest stage to the finest.
    cfg.MODEL.SHARPMASK.REDUCED_DIMS = (64, 64, 64, 32)
    # Compute the horizontal nets once for an image, not once for each window (section 3.1).
    cfg.MODEL.SHARPMASK.REFACTORED_TEST = True
