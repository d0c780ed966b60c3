"""DeepMask (Pinheiro et al., NIPS 2015, arXiv 1506.06204)."""

from instseg.projects import Project
from instseg.projects.deepmask.config import add_deepmask_config
from instseg.projects.deepmask.data import PatchSamples
from instseg.projects.deepmask.deepmask import DeepMask
from instseg.projects.deepmask.heads import Embedding, PooledScoreHead, SharedScoreHead
from instseg.projects.deepmask.inference import (
    FILL,
    Scale,
    Windows,
    best_windows,
    paste,
    pyramid,
    resize_padded,
)
from instseg.projects.deepmask.layers import SymmetricConv2d, symmetric_pad
from instseg.projects.deepmask.losses import mask_loss, score_loss
from instseg.projects.deepmask.resnet import SymmetricResNet, build_symmetric_resnet_backbone

__all__ = [
    "PROJECT",
    "FILL",
    "DeepMask",
    "Embedding",
    "PatchSamples",
    "PooledScoreHead",
    "Scale",
    "SharedScoreHead",
    "SymmetricConv2d",
    "SymmetricResNet",
    "Windows",
    "add_deepmask_config",
    "best_windows",
    "build_symmetric_resnet_backbone",
    "mask_loss",
    "paste",
    "pyramid",
    "resize_padded",
    "score_loss",
    "symmetric_pad",
]

PROJECT = Project(
    name="deepmask",
    title="DeepMask",
    paper="Pinheiro et al., NeurIPS 2015",
    family="top-down",
    best_at="proposals without classes",
    ap="AR 60.8",
    milliseconds="304",
    weights="authors'",
    order=9,
    add_config=add_deepmask_config,
    example="deepmask/deepmask_shapes.yaml",
    reference="deepmask/deepmask_resnet50_coco.yaml",
    fast=("MODEL.DEEPMASK.OCTAVES_TEST", (0.0,)),
)
