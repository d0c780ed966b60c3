"""``instseg benchmark tiles``: a large image by tiles, against the slicing of other packages."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import Instances
from yaml import safe_load

from instseg.benchmark.rows import Row, forget_peak, in_fresh_process, peak_resident
from instseg.config.nodes import CfgNode, get_cfg, load_cfg
from instseg.data.images import read_image
from instseg.data.intensity import Intensity
from instseg.data.readers.json_files import read_json
from instseg.data.regions import open_regions
from instseg.errors import ConfigError, DatasetError, reason_of
from instseg.inference.layout import check_tile
from instseg.inference.predictor import Predictor
from instseg.masks import CroppedMasks, to_rle
from instseg.optional import require
from instseg.visualize import at_least

_IOU = 0.5
"""A prediction is right if its IoU with an instance of the ground truth is above this."""


class Measurement(NamedTuple):
    """Costs and quality of one way to predict; memory is that beside the model, None if unknown."""

    seconds: float
    mebibytes: float | None
    f1: float


class Task(NamedTuple):
    """A large image to predict on, the same for all.

    Attributes:
        config: text of the configuration.
        image: file.
        ground_truth: the instances that it shows.
        tile, overlap: pixels.
        confidence: least score of an instance.
        allow_partial: see :class:`Predictor`.
    """

    config: str
    image: str
    ground_truth: CroppedMasks
    tile: int
    overlap: int
    confidence: float
    allow_partial: bool = False


Result = Callable[[], CroppedMasks]
"""Gives the instances, best first; what it takes to turn them into our masks is not measured."""
Predict = Callable[[Predictor, Task], Result]


def benchmark_tiles(
    config_file: str,
    image: str,
    ground_truth: str,
    *,
    tile: int = 1024,
    overlap: int = 128,
    confidence: float = 0.5,
    peers: Sequence[str] = ("sahi", "supervision"),
    overrides: Sequence[str] = (),
    allow_partial: bool = False,
) -> list[Row]:
    """Compare ``Predictor.predict_tiled`` with the slicing of other packages.

    All use the same predictor on the same tiles, each in a process of its own, in which time and
    peak memory are measured.  The others get the image as an array; ours reads it by parts.

    Args:
        config_file: of the model, with weights.
        image: an image file, such as one of ``tools/mosaic.py``.
        ground_truth: its ground truth in COCO's format.
        tile, overlap: pixels.
        confidence: least score of an instance.
        peers: keys of :data:`PEERS`, a row each.
        overrides: ``[KEY, VALUE, ...]``.
        allow_partial: see :class:`Predictor`.
    Raises:
        ConfigError: an unknown peer or one that is not installed, no such tiles, intensities that
            the others cannot be given, or the ground truth of another image.
        ImageError, DatasetError, CheckpointError: a file that cannot be used.
    """
    check_tile(tile, overlap)
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"--peer is {peer}; expected one of {', '.join(PEERS)}")
        require(PEERS[peer].package, "benchmark", f"--peer {peer}")
    cfg = load_cfg(config_file, overrides)
    if Intensity.of(cfg).changes:
        raise ConfigError(
            f"INPUT.NORMALIZE is {cfg.INPUT.NORMALIZE} and INPUT.CHANNELS {cfg.INPUT.CHANNELS}; "
            "expected none and (): the other packages pass on tiles of 8 bits, not the image"
        )
    instances = read_ground_truth(ground_truth)
    with open_regions(image) as regions:
        size = regions.shape[:2]
    if size != instances.image_size:
        raise ConfigError(
            f"{image} has {size[1]}x{size[0]} pixels, the first image of --truth {ground_truth} "
            f"{instances.image_size[1]}x{instances.image_size[0]}; give the ground truth of this "
            "image"
        )
    task = Task(cfg.dump(), image, instances, tile, overlap, confidence, allow_partial)
    ours = _measured("instseg", task)
    rows = []
    for peer in peers:
        theirs = _measured(peer, task)
        memory = None
        if ours.mebibytes and theirs.mebibytes:
            memory = theirs.mebibytes / ours.mebibytes
        rows.append(
            Row(
                name=f"{Path(config_file).stem} on {Path(image).name}",
                peer=f"{PEERS[peer].title} {version(PEERS[peer].package)}",
                ours_ms=1000 * ours.seconds,
                peer_ms=1000 * theirs.seconds,
                ratio_time=theirs.seconds / ours.seconds,
                ratio_memory=memory,
                peak_memory_mib=ours.mebibytes,
                f1=ours.f1,
                peer_f1=theirs.f1,
            )
        )
    return rows


def _measured(kind: str, task: Task) -> Measurement:
    measurement = in_fresh_process(measure, kind, task)
    return measurement or Measurement(float("nan"), None, float("nan"))


def measure(kind: str, task: Task) -> Measurement:
    """Predict on the image in one way; for a process of its own.

    Args:
        kind: "instseg", or a key of :data:`PEERS`.
    """
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(safe_load(task.config)))
    predictor = Predictor(cfg, allow_partial=task.allow_partial)
    predict = _predict_ours if kind == "instseg" else PEERS[kind].predict
    height, width = task.ground_truth.image_size
    predictor(np.zeros((min(task.tile, height), min(task.tile, width), 3), np.uint8))
    forget_peak()
    before, start = peak_resident(), time.perf_counter()
    result = predict(predictor, task)
    seconds, peak = time.perf_counter() - start, peak_resident()
    taken = None if before is None or peak is None else peak - before
    return Measurement(seconds, taken, f1(result(), task.ground_truth))


def read_ground_truth(file: str) -> CroppedMasks:
    """The instances of the first image of a file in COCO's format.

    Raises:
        DatasetError: the file cannot be read, or is not in that format.
    """
    content = read_json(file, f"--truth {file}")
    try:
        image = content["images"][0]
        size = image["height"], image["width"]
        rles = [
            to_rle(annotation["segmentation"], *size)
            for annotation in content["annotations"]
            if annotation["image_id"] == image["id"]
        ]
        return CroppedMasks.from_rles(rles, size)
    except (LookupError, TypeError, ValueError) as error:
        raise DatasetError(
            f"--truth {file} is no ground truth in COCO's format: {reason_of(error)}; expected "
            "images with id, height and width, and annotations with image_id and segmentation"
        ) from None


def f1(predicted: CroppedMasks, ground_truth: CroppedMasks) -> float:
    """F1 of predictions, best first, each matched with the free instance of the largest IoU."""
    matched = 0
    free = np.ones(len(ground_truth), dtype=bool)
    left, top, right, bottom = ground_truth.boxes.numpy().T
    for index, (x0, y0, x1, y1) in enumerate(predicted.boxes.tolist()):
        overlap = (left < x1) & (right > x0) & (top < y1) & (bottom > y0)
        near = np.flatnonzero(free & overlap)
        if not len(near):
            continue
        ious = predicted[index : index + 1].ious(ground_truth[near])[0]
        best = int(ious.argmax())
        if ious[best] > _IOU:
            free[near[best]] = False
            matched += 1
    return 2 * matched / max(len(predicted) + len(ground_truth), 1)


def _predict_ours(predictor: Predictor, task: Task) -> Result:
    result = predictor.predict_tiled(task.image, task.tile, task.overlap, progress=False)
    masks: CroppedMasks = at_least(result["instances"], task.confidence).pred_masks
    return lambda: masks


def _instances(predictor: Predictor, tile: np.ndarray, confidence: float) -> Instances:
    """What the predictor finds in a tile in BGR order."""
    return at_least(predictor(np.ascontiguousarray(tile))["instances"], confidence).to("cpu")


def _slicer(compact: bool) -> Predict:
    def predict(predictor: Predictor, task: Task) -> Result:
        import supervision as sv

        def callback(tile: np.ndarray) -> Any:
            instances = _instances(predictor, tile, task.confidence)
            return sv.Detections.from_detectron2({"instances": instances})

        slicer = sv.InferenceSlicer(
            callback, slice_wh=task.tile, overlap_wh=task.overlap, compact_masks=compact
        )
        image = read_image(task.image)
        detections: Any = slicer(image)
        order = np.argsort(-detections.confidence, kind="stable").tolist()
        return lambda: _cropped(detections.mask, order, image.shape[:2])

    return predict


def _cropped(masks: Any, order: Sequence[int], size: tuple[int, ...]) -> CroppedMasks:
    """From masks of supervision, compact or of the image's size, in this order."""
    height, width = size
    if masks is None or not order:
        return CroppedMasks.from_crops([], [], (height, width))
    if isinstance(masks, np.ndarray):
        return CroppedMasks.cat([CroppedMasks.from_dense(masks[[index]]) for index in order])
    crops = [masks.crop(index) for index in order]
    return CroppedMasks.from_crops(crops, masks.offsets[list(order)], (height, width))


def _predict_with_sahi(predictor: Predictor, task: Task) -> Result:
    from sahi.models.detectron2 import Detectron2DetectionModel
    from sahi.predict import get_sliced_prediction

    class Model(Detectron2DetectionModel):  # type: ignore[misc, unused-ignore]
        """Takes our predictor in place of Detectron2's."""

        def load_model(self) -> None:
            self.model = predictor
            self.category_mapping = {
                str(number): name for number, name in enumerate(predictor.categories.names)
            }

        def perform_inference(self, image: np.ndarray) -> None:
            instances = _instances(predictor, image, task.confidence)
            self._original_predictions = {"instances": instances}

    image = read_image(task.image)
    ratio = task.overlap / task.tile
    result = get_sliced_prediction(
        image,  # in BGR order, as the predictor takes it
        Model(confidence_threshold=task.confidence, device="cpu"),
        slice_height=task.tile,
        slice_width=task.tile,
        overlap_height_ratio=ratio,
        overlap_width_ratio=ratio,
        perform_standard_pred=False,
        verbose=0,
    )
    predictions = sorted(result.object_prediction_list, key=lambda item: -item.score.value)
    size = (image.shape[0], image.shape[1])
    polygons = [item.mask.segmentation for item in predictions if item.mask is not None]
    return lambda: CroppedMasks.from_rles([to_rle(item, *size) for item in polygons if item], size)


class Peer(NamedTuple):
    """Another way to predict on a large image."""

    title: str
    package: str
    predict: Predict


PEERS: dict[str, Peer] = {
    "sahi": Peer("sahi", "sahi", _predict_with_sahi),
    "supervision": Peer(
        "supervision InferenceSlicer, compact masks", "supervision", _slicer(compact=True)
    ),
    "supervision-dense": Peer("supervision InferenceSlicer", "supervision", _slicer(compact=False)),
}
"""By the names of ``--peer``.  Dense masks take the image's size in bytes for each instance."""
