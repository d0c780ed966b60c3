"""Map frames of videos to samples: a frame, an earlier one of its clip, and the flow between both.

A record of a frame has Detectron2's standard fields, and also ``video_id``, ``frame_index``,
``length`` and ``reference_files``: earlier frames of its clip, the nearest first.  If the data set
knows the flow to these, the record also has ``flow_files``, in the same order.
"""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from instseg.data.flow import read_flow, transform_flow
from instseg.data.image_mapper import SSDMapper, channels_first
from instseg.errors import ConfigError, DatasetError

NUM_REFERENCES = 10
"""Largest number of earlier frames that a record names."""


class VideoMapper(SSDMapper):
    """SSDMapper that adds ``reference_image`` and, if asked to, ``flow``.

    ``reference_image`` (3, h, w) is an earlier frame, transformed like ``image`` with the same
    random numbers.  ``flow`` (2, h, w) float32, x then y, is in pixels of ``image``: the point at
    pixel p of ``image`` lies at p + flow in ``reference_image``.  It is NaN where unknown, and may
    lead out of the image.

    If the clip has no frame as early as the drawn distance, the earliest one is used.  The first
    frame of a clip, and so every still image, is its own reference.
    """

    def __init__(
        self, *args: Any, reference_range: tuple[int, int], with_flow: bool, **kwargs: Any
    ) -> None:
        """
        Args:
            args, kwargs: those of SSDMapper.
            reference_range: smallest and largest distance to the reference, in frames.
            with_flow: add ``flow``; records need ``flow_files`` unless they are still images.
        """
        super().__init__(*args, **kwargs)
        self.reference_range = reference_range
        self.with_flow = with_flow

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        record = dict(dataset_dict)
        references = record.pop("reference_files", [])
        flows = record.pop("flow_files", [])
        shortest, longest = self.reference_range
        # Drawn for every record, so that all records take the same number of random numbers.
        distance = min(int(np.random.randint(shortest, longest + 1)), len(references))
        file = references[distance - 1] if distance else record["file_name"]
        reference = self.read(file)
        size = reference.shape[:2]
        if "height" in record and size != (record["height"], record["width"]):
            raise DatasetError(
                f"{file} is {size[1]} x {size[0]} pixels, {record['file_name']} of the same clip "
                f"{record['width']} x {record['height']}"
            )
        record["reference_image"] = reference
        if self.with_flow:
            record["flow"] = (
                read_flow(flows[distance - 1]) if distance else np.zeros((*size, 2), np.float32)
            )
            if record["flow"].shape[:2] != size:
                raise DatasetError(
                    f"{flows[distance - 1]} is {record['flow'].shape[1::-1]} pixels (width, "
                    f"height), its images {size[::-1]}"
                )
        return super().__call__(record)

    def _transform_rest(self, record: dict[str, Any], transforms: T.TransformList) -> None:
        reference = transforms.apply_image(record["reference_image"])
        record["reference_image"] = channels_first(reference)
        if self.with_flow:
            record["flow"] = channels_first(transform_flow(record["flow"], transforms))


def check_video(cfg: CfgNode, names: str, records: list[dict[str, Any]]) -> None:
    """Check that ``records`` have what ``INPUT.VIDEO_*`` need; do nothing if these are off.

    Still images count as clips of one frame.

    Args:
        names: of the data sets, for messages.
    Raises:
        ConfigError: no data set has videos, or one lacks the flow.
    """
    if not cfg.INPUT.VIDEO_REFERENCE:
        return
    frames = [record for record in records if record.get("reference_files")]
    if not frames:
        raise ConfigError(
            f"INPUT.VIDEO_REFERENCE {tuple(cfg.INPUT.VIDEO_REFERENCE)} needs videos, but the data "
            f"set {names} has still images only; train on e.g. shapes_video_train or "
            "youtubevis_2019_train"
        )
    if cfg.INPUT.VIDEO_FLOW and not all(record.get("flow_files") for record in frames):
        raise ConfigError(
            f"INPUT.VIDEO_FLOW is on, but the data set {names} does not know the flow between its "
            "frames; train on e.g. shapes_video_train or flying_chairs_train"
        )
