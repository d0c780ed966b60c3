"""Results in COCO's form: ``predictions.json`` and ``categories.json``."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from instseg.categories import Categories
from instseg.predict.formats.base import Format, ImageResult
from instseg.predict.records import JsonLines


class Coco(Format):
    """The records of all instances, and the list of all images and classes.

    See :mod:`instseg.predict` for their content.
    """

    files = ("categories.json", "predictions.json")

    def __init__(self, output: Path, categories: Categories, about: dict[str, Any]) -> None:
        super().__init__(output, categories, about)
        head = {"info": about, "categories": categories.as_coco()}
        images, records = (output / name for name in self.files)
        self._images = JsonLines(images, head, "images")
        self._records = JsonLines(records)

    def __enter__(self) -> "Coco":
        with ExitStack() as stack:
            stack.enter_context(self._images)
            stack.enter_context(self._records)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, image: ImageResult) -> None:
        page = {} if image.page is None else {"page": image.page}
        entry = {"id": image.image_id, "file_name": image.file_name} | page
        # The image first: its records refer to it, whenever the run ends.
        self._images.add(entry | {"width": image.width, "height": image.height})
        head = {"image_id": image.image_id, "file_name": image.file_name} | page
        self._records.add(*(head | record for record in image.records))
