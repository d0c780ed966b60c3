"""Read FlyingChairs as released: pairs of images with the optical flow between them.

Layout of ``$DETECTRON2_DATASETS/FlyingChairs_release``::

    data/00001_img1.ppm  data/00001_img2.ppm  data/00001_flow.flo  ...
    FlyingChairs_train_val.txt     a line for every pair: 1 trains, 2 validates

Source: Dosovitskiy et al., ICCV 2015 (FlowNet).
"""

import os
from pathlib import Path
from typing import Any

from instseg.errors import DatasetError

FOLDER = "FlyingChairs_release"
SPLIT_FILE = "FlyingChairs_train_val.txt"
_MARKS = {"train": "1", "val": "2"}


def load(name: str, folder: str, split: str) -> list[dict[str, Any]]:
    """One record for each pair, without annotations and classes.

    Each pair is a clip of one frame.  The flow leads from the first image to the second, so the
    second is the reference.

    Args:
        name: of the data set, for messages.
        folder: ``FlyingChairs_release``.
        split: ``train`` or ``val``.
    Raises:
        DatasetError: files are missing or damaged.
    """
    root = Path(folder)
    listing, data = root / SPLIT_FILE, root / "data"
    existing_files = {entry.name for entry in os.scandir(data)} if data.is_dir() else set()
    records = []
    for number, mark in enumerate(_read_marks(name, listing), start=1):
        if mark != _MARKS[split]:
            continue
        files = [f"{number:05d}_{part}" for part in ("img1.ppm", "img2.ppm", "flow.flo")]
        missing = [file for file in files if file not in existing_files]
        if missing:
            raise DatasetError(
                f"data set {name}: there is no file {data / missing[0]}; set DETECTRON2_DATASETS "
                "to the folder that holds it"
            )
        first, second, flow = (str(data / file) for file in files)
        height, width = _ppm_size(name, first)
        records.append(
            {
                "file_name": first,
                "image_id": number,
                "height": height,
                "width": width,
                "video_id": number,
                "frame_index": 0,
                "length": 1,
                "reference_files": [second],
                "flow_files": [flow],
            }
        )
    if not records:
        raise DatasetError(f"data set {name}: {listing} gives no pair the mark {_MARKS[split]}")
    return records


def _read_marks(name: str, listing: Path) -> list[str]:
    try:
        marks = listing.read_text(encoding="ascii").split()
    except FileNotFoundError:
        raise DatasetError(
            f"data set {name}: there is no file {listing}; set DETECTRON2_DATASETS to the folder "
            "that holds it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"data set {name}: {listing} is no list of marks: {error}") from None
    strange = [mark for mark in marks if mark not in _MARKS.values()]
    if strange:
        raise DatasetError(
            f"data set {name}: {listing} has {strange[0]!r}; expected a line with 1 (trains) or 2 "
            "(validates) for every pair"
        )
    return marks


def _ppm_size(name: str, path: str) -> tuple[int, int]:
    """(height, width) from the header of a binary PPM; the pixels are not read."""
    with open(path, "rb") as file:
        header = file.read(64).split(maxsplit=4)
    if len(header) < 4 or header[0] != b"P6" or not (header[1] + header[2]).isdigit():
        raise DatasetError(f"data set {name}: {path} is no PPM image of the kind P6")
    return int(header[2]), int(header[1])
