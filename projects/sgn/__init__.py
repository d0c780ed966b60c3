"""After SGN: Sequential Grouping Networks (Liu, Jia, Fidler, Urtasun, ICCV 2017)."""

from instseg.projects import Project
from instseg.projects.sgn.config import add_sgn_config
from instseg.projects.sgn.inference import SGNInstances
from instseg.projects.sgn.lines import (
    line_components,
    links_from_breakpoints,
    most_likely_labels,
)
from instseg.projects.sgn.losses import breakpoint_loss, link_loss
from instseg.projects.sgn.merging import (
    Components,
    MergeSettings,
    candidate_pairs,
    crop_pairs,
    large_components,
    merge_by_owner,
    merge_greedily,
    windows,
)
from instseg.projects.sgn.networks import BreakpointNet, LineNet, MergerNet
from instseg.projects.sgn.pipeline import (
    GroundTruth,
    ImageMaps,
    LineSettings,
    find_components,
)
from instseg.projects.sgn.sgn import SGN
from instseg.projects.sgn.targets import (
    breakpoint_labels,
    degrade,
    link_targets,
    majority_owners,
)

__all__ = [
    "PROJECT",
    "SGN",
    "BreakpointNet",
    "Components",
    "GroundTruth",
    "ImageMaps",
    "LineNet",
    "LineSettings",
    "MergeSettings",
    "MergerNet",
    "SGNInstances",
    "add_sgn_config",
    "breakpoint_labels",
    "breakpoint_loss",
    "candidate_pairs",
    "crop_pairs",
    "degrade",
    "find_components",
    "large_components",
    "line_components",
    "link_loss",
    "link_targets",
    "links_from_breakpoints",
    "majority_owners",
    "merge_by_owner",
    "merge_greedily",
    "most_likely_labels",
    "windows",
]

PROJECT = Project(
    name="sgn",
    title="after SGN",
    paper="Liu et al., ICCV 2017",
    family="bottom-up",
    best_at="instances that others cut in parts",
    ap="72.4",
    milliseconds="117",
    order=11,
    add_config=add_sgn_config,
    example="sgn/sgn_shapes.yaml",
    reference="sgn/sgn_VGG16_cityscapes.yaml",
    fast=("MODEL.SGN.MERGE_PARTNERS", 1),
    narrow=(
        *("MODEL.SGN.MIN_AREA_TEST", 4),
        *("MODEL.SGN.MERGE_MIN_AREA", 4),
        *("MODEL.SGN.OUTPUT_STRIDE", 4),
        *("INPUT.MIN_SIZE_TEST", 64),
        *("MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    ),
)
