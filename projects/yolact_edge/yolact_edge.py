"""YolactEdge: YOLACT whose frames between key frames skip most of the backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor, nn

from instseg.errors import ConfigError, DatasetError
from instseg.modeling import attached_zero
from instseg.projects.yolact import YOLACT, ground_truth_of
from instseg.projects.yolact_edge.flow import FeatFlowNet, Refinement, relative_flow
from instseg.projects.yolact_edge.losses import flow_loss, warp_loss

_LEVELS = ("p3", "p4", "p5")


@META_ARCH_REGISTRY.register()
class YolactEdge(YOLACT):
    """YOLACT for video (Liu et al., ICRA 2021, arXiv 2012.12259).

    A key frame is computed as by YOLACT and its pyramid kept.  In the frames after it the backbone
    stops at C3; the coarse levels of the pyramid are those of the key frame, moved along by a small
    network that compares the two frames.

    ::

        key frame:  C3, C4, C5 → L3, L4, L5 → S3, S4, S5 → P3..P7 → heads
        frame:      C3 → L3;  (L3, L3 of the key frame) → FeatFlowNet → motions of P4, P5
                    S4, S5 of the key frame → moved → S4, S5;  S3 = L3 + up(S4) → P3..P7 → heads

    Called as any model it computes every image in full, see :class:`instseg.modeling.VideoModel`
    for the rest.  On images alone it is YOLACT, ``META_ARCHITECTURE YOLACT``.
    """

    @configurable
    def __init__(
        self,
        *,
        flow_net: FeatFlowNet,
        refinement: Refinement | None,
        stage: str,
        freeze: bool,
        keyframe_interval: int,
        num_warped: int,
        warp_weight: float,
        flow_weight: float,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            flow_net: predicts the motion of the levels.
            refinement: corrects the levels moved along, None for nothing.
            stage: what is trained, "image", "flow" or "joint".
            freeze: leave out the backbone and the lateral layers in "joint".
            keyframe_interval: frames from one key frame to the next.
            num_warped: how many of P3..P5 are taken from the key frame, coarsest first.
            warp_weight: of the distance of these from the ones computed; 0 is off.
            flow_weight: of the loss of the stage "flow".
            kwargs: those of YOLACT.
        """
        super().__init__(**kwargs)
        self.flow_net = flow_net
        self.refinement = refinement
        self.stage = stage
        self.keyframe_interval = keyframe_interval
        self.warp_weight = warp_weight
        self.flow_weight = flow_weight
        self._first_warped = len(_LEVELS) - num_warped
        self._frozen = self._not_trained(freeze)
        for module in self._frozen:
            module.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.YOLACT_EDGE
        arguments: dict[str, Any] = super().from_config(cfg)
        _check_backbone(arguments["backbone"])
        channels = cfg.MODEL.YOLACT.CHANNELS
        return {
            **arguments,
            "flow_net": FeatFlowNet(channels, node.FLOW_CHANNELS, node.FLOW_LAYERS),
            "refinement": Refinement(len(node.WARPED), channels) if node.REFINE else None,
            "stage": node.STAGE,
            "freeze": node.FREEZE,
            "keyframe_interval": node.KEYFRAME_INTERVAL,
            "num_warped": len(node.WARPED),
            "warp_weight": node.WARP_WEIGHT,
            "flow_weight": node.FLOW_WEIGHT,
        }

    def _not_trained(self, freeze: bool) -> list[nn.Module]:
        """Modules that the stage does not train or use."""
        net, first = self.flow_net, self._first_warped
        if self.stage == "image":
            return [net] if self.refinement is None else [net, self.refinement]
        if self.stage == "flow":
            others = [part for part in self.children() if part is not net]
            features = [x.get_submodule(y) for x in net.predictors for y in ("scale", "bias")]
            return [*others, *features]
        frozen: list[nn.Module] = [
            *net.predictors[:first],
            *net.up_features[:first],
            *net.up_flow[:first],
        ]
        if freeze:
            fpn = self.fpn
            frozen += [self.backbone, fpn.lateral3, fpn.lateral4, fpn.lateral5]
        return frozen

    def unused_in_inference(self) -> tuple[str, ...]:
        """YOLACT's, and the layers for the motion of levels that every frame computes."""
        lists = ("predictors", "up_features", "up_flow")
        levels = range(self._first_warped)
        return (
            *super().unused_in_inference(),
            *(f"flow_net.{name}.{level}" for name in lists for level in levels),
        )

    def train(self, mode: bool = True) -> "YolactEdge":
        """Modules that are not trained stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def keyframe(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See :class:`instseg.modeling.VideoModel`.

        Returns:
            what :meth:`raw` gives; and the state: L3 as the flow network takes it (B, width, h, w)
            and the sums S of the levels that later frames take over, finest first.
        """
        laterals = self.fpn.laterals(self.levels(images))
        sums = self.fpn.top_down(laterals)
        return self.heads(self.fpn.outputs(sums)), self._state(laterals, sums)

    def between(self, images: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :class:`instseg.modeling.VideoModel`; returns what :meth:`raw` gives."""
        laterals = self.fpn.laterals(self._first_levels(images))
        return self.heads(self.fpn.outputs(self.transform(laterals, state)))

    def transform(self, laterals: Sequence[Tensor], state: Sequence[Tensor]) -> list[Tensor]:
        """Levels of a frame with the help of a key frame (section III-B).

        Args:
            laterals: of the frame, L3 at least and all levels that are not taken over.
            state: of the key frame.
        Returns:
            the sums S3, S4, S5.
        """
        reference, *sums = state
        first = self._first_warped
        motions = self.flow_net(self.flow_net.reduce(laterals[0]), reference, first)
        moved = [motion.apply(x) for motion, x in zip(motions, sums, strict=True)]
        # Before the refinement, as in the authors' code.
        computed = self.fpn.top_down(laterals[:first], moved[0])
        if self.refinement is not None:
            moved = self.refinement(moved, laterals[0])
        return [*computed, *moved]

    def _state(self, laterals: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.flow_net.reduce(laterals[0]), *sums[self._first_warped :]

    def _first_levels(self, images: Tensor) -> list[Tensor]:
        """C3 and the other levels that frames between key frames compute, and nothing else."""
        level_names = self._levels[: max(self._first_warped, 1)]
        x = self.backbone.stem(images)
        levels = []
        for name, part in zip(self.backbone.stage_names, self.backbone.stages, strict=True):
            x = part(x)
            if name in level_names:
                levels.append(x)
            if len(levels) == len(level_names):
                break
        return levels

    def losses(self, images: Tensor, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The losses of the stage.

        Beside YOLACT's items, ``reference_image`` is an earlier frame under the same augmentation;
        the stage "joint" trains on images without one as if they were key frames, and the stage
        "flow" needs it and ``flow`` (2, h, w), in pixels of ``image``, x then y: the content of a
        pixel is at pixel + flow in the earlier frame.  Unknown flow is NaN.

        Raises:
            DatasetError: the stage is "flow" and these are missing.
        """
        if self.stage == "image":
            return super().losses(images, batched_inputs)
        if self.stage == "flow":
            return self._flow_losses(images, batched_inputs)
        ground_truths = [ground_truth_of(item, self.device) for item in batched_inputs]
        laterals = self.fpn.laterals(self.levels(images))
        sums = self.fpn.top_down(laterals)
        losses = self.detection_losses(self.fpn.outputs(sums), ground_truths)
        rows = [i for i, item in enumerate(batched_inputs) if "reference_image" in item]
        if not rows:
            trained = [p for p in self._video_parameters() if p.requires_grad]
            return {**losses, "loss_warp": attached_zero(trained)}
        laterals, sums = ([x[rows] for x in part] for part in (laterals, sums))
        state = self._reference_state([batched_inputs[i] for i in rows])
        transformed = self.transform(laterals, state)
        warped = self.detection_losses(
            self.fpn.outputs(transformed), [ground_truths[i] for i in rows]
        )
        losses.update({f"{name}_warped": loss for name, loss in warped.items()})
        if self.warp_weight:
            first = self._first_warped
            layers = (self.fpn.output3, self.fpn.output4, self.fpn.output5)[first:]
            loss = warp_loss(transformed[first:], sums[first:], layers)
            losses["loss_warp"] = loss * self.warp_weight
        return losses

    def _reference_state(self, batched_inputs: Sequence[dict[str, Any]]) -> tuple[Tensor, ...]:
        """State of the earlier frames; of these only the flow network is trained."""
        with torch.no_grad():
            images = self.preprocess([{"image": x["reference_image"]} for x in batched_inputs])
            laterals = self.fpn.laterals(self.levels(images))
            sums = self.fpn.top_down(laterals)
        return self._state(laterals, sums)

    def _flow_losses(
        self, images: Tensor, batched_inputs: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        for item in batched_inputs:
            missing = [name for name in ("reference_image", "flow") if name not in item]
            if missing:
                raise DatasetError(
                    f"MODEL.YOLACT_EDGE.STAGE flow needs {' and '.join(missing)} with every "
                    f"image; {item.get('file_name', 'an image')} has none: DATASETS.TRAIN must "
                    "be videos with known flow"
                )
        references = self.preprocess([{"image": x["reference_image"]} for x in batched_inputs])
        with torch.no_grad():
            frame, reference = (self.first_lateral(x) for x in (images, references))
        reduce = self.flow_net.reduce
        motions = self.flow_net(reduce(frame), reduce(reference))
        targets = [relative_flow(x["flow"].to(self.device)[None]) for x in batched_inputs]
        size = images.shape[-2:]
        target = torch.cat([nn.functional.interpolate(x, size, mode="bilinear") for x in targets])
        loss = flow_loss([motion.flow.float() for motion in motions], target)
        return {"loss_flow": loss * self.flow_weight}

    def first_lateral(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised → L3."""
        lateral: Tensor = self.fpn.laterals(self._first_levels(images)[:1])[0]
        return lateral

    def _video_parameters(self) -> list[nn.Parameter]:
        parts = [x for x in (self.flow_net, self.refinement) if x is not None]
        return [parameter for part in parts for parameter in part.parameters()]


def _check_backbone(backbone: Backbone) -> None:
    if not all(hasattr(backbone, name) for name in ("stem", "stages", "stage_names")):
        raise ConfigError(
            f"YolactEdge has to stop in the middle of its backbone, which {type(backbone).__name__}"
            " does not allow; set MODEL.BACKBONE.NAME to build_resnet_backbone or "
            "build_mobilenet_v2_backbone"
        )
