"""The built-in synthetic videos: textured shapes that move, turn, grow and hide each other.

Two splits of clips of ``LENGTH`` frames: ``shapes_video_train`` and ``shapes_video_val``.
Instances have the classes of :mod:`instseg.data.synthetic.shapes`.  They and the ground behind them
keep their textures.  Light stays, noise is new in every frame.  Nothing is stored, since a
frame depends only on its split, clip, number and size.  Paths are

- ``shapes-video://SPLIT/SIZE/CLIP/FRAME``, an image;
- ``shapes-video://SPLIT/SIZE/CLIP/FRAME/REFERENCE``, a ``.flo`` file of the flow from FRAME to
  the frame REFERENCE.

Coordinates are pixels, a pixel's centre lies at +0.5.  Lengths below are for an image of 128
pixels and scale with the size.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from instseg.data.flow import encode_flow
from instseg.data.synthetic.files import VIDEOS, check_member, check_size, encode_ppm
from instseg.data.synthetic.outlines import KINDS, generator, outline_of, polygon_area, rasterise
from instseg.data.synthetic.render import colour_of, texture
from instseg.data.video_mapper import NUM_REFERENCES
from instseg.errors import DatasetError
from instseg.masks import annotation_of

SPLITS = {"shapes_video_train": 120, "shapes_video_val": 15}
"""Clips of each split."""
LENGTH = 20
"""Frames of every clip."""
CLASSES = KINDS[:3]
MIN_VISIBLE = 0.25
"""An instance with less of its area in sight has no annotation in that frame."""

_MAX_SHAPES = 5  # instances of a clip
_TRIES = 20  # positions tried for one instance before it is given up
_GROUND = np.array([[-1, -1], [2, -1], [2, 2], [-1, 2]])
"""Outline of the ground, in sides of the image."""


@dataclass(frozen=True)
class Motion:
    """A smooth path: position, angle and scale at any time, all in closed form.

    Attributes:
        centre: (2,) pixels around which the instance sways.
        sway: (2,) largest distance from there in x and y.
        turns: (3,) turns per frame of the sway in x, in y and of the scale.
        phases: (3,) radians, where these begin.
        spin: radians per frame.
        swell: largest relative change of the scale.
    """

    centre: np.ndarray
    sway: np.ndarray
    turns: np.ndarray
    phases: np.ndarray
    spin: float
    swell: float

    def pose(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """(2, 2) turning and scaling, (2,) position: ``points @ matrix.T + position``."""
        waves = np.sin(2 * np.pi * self.turns * frame + self.phases)
        scale, angle = 1 + self.swell * waves[2], self.spin * frame
        cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
        matrix = np.array([[cosine, -sine], [sine, cosine]])
        return matrix, self.centre + self.sway * waves[:2]


@dataclass(frozen=True)
class Layer:
    """A surface: the ground or an instance.

    Attributes:
        kind: index into ``CLASSES``, -1 for the ground.
        outline: (P, 2) corners around its own origin.
        paint: (T, T, 3) float32 RGB, the origin in its middle.
        motion: where it is.
    """

    kind: int
    outline: np.ndarray
    paint: np.ndarray
    motion: Motion

    def placed(self, frame: int) -> np.ndarray:
        """(P, 2) corners in the image."""
        matrix, position = self.motion.pose(frame)
        return self.outline @ matrix.T + position


@dataclass(frozen=True)
class Clip:
    """Layers from the back to the front, the first one the ground.

    Attributes:
        light: (S, S, 1) float32, added to every frame.
        noise: standard deviation of each frame's noise in grey levels.
        channels: of the noise: 1 in a grey clip.
    """

    layers: tuple[Layer, ...]
    light: np.ndarray
    noise: float
    channels: int


@functools.lru_cache(maxsize=8)
def clip(split: str, index: int, size: int) -> Clip:
    """One clip.

    Args:
        split: a key of ``SPLITS``.
        index: 0 .. number of clips - 1.
        size: side of the square images in pixels.
    Raises:
        DatasetError: unknown split, an index outside it, or a size outside ``SIZES``.
    """
    check_size(size)
    check_member("clip", split, index, SPLITS)
    # Two generators, so that motions do not depend on how many numbers a texture uses.
    rng, paints = generator(split, index, 0), generator(split, index, 2)
    grey = rng.random() < 0.4
    colours = [colour_of(rng, [], grey)]
    ground = _motion(rng, np.full(2, size / 2), sway=12 * size / 128, spin=0.0, swell=0.0)
    layers = [
        Layer(-1, _GROUND * size, texture(paints, colours[0], 2 * size, 2 * size, size), ground)
    ]
    for centre in _centres(rng, size):
        kind = int(rng.random() * len(CLASSES))
        outline = outline_of(kind, (22 + 30 * rng.random()) * size / 128, 2 * np.pi * rng.random())
        colours.append(colour_of(rng, colours, grey))
        side = 2 * math.ceil(np.linalg.norm(outline, axis=1).max()) + 2
        paint = texture(paints, colours[-1], side, side, size)
        motion = _motion(rng, centre, sway=24 * size / 128, spin=math.radians(4), swell=0.2)
        layers.append(Layer(kind, outline, paint, motion))
    slope = rng.random(2) * 60 - 30
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    light = (slope[0] * ramp[:, None] + slope[1] * ramp)[:, :, None].astype(np.float32)
    return Clip(tuple(layers), light, 8 * rng.random(), 1 if grey else 3)


def _centres(rng: np.random.Generator, size: int) -> list[np.ndarray]:
    """2 to ``_MAX_SHAPES`` positions not close to each other; fewer if there is no room."""
    num_shapes = 2 + int(rng.random() * (_MAX_SHAPES - 1))
    centres: list[np.ndarray] = []
    for _ in range(num_shapes):
        for _ in range(_TRIES):
            centre = (0.15 + 0.7 * rng.random(2)) * size
            if all(np.linalg.norm(centre - other) > 0.25 * size for other in centres):
                centres.append(centre)
                break
    return centres


def _motion(
    rng: np.random.Generator, centre: np.ndarray, *, sway: float, spin: float, swell: float
) -> Motion:
    """A random path with at most this much of everything, there and back in 40 to 80 frames."""
    return Motion(
        centre,
        sway=sway * (0.2 + 0.8 * rng.random(2)),
        turns=1 / (40 + 40 * rng.random(3)),
        phases=2 * np.pi * rng.random(3),
        spin=spin * (2 * rng.random() - 1),
        swell=swell * rng.random(),
    )


def surfaces(clip: Clip, frame: int) -> np.ndarray:
    """(S, S) int8: index of the layer in sight at each pixel; 0 is the ground."""
    size = len(clip.light)
    numbers = np.zeros((size, size), dtype=np.int8)
    for number, layer in enumerate(clip.layers[1:], start=1):
        numbers[rasterise(layer.placed(frame), size)] = number
    return numbers


def image(split: str, index: int, frame: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB image of a frame."""
    scene = clip(split, index, size)
    numbers = surfaces(scene, frame)
    canvas = np.empty((size, size, 3), dtype=np.float32)
    for number, layer in enumerate(scene.layers):
        y, x = np.nonzero(numbers == number)
        matrix, position = layer.motion.pose(frame)
        points = (np.stack([x, y], axis=1) + 0.5 - position) @ np.linalg.inv(matrix).T
        canvas[y, x] = _sampled(layer.paint, points + len(layer.paint) / 2)
    rng = generator(split, index * LENGTH + frame, 1)
    noise = rng.standard_normal((size, size, scene.channels), dtype=np.float32)
    canvas += scene.light + np.float32(scene.noise) * noise
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _sampled(paint: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(N, 3) colours of ``paint`` (T, T, 3) at ``points`` (N, 2) x, y; bilinear."""
    at = np.clip(points - 0.5, 0, len(paint) - 1.001)
    x, y = at.astype(int).T
    dx, dy = (at % 1).astype(np.float32).T[:, :, None]
    upper = paint[y, x] * (1 - dx) + paint[y, x + 1] * dx
    lower = paint[y + 1, x] * (1 - dx) + paint[y + 1, x + 1] * dx
    colours: np.ndarray = upper * (1 - dy) + lower * dy
    return colours


def flow(split: str, index: int, frame: int, reference: int, size: int) -> np.ndarray:
    """(size, size, 2) float32 flow from ``frame`` to the frame ``reference``, exact.

    It is NaN where the visible point is hidden in the reference frame or lies outside it: the pixel
    at its position there shows another surface.
    """
    scene = clip(split, index, size)
    numbers, numbers_in_reference = surfaces(scene, frame), surfaces(scene, reference)
    result = np.full((size, size, 2), np.nan, dtype=np.float32)
    for number, layer in enumerate(scene.layers):
        y, x = np.nonzero(numbers == number)
        now = np.stack([x, y], axis=1) + 0.5
        (matrix, position), (matrix_then, position_then) = (
            layer.motion.pose(time) for time in (frame, reference)
        )
        then = (now - position) @ (matrix_then @ np.linalg.inv(matrix)).T + position_then
        inside = ((then >= 0) & (then < size)).all(axis=1)
        column, row = np.clip(then, 0, size - 1).astype(int).T
        known = inside & (numbers_in_reference[row, column] == number)
        result[y[known], x[known]] = (then - now)[known]
    return result


def load(split: str, size: int, clips: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Records of ``split``, one per frame, in Detectron2's standard format, and of its clip.

    Beside the standard fields each has ``video_id`` (the clip), ``frame_index``, ``length``,
    ``reference_files`` and ``flow_files`` (of earlier frames, the nearest first); each annotation
    has ``track_id``, the number of the instance in its clip.
    """
    records = []
    for index in range(SPLITS[split]) if clips is None else clips:
        scene = clip(split, index, size)
        for frame in range(LENGTH):
            name = f"{VIDEOS}{split}/{size}/{index}"
            earlier = range(frame - 1, max(-1, frame - 1 - NUM_REFERENCES), -1)
            records.append(
                {
                    "file_name": f"{name}/{frame}",
                    "image_id": index * LENGTH + frame,
                    "height": size,
                    "width": size,
                    "video_id": index,
                    "frame_index": frame,
                    "length": LENGTH,
                    "reference_files": [f"{name}/{other}" for other in earlier],
                    "flow_files": [f"{name}/{frame}/{other}" for other in earlier],
                    "annotations": _annotations(scene, frame),
                }
            )
    return records


def _annotations(scene: Clip, frame: int) -> list[dict[str, Any]]:
    numbers = surfaces(scene, frame)
    annotations = []
    for number, layer in enumerate(scene.layers[1:], start=1):
        mask = numbers == number
        if mask.sum() < max(1, MIN_VISIBLE * polygon_area(layer.placed(frame))):
            continue
        annotations.append(annotation_of(mask, layer.kind, track_id=number - 1))
    return annotations


def content_of(path: str) -> bytes:
    """Content of the file that :mod:`instseg.data.synthetic.files` serves under ``path``."""
    split, *numbers = path.split("/")
    size, index, frame, *references = map(int, numbers)
    if not {frame, *references} <= set(range(LENGTH)):
        raise DatasetError(f"a clip has the frames 0..{LENGTH - 1} alone")
    if references:
        return encode_flow(flow(split, index, frame, references[0], size))
    return encode_ppm(image(split, index, frame, size))
