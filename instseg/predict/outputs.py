"""The files that a run of ``instseg predict`` is going to write."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from instseg.predict.formats import FORMATS
from instseg.predict.records import JsonLines, check_free, has_lines, writing
from instseg.predict.sources import Source
from instseg.predict.tile_records import tiles_file

_JPEG_SUFFIXES = frozenset((".jfif", ".jpe", ".jpeg", ".jpg"))


def overlay_name(source: Source, *, tiled: bool = False) -> str:
    """Name of the overlay of an image or video.

    Args:
        tiled: the image is predicted by tiles.
    """
    if source.kind != "image":
        return f"{source.stem}.mp4"
    jpeg = Path(source.name).suffix.lower() in _JPEG_SUFFIXES and not tiled
    return f"{source.stem}{'.jpg' if jpeg else '.png'}"


def check_outputs(
    output: Path,
    sources: Sequence[Source],
    formats: Sequence[str],
    *,
    overlay: bool,
    tiled: bool,
    resume: bool,
) -> None:
    """Make sure, before anything is computed, that a run replaces no file of the user.

    Masks of single instances, whose names are not known yet, are checked when they are written, and
    so are overlays of videos to be resumed, which may be complete.

    Args:
        output: folder of the run.
        sources: its inputs.
        formats: names of the formats of images.
        overlay: whether overlays are written.
        tiled: whether images are predicted by tiles.
        resume: whether videos go on.
    Raises:
        OutputError: there is a file, or something else, that no run of ours wrote.
    """
    paths = [output / name for name in _names(sources, formats)]
    lines = [JsonLines(path).lines for path in paths if path.suffix == ".json"]
    if tiled:
        lines += [tiles_file(output, source.stem) for source in sources if source.kind == "image"]
    for path in lines:
        with writing(path):
            has_lines(path)
    for path in paths:
        check_free(path)
    for source in sources if overlay else ():
        if source.kind == "image" or not resume:
            check_free(output / overlay_name(source, tiled=tiled))


def _names(sources: Sequence[Source], formats: Sequence[str]) -> Iterator[str]:
    """Names of the files of results."""
    writers = [FORMATS[name] for name in formats]
    if any(source.kind == "image" for source in sources):
        for writer in writers:
            yield from writer.files
    for source in sources:
        if source.kind == "image":
            yield from (f"{source.stem}{writer.suffix}" for writer in writers if writer.suffix)
        else:
            yield f"{source.stem}.json"
