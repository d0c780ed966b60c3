"""Mean shift: input that it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from instseg.ops.mean_shift import mean_shift, peel_clusters
from tests.ops.common import CUDA

METHODS = [mean_shift, peel_clusters]
Method = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan, math.inf])
def test_a_bandwidth_that_is_no_radius_is_an_error(bandwidth: float, method: Method) -> None:
    with pytest.raises(ValueError, match=f"bandwidth is {bandwidth}; expected a finite number"):
        method(torch.zeros(3, 2), bandwidth=bandwidth)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3,), (3, 2, 2), (3, 0), (3, 65)])
def test_points_of_another_shape_are_an_error(shape: tuple[int, ...], method: Method) -> None:
    with pytest.raises(ValueError, match=r"embeddings has shape .*expected .* D from 1 to 64"):
        method(torch.zeros(shape), bandwidth=1.0)


@pytest.mark.parametrize("method", METHODS)
def test_whole_numbers_are_an_error(method: Method) -> None:
    with pytest.raises(TypeError, match=f"{method.__name__}: embeddings is torch.int64"):
        method(torch.zeros(3, 2, dtype=torch.int64), bandwidth=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": torch.zeros(2, 3)}, r"seeds has shape \[2, 3\]; expected \(any, 2\)"),
        ({"seeds": torch.full((2, 2), torch.nan)}, "seeds has values that are not finite"),
        ({"max_iterations": -1}, "max_iterations is -1"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"min_bin_count": 0}, "min_bin_count is 0"),
    ],
)
def test_numbers_that_mean_shift_cannot_use_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_shift(torch.zeros(3, 2), **{"bandwidth": 1.0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_iterations": -1}, "max_iterations is -1"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"min_points": 0}, "min_points is 0"),
        ({"max_clusters": -1}, "max_clusters is -1"),
    ],
)
def test_numbers_that_peeling_cannot_use_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"peel_clusters: {message}"):
        peel_clusters(torch.zeros(3, 2), **{"bandwidth": 1.0, **change})


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        (torch.zeros(2, dtype=torch.long), r"bins has shape \[2\]; expected \(3,\)"),
        (torch.tensor([0, 1, 3]), "bins are 0 to 3; expected 0 to 2"),
        (torch.tensor([0, 1, -1]), "bins are -1 to 1; expected 0 to 2"),
    ],
)
def test_bins_that_do_not_fit_are_named(bins: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"peel_clusters: {message}"):
        torch.ops.instseg.peel_clusters(torch.zeros(3, 2), bins, 1.0, 9, 1e-3, 1, 9)


@pytest.mark.parametrize("device", [CUDA])
def test_tensors_on_two_devices_are_an_error(device: str) -> None:
    with pytest.raises(RuntimeError, match="embeddings is on cuda.* and seeds on cpu"):
        mean_shift(torch.zeros(3, 2, device=device), bandwidth=1.0, seeds=torch.zeros(1, 2))
