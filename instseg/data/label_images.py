"""Label images: one number per pixel, 0 for the background and the same number for an instance."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from instseg.errors import ImageError
from instseg.masks import RLE, CroppedMasks

Labels = npt.NDArray[np.int64]
_SAMPLE_FORMAT = 339  # tag of a TIFF
_SIGNED = 2  # value of SampleFormat
_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0  # value of it
_LARGEST = 2**53  # floats hold every whole number up to it
_TOUCHING = np.ones((3, 3))  # pixels that share a corner belong to one piece


def signed_pixels(image: Image.Image, upright: Image.Image) -> npt.NDArray[Any]:
    """(H, W) numbers of an image, as its TIFF stores them.

    Pillow mixes up signs, and inverts bytes if 0 is white.

    Args:
        image: opened by Pillow.
        upright: the same, turned.
    """
    pixels = np.asarray(upright)
    if image.format != "TIFF":
        return pixels
    if pixels.dtype in (np.uint8, bool) and image.getexif().get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        pixels = np.invert(pixels)
    is_signed = image.getexif().get(_SAMPLE_FORMAT, 1) in (_SIGNED, (_SIGNED,))
    if is_signed and pixels.dtype == np.uint8:
        return pixels.view(np.int8)
    if not is_signed and pixels.dtype == np.int32:
        return pixels.view(np.uint32)
    return pixels


def as_labels(pixels: npt.NDArray[Any], source: str) -> Labels:
    """Check that pixels are labels.

    Floats are accepted if all are whole, since programs such as MorphoLibJ write labels as floats.

    Args:
        pixels: (H, W) of any kind of number.
        source: name of the file in error messages.
    Raises:
        ImageError: some are negative, or no whole numbers.
    """
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise ImageError(f"{source}: has pixels that are NaN or infinite; expected labels")
        fractions = pixels[pixels != np.floor(pixels)]
        if len(fractions):
            raise ImageError(
                f"{source}: has pixels such as {fractions[0]:g}; expected whole numbers, a label "
                "per instance: is it a map of probabilities or distances?"
            )
    lowest = pixels.min()
    if lowest < 0:
        raise ImageError(
            f"{source}: has the negative label {lowest:g}; expected 0 for the background and "
            "labels from 1"
        )
    if pixels.max() > _LARGEST:
        raise ImageError(f"{source}: has the label {pixels.max():g}; expected at most {_LARGEST}")
    return pixels.astype(np.int64)


def colour_error(source: str, what: str) -> ImageError:
    """The error about labels painted in colour, from which the labels cannot be read."""
    return ImageError(
        f"{source}: has {what}; expected one number per pixel, as in a grey image or one with a "
        "palette; colours do not tell the labels: save the label image itself"
    )


def label_rles(labels: Labels) -> dict[int, RLE]:
    """The mask of each label except 0, as compressed RLE, in the order of the labels."""
    numbers, compact = _consecutive(labels)
    masks = CroppedMasks.from_label_image(compact, len(numbers))
    return dict(zip(numbers, masks.to_rle(), strict=True))


def labels_in_pieces(labels: Labels) -> dict[int, int]:
    """Label → number of its pieces, for those of two or more; pixels at a corner are connected."""
    numbers, compact = _consecutive(labels)
    pieces = {}
    for index, (number, box) in enumerate(
        zip(numbers, ndimage.find_objects(compact), strict=True), start=1
    ):
        count = ndimage.label(compact[box] == index, _TOUCHING)[1]
        if count > 1:
            pieces[number] = count
    return pieces


def _consecutive(labels: Labels) -> tuple[list[int], Labels]:
    """The labels except 0 in their order, and the same image with 1, 2, 3, ... for them."""
    present, compact = np.unique(labels, return_inverse=True)
    return present[present > 0].tolist(), compact.reshape(labels.shape) + (present[0] > 0)
