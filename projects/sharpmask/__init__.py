"""SharpMask (Pinheiro et al., ECCV 2016, arXiv 1603.08695)."""

from instseg.projects import Project
from instseg.projects.sharpmask.config import add_sharpmask_config
from instseg.projects.sharpmask.refinement import Refinement, gather_windows
from instseg.projects.sharpmask.sharpmask import SharpMask

__all__ = ["PROJECT", "Refinement", "SharpMask", "add_sharpmask_config", "gather_windows"]

PROJECT = Project(
    name="sharpmask",
    title="SharpMask",
    paper="Pinheiro et al., ECCV 2016",
    family="top-down",
    best_at="proposals with sharp borders",
    ap="AR 86.5",
    milliseconds="514",
    weights="authors'",
    order=10,
    add_config=add_sharpmask_config,
    ancestors=("deepmask",),
    example="sharpmask/sharpmask_shapes.yaml",
    fast=("MODEL.DEEPMASK.OCTAVES_TEST", (0.0,)),
    reference="sharpmask/sharpmask_resnet50_coco.yaml",
    # Half of all untrained networks leave every pixel out of the mask.
    narrow=("MODEL.DEEPMASK.MASK_THRESH_TEST", 0.4),
)
