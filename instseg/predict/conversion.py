"""The work of ``instseg results``: results of an earlier run, in other formats."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from instseg.categories import Categories
from instseg.errors import ConfigError, ImageError, one_line, short
from instseg.masks import RLE, CroppedMasks
from instseg.predict.formats import DEFAULT, ImageResult, opened, parse
from instseg.predict.result_file import ResultFile, as_object, checked_mask, open_results
from instseg.predict.sources import RESERVED, prepare_output, unused_stem

logger = logging.getLogger(__name__)

_OF_IMAGE = ("image_id", "file_name", "page")
"""Keys of a record that belong to its image."""


def convert(
    file: Path, formats: str, output: Path | None = None, images: Path | None = None
) -> int:
    """Write the results in a file in other formats.

    Prints one line on stderr for an image whose results cannot be written, and goes on.

    Args:
        file: see :class:`~instseg.predict.result_file.ResultFile`.
        formats: names with commas between them.
        output: folder of everything that is written; None for that of ``file``.
        images: folder of the images; None for where they were.
    Returns:
        0, or 1 if the results of some image could not be written.
    Raises:
        ConfigError: the file or a name of a format cannot be used.
        OutputError: the folder cannot be written to.
    """
    names = parse(formats, "--to")
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images} is no folder; expected that of the images")
    output = output or file.parent
    if DEFAULT in names and output.resolve() == file.parent.resolve():
        raise ConfigError(f"--to {DEFAULT} could replace {file} itself; choose another --output")
    results = open_results(file)
    if not results.head:
        text = "%s: no categories.json beside it: images without instances are not known"
        logger.info(text, file)
    prepare_output(output, ())
    categories = results.categories()
    info = results.head.get("info")
    about = {"config": None, "results": str(file)} | (info if isinstance(info, dict) else {})
    status = 0
    with opened(names, output, categories, about) as writers:
        for image in image_results(results, categories, images):
            try:
                for writer in writers:
                    writer.add(image)
            except ImageError as error:
                tqdm.write(one_line(error), file=sys.stderr)
                status = 1
    return status


def image_results(
    results: ResultFile, categories: Categories, images: Path | None
) -> Iterator[ImageResult]:
    """The results of each image, or of each frame of a video.

    Raises:
        ConfigError: an entry cannot be used.
    """
    if results.is_video:
        yield from _frames(results, categories, images)
        return
    listed = _listed(results)
    names = _Stems(results.path)
    stems, done = names.of(listed.values()), set()
    for key, group in groupby(results.entries(), key=lambda entry: entry.get("image_id")):
        if key in done:
            raise ConfigError(
                f"{results.path}: the results of image {short(key)} are not one after the other; "
                "sort them by image_id"
            )
        done.add(key)
        records = list(group)
        image = listed.get(key) or _image_of(results.path, key, records[0])
        stem = stems[key] if key in listed else names.of([image])[key]
        yield _image_result(results.path, image, records, stem, categories, images)
    for key, image in listed.items():
        if key not in done:
            yield _image_result(results.path, image, [], stems[key], categories, images)


def _listed(results: ResultFile) -> dict[int | str, dict[str, Any]]:
    """Id → entry of the images that ``categories.json`` lists."""
    images = results.head.get("images") or []
    if not isinstance(images, list):
        raise ConfigError(f"{results.path}: the list of images beside it is {short(images)}")
    for image in images:
        if not isinstance(image, dict) or type(image.get("id")) not in (int, str):
            raise ConfigError(f"{results.path}: the list of images beside it has {short(image)}")
    return {image["id"]: image for image in images}


def _frames(
    results: ResultFile, categories: Categories, images: Path | None
) -> Iterator[ImageResult]:
    stems = set(RESERVED)
    for frame in results.entries():
        number, records = frame.get("frame"), frame.get("objects")
        if type(number) is not int or not isinstance(records, list):
            raise ConfigError(f"{results.path}: {short(frame)} is no frame")
        name = f"{results.path.stem}_frame{number:06d}"
        image = {"id": number, "file_name": frame.get("file_name") or name}
        image |= {"width": frame.get("width"), "height": frame.get("height")}
        stem = unused_stem(name, stems)
        yield _image_result(results.path, image, records, stem, categories, images)


def _image_result(
    path: Path,
    image: dict[str, Any],
    records: Sequence[dict[str, Any]],
    stem: str,
    categories: Categories,
    images: Path | None,
) -> ImageResult:
    name = _name(path, image)
    height, width = image.get("height"), image.get("width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ConfigError(f"{path}: image {name} has the size {short((width, height))}")
    checked = [_record(path, name, record, categories, height, width) for record in records]
    checked.sort(key=lambda pair: -pair[0]["score"])
    masks = [mask for _, mask in checked if mask is not None]
    has_masks = len(masks) == len(checked)
    return ImageResult(
        image_id=image["id"],
        file_name=name,
        stem=stem,
        height=height,
        width=width,
        records=[record for record, _ in checked],
        masks=CroppedMasks.from_rles(masks, (height, width)) if has_masks else None,
        path=_file(name, images),
        page=image.get("page"),
    )


def _name(path: Path, image: dict[str, Any]) -> str:
    """The name of an image in results."""
    name = str(image.get("file_name") or image["id"])
    try:
        if b"\0" not in os.fsencode(name):
            return name
    except UnicodeEncodeError:
        pass
    raise ConfigError(f"{path}: an image has the name {short(name)}; expected that of a file")


class _Stems:
    """Names the files of images as ``instseg predict`` does: inputs first, then pages of stacks."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of the results, for messages.
        """
        self._path = path
        self._taken = set(RESERVED)
        self._stacks: dict[str, str] = {}
        self._pages: set[tuple[str, int]] = set()

    def of(self, images: Iterable[dict[str, Any]]) -> dict[int | str, str]:
        """Id → stem of the files of an image.

        Args:
            images: in the order of the run.
        """
        inputs = {image["id"]: self._of_input(image) for image in images}
        return {
            key: stem if page is None else unused_stem(f"{stem}_page{page:04d}", self._taken)
            for key, (stem, page) in inputs.items()
        }

    def _of_input(self, image: dict[str, Any]) -> tuple[str, int | None]:
        """The stem of an image, or that of its stack and its page there."""
        name, page = _name(self._path, image), image.get("page")
        if page is not None and type(page) is not int:
            raise ConfigError(f"{self._path}: image {name} has the page {short(page)}")
        if page is not None and name in self._stacks and (name, page) not in self._pages:
            stem = self._stacks[name]
        else:
            stem = unused_stem(Path(name).stem or "image", self._taken)
        if page is not None:
            self._stacks[name] = stem
            self._pages.add((name, page))
        return stem, page


def _record(
    path: Path, name: str, record: Any, categories: Categories, height: int, width: int
) -> tuple[dict[str, Any], RLE | None]:
    """A checked record without the keys of its image, and its mask, if it has one."""
    record = {k: v for k, v in as_object(path, record).items() if k not in _OF_IMAGE}
    mask = checked_mask(path, name, record, height, width)
    if mask is None:
        return record, None
    key = record["category_id"]
    name = record.get("category_name") or categories.name_of(categories.number_of(key))
    return record | {"category_name": str(name)}, mask


def _image_of(path: Path, key: Any, record: dict[str, Any]) -> dict[str, Any]:
    """An image that no file lists, as its first record tells it."""
    mask = record.get("segmentation")
    size = mask.get("size") if isinstance(mask, dict) else None
    if not isinstance(size, list) or len(size) != 2:
        raise ConfigError(
            f"{path}: the size of image {short(key)} is not known; expected categories.json beside "
            "the file, or masks as RLE"
        )
    more = {name: record.get(name) for name in ("file_name", "page")}
    return {"id": key, "width": size[1], "height": size[0]} | more


def _file(name: str, images: Path | None) -> Path | None:
    """The file of an image, if it is there."""
    paths = [Path(name)] if images is None else [images / name, images / Path(name).name]
    return next((path for path in paths if os.path.isfile(path)), None)
