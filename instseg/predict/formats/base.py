"""What the formats of results have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from instseg.categories import Categories
from instseg.errors import ConfigError
from instseg.masks import CroppedMasks


@dataclass(frozen=True)
class ImageResult:
    """The instances of one image.

    Attributes:
        image_id: its id in results.
        file_name: its name in results.
        stem: of the files written for it.
        height, width: in pixels.
        records: one for each instance in COCO's form, the best first.
        masks: of ``records``, in their order; None for models without masks.
        path: of the image file; None if it is not there.
        page: of a stack, counted from 0; None for a single image.
    """

    image_id: int | str
    file_name: str
    stem: str
    height: int
    width: int
    records: Sequence[dict[str, Any]]
    masks: CroppedMasks | None
    path: Path | None
    page: int | None = None

    def needed_masks(self) -> CroppedMasks:
        """The masks, for a format that cannot do without.

        Raises:
            ConfigError: there are none.
        """
        if self.masks is None and self.records:
            raise ConfigError(
                f"{self.file_name}: these results have no masks; the only format without masks is "
                "coco"
            )
        return self.masks or CroppedMasks.from_rles([], (self.height, self.width))


class Format(ABC):
    """Writes the results of images, one after the other; a context manager.

    Files are complete whenever they are there.  Those that list several images appear when the
    context ends, also by an error.

    Attributes:
        packages: those of the extra ``microscopy`` that it needs.
        files: names of its files that cover all images of a run.
        suffix: of the file that it writes for each image, after the stem; "" for none.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()
    suffix: ClassVar[str] = ""

    def __init__(self, output: Path, categories: Categories, about: dict[str, Any]) -> None:
        """
        Args:
            output: folder of everything that is written.
            categories: the classes, in their order.
            about: settings of the run, JSON.
        """
        self.output = output
        self.categories = categories
        self.about = about

    @abstractmethod
    def add(self, image: ImageResult) -> None:
        """Write the results of an image.

        Raises:
            OutputError: the disk is full, or the like.
            ImageError: this one image cannot be written.
        """

    def path(self, image: ImageResult) -> Path:
        """The file of an image."""
        return self.output / f"{image.stem}{self.suffix}"

    def __enter__(self) -> "Format":
        return self

    def __exit__(self, *error: Any) -> None:
        return None
