"""Inputs of ``instseg predict``, such as files and cameras, and the names of their results."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from instseg.data.build import register_dataset
from instseg.data.dataset import load
from instseg.data.presence import is_zarr
from instseg.data.records import check_image_ids
from instseg.data.sequences import is_pattern, natural_order, numbered_files, without_number
from instseg.data.streams import is_url, public_name
from instseg.data.suffixes import MEDIA_SUFFIXES, VIDEO_SUFFIXES
from instseg.errors import ConfigError, DatasetError, OutputError
from instseg.predict.folders import media_in

_CAMERA_DIGITS = 10
RESERVED = frozenset(("categories", "predictions"))
"""Stems of the JSON files that belong to no video."""
_LONGEST_STEM = 50


@dataclass(frozen=True)
class Source:
    """Something to predict on, and the stem of the files written for it.

    Attributes:
        name: the file to open, or the public part of a stream's address.
        stem: of the files written for it.
        kind: of input.
        image_id: its id in a data set, None without one.
        file_name: its name in results, "" for ``name``.
        url: full address of a stream.
        files: of a sequence, in the order of its frames.
        page: of an image in a stack, None without one.
        pages: of a sequence that is a stack; ``files`` is then that one file.
    """

    name: str
    stem: str
    kind: Literal["image", "video", "camera", "stream", "sequence"]
    image_id: int | str | None = None
    file_name: str = ""
    url: str = field(default="", repr=False)
    files: tuple[str, ...] = field(default=(), repr=False)
    page: int | None = None
    pages: tuple[int, ...] = field(default=(), repr=False)


def find_sources(
    inputs: Sequence[str],
    *,
    recursive: bool = False,
    sequences: bool = False,
    output: Path | None = None,
) -> list[Source]:
    """The sources that files, folders, patterns, streams and camera numbers stand for.

    A file that does not exist, or a link to none in a folder, is kept: it gives an error line when
    its turn comes.

    Args:
        recursive: search the folders inside folders as well, but not those that are links.
        sequences: the images of a folder are the frames of one video.
        output: a folder that is not searched.
    Raises:
        ConfigError: nothing at all to work on, or an input that is a configuration key.
    """
    sources: list[Source] = []
    stems = set(RESERVED)
    for item in inputs:
        if not item:
            raise ConfigError("an --input is empty; is a variable of the shell not set?")
        path = Path(item)
        if is_url(item):
            sources.append(_stream(item, stems))
        elif is_zarr(path):
            sources.append(Source(item, unused_stem(path.stem, stems), "image"))
        elif os.path.isdir(path):  # unlike Path.is_dir() also for too long a name
            for folder, media in media_in(path, recursive=recursive, output=output):
                sources.extend(_in_folder(folder, media, stems, sequences))
        elif _is_key(path):
            raise ConfigError(
                f"--input {item} is a key; put KEY VALUE pairs behind `--`, at the end"
            )
        else:
            sources.append(_source(item, stems))
    if not any(map(_is_there, sources)):
        raise ConfigError(f"nothing to predict on: --input {' '.join(inputs)} does not exist")
    return sources


def _is_there(source: Source) -> bool:
    if source.kind in ("camera", "stream"):
        return True
    return bool(source.files) or os.path.lexists(source.name)


def dataset_sources(name: str) -> list[Source]:
    """The images of a data set, with the ids and names that they have there.

    Args:
        name: as in ``DATASETS.TEST``; also ``coco:PATH.json:IMAGE_ROOT``.
    Raises:
        DatasetError: no such data set, or one that cannot be read.
    """
    register_dataset(name)
    dataset = load(name)
    check_image_ids(name, dataset.records)
    root = os.path.join(dataset.image_root, "")
    stems = set(RESERVED)
    sources = []
    for number, record in enumerate(dataset.records):
        file = os.fspath(record["file_name"])
        image_id = record.get("image_id", number)
        sources.append(
            Source(
                file,
                unused_stem(Path(file).stem, stems),
                "image",
                image_id if isinstance(image_id, str) else int(image_id),
                file.removeprefix(root),
            )
        )
    if not sources:
        raise DatasetError(f"--images-of {name}: the data set has no images")
    return sources


def _is_key(path: Path) -> bool:
    looks_so = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", str(path)) is not None
    return looks_so and path.suffix.lower() not in MEDIA_SUFFIXES and not os.path.exists(path)


def _source(name: str, stems: set[str]) -> Source:
    path = Path(name)
    if os.path.lexists(name):
        pass
    elif _is_camera(name):
        return Source(name, unused_stem(f"camera_{name}", stems), "camera")
    elif is_pattern(name):
        stem = unused_stem(without_number(path.stem), stems)
        return Source(name, stem, "sequence", files=tuple(numbered_files(name)))
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    return Source(name, unused_stem(path.stem, stems), "video" if is_video else "image")


def _stream(url: str, stems: set[str]) -> Source:
    name = public_name(url)
    stem = re.sub(r"[^\w-]+", "_", Path(name.partition("://")[2]).stem)[:_LONGEST_STEM]
    return Source(name, unused_stem(stem, stems), "stream", url=url)


def _in_folder(
    folder: Path, media: Sequence[Path], stems: set[str], sequences: bool
) -> Iterator[Source]:
    images = [str(file) for file in media if file.suffix.lower() not in VIDEO_SUFFIXES]
    if sequences and images:
        stem = unused_stem(folder.resolve().name or "images", stems)
        yield Source(str(folder), stem, "sequence", files=tuple(sorted(images, key=natural_order)))
    for file in media:
        if not sequences or file.suffix.lower() in VIDEO_SUFFIXES:
            yield _source(str(file), stems)


def _is_camera(name: str) -> bool:
    """Whether it is a number that OpenCV takes; a longer one can only be the name of a file."""
    return name.isdecimal() and len(name) <= _CAMERA_DIGITS and int(name) < 2**31


def unused_stem(stem: str, taken: set[str]) -> str:
    """``stem`` or ``stem_2``, ``stem_3``, ...: compared without case, as some file systems do.

    Args:
        taken: stems in lower case; the result is added to it.
    """
    candidate, number = stem, 1
    while candidate.lower() in taken:
        number += 1
        candidate = f"{stem}_{number}"
    taken.add(candidate.lower())
    return candidate


def prepare_output(output: Path, sources: Iterable[Source]) -> None:
    """Create the folder ``output``, and make sure that nothing in it is an input.

    Raises:
        OutputError: it cannot be created or written to.
        ConfigError: it is the folder of an input.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output, prefix=".writable-"):
            pass
    except OSError as error:
        raise OutputError(
            f"--output {output} cannot be written: {error.strerror}; choose another folder"
        ) from None
    for source in sources:
        if source.kind in ("camera", "stream"):
            continue
        if os.path.realpath(output) in _folders(source.files[0] if source.files else source.name):
            raise ConfigError(
                f"--output {output} is the folder of the input {source.name}, which an overlay "
                "could replace; choose another folder"
            )


def _folders(name: str) -> set[str]:
    """The folder of the file ``name``, and if it is a link, also that of its target."""
    paths = (os.path.dirname(name), os.path.dirname(os.path.realpath(name)))
    return {os.path.realpath(path) for path in paths}
