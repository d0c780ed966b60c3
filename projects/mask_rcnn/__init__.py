"""Mask R-CNN (He et al., ICCV 2017, arXiv 1703.06870)."""
