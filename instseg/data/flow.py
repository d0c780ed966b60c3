"""Read and write optical flow in Middlebury's ``.flo`` files, and augment it.

A flow is (H, W, 2) float32, x then y, in pixels: the point at pixel p of the image lies at p + flow
in the reference image.  NaN marks an unknown flow.
"""

import numpy as np
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import BlendTransform, VFlipTransform

from instseg.data.augmentations import CanvasTransform, PhotometricTransform
from instseg.data.windows import SymmetryTransform, WindowTransform
from instseg.errors import DatasetError

_TAG = np.float32(202021.25).tobytes()
"""First bytes of a file, "PIEH" in the right byte order."""
_LARGEST = 1e9
"""Larger values mark an unknown flow."""
_LARGEST_SIDE = 2**15
_APPEARANCE = T.NoOpTransform | BlendTransform | T.ColorTransform | PhotometricTransform
"""Transforms that leave pixels where they are."""


def read_flow(path: str) -> np.ndarray:
    """(H, W, 2) flow of a ``.flo`` file, from any path that Detectron2's ``PathManager`` opens.

    Raises:
        DatasetError: the file is missing, damaged or of another format.
    """
    try:
        with PathManager.open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from None
    return decode_flow(content, path)


def decode_flow(content: bytes, path: str) -> np.ndarray:
    """(H, W, 2) flow of the bytes of a ``.flo`` file; ``path`` is for messages.

    Raises:
        DatasetError: the bytes are damaged or of another format.
    """
    if content[:4] != _TAG or len(content) < 12:
        raise DatasetError(f"{path} is no .flo file: it does not begin with PIEH and a size")
    width, height = np.frombuffer(content, "<i4", 2, offset=4).tolist()
    if not (0 < width <= _LARGEST_SIDE and 0 < height <= _LARGEST_SIDE):
        raise DatasetError(f"{path} claims to be {width} x {height} pixels")
    expected = 12 + 8 * width * height
    if len(content) != expected:
        raise DatasetError(
            f"{path} is damaged: {width} x {height} pixels take {expected} bytes, found "
            f"{len(content)}"
        )
    flow = np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
    known = (np.abs(flow) <= _LARGEST).all(axis=2, keepdims=True)
    return np.where(known, flow, np.float32(np.nan))


def encode_flow(flow: np.ndarray) -> bytes:
    """Bytes of a ``.flo`` file.

    Args:
        flow: (H, W, 2) float32; NaN is written as the format's mark of an unknown flow.
    """
    size = np.array(flow.shape[1::-1], "<i4")
    values = np.nan_to_num(flow, nan=2 * _LARGEST).astype("<f4")
    return _TAG + size.tobytes() + values.tobytes()


def transform_flow(flow: np.ndarray, transforms: T.TransformList) -> np.ndarray:
    """The flow between two images after both went through ``transforms``.

    Stretching uses the nearest pixel, so that no value mixes two surfaces.  The flow of pixels that
    a larger canvas adds is unknown.  A flow may lead out of the reference image.

    Args:
        flow: (H, W, 2) between the images before ``transforms``.
        transforms: those of ``INPUT.AUGMENTATION ssd``, also of colours, and of
            :mod:`instseg.data.windows`.
    Returns:
        (H', W', 2) float32.
    Raises:
        TypeError: a transform is of another kind.
    """
    for transform in transforms.transforms:
        if isinstance(transform, _APPEARANCE):
            continue
        elif isinstance(transform, T.HFlipTransform):
            flow = flow[:, ::-1] * np.array([-1, 1], np.float32)
        elif isinstance(transform, VFlipTransform):
            flow = flow[::-1] * np.array([1, -1], np.float32)
        elif isinstance(transform, SymmetryTransform | WindowTransform | CanvasTransform):
            flow = transform.apply_flow(flow)
        elif isinstance(transform, T.CropTransform):
            x, y, w, h = transform.x0, transform.y0, transform.w, transform.h
            flow = flow[y : y + h, x : x + w]
        elif isinstance(transform, T.ResizeTransform):
            flow = _resized(flow, transform.new_h, transform.new_w)
        else:
            raise TypeError(f"cannot tell how {type(transform).__name__} moves pixels")
    return np.ascontiguousarray(flow)


def _resized(flow: np.ndarray, new_height: int, new_width: int) -> np.ndarray:
    """``flow`` of images stretched to another size; each pixel uses the old one at its centre."""
    height, width = flow.shape[:2]
    rows = ((np.arange(new_height) + 0.5) * height / new_height).astype(int)
    columns = ((np.arange(new_width) + 0.5) * width / new_width).astype(int)
    factors = np.array([new_width / width, new_height / height], np.float32)
    return flow[rows[:, None], columns] * factors
