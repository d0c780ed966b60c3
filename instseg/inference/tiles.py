"""Prediction on images of any size, tile by tile, with memory for some tiles and the results.

Each tile is predicted as an image of its own: it is resized as the configuration says, and
``TEST.DETECTIONS_PER_IMAGE`` is the limit of a tile, not of the image.  All tiles have one size
(:class:`instseg.inference.layout.Layout`), so all are resized by the same factor; with
``INPUT.MIN_SIZE_TEST`` that factor follows from the side of a tile, which therefore has to be
chosen such that instances get the size they had in training.  An image that fits into a tile is
predicted as without tiles.
"""

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import log_first_n
from torch import Tensor
from tqdm import tqdm

from instseg.errors import ConfigError
from instseg.inference.layout import Layout, Rect, check_tile
from instseg.inference.stitching import Piece, Stitched, Stitcher
from instseg.inference.tile_sources import TileSource
from instseg.masks import CroppedMasks
from instseg.modeling import CROPPED

if TYPE_CHECKING:
    from instseg.inference.predictor import Predictor

logger = logging.getLogger(__name__)

CONTEXT = 16
"""Pixels around an instance that the tile which is responsible for it shows at least.

The borders of an instance and its next neighbour are in sight then.  Networks look further, but
what they see there decides little.
"""
_SHARE = 8
"""Tiles overlap by this part of their side if nothing is known of the instances."""


class TileResults(Protocol):
    """Keeps what was found in each tile, so that a run that ends early can be continued."""

    def earlier(self) -> Iterator[Instances]:
        """What an earlier run found in the first tiles."""

    def add(self, instances: Instances) -> None:
        """Keep what was found in the next tile: ``pred_masks`` are CroppedMasks of the tile."""


class _Nothing:
    def earlier(self) -> Iterator[Instances]:
        yield from ()

    def add(self, instances: Instances) -> None:
        pass


def layout_of(predictor: "Predictor", source: TileSource, tile: int, overlap: int | None) -> Layout:
    """The tiles of an image.

    Args:
        tile, overlap: see :meth:`instseg.inference.predictor.Predictor.predict_tiled`.
    Raises:
        ConfigError: no tiles of this side overlap so much.
    """
    check_tile(tile, overlap or 0)
    if overlap is None:
        one = tile >= max(source.height, source.width)
        overlap = 0 if one else default_overlap(predictor, tile)
    return Layout(source.height, source.width, tile, overlap)


def default_overlap(predictor: "Predictor", tile: int) -> int:
    """Pixels by which tiles overlap if the user does not say: the largest instance of the training
    with :data:`CONTEXT` on both sides.

    Logs how it was chosen.  It is at most half a tile; pieces of larger instances are joined.
    """
    largest = predictor.largest_instance
    if largest is None:
        overlap = tile // _SHARE
        logger.info(
            "tiles overlap by %d pixels, 1/%d of a tile: the weights do not say how large instances"
            " were in training; choose it by overlap (--overlap)",
            overlap,
            _SHARE,
        )
        return overlap
    wanted = largest + 2 * CONTEXT
    overlap = min(wanted, tile // 2)
    if overlap == wanted:
        why = f"the longest side of an instance in training, {largest}, and {CONTEXT} on both sides"
    else:
        why = (
            f"half a tile, as the longest side of an instance in training is {largest}; larger "
            "tiles need to join fewer pieces"
        )
    logger.info("tiles overlap by %d pixels: %s", overlap, why)
    return overlap


def predict_tiles(
    predictor: "Predictor",
    source: TileSource,
    layout: Layout,
    *,
    results: TileResults | None = None,
    keep: Callable[[Instances], Instances] = lambda instances: instances,
    progress: bool = False,
) -> Instances:
    """The instances of an image, found tile by tile.

    Args:
        predictor: of the tiles, which it gets in batches.
        source: the image.
        layout: its tiles.
        results: has those of an earlier run and gets the others.
        keep: chooses among the instances of a tile.
        progress: show a bar on terminals.
    Returns:
        on the CPU, best first, with the fields that the model gives; ``pred_masks`` are
        CroppedMasks.  Instances without a pixel are left out.  If an instance has several
        pieces, the largest one gives the fields, and all make ``pred_masks`` and
        ``pred_boxes`` whole.
    Raises:
        ConfigError: the model gives no masks.
        ImageError: a part of the image cannot be read or used.
    """
    results = results or _Nothing()
    image = _Image(layout)
    for instances in results.earlier():
        image.add(instances)
    done = image.tiles
    _tell_scale(predictor, layout)
    tiles = map(source.read, layout.rects[done:])
    hidden = None if progress else True  # None shows it on terminals
    bar = tqdm(total=len(layout), initial=done, unit="tile", leave=False, disable=hidden)
    with bar:
        for result in predictor.stream(tiles, masks=CROPPED):
            instances = keep(result["instances"]).to("cpu")
            if not instances.has("pred_masks"):
                raise ConfigError("tiles are joined by their masks, and this model gives none")
            instances.pred_masks = CroppedMasks.of(instances.pred_masks)
            _tell_limit(predictor, len(instances))
            results.add(instances)
            image.add(instances)
            bar.update()
            del result, instances  # frees their memory before the next tile
    return image.instances()


def _tell_limit(predictor: "Predictor", count: int) -> None:
    """Log that a tile has as many instances as it may have."""
    limit = predictor.cfg.TEST.DETECTIONS_PER_IMAGE
    if 0 <= limit <= count:
        log_first_n(
            logging.WARNING,
            f"a tile has the {limit} instances that TEST.DETECTIONS_PER_IMAGE allows it, so some "
            "may be missing; raise it, or choose smaller tiles (said once)",
            key="message",
        )


def _tell_scale(predictor: "Predictor", layout: Layout) -> None:
    """Log by how much tiles are resized before the model gets them."""
    height, width = (int(ends[0, 1]) for ends in (layout.rows, layout.columns))
    shortest = predictor.cfg.INPUT.MIN_SIZE_TEST
    if not shortest or len(layout) == 1:
        return
    h, w = ResizeShortestEdge.get_output_shape(
        height, width, shortest, predictor.cfg.INPUT.MAX_SIZE_TEST
    )
    logger.info(
        "every tile of %dx%d pixels is resized to %dx%d (INPUT.MIN_SIZE_TEST %d); choose tiles in "
        "which instances get the size they had in training",
        *(width, height, w, h, shortest),
    )


class _Image:
    """Collects what the tiles of an image give.

    Attributes:
        tiles: number of tiles that were added.
    """

    def __init__(self, layout: Layout) -> None:
        self.tiles = 0
        self._layout = layout
        self._stitcher = Stitcher(layout)
        self._count = 0
        self._fields: list[Instances] = []
        self._numbers: list[int] = []
        self._joined: dict[int, Rect] = {}
        self._masks = [CroppedMasks.from_crops([], np.zeros((0, 2), np.int64), self._size)]

    @property
    def _size(self) -> tuple[int, int]:
        return self._layout.height, self._layout.width

    def add(self, instances: Instances) -> None:
        """Add what the next tile gives."""
        rect = self._layout.rects[self.tiles]
        masks = instances.pred_masks.shifted(rect.x0, rect.y0, self._size)
        # Whole images of scores and classes are small, so they wait for the end.
        fields = {name: value for name, value in instances.get_fields().items()}
        del fields["pred_masks"]
        corner = torch.tensor([rect.x0, rect.y0] * 2, dtype=torch.float32)
        fields["pred_boxes"] = Boxes(instances.pred_boxes.tensor + corner)
        self._fields.append(Instances(self._size, **fields))
        self._collect(list(self._stitcher.add(self.tiles, self._pieces(instances, masks))))
        self._count += len(instances)
        self.tiles += 1

    def _pieces(self, instances: Instances, masks: CroppedMasks) -> Iterator[Piece]:
        boxes, scores = masks.boxes.tolist(), instances.scores.tolist()
        for index, kind in enumerate(instances.pred_classes.tolist()):
            if boxes[index][2]:
                crop = masks.crop(index)[2]
                yield Piece(self._count + index, kind, scores[index], Rect(*boxes[index]), crop)

    def _collect(self, stitched: list[Stitched]) -> None:
        self._numbers += [instance.number for instance in stitched]
        self._joined |= {instance.number: instance.box for instance in stitched if instance.joined}
        corners = np.array([instance.box[:2] for instance in stitched], np.int64).reshape(-1, 2)
        crops = [instance.mask for instance in stitched]
        self._masks.append(CroppedMasks.from_crops(crops, corners, self._size))

    def instances(self) -> Instances:
        """All instances of the image, best first, then in the order in which they were found."""
        unordered = Instances.cat(self._fields)[torch.tensor(self._numbers, dtype=torch.int64)]
        for row, number in enumerate(self._numbers):
            if number in self._joined:
                unordered.pred_boxes.tensor[row] = torch.tensor(self._joined[number]).float()
        unordered.pred_masks = CroppedMasks.cat(self._masks)
        order: Tensor = torch.from_numpy(
            np.lexsort((np.array(self._numbers, np.int64), -unordered.scores.double().numpy()))
        )
        return unordered[order]
