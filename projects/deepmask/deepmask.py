"""The network: a trunk, the mask and the score of a window, trained on patches, run densely."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.errors import ConfigError
from instseg.masks import instances_from_masks
from instseg.modeling import (
    Comparison,
    PixelModel,
    PlacedMask,
    attached_zero,
    check_finite,
    masks_of,
    result_size,
    stage,
    wants_cropped,
)
from instseg.projects.deepmask.comparisons import dense_against_patches
from instseg.projects.deepmask.heads import Embedding, PooledScoreHead, SharedScoreHead
from instseg.projects.deepmask.inference import (
    Scale,
    Windows,
    best_windows,
    paste,
    pyramid,
    resize_padded,
)
from instseg.projects.deepmask.losses import mask_loss, score_loss

# Elements of the logits that are in memory at once: 64 MiB of float32.
_CHUNK = 2**24


@META_ARCH_REGISTRY.register()
class DeepMask(PixelModel):
    """DeepMask (Pinheiro et al., NIPS 2015, arXiv 1506.06204; released form arXiv 1603.08695).

    ::

        patch → backbone → (C, h, w), without the cells of the context
          → 1x1 conv + ReLU → linear → vector
              ├─ linear → mask of the instance in the middle of the patch, S x S logits
              └─ hidden layer → is there an instance, and does it fit the patch?

    An image is searched at several scales.  All layers are convolutions: each runs once per scale
    and gives a vector and a score for every window.  Windows are one cell of the map apart.
    Proposals have no class: ``pred_classes`` is 0 everywhere.
    """

    num_classes_key = None

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        patch_size: int,
        context: int,
        mask_size: int,
        feature_dim: int,
        embedding_dim: int,
        score_branch: str,
        score_dim: int,
        dropout: float,
        score_weight: float,
        octaves: Sequence[float],
        max_size: int,
        mask_threshold: float,
        max_proposals: int,
    ) -> None:
        """
        Args:
            backbone: gives the feature map ``in_feature``, whose stride is that of the windows.
            pixel_mean, pixel_std: see :class:`~instseg.modeling.PixelModel`.
            patch_size: side of a window in pixels, a multiple of the stride.
            context: pixels around the window in a training patch, a multiple of the stride.
            mask_size: side S of the mask logits.
            feature_dim: channels of the 1x1 convolution.
            embedding_dim: dimension of a window's vector.
            score_branch: "shared" or "pooled", see :mod:`instseg.projects.deepmask.heads`.
            score_dim: units of the last hidden layer of the score.
            dropout: probability in the score's layers.
            score_weight: lambda of :func:`score_loss`.
            octaves: scales that inference searches, as powers of two.
            max_size: largest longer side of an image at inference, in pixels.
            mask_threshold: probability above which a pixel belongs to a mask.
            max_proposals: largest number of proposals of an image.
        """
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.in_feature = in_feature
        shape = backbone.output_shape()[in_feature]
        self.stride = shape.stride
        window = patch_size // self.stride
        self.embedding = Embedding(shape.channels, feature_dim, embedding_dim, window)
        self.mask_head = nn.Linear(embedding_dim, mask_size**2)
        self.score_head: SharedScoreHead | PooledScoreHead
        if score_branch == "shared":
            self.score_head = SharedScoreHead(embedding_dim, score_dim, dropout)
        else:
            self.score_head = PooledScoreHead(
                shape.channels, embedding_dim, score_dim, window, dropout
            )
        self.patch_size = patch_size
        self.context = context
        self.mask_size = mask_size
        self.score_weight = score_weight
        self.octaves = tuple(octaves)
        self.max_size = max_size
        self.mask_logit = math.log(mask_threshold / (1 - mask_threshold))
        self.max_proposals = max_proposals

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DEEPMASK
        backbone = build_backbone(cfg)
        _check(cfg, backbone)
        return {
            "backbone": backbone,
            "in_feature": node.IN_FEATURE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "patch_size": node.PATCH_SIZE,
            "context": node.CONTEXT,
            "mask_size": node.MASK_SIZE,
            "feature_dim": node.FEATURE_DIM,
            "embedding_dim": node.EMBEDDING_DIM,
            "score_branch": node.SCORE_BRANCH,
            "score_dim": node.SCORE_DIM,
            "dropout": node.DROPOUT,
            "score_weight": node.SCORE_WEIGHT,
            "octaves": node.OCTAVES_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "mask_threshold": node.MASK_THRESH_TEST,
            "max_proposals": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else one dict per image with its ``instances``.

        Args:
            batched_inputs: in training patches, ``image`` (3, P, P) with values 0..255 and P =
                ``patch_size`` + 2 ``context``; all with ``head`` "mask" and ``gt_mask`` (T, T), -1
                or 1, or all with ``head`` "score" and ``label``, -1 or 1.  Else Detectron2's
                format: ``image`` (3, h, w) and optionally ``height``, ``width`` of the result and
                ``max_instances`` in it.
        Raises:
            ValueError: patches for both heads in a batch, or of another size.
            CheckpointError: not in training, the network gives values that are not finite.
        """
        if self.training:
            return self.losses(batched_inputs)
        # One by one: the padding of a batch would change results.
        return [{"instances": self.propose(item)} for item in batched_inputs]

    def losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``loss_mask`` or ``loss_score``, by the head of the patches; the other is 0.

        A batch trains one head; every batch trains the trunk (section 3).
        """
        head = self.head_of(batched_inputs)
        features = self.patch_features(batched_inputs)[self.in_feature]
        vectors = self.embedding(features)
        losses = {
            f"loss_{name}": attached_zero(part.parameters())
            for name, part in (("mask", self.mask_head), ("score", self.score_head))
        }
        # Sums over many pixels need single precision.
        if head == "mask":
            targets = self._stack(batched_inputs, "gt_mask")
            logits = self.mask_logits(vectors[:, :, 0, 0]).float()
            if targets.shape[-1] != self.mask_size:
                size = targets.shape[-2:]
                logits = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=True)[
                    :, 0
                ]
            losses["loss_mask"] = mask_loss(logits, targets)
        else:
            labels = self._stack(batched_inputs, "label")
            logits = self.score_head(features, vectors)[:, 0, 0]
            losses["loss_score"] = score_loss(logits, labels, self.score_weight)
            if isinstance(self.score_head, PooledScoreHead):
                losses["loss_mask"] = losses["loss_mask"] + attached_zero(
                    self.embedding.parameters()
                )
        return losses

    def patch_features(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Maps of the backbone for patches, without the cells of their context."""
        side = self.patch_size + 2 * self.context
        for item in batched_inputs:
            if item["image"].shape[-2:] != (side, side):
                raise ValueError(
                    f"a training patch has {tuple(item['image'].shape[-2:])} pixels; expected "
                    f"{side} x {side}, PATCH_SIZE + 2 CONTEXT of MODEL.DEEPMASK"
                )
        maps = self.features(self._stack(batched_inputs, "image"))
        shapes = self.backbone.output_shape()
        return {
            name: _without_border(x, self.context // shapes[name].stride)
            for name, x in maps.items()
        }

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of the backbone for (B, 3, H, W) images with values 0..255."""
        maps: dict[str, Tensor] = self.backbone(self.normalised(images))
        return maps

    def mask_logits(self, vectors: Tensor) -> Tensor:
        """(N, E) vectors of windows → (N, S, S) logits."""
        logits: Tensor = self.mask_head(vectors)
        return logits.view(-1, self.mask_size, self.mask_size)

    def head_of(self, batched_inputs: Sequence[dict[str, Any]]) -> str:
        """ "mask" or "score".

        Raises:
            ValueError: the patches of the batch differ in it.
        """
        heads = {item["head"] for item in batched_inputs}
        if len(heads) != 1 or not heads <= {"mask", "score"}:
            raise ValueError(f"a batch of patches trains one head; found {sorted(heads)}")
        return str(heads.pop())

    def propose(self, item: dict[str, Any]) -> Instances:
        """Proposals of one image over all scales (section 5).

        Returns:
            at most ``max_proposals``, by falling score, with the usual fields.  Deviation:
            proposals whose mask has no pixel in the image are left out; the released code gives
            them too.
        """
        image = item["image"].to(self.device, torch.float32)
        height, width = image.shape[-2:]
        size = result_size(item)
        windows_by_scale = []
        levels = []
        for scale in pyramid(height, width, self.octaves, self.max_size):
            windows, level = self.search(image, scale)
            windows_by_scale.append(windows)
            levels.append(level)
        limit = min(self.max_proposals, item.get("max_instances", self.max_proposals))
        windows_by_scale = best_windows(windows_by_scale, limit)
        scores = torch.cat([windows.scores for windows in windows_by_scale])
        # Masks come scale by scale; each goes to the row of its rank by score.
        order = scores.argsort(descending=True, stable=True)
        ranks = order.argsort().split([len(windows.scores) for windows in windows_by_scale])
        enlarged = (size[0] / height, size[1] / width)
        placed = (
            mask
            for windows, level, rows in zip(windows_by_scale, levels, ranks, strict=True)
            for mask in self._paste(windows, level, rows.tolist(), size, enlarged)
        )
        with stage("masks"):
            masks = masks_of(
                placed, len(scores), size, cropped=wants_cropped(item), device=self.device
            )
        return instances_from_masks(masks, scores[order], torch.zeros_like(order))

    def search(self, image: Tensor, scale: Scale) -> tuple[Windows, Any]:
        """The best windows at one scale.

        Args:
            image: (3, h, w).
            scale: of the pyramid.
        Returns:
            at most ``max_proposals`` windows, and what :meth:`logits_of` needs of this scale.
        Raises:
            CheckpointError: scores that are not finite.
        """
        with stage("network"):
            multiple = max(self.backbone.size_divisibility, 1)
            padded = resize_padded(image, scale, self.patch_size // 2, multiple)
            maps = self.features(padded)
            vectors = self.embedding(maps[self.in_feature])
            scores = self.score_head(maps[self.in_feature], vectors)[0].float().sigmoid()
            level = self.prepare(maps)
        check_finite(scores)
        columns = scores.shape[1]
        best, cells = scores.flatten().sort(descending=True, stable=True)
        best, cells = best[: self.max_proposals], cells[: self.max_proposals]
        windows = Windows(
            scale=scale,
            scores=best,
            cells=torch.stack([cells // columns, cells % columns], dim=1),
            vectors=vectors[0].flatten(1)[:, cells].T,
        )
        return windows, level

    def prepare(self, maps: dict[str, Tensor]) -> Any:
        """Input of :meth:`logits_of` from the maps of one scale; here vectors are enough."""
        return None

    def logits_of(self, windows: Windows, level: Any) -> Tensor:
        """(N, S, S) mask logits of windows, ``level`` as :meth:`prepare` gave it."""
        return self.mask_logits(windows.vectors)

    @property
    def output_size(self) -> int:
        """Side of the logits that :meth:`logits_of` gives."""
        return self.mask_size

    def comparisons(self, image: Tensor) -> list[Comparison]:
        """See :class:`instseg.modeling.ComparedModel`."""
        return [dense_against_patches(self, image)]

    def _paste(
        self,
        windows: Windows,
        level: Any,
        rows: Sequence[int],
        size: tuple[int, int],
        enlarged: tuple[float, float],
    ) -> Iterator[PlacedMask]:
        """The masks of windows of one scale; logits are computed some at a time."""
        step = max(_CHUNK // self.output_size**2 // 8, 1)
        factor = windows.scale.factor
        for start in range(0, len(rows), step):
            part = torch.arange(start, min(start + step, len(rows)), device=self.device)
            logits = self.logits_of(windows[part], level).float()
            check_finite(logits)
            yield from paste(
                logits,
                windows.cells[part],
                rows[start : start + step],
                size,
                factors=(factor / enlarged[0], factor / enlarged[1]),
                patch_size=self.patch_size,
                stride=self.stride,
                threshold=self.mask_logit,
            )

    def _stack(self, batched_inputs: Sequence[dict[str, Any]], key: str) -> Tensor:
        values = [torch.as_tensor(item[key], dtype=torch.float32) for item in batched_inputs]
        return torch.stack(values).to(self.device)


def _without_border(x: Tensor, cells: int) -> Tensor:
    """``x`` (..., H, W) less ``cells`` on every side."""
    height, width = x.shape[-2:]
    return x[..., cells : height - cells, cells : width - cells]


def _check(cfg: CfgNode, backbone: Backbone) -> None:
    """Raise a ConfigError for values that make no network."""
    node = cfg.MODEL.DEEPMASK
    known = backbone.output_shape()
    if node.IN_FEATURE not in known:
        raise ConfigError(
            f"MODEL.DEEPMASK.IN_FEATURE is {node.IN_FEATURE!r}; the backbone gives "
            f"{', '.join(known)}"
        )
    stride = known[node.IN_FEATURE].stride
    cells = node.PATCH_SIZE // stride
    rules = {
        "PATCH_SIZE": (
            cells >= 1 and node.PATCH_SIZE % (2 * stride) == 0,
            f"a multiple of {2 * stride}, twice the stride of {node.IN_FEATURE}",
        ),
        "CONTEXT": (
            node.CONTEXT >= 0 and node.CONTEXT % stride == 0,
            f"a multiple of {stride}, the stride of {node.IN_FEATURE}",
        ),
    }
    for key, (fits, expected) in rules.items():
        if not fits:
            raise ConfigError(f"MODEL.DEEPMASK.{key} is {node[key]!r}; expected {expected}")
