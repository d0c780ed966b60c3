"""Read images as the frames of a video: those of a folder, or those with numbered names."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from instseg.data.images import PageReader
from instseg.data.intensity import AS_IS, Intensity
from instseg.data.videos import Frame
from instseg.errors import ImageError

logger = logging.getLogger(__name__)

DEFAULT_FPS = 25.0
_NUMBER = re.compile(r"%(?:0?([1-9]\d?))?d", re.ASCII)


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts ``frame_9`` before ``frame_10``."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether the name stands for the files of a sequence, as ``frames_%05d.png`` does."""
    name = os.path.basename(path)
    return name.count("%") == 1 and _NUMBER.search(name) is not None


def without_number(name: str) -> str:
    """The common part of the names of a pattern's files: ``frames`` for ``frames_%05d``."""
    return _NUMBER.sub("", name).strip(" _-.") or "frames"


def numbered_files(pattern: str | os.PathLike[str]) -> list[str]:
    """The files whose names are ``pattern`` with a number in place of ``%d`` or ``%05d``.

    Args:
        pattern: a path for which :func:`is_pattern` is true.
    Returns:
        paths in the order of the numbers; empty if there is no such folder.  Missing numbers are
        logged.
    """
    folder, name = os.path.split(pattern)
    before, digits, after = _NUMBER.split(name)
    before, after, width = re.escape(before), re.escape(after), int(digits or 1)
    whole_name = re.compile(f"{before}([0-9]{{{width}}}|[1-9][0-9]{{{width},}}){after}", re.DOTALL)
    try:
        matches = [match for match in map(whole_name.fullmatch, os.listdir(folder or ".")) if match]
    except OSError:
        return []
    files = {int(match[1]): os.path.join(folder, match[0]) for match in matches}
    numbers = sorted(number for number, path in files.items() if not os.path.isdir(path))
    if numbers and (missing := numbers[-1] - numbers[0] + 1 - len(numbers)):
        logger.info(
            "%s: %d of the numbers %d to %d have no file; the frames are taken for successive ones",
            *(pattern, missing, numbers[0], numbers[-1]),
        )
    return [files[number] for number in numbers]


class ImageSequence:
    """Image files, or the pages of one file, as the frames of a video, read one at a time."""

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        fps: float = DEFAULT_FPS,
        *,
        pages: Sequence[int] = (),
        intensity: Intensity = AS_IS,
    ) -> None:
        """
        Args:
            name: of the sequence in error messages.
            files: in the order of the frames.
            fps: frames per second.
            pages: of the one file, which is a stack, in the order of the frames.
            intensity: what is done to the channels of images.
        Raises:
            ImageError: there are no files.
        """
        if not files:
            raise ImageError(f"{name}: there are no files of such names")
        self.name = name
        self.fps = fps
        self._images: list[tuple[str, int | None]] = [(file, None) for file in files]
        if pages:
            self._images = [(files[0], page) for page in pages]
        self.length: int | None = len(self._images)
        self._reader = PageReader(intensity)

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames in order.

        Raises:
            ImageError: after the last frame, if some images cannot be used.
        """
        count = 0
        first: ImageError | None = None
        for number, (path, page) in enumerate(self._images):
            try:
                image = self._reader.read(path, page)
            except ImageError as error:
                count, first = count + 1, first or error
                continue
            yield Frame(image, number / self.fps, Path(path).name, page)
        if first is not None:
            rest = "; the other frames are used" if count < len(self._images) else ""
            raise ImageError(
                f"{self.name}: {count} of {len(self._images)} images cannot be used, first "
                f"{first}{rest}"
            )

    def close(self) -> None:
        """Close the stack, if it is one."""
        self._reader.close()
