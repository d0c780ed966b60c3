"""Drawing predictions on images and tiling images into figures."""

from instseg.visualize.drawing import (
    LABELS,
    OverlayStyle,
    at_least,
    class_name,
    draw_instances,
    label_texts,
)
from instseg.visualize.gallery import gallery
from instseg.visualize.legend import with_legend

__all__ = [
    "LABELS",
    "OverlayStyle",
    "at_least",
    "class_name",
    "draw_instances",
    "gallery",
    "label_texts",
    "with_legend",
]
