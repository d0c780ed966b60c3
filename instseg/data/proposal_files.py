"""Read and write proposals in the format of Detectron2's ``MODEL.LOAD_PROPOSALS``.

A file is a pickle of a dict: ``ids`` of images, ``boxes`` (N, 4) and ``objectness_logits`` (N,) for
each, and ``bbox_mode``.  Detectron2 would execute code from a pickle; this reader never does.
"""

import os
import pickle
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from detectron2.structures import BoxMode

from instseg.errors import ConfigError, DatasetError, short
from instseg.files import atomic_write
from instseg.pickles import read_array_pickle

Array = npt.NDArray[np.float32]

_OLD_KEYS = {"indexes": "ids", "scores": "objectness_logits"}
"""Names in files for Detectron, and those for Detectron2."""
_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def write_proposals(
    path: str | os.PathLike[str], images: Iterable[tuple[Any, Array, Array]]
) -> None:
    """Write a proposal file, atomically.

    Args:
        path: the file.
        images: for each image its id, corners (N, 4) of boxes in its pixels, and logits (N,).  The
            first is taken only once the file is known to be writable.
    Raises:
        OutputError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        ids, boxes, logits = map(list, zip(*images, strict=True))
        content = {
            "ids": ids,
            "boxes": boxes,
            "objectness_logits": logits,
            "bbox_mode": int(BoxMode.XYXY_ABS),
        }
        pickle.dump(content, file, protocol=4)

    atomic_write(path, write)


def with_proposals(records: Sequence[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """Copies of the records with their proposals, best first, as Detectron2's mappers expect them.

    Raises:
        DatasetError: the file has other content, or lacks one of the images.
        CheckpointError: the file cannot be read or would execute code.
    """
    content = read_array_pickle(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds a {type(content).__name__}; expected proposals in a dict")
    content = {_OLD_KEYS.get(key, key): value for key, value in content.items()}
    values = (content.get(key) for key in ("ids", "boxes", "objectness_logits"))
    columns = [value for value in values if isinstance(value, list)]
    if len(columns) != 3 or len({len(column) for column in columns}) != 1:
        raise DatasetError(
            f"{path} holds {', '.join(map(str, content)) or 'nothing'}; expected the lists ids, "
            "boxes and objectness_logits, of one length"
        )
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if not isinstance(mode, int) or mode not in _MODES:
        expected = " or ".join(f"{int(allowed)} ({allowed.name})" for allowed in _MODES)
        raise DatasetError(f"{path}: bbox_mode is {short(mode)}; expected {expected}")
    other = next((key for key in columns[0] if not isinstance(key, int | str | np.ndarray)), None)
    if other is not None:
        raise DatasetError(
            f"{path}: an id is a {type(other).__name__}; expected the number or text of an image"
        )
    proposals = {str(key): item for key, *item in zip(*columns, strict=True)}
    missing = [record for record in records if str(record["image_id"]) not in proposals]
    if missing:
        raise DatasetError(
            f"{path} has no proposals for {len(missing)} of {len(records)} images, first "
            f"{missing[0]['file_name']} (id {missing[0]['image_id']}); it is for another data set"
        )
    completed = []
    for record in records:
        boxes, logits = proposals[str(record["image_id"])]
        _check(f"{path}, image {record['image_id']}", boxes, logits)
        order = np.argsort(-logits, kind="stable")
        completed.append(
            {
                **record,
                "proposal_boxes": boxes[order],
                "proposal_objectness_logits": logits[order],
                "proposal_bbox_mode": BoxMode(mode),
            }
        )
    return completed


def check_proposal_files(key: str, files: Sequence[str], names: Sequence[str]) -> None:
    """Raise a ConfigError if ``key`` does not name a file for each data set."""
    if len(files) != len(names):
        raise ConfigError(
            f"MODEL.LOAD_PROPOSALS needs a file for each data set: {key} has {len(files)}, for "
            f"{', '.join(names)}; write them with `instseg proposals`"
        )


def _check(where: str, boxes: Any, logits: Any) -> None:
    for what, values, shape in (("boxes", boxes, (4,)), ("objectness_logits", logits, ())):
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or not values.ndim:
            raise DatasetError(f"{where}: {what} are no array of floating-point numbers")
        expected = (len(boxes), *shape)
        if values.shape != expected or not np.isfinite(values).all():
            raise DatasetError(
                f"{where}: {what} have shape {values.shape} or are not finite; expected {expected}"
            )
