"""Weights in half precision: what is rounded, what stays, what is refused."""

import pytest
import torch

from instseg.checkpoint import read_weights, save_safetensors
from instseg.checkpoint.half import halve
from instseg.errors import CheckpointError


def test_weights_become_half_precision_and_whole_numbers_stay() -> None:
    weights = {"conv.weight": torch.tensor([1.0, 1 / 3]), "bn.num_batches_tracked": torch.tensor(7)}
    halved = halve(weights)
    assert halved.weights["conv.weight"].dtype == torch.float16
    assert halved.weights["bn.num_batches_tracked"].dtype == torch.int64
    assert halved.kept == ()


def test_the_largest_change_is_told_relative_to_its_tensor() -> None:
    # Next to 1/3 in float16 is 0.33325: a change of 8.1e-5, which is 8.1e-6 of 10.
    halved = halve({"a": torch.tensor([0.5, 10.0]), "b": torch.tensor([1 / 3, 10.0])})
    assert halved.changed == "b"
    assert halved.change == pytest.approx((1 / 3 - 0.333251953125) / 10, rel=1e-3)


def test_exact_values_change_nothing() -> None:
    halved = halve({"a": torch.tensor([0.5, 2.0]), "empty": torch.zeros(0)})
    assert (halved.change, halved.changed) == (0.0, "")


@pytest.mark.parametrize(
    ("name", "value", "stays"),
    [
        ("bn.running_var", 1e6, True),  # beyond 65504
        ("bn.running_var", 1e-9, True),  # below the smallest number above 0, 6e-8
        ("bn.running_var", 1e-6, True),  # 17 steps of 6e-8: too few digits
        ("bn.running_mean", -1e6, True),
        ("bn.running_var", 0.1, False),
        ("bn.running_var", 0.0, False),
        ("conv.weight", 1e-9, False),
    ],
)
def test_statistics_that_do_not_fit_stay_in_single_precision(
    name: str, value: float, stays: bool
) -> None:
    halved = halve({name: torch.tensor([1.0, value])})
    assert (halved.weights[name].dtype == torch.float32) == stays
    assert halved.kept == ((name,) if stays else ())


def test_a_weight_beyond_half_precision_is_refused_with_its_name() -> None:
    with pytest.raises(CheckpointError, match=r"fc.weight has a value of 7e\+04; .* 65504"):
        halve({"fc.weight": torch.tensor([1.0, 7e4])})


def test_halved_weights_come_back_from_a_file_bit_by_bit(tmp_path) -> None:
    weights = {"w": torch.randn(100), "bn.running_var": torch.tensor([1e-9])}
    halved = halve(weights)
    save_safetensors(tmp_path / "a.safetensors", halved.weights)
    back = read_weights(tmp_path / "a.safetensors")["model"]
    assert all(torch.equal(back[name], halved.weights[name]) for name in weights)
