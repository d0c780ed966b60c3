"""The features of regions, pooled by our operator where it is faster than torchvision's."""

from typing import cast

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn

from instseg.ops._library import compiled
from instseg.ops.roi_align import roi_align


class RegionPooler(ROIPooler):
    """Detectron2's ``ROIPooler`` with ``ROIAlign``; it gives the same bits and is faster on a CPU.

    Torchvision's operator knows one thread and one map there, and Detectron2 copies what it gives
    for each level of a feature pyramid.  On a GPU this is Detectron2's pooler.
    """

    @classmethod
    def of(cls, pooler: ROIPooler) -> "RegionPooler":
        """One that pools as ``pooler`` does, whose levels are all ``ROIAlign``."""
        first = pooler.level_poolers[0]
        return cls(
            pooler.output_size,
            [level.spatial_scale for level in pooler.level_poolers],
            first.sampling_ratio,
            "ROIAlignV2" if first.aligned else "ROIAlign",
            pooler.canonical_box_size,
            pooler.canonical_level,
        )

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """See ``ROIPooler``."""
        if x[0].device.type != "cpu" or not box_lists or torch.jit.is_tracing():
            pooled: Tensor = super().forward(x, box_lists)
            return pooled
        levels = None
        if len(self.level_poolers) > 1:
            pyramid = (self.min_level, self.max_level)
            canonical = (self.canonical_box_size, self.canonical_level)
            levels = assign_boxes_to_levels(box_lists, *pyramid, *canonical)
        first = self.level_poolers[0]
        height, width = self.output_size
        return roi_align(
            x,
            convert_boxes_to_pooler_format(box_lists),
            [level.spatial_scale for level in self.level_poolers],
            (height, width),
            max(first.sampling_ratio, 0),
            levels=levels,
            aligned=first.aligned,
        )


def use_region_poolers(model: nn.Module) -> None:
    """Replace each of Detectron2's poolers inside ``model``, which has no parameters, by ours.

    Where no operators are compiled, torchvision's is the faster one, and they stay.
    """
    if not compiled():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            # Exactly these classes: others may do more than pool.
            if type(child) is not ROIPooler:
                continue
            levels = cast(nn.ModuleList, child.level_poolers)
            if all(type(level) is ROIAlign for level in levels):
                setattr(module, name, RegionPooler.of(child))
