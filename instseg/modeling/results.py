"""What an input asks of the result of a prediction."""

from collections.abc import Mapping
from typing import Any


def result_size(item: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the masks that an input asks for.

    Args:
        item: Detectron2's input of a model: ``height`` and ``width`` if they are asked for, else
            those of its ``image`` (C, h, w) count.
    """
    height, width = item["image"].shape[-2:]
    return int(item.get("height", height)), int(item.get("width", width))
