"""Results of videos in the layout of YouTube-VIS."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from instseg.errors import DatasetError
from instseg.masks import as_text, to_rle
from instseg.tracking import vote


def as_youtube_vis(path: str | os.PathLike[str], video_id: int = 1) -> list[dict[str, Any]]:
    """The tracks in a file that ``instseg predict --track`` wrote for a video.

    Args:
        path: the file; all of it is read into memory.
        video_id: number of the video in the data set of the result.
    Returns:
        one JSON object per track, as YouTube-VIS's server takes them: ``video_id``,
        ``category_id`` (the one with the highest sum of scores), ``score`` (the mean over the
        frames that show it) and ``segmentations``, an RLE or null for every frame.
    Raises:
        DatasetError: another file, or one without tracks or masks.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        frames, tracked = content["frames"], content["info"]["track"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} is no complete file of `instseg predict` on a video ({error}); --resume "
            "completes an unfinished one"
        ) from error
    if not tracked:
        raise DatasetError(f"{path} was written without --track: its instances are not linked")
    tracks: dict[int, dict[str, Any]] = {}
    scores: dict[int, list[float]] = {}
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    for index, frame in enumerate(frames):
        for entry in frame["objects"]:
            number = entry["track_id"]
            if number is None:
                continue
            if "segmentation" not in entry:
                raise DatasetError(f"{path} holds boxes without masks")
            track = tracks.setdefault(
                number,
                {
                    "video_id": video_id,
                    "category_id": entry["category_id"],
                    "score": 0.0,
                    "segmentations": [None] * len(frames),
                },
            )
            mask = entry["segmentation"]
            if isinstance(mask, list):  # polygons, which YouTube-VIS does not take
                mask = as_text(to_rle(mask, frame["height"], frame["width"]))
            track["segmentations"][index] = mask
            scores.setdefault(number, []).append(entry["score"])
            votes[number][entry["category_id"]] += entry["score"]
    for number, track in tracks.items():
        track["category_id"] = vote(votes[number])
        track["score"] = sum(scores[number]) / len(scores[number])
    return list(tracks.values())
