"""What the FCIS head says to bad input."""

import pytest
import torch

from instseg.ops.fcis_head import fcis_head
from tests.ops.common import CUDA, DEVICES
from tests.ops.position_sensitive import SIZES, head_classes, head_maps, sample_rois

ROW = (0.0, 1.0, 1.0, 20.0, 20.0)


@pytest.mark.parametrize("value", [-1, 2, 2**31, 0.5, torch.nan])
def test_a_bad_batch_index_is_an_error_that_names_the_row(value):
    rois = torch.tensor([ROW, (value, *ROW[1:])])
    with pytest.raises(IndexError, match=r"fcis_head: rois\[1\] has batch index"):
        fcis_head(head_maps(), rois, None, *SIZES)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_coordinate_that_is_not_finite_is_an_error_that_names_the_row(value):
    rois = torch.tensor([ROW, (*ROW[:4], value)])
    with pytest.raises(ValueError, match=r"fcis_head: rois\[1\] has coordinate"):
        fcis_head(head_maps(), rois, None, *SIZES)


@pytest.mark.parametrize("value", [-2, 4, 2**40])
def test_a_bad_class_is_an_error_that_names_the_row(value):
    with pytest.raises(IndexError, match=r"fcis_head: classes\[1\] is"):
        fcis_head(head_maps(), torch.tensor([ROW, ROW]), torch.tensor([0, value]), *SIZES)


@pytest.mark.parametrize("device", [CUDA])
def test_rois_that_cannot_be_used_are_zero_on_a_gpu(device):
    maps = head_maps(device).requires_grad_()
    rows = [(-1, *ROW[1:]), (2, *ROW[1:]), (2**31, *ROW[1:]), (torch.nan, *ROW[1:])]
    rows += [(*ROW[:3], torch.nan, 5), (*ROW[:3], torch.inf, 5), ROW]
    scores, logits, _ = fcis_head(maps, torch.tensor(rows, device=device), None, *SIZES)
    (scores[:-1].sum() + logits[:-1].sum()).backward()
    assert not scores[:-1].any() and not logits[:-1].any() and not maps.grad.any()
    assert scores[-1].all() and logits[-1].all()


@pytest.mark.parametrize("device", [CUDA])
def test_bad_classes_have_zero_logits_on_a_gpu(device):
    maps, rois = head_maps(device), torch.tensor([ROW] * 3, device=device)
    classes = torch.tensor([-2, 4, 2**40], device=device)
    assert not fcis_head(maps, rois, classes, *SIZES)[1].any()


LABELS = head_classes(17)
BAD_ARGUMENTS = {
    "maps has 3 dimensions": lambda m, r: (m[0], r, None, *SIZES),
    "maps has 31 channels": lambda m, r: (m[:, 1:], r, None, *SIZES),
    "maps has 8 channels": lambda m, r: (m[:, :8], r, None, *SIZES),
    "maps is Int": lambda m, r: (m.int(), r, None, *SIZES),
    "rois has 1 dimensions": lambda m, r: (m, r[0], None, *SIZES),
    "rois has 4 columns": lambda m, r: (m, r[:, 1:], None, *SIZES),
    "rois is Half": lambda m, r: (m, r.half(), None, *SIZES),
    "classes is Int": lambda m, r: (m, r, LABELS.int().to(m.device), *SIZES),
    r"classes is \[3\]": lambda m, r: (m, r, LABELS[:3].to(m.device), *SIZES),
    "spatial_scale is -1": lambda m, r: (m, r, None, -1.0, 2, 5),
    "group_size is 0": lambda m, r: (m, r, None, 1 / 8, 0, 5),
    "pooled_size is 0": lambda m, r: (m, r, None, 1 / 8, 2, 0),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_arguments_that_do_not_fit_are_named(message, device):
    arguments = BAD_ARGUMENTS[message](head_maps(device), sample_rois().to(device))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"fcis_head: {message}"):
        fcis_head(*arguments)


@pytest.mark.parametrize("device", [CUDA])
def test_tensors_on_several_devices_are_an_error(device):
    with pytest.raises(RuntimeError, match="fcis_head: maps is on cuda:0 and rois on cpu"):
        fcis_head(head_maps(device), sample_rois(), None, *SIZES)
