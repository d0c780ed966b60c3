"""Add files of semantic maps to records, for models that take one (``INPUT.SEMANTIC_ROOT``)."""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from instseg.errors import DatasetError


def with_semantic_files(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, each with its label file for Detectron2's mapper if the key is set.

    The file of ``NAME.jpg`` is ``INPUT.SEMANTIC_ROOT/NAME.png``, a grey image of the same size.  It
    is flipped, resized and cropped with the image, and models get it as ``sem_seg``.

    Args:
        records: not modified.
    Raises:
        DatasetError: an image has no file.
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
