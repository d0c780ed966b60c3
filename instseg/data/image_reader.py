"""Read the images of a data set again and again, and keep them in memory while there is room."""

import os

from instseg.data.images import Array, read_image
from instseg.data.intensity import AS_IS, Intensity


class ImageReader:
    """:func:`~instseg.data.images.read_image` that keeps decoded images.

    It keeps the first images that it reads, until ``cache_mib`` is used up, and reads the others
    again each time: an image is as likely to come back as any other.  Each process that loads data
    keeps its own.
    """

    def __init__(
        self, *, format: str = "BGR", intensity: Intensity = AS_IS, cache_mib: float = 0
    ) -> None:
        """
        Args:
            format, intensity: see :func:`~instseg.data.images.read_image`.
            cache_mib: room for decoded images, in MiB.
        """
        self.format, self.intensity = format, intensity
        self._images: dict[str, Array] = {}
        self._free_bytes = cache_mib * 2**20

    def __call__(self, path: str | os.PathLike[str]) -> Array:
        """(H, W, C) uint8 that must not be written to.

        Raises:
            ImageError: as :func:`~instseg.data.images.read_image`.
        """
        name = os.fspath(path)
        image = self._images.get(name)
        if image is None:
            image = read_image(name, format=self.format, intensity=self.intensity)
            image.flags.writeable = False
            if image.nbytes <= self._free_bytes:
                self._free_bytes -= image.nbytes
                self._images[name] = image
        return image
