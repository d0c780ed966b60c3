"""SharpMask (Pinheiro et al., ECCV 2016, arXiv 1603.08695)."""

from instseg.projects.sharpmask.config import add_sharpmask_config
from instseg.projects.sharpmask.refinement import Refinement, gather_windows
from instseg.projects.sharpmask.sharpmask import SharpMask

__all__ = ["Refinement", "SharpMask", "add_sharpmask_config", "gather_windows"]
