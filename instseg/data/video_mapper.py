"""Training on videos: a frame, an earlier one of its clip, and the flow between the two.

A record of a video has, beside Detectron2's standard fields, ``video_id``, ``frame_index``,
``length`` and ``reference_files``: earlier frames of its clip, the nearest first.  A data set that
knows the flow to them gives ``flow_files`` as well, in the same order.
"""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from instseg.data.flow import read_flow, transform_flow
from instseg.data.image_mapper import SSDMapper
from instseg.data.images import read_image
from instseg.errors import ConfigError, DatasetError

NUM_REFERENCES = 10
"""How many earlier frames a record names at most."""


class VideoMapper(SSDMapper):
    """SSDMapper that adds ``reference_image`` and, if asked to, ``flow``.

    ``reference_image`` (3, h, w) is an earlier frame that went through the same transforms, with
    the same random numbers, as ``image``.  ``flow`` (2, h, w) float32, x then y, is in pixels of
    ``image``: what is at a pixel of it lies at pixel + flow in ``reference_image``.  It is NaN
    where that is unknown, and may lead out of the image.

    Near the beginning of a clip, where no frame is as early as asked for, the earliest one is
    taken: for the first frame, and so for every still image, that is itself.
    """

    def __init__(
        self, *args: Any, reference_range: tuple[int, int], with_flow: bool, **kwargs: Any
    ) -> None:
        """
        Args:
            args, kwargs: those of SSDMapper.
            reference_range: fewest and most frames from the reference to the frame.
            with_flow: the records have ``flow_files``, or are still images.
        """
        super().__init__(*args, **kwargs)
        self.reference_range = reference_range
        self.with_flow = with_flow

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        record = dict(dataset_dict)
        references = record.pop("reference_files", [])
        flows = record.pop("flow_files", [])
        shortest, longest = self.reference_range
        # Drawn before anything is looked at, so that the same numbers follow for every record.
        distance = min(int(np.random.randint(shortest, longest + 1)), len(references))
        file = references[distance - 1] if distance else record["file_name"]
        reference = read_image(file, format=self.image_format)
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
        record["reference_image"] = _channels_first(reference)
        if self.with_flow:
            record["flow"] = _channels_first(transform_flow(record["flow"], transforms))


def check_video(cfg: CfgNode, names: str, records: list[dict[str, Any]]) -> None:
    """Check that ``records`` are what ``INPUT.VIDEO_*`` ask for; do nothing if they are off.

    Still images may be mixed in, as clips of one frame.

    Args:
        names: of the data sets, for messages.
    Raises:
        ConfigError: none of the data sets is a video set, or one does not know its flow.
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


def _channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
