"""Golden numbers and RoIs for the tests of psroi_pool and fcis_head."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg.ops.fcis_head import to_fcis_head_order
from tests.conftest import GOLDEN, load_module

FOLDER = GOLDEN / "position_sensitive"
signed = load_module(FOLDER / "inputs.py").signed

# spatial_scale, group_size and pooled_size; 5 is not a multiple of 2.
SIZES = (1 / 8, 2, 5)

# (x1, y1, x2, y2) in pixels of a map of 6 x 7 cells of 8 pixels.
BOXES = {
    "inside": (9.3, 11.7, 38.2, 40.9),
    "whole": (0, 0, 55, 47),
    "on_left_and_top_border": (0, 0, 20, 30),
    "on_right_and_bottom_border": (30, 22, 55, 47),
    "across_left_and_top_border": (-13.5, -20, 17, 25),
    "across_right_and_bottom_border": (40, 30, 73, 66.2),
    "across_all_borders": (-30, -30, 90, 90),
    "beyond_left": (-60, 5, -20, 30),
    "beyond_right": (70, 5, 90, 30),
    "beyond_top": (5, -50, 30, -10),
    "beyond_bottom": (5, 60, 30, 90),
    "tiny": (20.2, 20.2, 20.4, 20.4),
    "one_pixel": (17, 33, 17, 33),
    "half_pixels": (10.5, -2.5, 33.5, 20.5),
    "inverted": (40, 40, 10, 10),
    "thin": (2, 20, 53, 21),
    "enormous": (-1e9, -1e9, 1e9, 1e9),
}


def sample_rois(images: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """All BOXES, image by image in turn."""
    rows = [(i % images, *box) for i, box in enumerate(BOXES.values())]
    return torch.tensor(rows, dtype=dtype)


def head_maps(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Maps of four classes for fcis_head with SIZES."""
    return torch.randn(2, 2 * 2 * 2 * 4, 6, 7, dtype=torch.float64).to(device, dtype)


def head_classes(count: int, device: str = "cpu") -> Tensor:
    """None and all classes of head_maps in turn: -1, 0, 1, 2, 3, -1, ..."""
    return (torch.arange(count) % 5 - 1).to(device)


def sizes(arrays: Any) -> tuple[float, int, int]:
    """Spatial scale, group size and pooled size of a golden file."""
    keys = "spatial_scale", "group_size", "pooled_size"
    return tuple(arrays[key].item() for key in keys)  # type: ignore[return-value]


def ordered(arrays: Any, maps: Tensor) -> Tensor:
    """The maps of a golden file of the head, in our order of channels."""
    classes = int(arrays["num_classes_with_background"])
    return to_fcis_head_order(maps, classes, int(arrays["group_size"]), dim=1)


def golden(stem: str, dtype: str, device: str, factor: float = 1.0) -> tuple[Any, Tensor, Tensor]:
    """The arrays of a golden file, its maps (authors' channels) and its RoIs."""
    arrays = np.load(FOLDER / f"{stem}.npz")
    shape, seed = arrays["feature_shape"], int(arrays["seed"])
    maps = factor * signed(f"{stem}.features", shape, seed, np.dtype(dtype))
    return arrays, torch.from_numpy(maps).to(device), torch.from_numpy(arrays["rois"]).to(device)
