"""Prediction on image files."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from tqdm import tqdm

from instseg.data.images import Array, read_image
from instseg.errors import ImageError
from instseg.predict.records import JsonLines, write_image
from instseg.predict.results import Results
from instseg.predict.sources import Source

_JPEG_SUFFIXES = frozenset((".jfif", ".jpe", ".jpeg", ".jpg"))


def predict_images(
    results: Results, sources: Sequence[Source], records: JsonLines, images: JsonLines
) -> None:
    """Predict on images, batched as the predictor does, and write what belongs to each.

    Args:
        results: where an image that cannot be used is counted.
        sources: images.
        records: ``predictions.json``.
        images: ``categories.json``, which lists the images.
    Raises:
        OutputError: a result cannot be written.
    """
    pending: deque[tuple[Source, Array]] = deque()

    def readable() -> Iterator[Array]:
        for source in tqdm(sources, unit="image", disable=None):
            try:
                image = read_image(source.name)
            except ImageError as error:
                results.fail(error)
                continue
            pending.append((source, image))
            yield image

    image_ids = count(1)  # enumerate() would hold on to a result while the next is made
    for result in results.predictor.stream(readable()):
        source, image = pending.popleft()
        kept = results.keep(result["instances"])
        number = next(image_ids)
        image_id = number if source.image_id is None else source.image_id
        name = source.file_name or source.name
        head = {"image_id": image_id, "file_name": name}
        height, width = image.shape[:2]
        try:
            instances = results.describe(kept, source.stem)
            # The image first: whenever the run ends, all that is said of images can be looked up.
            images.add({"id": image_id, "file_name": name, "width": width, "height": height})
            records.add(*(head | instance for instance in instances))
            if results.overlay:
                suffix = ".jpg" if Path(source.name).suffix.lower() in _JPEG_SUFFIXES else ".png"
                path = results.output / f"{source.stem}{suffix}"
                write_image(path, results.draw(image, kept))
        except ImageError as error:  # no file can hold its masks or overlay, or be named for them
            results.fail(error)
        del result, kept  # masks of a large image, which the next one needs the room of
