"""Read videos with instances in the JSON layout of YouTube-VIS 2019 to 2022.

Layout under ``$DETECTRON2_DATASETS`` for ``youtubevis_{2019,2021}_{train,val}``::

    ytvis_2019/ train.json valid.json  train/JPEGImages/VIDEO/00000.jpg  valid/JPEGImages/...

The released ``valid.json`` has no annotations: the authors' server scores results on it.

Source: Yang et al., ICCV 2019.
"""

import os
from collections import defaultdict
from typing import Any

from detectron2.data import MetadataCatalog

from instseg.data.readers.json_files import crowd_flag, read_json, size_in_pixels, slashes, whole
from instseg.data.video_mapper import NUM_REFERENCES
from instseg.errors import DatasetError
from instseg.masks import annotation_of, check_rle, rle_area, to_rle

EVALUATOR_TYPE = "youtube_vis"
"""Value in the metadata; adds the metric over tracks to that over frames."""
PREFIX = "youtubevis:"

YEARS = (2019, 2021)
_LARGEST_SIDE = 2**15
FILES = {"train": "train", "val": "valid"}


def load(name: str, json_file: str, image_root: str) -> list[dict[str, Any]]:
    """One record for each frame, clip after clip, in Detectron2's standard format.

    Each record also has ``video_id``, ``frame_index``, ``length`` and ``reference_files`` (earlier
    frames, the nearest first), and each annotation has ``track_id``.  ``image_id`` counts the
    frames of the data set.  The metadata of ``name`` gets the classes in the order of their ids.

    Args:
        name: of the data set, for messages and for its metadata.
        json_file: videos, annotations (may be missing, as in the sets for testing), categories.
        image_root: folder that the names of the frames are relative to.
    Raises:
        DatasetError: content is missing, malformed or contradictory.
    """
    reader = _Reader(f"data set {name}: {json_file}", image_root)
    content = reader.content(json_file)
    if not os.path.isdir(image_root):
        raise DatasetError(f"data set {name}: the image folder {image_root} does not exist")
    classes = reader.categories(content)
    MetadataCatalog.get(name).set(
        thing_classes=list(classes.values()),
        thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(classes)},
    )
    videos = reader.videos(content)
    tracks = reader.tracks(content, videos, list(classes))
    records: list[dict[str, Any]] = []
    for key, video in videos.items():
        files = [os.path.join(image_root, file) for file in video["file_names"]]
        for frame, file in enumerate(files):
            record = {
                "file_name": file,
                "image_id": len(records),
                "height": video["height"],
                "width": video["width"],
                "video_id": key,
                "frame_index": frame,
                "length": len(files),
                "reference_files": files[max(0, frame - NUM_REFERENCES) : frame][::-1],
            }
            if tracks is not None:
                record["annotations"] = tracks[key, frame]
            records.append(record)
    return records


class _Reader:
    """Reads the parts of the file; all error messages begin with ``where``."""

    def __init__(self, where: str, image_root: str) -> None:
        self.where = where
        self.image_root = image_root

    def content(self, json_file: str) -> dict[str, Any]:
        if not os.path.exists(json_file):
            raise DatasetError(
                f"{self.where}: there is no such file; set DETECTRON2_DATASETS to the folder that "
                "holds it"
            )
        content = read_json(json_file, self.where)
        if not isinstance(content, dict):
            raise DatasetError(f"{self.where} holds a {type(content).__name__}, not an object")
        return content

    def categories(self, content: dict[str, Any]) -> dict[int, str]:
        """Id → name, in the order of the ids."""
        names: dict[int, str] = {}
        for entry in self._entries(content, "categories"):
            key = self._value(entry, "categories", "id", int)
            if key in names:
                raise DatasetError(f"{self.where} has two categories {key}")
            names[key] = self._value(entry, "categories", "name", str)
        if not names:
            raise DatasetError(f"{self.where} has no categories")
        return dict(sorted(names.items()))

    def videos(self, content: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Id → video, in the order of the file."""
        videos: dict[int, dict[str, Any]] = {}
        for entry in self._entries(content, "videos"):
            key = self._value(entry, "videos", "id", int)
            files = self._value(entry, "videos", "file_names", list)
            size = {k: size_in_pixels(entry.get(k)) for k in ("height", "width")}
            height, width = (self._value({**entry, **size}, "videos", k, int) for k in size)
            if key in videos:
                raise DatasetError(f"{self.where} has two videos {key}")
            if not files or not all(isinstance(file, str) for file in files):
                raise DatasetError(f"{self.where}: file_names of video {key} are no list of names")
            if not 1 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
                raise DatasetError(f"{self.where}: video {key} is {width} x {height} pixels")
            names = [slashes(file, self.image_root) for file in files]
            videos[key] = {**entry, **size, "file_names": names}
        if not videos:
            raise DatasetError(f"{self.where} has no videos")
        return videos

    def tracks(
        self, content: dict[str, Any], videos: dict[int, dict[str, Any]], categories: list[int]
    ) -> dict[tuple[int, int], list[dict[str, Any]]] | None:
        """(video, frame) → annotations of that frame; None if the file has no list of them."""
        if content.get("annotations") is None:
            return None
        frames: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        track_ids = set()
        for entry in self._entries(content, "annotations"):
            track, key, category = (
                self._value(entry, "annotations", k, int) for k in ("id", "video_id", "category_id")
            )
            crowd = crowd_flag(entry.get("iscrowd", 0))
            masks = self._value(entry, "annotations", "segmentations", list)
            what = f"{self.where}: annotation {track}"
            if track in track_ids:
                raise DatasetError(f"{self.where} has two annotations {track}")
            track_ids.add(track)
            if key not in videos:
                raise DatasetError(f"{what} belongs to the video {key}, which is not there")
            if category not in categories:
                raise DatasetError(f"{what} has the category {category}, which is not there")
            if crowd not in (0, 1):
                raise DatasetError(f"{what} has iscrowd {crowd!r}; expected 0 or 1")
            video = videos[key]
            if len(masks) != len(video["file_names"]):
                raise DatasetError(
                    f"{what} has {len(masks)} segmentations, its video {key} "
                    f"{len(video['file_names'])} frames; expected one each, null where the "
                    "instance is not in sight"
                )
            for frame, mask in enumerate(masks):
                rle = _to_rle(mask, video, f"{what}, frame {frame}")
                if rle is None:
                    continue
                frames[key, frame].append(
                    annotation_of(rle, categories.index(category), iscrowd=crowd, track_id=track)
                )
        return frames

    def _entries(self, content: dict[str, Any], field: str) -> list[dict[str, Any]]:
        entries = content.get(field)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DatasetError(
                f"{self.where} has no list of {field}; expected the layout of YouTube-VIS"
            )
        return entries

    def _value(self, entry: dict[str, Any], field: str, key: str, kind: type) -> Any:
        value = whole(entry.get(key)) if kind is int else entry.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DatasetError(
                f"{self.where}: {key} is {str(value)[:50]!r} in an entry of {field} with id "
                f"{entry.get('id')}; expected {kind.__name__}"
            )
        return value


def _to_rle(mask: Any, video: dict[str, Any], what: str) -> dict[str, Any] | None:
    """Compressed RLE of a segmentation; None if the instance is not in sight.

    Raises:
        DatasetError: the segmentation is neither null nor an RLE of the video's size.
    """
    if mask is None:
        return None
    height, width = video["height"], video["width"]
    try:
        counts = check_rle(mask, height, width)
    except ValueError as error:
        raise DatasetError(f"{what}: {error}") from None
    rle = to_rle({**mask, "counts": counts}, height, width)
    return rle if rle_area(rle) else None
