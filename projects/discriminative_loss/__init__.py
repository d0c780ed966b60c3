"""Discriminative loss (De Brabandere, Neven, Van Gool, CVPRW 2017, arXiv 1708.02551)."""
