"""YouTube-VIS's average precision of tracks: masks of one instance through time."""

import contextlib
import io
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from instseg.data.dataset import DataSet
from instseg.data.readers.youtube_vis import EVALUATOR_TYPE
from instseg.errors import ConfigError, DatasetError
from instseg.evaluation.matching import mask_ranking
from instseg.evaluation.registry import Metric, register
from instseg.files import atomic_write
from instseg.masks import RLE, CroppedMasks, as_text, decode, rle_area, to_rle
from instseg.tracking import UNTRACKED, Tracker, check_installed, vote

_AREAS = {"": (0, 1e10), "s": (0, 128**2), "m": (128**2, 256**2), "l": (256**2, 1e10)}
"""YouTube-VIS's ranges of the mean area of a track over the frames in which it is visible."""
_THRESHOLDS = (50, 75)
"""IoU in per cent with an AP of its own, besides the mean."""
_MAX_TRACKS = (1, 10, 100)
_MOST_PIXELS = 2**32 - 1
"""Largest number of pixels in all frames of a clip; the counts of an RLE hold no more."""


@dataclass
class Track:
    """An instance in a clip.

    Attributes:
        category: contiguous class.
        masks: frame → mask, for the frames in which it is visible.
        scores: of its detections; empty for ground truth.
        crowd: overlaps with it count neither for nor against a prediction.
    """

    category: int
    masks: dict[int, RLE] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    crowd: int = 0


@register("tracks", kind=EVALUATOR_TYPE)
class TrackEvaluator(Metric, DatasetEvaluator):
    """AP and AR of tracks, with one IoU over all frames of a clip.

    That IoU is the sum of the intersections over the sum of the unions; in a frame where only one
    side has a mask, that mask adds to the union.  The rest is COCO's metric with videos instead of
    images: AP over IoU 0.5 ... 0.95, AR with 1 and 10 tracks per video (Yang et al., ICCV 2019,
    section 5).

    :class:`instseg.tracking.Tracker` links detections to tracks.  The score of a track is the mean
    of those of its masks, and its class is the one with the largest sum of scores.  Tracks are
    written to ``tracks.json`` in the format of the authors' server.  A data set without annotations
    gets that file and no metric.
    """

    takes_cropped = True

    def __init__(self, dataset: DataSet, *, output_dir: str, score_threshold: float) -> None:
        """
        Args:
            dataset: its records have ``video_id``, ``frame_index`` and ``length``; annotations have
                ``track_id``.
            output_dir: for ``tracks.json``.
            score_threshold: detections with a lower score belong to no track.
        Raises:
            ConfigError: the data set has still images, or the package for tracking is missing.
            DatasetError: a clip has more pixels than can be counted.
        """
        check_installed()
        self._dataset = dataset
        self._clips: dict[Any, dict[int, dict[str, Any]]] = defaultdict(dict)
        for record in dataset.records:
            if "video_id" not in record:
                raise ConfigError(
                    f"TEST.METRICS has tracks, but the data set {dataset.name} holds still "
                    "images; leave tracks out"
                )
            pixels = record["height"] * record["width"] * record["length"]
            if pixels > _MOST_PIXELS:
                raise DatasetError(
                    f"data set {dataset.name}: the clip {record['video_id']} has {pixels} pixels "
                    f"in all its frames; tracks can be compared on up to {_MOST_PIXELS}"
                )
            self._clips[record["video_id"]][record["frame_index"]] = record
        self._output_dir = output_dir
        self._threshold = score_threshold
        self._detections: list[tuple[Any, int, Instances, list[RLE]]] = []

    @classmethod
    def measures(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> list[str]:
        """Names of the numbers for a data set with annotations."""
        names = ["AP", *(f"AP{threshold}" for threshold in _THRESHOLDS)]
        names += [f"AP{label}" for label in _AREAS if label]
        return [f"tracks/{name}" for name in (*names, *(f"AR{n}" for n in _MAX_TRACKS[:2]))]

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset: DataSet, folder: str) -> DatasetEvaluator:
        return cls(dataset, output_dir=folder, score_threshold=cfg.TEST.TRACK_SCORE_THRESH)

    @classmethod
    def check(cls, cfg: CfgNode, dataset: DataSet, model: nn.Module) -> None:
        cls.from_config(cfg, dataset, "")

    def reset(self) -> None:
        self._detections = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        for frame, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            counted = instances[mask_ranking(instances) >= self._threshold]
            light = Instances(counted.image_size)
            light.pred_boxes = Boxes(counted.pred_boxes.tensor.cpu())
            light.scores, light.pred_classes = mask_ranking(counted), counted.pred_classes.cpu()
            masks = CroppedMasks.of(counted.pred_masks).to_rle()
            self._detections.append((frame["video_id"], frame["frame_index"], light, masks))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Per cent, as Detectron2's evaluators; empty without annotations."""
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return None
        frames = {
            (clip, index): (instances, masks)
            for clip, index, instances, masks in itertools.chain.from_iterable(gathered)
        }
        predicted = {
            clip: _linked(frames.get((clip, index)) for index in range(_length(records)))
            for clip, records in self._clips.items()
        }
        self._write(predicted)
        if not any(
            "annotations" in r for records in self._clips.values() for r in records.values()
        ):
            return {"tracks": {}}
        gt_tracks = {clip: _annotated(records) for clip, records in self._clips.items()}
        return {"tracks": self._metrics(gt_tracks, predicted)}

    def _metrics(
        self, gt_tracks: Mapping[Any, list[Track]], predicted: Mapping[Any, list[Track]]
    ) -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            evaluation = COCOeval(self._as_coco(gt_tracks), self._as_coco(predicted), "segm")
            evaluation.params.maxDets = list(_MAX_TRACKS)
            evaluation.params.areaRng = [list(limits) for limits in _AREAS.values()]
            evaluation.params.areaRngLbl = list(_AREAS)
            evaluation.evaluate()
            evaluation.accumulate()
        # (thresholds, recalls, classes, areas, limits), and without recalls; -1 is a missing value.
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        thresholds = evaluation.params.iouThrs.round(2).tolist()
        result = {"AP": _mean(precision[..., 0, -1])}
        for threshold in _THRESHOLDS:
            at_threshold = precision[thresholds.index(threshold / 100)]
            result[f"AP{threshold}"] = _mean(at_threshold[..., 0, -1])
        for number, label in enumerate(_AREAS):
            if label:
                result[f"AP{label}"] = _mean(precision[..., number, -1])
        for number, limit in enumerate(_MAX_TRACKS[:2]):
            result[f"AR{limit}"] = _mean(recall[..., 0, number])
        return result

    def _as_coco(self, tracks: Mapping[Any, list[Track]]) -> COCO:
        """Clips as COCO's images, with frames side by side so that IoU is over all frames."""
        annotations: list[dict[str, Any]] = []
        images = []
        for number, (clip, records) in enumerate(self._clips.items()):
            size, length = _size(records), _length(records)
            images.append({"id": number, "height": size[0], "width": size[1] * length})
            for track in tracks[clip]:
                areas = [rle_area(mask) for mask in track.masks.values()]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": track.category,
                        "segmentation": side_by_side(track.masks, size, length),
                        "area": float(np.mean(areas)),
                        "score": float(np.mean(track.scores)) if track.scores else 1.0,
                        "iscrowd": track.crowd,
                    }
                )
        coco = COCO()
        coco.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": index, "name": name} for index, name in enumerate(self._dataset.classes)
            ],
        }
        coco.createIndex()
        return coco

    def _write(self, predicted: Mapping[Any, list[Track]]) -> None:
        """Write ``tracks.json``, with the class ids of the data set."""
        content = [
            {
                "video_id": clip,
                "category_id": self._dataset.category_id(track.category),
                "score": float(np.mean(track.scores)),
                "segmentations": [
                    as_text(track.masks[index]) if index in track.masks else None
                    for index in range(_length(self._clips[clip]))
                ],
            }
            for clip, tracks in predicted.items()
            for track in tracks
        ]
        path = os.path.join(self._output_dir, "tracks.json")
        atomic_write(path, lambda file: file.write(json.dumps(content).encode()))


def side_by_side(masks: Mapping[int, RLE], size: tuple[int, int], length: int) -> RLE:
    """The masks of a track as one RLE of an image with the frames side by side.

    An RLE runs down the columns, so its runs are those of one frame after the other.

    Args:
        masks: frame → mask; frames without one are empty.
        size: height and width of a frame.
        length: number of frames.
    """
    pixels = size[0] * size[1]
    edges = [np.empty(0, dtype=np.int64)]
    for frame, mask in masks.items():
        runs = np.diff(decode(mask, *size).ravel(order="F").astype(np.int8), prepend=0, append=0)
        edges.append(np.flatnonzero(runs) + frame * pixels)
    # If one mask ends at the last pixel and the next begins at the first, their edges cancel.
    positions, counts = np.unique(np.concatenate(edges), return_counts=True)
    runs = np.diff(positions[counts == 1], prepend=0, append=length * pixels)
    shape = [size[0], size[1] * length]
    return to_rle({"counts": runs.tolist(), "size": shape}, *shape)


def _linked(frames: Iterable[tuple[Instances, list[RLE]] | None]) -> list[Track]:
    """Tracks of one clip; a frame without a prediction is None and has no detections."""
    tracker = Tracker()
    tracks: dict[int, Track] = {}
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    for index, frame in enumerate(frames):
        instances, masks = frame or (_nothing(), [])
        classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
        for number, category, score, mask in zip(
            tracker.update(instances).tolist(), classes, scores, masks, strict=True
        ):
            if number == UNTRACKED or not rle_area(mask):
                continue
            track = tracks.setdefault(number, Track(category))
            track.masks[index] = mask
            track.scores.append(score)
            votes[number][category] += score
    for number, track in tracks.items():
        track.category = vote(votes[number])
    return list(tracks.values())


def _nothing() -> Instances:
    empty = torch.zeros(0)
    boxes = Boxes(torch.zeros(0, 4))
    return Instances((1, 1), pred_boxes=boxes, scores=empty, pred_classes=empty.long())


def _annotated(records: Mapping[int, Mapping[str, Any]]) -> list[Track]:
    """The true tracks of one clip."""
    tracks: dict[Any, Track] = {}
    for index, record in records.items():
        for annotation in record.get("annotations", ()):
            crowd = annotation.get("iscrowd", 0)
            track = tracks.setdefault(
                annotation["track_id"], Track(annotation["category_id"], crowd=crowd)
            )
            track.masks[index] = to_rle(annotation["segmentation"], *_size(records))
    return list(tracks.values())


def _size(records: Mapping[int, Mapping[str, Any]]) -> tuple[int, int]:
    first = next(iter(records.values()))
    return first["height"], first["width"]


def _length(records: Mapping[int, Mapping[str, Any]]) -> int:
    return int(next(iter(records.values()))["length"])


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not missing, in per cent; NaN if all are missing."""
    present = values[values > -1]
    return float(100 * present.mean()) if present.size else float("nan")
