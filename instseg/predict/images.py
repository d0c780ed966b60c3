"""Prediction on image files."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from detectron2.structures import Instances
from tqdm import tqdm

from instseg.data.images import Array, PageReader
from instseg.data.intensity import ModelImage
from instseg.errors import ImageError
from instseg.predict.formats import Format, ImageResult
from instseg.predict.outputs import overlay_name
from instseg.predict.records import write_image
from instseg.predict.results import Results
from instseg.predict.sources import Source


def add_results(
    results: Results,
    source: Source,
    number: int,
    size: tuple[int, ...],
    instances: Instances,
    formats: Sequence[Format],
) -> None:
    """Write the results of an image in every format.

    Args:
        source: the image.
        number: of the image in this run, from 1.
        size: height and width.
        instances: what :meth:`Results.keep` gave.
        formats: where they are written.
    Raises:
        ImageError: too large an image for a format, or too long a name.
        OutputError: a result cannot be written.
    """
    one = ImageResult(
        image_id=number if source.image_id is None else source.image_id,
        file_name=source.file_name or source.name,
        stem=source.stem,
        height=size[0],
        width=size[1],
        records=results.describe(instances, source.stem),
        masks=instances.pred_masks if instances.has("pred_masks") else None,
        path=Path(source.name),
        page=source.page,
    )
    for writer in formats:
        writer.add(one)


def predict_images(results: Results, sources: Sequence[Source], formats: Sequence[Format]) -> None:
    """Predict on images, in the predictor's batches, and write the results of each.

    Args:
        results: counts images that cannot be used.
        sources: images.
        formats: they take the results of each image.
    Raises:
        OutputError: a result cannot be written.
    """
    pending: deque[tuple[Source, Array]] = deque()
    reader = PageReader(results.predictor.intensity)

    def readable() -> Iterator[ModelImage]:
        for source in tqdm(sources, unit="image", disable=None):
            try:
                image = reader.read(source.name, source.page)
            except ImageError as error:
                results.fail(error)
                continue
            pending.append((source, image))
            yield ModelImage(image)
        reader.close()

    image_ids = count(1)  # enumerate() would keep a result in memory while the next is made
    for result in results.predictor.stream(readable()):
        source, image = pending.popleft()
        instances = results.keep(result["instances"])
        number = next(image_ids)
        try:
            add_results(results, source, number, image.shape[:2], instances, formats)
            if results.overlay:
                path = results.output / overlay_name(source)
                write_image(path, results.draw(image, instances))
        except ImageError as error:  # too large for a file of masks or overlay, or too long a name
            results.fail(error)
        del result, instances  # frees the memory of the masks before the next image
