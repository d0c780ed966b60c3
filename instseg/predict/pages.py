"""The pages of stacks that ``instseg predict --pages`` takes."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from instseg.data.images import is_tiff
from instseg.data.tiff import TiffImages
from instseg.data.tiff_errors import INSTALL
from instseg.errors import ConfigError, ImageError
from instseg.predict.sources import Source, unused_stem

_INTERVAL = re.compile(r"(\d*):(\d*)|(\d+)", re.ASCII)
_MOST_DIGITS = 9


@dataclass(frozen=True)
class Pages:
    """Pages of a stack, counted from 0.

    Attributes:
        text: as given.
        first: the first one.
        end: the one behind the last; None is the end of the stack.
    """

    text: str
    first: int
    end: int | None

    @classmethod
    def parse(cls, text: str) -> "Pages":
        """Those of ``all``, of a number, or of an interval A:B, from A to B - 1.

        Raises:
            ConfigError: another text, an interval without pages, or tifffile is not installed.
        """
        match = _INTERVAL.fullmatch(text) if len(text) <= 2 * _MOST_DIGITS else None
        if text == "all":
            first, end = 0, None
        elif match and match[3]:
            first, end = int(match[3]), int(match[3]) + 1
        elif match:
            first, end = int(match[1] or 0), int(match[2]) if match[2] else None
        if (text != "all" and not match) or (end is not None and end <= first):
            raise ConfigError(
                f"--pages is {text!r}; expected all, the number of a page from 0 on, or A:B for "
                "those from A to B - 1"
            )
        if find_spec("tifffile") is None:
            raise ConfigError(
                f"--pages needs the package tifffile, which is not installed; type: {INSTALL}"
            )
        return cls(text, first, end)

    def of(self, count: int) -> range:
        """Those of a stack of ``count`` pages, and the first one that is asked for and missing."""
        end = count if self.end is None else min(self.end, count + 1)
        return range(self.first, max(end, self.first + 1))


def take_pages(sources: Sequence[Source], pages: Pages, *, as_videos: bool) -> list[Source]:
    """Replace images that are stacks by their pages.

    A page that a stack does not have is a source as well: reading it reports that there is none.

    Args:
        as_videos: the pages of a stack are the frames of one video, also of one among the images of
            a folder, which are another video.
    """
    stems = {source.stem.lower() for source in sources}
    taken: list[Source] = []
    for source in sources:
        if source.kind == "sequence":
            taken += _without_stacks(source, pages, stems)
        elif source.kind == "image":
            taken += _pages_of(source, pages, stems, as_videos=as_videos)
        else:
            taken.append(source)
    return taken


def _without_stacks(source: Source, pages: Pages, stems: set[str]) -> Iterator[Source]:
    """A sequence of those files that are single images, then each of the stacks."""
    counts = {file: _count(file) or 1 for file in source.files}
    single = tuple(file for file in source.files if counts[file] == 1)
    if single or not source.files:
        yield replace(source, files=single)
    for file in source.files:
        if counts[file] > 1:
            stem = unused_stem(Path(file).stem, stems)
            yield _video(Source(file, stem, "image"), pages.of(counts[file]))


def _pages_of(
    source: Source, pages: Pages, stems: set[str], *, as_videos: bool
) -> Iterator[Source]:
    count = _count(source.name)
    if count is None or (count == 1 and 0 in pages.of(1)):
        yield source
    elif as_videos and count > 1:
        yield _video(source, pages.of(count))
    else:
        for number in pages.of(count):
            stem = unused_stem(f"{source.stem}_page{number:04d}", stems)
            yield replace(source, stem=stem, page=number)


def _video(stack: Source, pages: range) -> Source:
    return replace(stack, kind="sequence", files=(stack.name,), pages=tuple(pages))


def _count(file: str) -> int | None:
    """The number of images in a file, more than one only in a TIFF; None if it cannot be read.

    A TIFF that is cut off counts one more, so that reading this one reports the damage.
    """
    try:
        if not is_tiff(file):
            return 1 if os.path.isfile(file) else None
        with TiffImages(file) as images:
            return len(images.pages) + bool(images.damage)
    except (ImageError, OSError):  # said when the turn of the source comes
        return None
