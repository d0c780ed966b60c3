"""The network: DeepMask, and a second, top-down network that makes its masks sharp."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor

from instseg.errors import ConfigError
from instseg.modeling import Comparison
from instseg.projects.deepmask import (
    DeepMask,
    Windows,
    best_windows,
    mask_loss,
    pyramid,
    resize_padded,
)
from instseg.projects.sharpmask.refinement import Refinement, gather_windows


@META_ARCH_REGISTRY.register()
class SharpMask(DeepMask):
    """SharpMask (Pinheiro et al., ECCV 2016, arXiv 1603.08695).

    It contains a whole DeepMask under the same names, which is not trained: ``MODEL.WEIGHTS`` is a
    trained DeepMask (two-stage training, section 4).  Only :class:`Refinement` learns, from patches
    for the mask.  At inference DeepMask's scores choose the windows, and only chosen windows get a
    mask.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str,
        embedding_dim: int,
        patch_size: int,
        mask_dim: int,
        skip_dim: int,
        reduced_dims: Sequence[int],
        refactored: bool,
        **settings: Any,
    ) -> None:
        """
        Args:
            backbone: gives ``in_feature`` and maps of half, a quarter ... of its stride, down to 2.
            in_feature, embedding_dim, patch_size, settings: of :class:`DeepMask`.
            mask_dim, skip_dim, reduced_dims: of :class:`Refinement`.
            refactored: compute the horizontal nets once for an image; otherwise for each window,
                as in training.
        """
        super().__init__(
            backbone=backbone,
            in_feature=in_feature,
            embedding_dim=embedding_dim,
            patch_size=patch_size,
            **settings,
        )
        self.requires_grad_(False)
        shapes = backbone.output_shape()
        self.levels = sorted(shapes, key=lambda name: -shapes[name].stride)
        self.window = patch_size // self.stride
        self.refactored = refactored
        self.refinement = Refinement(
            embedding_dim=embedding_dim,
            window=self.window,
            feature_channels=[shapes[name].channels for name in self.levels],
            mask_dim=mask_dim,
            skip_dim=skip_dim,
            reduced_dims=reduced_dims,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        node = cfg.MODEL.SHARPMASK
        _check(cfg, arguments["backbone"])
        return {
            **arguments,
            "mask_dim": node.MASK_DIM,
            "skip_dim": node.SKIP_DIM,
            "reduced_dims": node.REDUCED_DIMS,
            "refactored": node.REFACTORED_TEST,
        }

    def unused_in_inference(self) -> tuple[str, ...]:
        """DeepMask's masks, see :class:`instseg.modeling.contract.TrainingOnlyModule`."""
        return ("mask_head",)

    def train(self, mode: bool = True) -> "SharpMask":
        """The trunk and DeepMask's heads stay as they are in inference."""
        super().train(False)
        self.training = mode
        self.refinement.train(mode)
        return self

    def losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``loss_mask`` of the refined masks.

        Raises:
            ValueError: patches for the score.
        """
        if self.head_of(batched_inputs) != "mask":
            raise ValueError(
                "SharpMask trains the mask alone, found patches for the score; set "
                "MODEL.DEEPMASK.SCORE_FRACTION 0"
            )
        with torch.no_grad():
            maps = self.patch_features(batched_inputs)
            vectors = self.embedding(maps[self.in_feature])[:, :, 0, 0]
        logits = self.refinement(vectors, self.refinement.skips([maps[n] for n in self.levels]))
        return {"loss_mask": mask_loss(logits, self._stack(batched_inputs, "gt_mask"))}

    def prepare(self, maps: dict[str, Tensor]) -> list[Tensor]:
        """The horizontal features of a scale, or the maps that they are made of."""
        features = [maps[name] for name in self.levels]
        return self.refinement.skips(features) if self.refactored else features

    def logits_of(self, windows: Windows, level: Any) -> Tensor:
        """(N, S, S) refined mask logits; cells beyond a map count as 0."""
        parts = [
            gather_windows(x[0], windows.cells << number, self.window << number)
            for number, x in enumerate(level)
        ]
        skips = parts if self.refactored else self.refinement.skips(parts)
        logits: Tensor = self.refinement(windows.vectors, skips)
        return logits

    def comparisons(self, image: Tensor) -> list[Comparison]:
        """DeepMask's comparison, and the two forms of the refinement on the best windows."""
        multiple = max(self.backbone.size_divisibility, 1)
        windows_by_scale, maps = [], []
        height, width = image.shape[-2:]
        for scale in pyramid(height, width, self.octaves, self.max_size):
            windows_by_scale.append(self.search(image, scale)[0])
            padded = resize_padded(image, scale, self.patch_size // 2, multiple)
            maps.append(self.features(padded))
        windows_by_scale = best_windows(windows_by_scale, self.max_proposals)

        def refine(refactored: bool) -> None:
            configured, self.refactored = self.refactored, refactored
            for windows, features in zip(windows_by_scale, maps, strict=True):
                level = self.prepare(features)
                for part in torch.arange(len(windows.scores), device=self.device).split(64):
                    self.logits_of(windows[part], level)
            self.refactored = configured

        count = sum(len(windows.scores) for windows in windows_by_scale)
        return [
            *super().comparisons(image),
            Comparison(
                name=f"refined masks of {count} windows",
                peer="horizontal nets on each window",
                ours=lambda: refine(True),
                theirs=lambda: refine(False),
            ),
        ]

    @property
    def output_size(self) -> int:
        return self.window << len(self.levels)


def _check(cfg: CfgNode, backbone: Backbone) -> None:
    """Raise a ConfigError for values that do not fit together."""
    node = cfg.MODEL.DEEPMASK
    sharp = cfg.MODEL.SHARPMASK
    strides = sorted((shape.stride for shape in backbone.output_shape().values()), reverse=True)
    coarsest = backbone.output_shape()[node.IN_FEATURE].stride
    expected_strides = [coarsest >> number for number in range(len(strides))]
    if strides != expected_strides or expected_strides[-1] != 2:
        raise ConfigError(
            f"SharpMask needs maps of the strides {coarsest}, {coarsest // 2} ... 2; the backbone "
            f"gives {strides}; of a ResNet, set MODEL.RESNETS.OUT_FEATURES "
            "['conv1', 'res2', 'res3', 'res4']"
        )
    if len(sharp.REDUCED_DIMS) != len(strides):
        raise ConfigError(
            f"MODEL.SHARPMASK.REDUCED_DIMS is {sharp.REDUCED_DIMS}; expected {len(strides)} "
            "numbers, one for each map of the backbone"
        )
    for key in ("MASK_DIM", "SKIP_DIM"):
        if sharp[key] < 1 or sharp[key] % (1 << len(strides)):
            raise ConfigError(
                f"MODEL.SHARPMASK.{key} is {sharp[key]}; expected a multiple of "
                f"{1 << len(strides)}, as every stage halves it"
            )
