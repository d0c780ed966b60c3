"""Which YCbCr a video holds: the matrix and range between its pixels and RGB.

BT.709 is the matrix of high definition and BT.601 of anything smaller.  A video says which one it
has; where it does not, its size tells, as players assume.
"""

from typing import Any

import av
from av.video.reformatter import ColorRange, Colorspace

from instseg.data.images import Array

# Numbers of ITU-T H.273, which containers and codecs use: the same for the matrix, the primaries
# and the transfer function.
_BT709, _UNSPECIFIED, _SMPTE170M = 1, 2, 6


def is_high_definition(height: int, width: int) -> bool:
    """Whether an untagged video of this size is taken for BT.709."""
    return height >= 720 or width > 1024


def to_bgr(frame: Any) -> Array:
    """Pixels of a decoded frame, (H, W, 3) uint8 in BGR order, with the colours it says it has."""
    matrix = None  # what the frame says, as FFmpeg reads it
    if frame.colorspace == _UNSPECIFIED and is_high_definition(frame.height, frame.width):
        matrix = Colorspace.ITU709
    image: Array = frame.to_ndarray(format="bgr24", src_colorspace=matrix)
    return image


def to_yuv(image: Array) -> Any:
    """A frame for an encoder that :func:`tag` has told of, from (H, W, 3) in BGR order."""
    height, width = image.shape[:2]
    matrix = Colorspace.ITU709 if is_high_definition(height, width) else Colorspace.ITU601
    return av.VideoFrame.from_ndarray(image, format="bgr24").reformat(
        format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG
    )


def tag(context: Any, height: int, width: int) -> None:
    """Have an encoder write which colours the frames of :func:`to_yuv` have."""
    number = _BT709 if is_high_definition(height, width) else _SMPTE170M
    context.colorspace = context.color_primaries = context.color_trc = number
    context.color_range = ColorRange.MPEG
