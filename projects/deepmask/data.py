"""Training patches of DeepMask, drawn from the instances of a data set (DeepMask, section 3.3)."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from instseg.data.appearance import build_appearance
from instseg.data.image_mapper import read_recorded
from instseg.data.image_reader import ImageReader
from instseg.data.instances import without_crowds
from instseg.data.intensity import AS_IS, CHANNELS, Intensity
from instseg.data.samples import SAMPLES_REGISTRY
from instseg.data.sampling import group_factors
from instseg.data.windows import WindowTransform, build_geometry
from instseg.errors import DatasetError
from instseg.masks import decode, rle_area, to_rle
from instseg.projects.deepmask.inference import FILL
from instseg.projects.deepmask.patches import (
    Rules,
    Window,
    canonical_scales,
    crop,
    is_learnable,
    mask_window,
    negative_window,
    positive_window,
)

Sample = dict[str, Any]
Image = npt.NDArray[np.uint8]

_TRIES = 100
"""Images tried for one negative window."""


@SAMPLES_REGISTRY.register()
class PatchSamples(IterableDataset[Sample]):
    """An endless stream of patches; those of one batch are all for the same head.

    A sample is a dict of ``image``, (3, S, S) float32 with values of 0 to 255 where S is the side
    of the network's window and its context, ``file_name``, and

    * ``head`` "mask": ``gt_mask``, (M, M) float32 of the window without context, 1 on the instance
      in its middle and -1 elsewhere.  A class is drawn evenly, then an instance of it.
    * ``head`` "score": ``label``, 1.0 if an instance is in canonical position, -1.0 if none is near
      it, equally often.  Images are drawn evenly.

    The head of each batch is drawn too; all processes draw the same one.

    Deviation: crowds are left out altogether; the released code trains scores on their boxes.
    Classes without a usable instance are never drawn; the released code then never returns.
    """

    @configurable
    def __init__(
        self,
        records: list[dict[str, Any]],
        *,
        batch_size: int,
        rules: Rules,
        score_fraction: float,
        flip: bool,
        image_format: str,
        intensity: Intensity = AS_IS,
        geometry: Sequence[T.Augmentation] = (),
        appearance: Sequence[T.Augmentation] = (),
        weights: Tensor | None = None,
        cache_mib: float = 0,
    ) -> None:
        """
        Args:
            records: Detectron2's, with masks as polygons or RLE.
            batch_size: number of successive samples for the same head.
            rules: sizes in pixels, see :class:`Rules`.
            score_fraction: share of batches for the score.
            flip: mirror half of the patches.
            image_format: order of the channels.
            intensity: what is done to them.
            geometry: augmentations of an image before a patch is cut out, see
                :mod:`instseg.data.windows`.
            appearance: augmentations of a patch, see :mod:`instseg.data.appearance`; its values
                stay within 0 to 255.
            weights: (N,) how much more often the images and their instances are drawn.
            cache_mib: room for decoded images, see :class:`ImageReader`.
        Raises:
            DatasetError: a head with a share of the batches has no instance to learn from.

        Iterating raises an ImageError that names an image that cannot be read.
        """
        self.batch_size = batch_size
        self.rules = rules
        self.score_fraction = score_fraction
        self.flip = flip
        self.geometry = T.AugmentationList(list(geometry))
        self.appearance = T.AugmentationList(list(appearance))
        by_category: dict[int, list[tuple[int, int]]] = {}
        scored = []
        for i, record in enumerate(records):
            try:
                for k in _learnable(record):
                    category = record["annotations"][k]["category_id"]
                    by_category.setdefault(category, []).append((i, k))
                if _canonical(
                    [_corners(x) for x in without_crowds(record.get("annotations", ()))], rules
                ):
                    scored.append(i)
            except Exception as error:  # pycocotools raises anything for a malformed mask
                raise DatasetError(
                    f"an annotation of {record['file_name']} cannot be used: {error!r}"
                ) from error
        if (score_fraction < 1 and not by_category) or (score_fraction > 0 and not scored):
            raise DatasetError(_why_unusable(records))
        self._by_class = [
            _Draws(np.array(by_category[category]), weights) for category in sorted(by_category)
        ]
        self._scored = _Draws(np.array(scored, dtype=np.int64)[:, None], weights)
        # Serialised, because each process that loads data would copy a million small objects.
        self._records = DatasetFromList(records, copy=False)
        self._read = ImageReader(format=image_format, intensity=intensity, cache_mib=cache_mib)
        self._seed = comm.shared_random_seed()

    @classmethod
    def from_config(
        cls, cfg: CfgNode, records: list[dict[str, Any]], *, batch_size: int
    ) -> dict[str, Any]:
        node = cfg.MODEL.DEEPMASK
        return {
            "records": records,
            "batch_size": batch_size,
            "rules": Rules(
                patch_size=node.PATCH_SIZE,
                context=node.CONTEXT,
                object_size=node.OBJECT_SIZE or math.ceil(node.PATCH_SIZE * 128 / 224),
                mask_size=node.TRAIN_MASK_SIZE,
                shift=node.SHIFT,
                scale_jitter=node.SCALE_JITTER,
            ),
            "score_fraction": node.SCORE_FRACTION,
            "flip": cfg.INPUT.RANDOM_FLIP == "horizontal",
            "image_format": cfg.INPUT.FORMAT,
            "intensity": Intensity.of(cfg),
            "geometry": build_geometry(cfg, color=[FILL] * CHANNELS[cfg.INPUT.FORMAT], whole=True),
            "appearance": build_appearance(cfg),
            "weights": group_factors(cfg, records),
            "cache_mib": cfg.DATALOADER.CACHE_MIB,
        }

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = np.random.default_rng(np.random.randint(2**31))
        for batch in itertools.count(first, step):  # as the loader takes them from its workers
            draw = self._score_sample if self._is_for_score(batch) else self._mask_sample
            for _ in range(self.batch_size):
                yield draw(rng)

    def _is_for_score(self, batch: int) -> bool:
        uniform = np.random.default_rng((self._seed, batch)).random()
        return bool(uniform < self.score_fraction)

    def _mask_sample(self, rng: np.random.Generator) -> Sample:
        i, k = self._by_class[rng.integers(len(self._by_class))].draw(rng)
        record = self._records[int(i)]
        annotation = record["annotations"][k]
        whole = read_recorded(record, self._read)
        image, transforms = self._moved(whole)
        window = mask_window(_moved_box(annotation, record, transforms), self.rules, rng)
        patch = self._patch(image, window)
        side = window.side * self.rules.patch_size / self.rules.input_size
        inner = Window(window.x, window.y, side)
        mask = transforms.apply_segmentation(_draw(annotation, whole, record))
        mask = crop(mask, inner, self.rules.mask_size, 0.0)
        target = torch.where(mask[0] > 0.5, 1.0, -1.0)
        patch, target = self._flipped(rng, patch, target)
        return {**_sample(record, patch), "head": "mask", "gt_mask": target}

    def _score_sample(self, rng: np.random.Generator) -> Sample:
        label = 1.0 if rng.random() < 0.5 else -1.0
        for _ in range(_TRIES):
            record = self._records[int(self._scored.draw(rng)[0])]
            image, transforms = self._moved(read_recorded(record, self._read))
            moved = [
                _moved_box(x, record, transforms)
                for x in without_crowds(record.get("annotations", ()))
            ]
            boxes = _canonical(moved, self.rules)
            if label > 0:
                window = positive_window(boxes, self.rules, rng) if boxes else None
            else:
                window = negative_window(image.shape[:2], boxes, self.rules, rng)
            if window is not None:
                (patch,) = self._flipped(rng, self._patch(image, window))
                return {**_sample(record, patch), "head": "score", "label": label}
        raise DatasetError(
            f"no window without an instance was found in {_TRIES} images, the last of them "
            f"{record['file_name']}; the images are too full of instances, or too small, for "
            f"instances of {self.rules.object_size} pixels; lower MODEL.DEEPMASK.SHIFT or set "
            "MODEL.DEEPMASK.SCORE_FRACTION 0"
        )

    def _moved(self, image: Image) -> tuple[Image, T.TransformList]:
        """An image after the augmentations of its geometry, and what these do to coordinates."""
        data = T.AugInput(image)
        transforms = self.geometry(data)
        return data.image, transforms

    def _patch(self, image: Image, window: Window) -> Tensor:
        """(3, S, S) content of the window and its context."""
        patch = crop(image, window, self.rules.input_size, FILL)
        if not self.appearance.augs:
            return patch
        data = T.AugInput(np.ascontiguousarray(patch.permute(1, 2, 0).numpy()))
        self.appearance(data)
        return torch.from_numpy(data.image.clip(0, 255)).permute(2, 0, 1).contiguous()

    def _flipped(self, rng: np.random.Generator, *images: Tensor) -> tuple[Tensor, ...]:
        flips = self.flip and rng.random() < 0.5
        return tuple(image.flip(-1) for image in images) if flips else images


class _Draws:
    """Rows to draw from, evenly or by the weights of their images."""

    def __init__(self, rows: npt.NDArray[np.int64], weights: Tensor | None) -> None:
        """
        Args:
            rows: (n, ...); each begins with the index of an image.
            weights: of the images.
        """
        self._rows = rows
        self._sums = None if weights is None else weights.double().numpy()[rows[:, 0]].cumsum()

    def draw(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """One of the rows."""
        if self._sums is None:
            index = int(rng.integers(len(self._rows)))
        else:
            index = int(self._sums.searchsorted(rng.random() * self._sums[-1], side="right"))
        row: npt.NDArray[np.int64] = self._rows[index]
        return row


def _sample(record: dict[str, Any], patch: Tensor) -> Sample:
    return {"file_name": record["file_name"], "image": patch}


def _corners(annotation: dict[str, Any]) -> list[float]:
    corners: list[float] = BoxMode.convert(
        [float(x) for x in annotation["bbox"]], annotation["bbox_mode"], BoxMode.XYXY_ABS
    )
    return corners


def _canonical(boxes: list[list[float]], rules: Rules) -> list[list[float]]:
    """Corners of the instances that have a canonical scale."""
    scales = canonical_scales(boxes, rules)
    return [box for box, scale in zip(boxes, scales, strict=True) if not math.isnan(scale)]


def _moved_box(
    annotation: dict[str, Any], record: dict[str, Any], transforms: T.TransformList
) -> list[float]:
    """Corners of an instance after augmentation.

    The box of a turned instance is that of its turned outline, not that of its turned box.
    """
    turned = any(isinstance(x, WindowTransform) for x in transforms.transforms)
    if not turned or not annotation.get("segmentation"):
        corners: list[float] = transforms.apply_box(np.array([_corners(annotation)]))[0].tolist()
        return corners
    points = transforms.apply_coords(_outline(annotation, record["height"], record["width"]))
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]


def _outline(annotation: dict[str, Any], height: int, width: int) -> npt.NDArray[np.float64]:
    """(N, 2) corners of pixels, x then y, whose convex hull is that of a mask."""
    mask = decode(annotation["segmentation"], height, width)
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return np.array(_corners(annotation), dtype=np.float64).reshape(2, 2)
    left, right = mask[rows].argmax(axis=1), width - mask[rows, ::-1].argmax(axis=1)
    corners = [(x, y) for x in (left, right) for y in (rows, rows + 1)]
    return np.concatenate([np.stack(pair, axis=1) for pair in corners]).astype(np.float64)


def _learnable(record: dict[str, Any]) -> Iterator[int]:
    """Indices of the annotations whose masks can be learnt."""
    for k, annotation in enumerate(record.get("annotations", ())):
        segmentation = annotation.get("segmentation")
        if segmentation and not annotation.get("iscrowd", 0):
            if is_learnable(_corners(annotation), _area(segmentation)):
                yield k


def _area(segmentation: Any) -> float:
    """Area of the polygons, or number of pixels of the RLE."""
    if isinstance(segmentation, dict):
        return float(rle_area(to_rle(segmentation, *segmentation["size"])))
    areas = []
    for polygon in segmentation:
        x, y = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
        areas.append(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)
    return float(sum(areas))


def _draw(annotation: dict[str, Any], image: Image, record: dict[str, Any]) -> Image:
    """(H, W) mask of an instance."""
    size = image.shape[:2]
    mask: Image = decode(annotation["segmentation"], *size).view(np.uint8)
    if mask.shape != size:
        raise DatasetError(
            f"{record['file_name']} has {size[0]} rows and {size[1]} columns, the mask of one of "
            f"its instances has {mask.shape[0]} and {mask.shape[1]}"
        )
    return mask


def _why_unusable(records: list[dict[str, Any]]) -> str:
    annotations: list[dict[str, Any]] = [x for r in records for x in r.get("annotations", ())]
    tests: dict[str, Callable[[dict[str, Any]], bool]] = {
        "are crowds": lambda x: bool(x.get("iscrowd", 0)),
        "have no mask": lambda x: not x.get("segmentation"),
    }
    counts = ", ".join(f"{sum(map(test, annotations))} {what}" for what, test in tests.items())
    return (
        f"the data set has no instance to train on: of {len(annotations)} annotations in "
        f"{len(records)} images, {counts}, the others are too small; DeepMask needs masks of 100 "
        "pixels and boxes with sides of 5 at least"
    )
