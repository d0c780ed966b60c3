"""Semantic maps from files, for models that take one (``INPUT.SEMANTIC_ROOT``)."""

import os
from typing import Any

from detectron2.config import CfgNode

from instseg.errors import DatasetError


def add_semantic_files(cfg: CfgNode, records: list[dict[str, Any]]) -> None:
    """Tell Detectron2's mapper about the label file of each record, where the key is set.

    The file of ``NAME.jpg`` is ``INPUT.SEMANTIC_ROOT/NAME.png``, a grey picture of the same size;
    it is flipped, resized and cropped along and arrives as ``sem_seg``.

    Args:
        records: changed in place.
    Raises:
        DatasetError: a picture without a file.
    """
    root = cfg.INPUT.SEMANTIC_ROOT
    if not root:
        return
    for record in records:
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        path = os.path.join(root, f"{stem}.png")
        if not os.path.isfile(path):
            raise DatasetError(
                f"INPUT.SEMANTIC_ROOT is {root}, but there is no {path} for {record['file_name']}"
            )
        record["sem_seg_file_name"] = path
