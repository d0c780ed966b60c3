"""Convert between RGB and the YCbCr of videos, with the right matrix and range.

High definition uses the matrix BT.709, smaller videos use BT.601.  A video's tags say which one it
has.  Without tags its size decides, as in players.
"""

from typing import Any

from instseg.data.images import Array
from instseg.optional import AV as av

# Numbers of ITU-T H.273, as containers and codecs use them; matrix, primaries and transfer function
# share them.
_BT709, _UNSPECIFIED, _SMPTE170M = 1, 2, 6


def is_high_definition(height: int, width: int) -> bool:
    """Whether an untagged video of this size counts as BT.709."""
    return height >= 720 or width > 1024


def to_bgr(frame: Any) -> Array:
    """Pixels of a decoded frame, (H, W, 3) uint8 in BGR order, converted as its tags say."""
    matrix = None  # FFmpeg then uses the frame's tag
    if frame.colorspace == _UNSPECIFIED and is_high_definition(frame.height, frame.width):
        matrix = av.video.reformatter.Colorspace.ITU709
    image: Array = frame.to_ndarray(format="bgr24", src_colorspace=matrix)
    return image


def to_yuv(image: Array) -> Any:
    """A frame from (H, W, 3) in BGR order, for an encoder that :func:`tag` has prepared."""
    reformatter = av.video.reformatter
    high_definition = is_high_definition(*image.shape[:2])
    matrix = getattr(reformatter.Colorspace, "ITU709" if high_definition else "ITU601")
    return av.VideoFrame.from_ndarray(image, format="bgr24").reformat(
        format="yuv420p", dst_colorspace=matrix, dst_color_range=reformatter.ColorRange.MPEG
    )


def tag(context: Any, height: int, width: int) -> None:
    """Have an encoder write tags for the colours of :func:`to_yuv`."""
    number = _BT709 if is_high_definition(height, width) else _SMPTE170M
    context.colorspace = context.color_primaries = context.color_trc = number
    context.color_range = av.video.reformatter.ColorRange.MPEG
