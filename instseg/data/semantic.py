"""Semantic maps from files, for models that take one (``INPUT.SEMANTIC_ROOT``)."""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from instseg.errors import DatasetError


def with_semantic_files(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, with the label file of each for Detectron2's mapper where the key is set.

    The file of ``NAME.jpg`` is ``INPUT.SEMANTIC_ROOT/NAME.png``, a grey image of the same size;
    it is flipped, resized and cropped along and arrives as ``sem_seg``.

    Args:
        records: stay as they are.
    Raises:
        DatasetError: an image without a file.
    """
    root = cfg.INPUT.SEMANTIC_ROOT
    if not root:
        return list(records)
    completed = []
    for record in records:
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        path = os.path.join(root, f"{stem}.png")
        if not os.path.isfile(path):
            raise DatasetError(
                f"INPUT.SEMANTIC_ROOT is {root}, but there is no {path} for {record['file_name']}"
            )
        completed.append({**record, "sem_seg_file_name": path})
    return completed
