"""Operators in Python, for installations without compiled ones, give what the compiled ones do."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from instseg.ops import (
    _library,
    assemble_instances,
    assemble_masks,
    fast_nms,
    fcis_head,
    mean_shift_in_python,
    psroi_pool,
    roi_align,
    sgn_lines,
    vote_masks_in_python,
)
from instseg.ops._schemas import SCHEMAS
from tests.conftest import ROOT

COMPILED = _library._C is not None
needs_compiled = pytest.mark.skipif(not COMPILED, reason="compares with compiled operators")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def rois(count: int, images: int, side: float) -> Tensor:
    """RoIs in, across and outside of images, some inverted."""
    corners = torch.rand(count, 4) * 2 * side - side / 2
    corners[: count // 2, 2:] = corners[: count // 2, :2] + torch.rand(count // 2, 2) * side
    return torch.cat([torch.randint(images, (count, 1)).float(), corners], dim=1)


def compare(name: str, function: object, *arguments: object) -> None:
    expected = _library.operator(name)(*arguments)
    actual = function(*arguments)  # type: ignore[operator]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_schemas_are_those_of_the_compiled_operators() -> None:
    source = (ROOT / "csrc/register.cpp").read_text()
    texts = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", source)
    schemas = ["".join(re.findall(r'"([^"]*)"', text)) for text in texts]
    assert sorted(schemas) == sorted(name + schema for name, schema in SCHEMAS.items())


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_psroi_pool(dtype: torch.dtype) -> None:
    maps, boxes = torch.randn(2, 18, 9, 11).to(dtype), rois(20, 2, 40)
    for some in (boxes, boxes[:0]):
        compare("psroi_pool", psroi_pool._pool_in_python, maps, some, 0.25, 3, 4)
    grad = torch.randn(20, 2, 4, 4).to(dtype)
    arguments = grad, boxes, 0.25, 3, [2, 18, 9, 11]
    if dtype != torch.bfloat16:  # which is rounded once here, and sums of roundings differ
        compare("psroi_pool_backward", psroi_pool._backward_in_python, *arguments)


@needs_compiled
@pytest.mark.parametrize("given", [False, True])
def test_fcis_head(given: bool) -> None:
    maps = torch.randn(2, 24, 9, 11).contiguous(memory_format=torch.channels_last)
    boxes = rois(15, 2, 40)
    classes = torch.randint(-1, 3, (15,)) if given else None
    compare("fcis_head", fcis_head._head_in_python, maps, boxes, classes, 0.25, 2, 4)
    chosen = _library.operator("fcis_head")(maps, boxes, classes, 0.25, 2, 4)[2]
    grads = torch.randn(15, 3), torch.randn(15, 2, 4, 4)
    arguments = (*grads, maps, boxes, chosen, 0.25, 2, 4)
    compare("fcis_head_backward", fcis_head._head_backward_in_python, *arguments)


@needs_compiled
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", [4, 5])
def test_assemble_instances(dense: bool, size: int) -> None:
    maps = torch.randn(2, 9, 6, 7)
    windows = None
    if not dense:
        windows = torch.cat([torch.randint(2, (9, 1)), torch.randint(-6, 9, (9, 2))], dim=1)
    compare("assemble_instances", assemble_instances._in_python, maps, windows, 3, size, -10.0)
    none = maps[:, :, :0]
    compare("assemble_instances", assemble_instances._in_python, none, windows, 3, size, -10.0)
    grad = torch.randn(84 if dense else 9, size, size)
    arguments = grad, windows, 3, [2, 9, 6, 7]
    compare("assemble_instances_backward", assemble_instances._backward_in_python, *arguments)


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_assemble_masks(dtype: torch.dtype) -> None:
    prototypes, coefficients = torch.randn(10, 12, 4).to(dtype), torch.randn(6, 4).to(dtype)
    boxes = torch.rand(6, 4) * 60 - 5
    boxes[0] = torch.nan
    arguments = prototypes, coefficients, boxes, 40, 48
    expected = _library.operator("assemble_masks")(*arguments)
    actual = assemble_masks._in_python(*arguments)
    assert (actual != expected).sum() <= 2 and actual.any()  # ties
    assert not actual[0].any()


@needs_compiled
def test_voting() -> None:
    boxes = torch.cat([torch.rand(30, 2) * 40, torch.rand(30, 2) * 40 + 20], dim=1)
    scores = torch.rand(3, 30)
    function = vote_masks_in_python.nms_per_class
    for max_kept in (5, 50):
        compare("nms_per_class", function, boxes, scores, 0.3, 0.2, max_kept)
    masks, weights = torch.rand(30, 7, 7), torch.rand(4, 30) / 15
    weights[:, ::2] = 0
    weights[1:3] *= 4  # so that their averages have pixels
    boxes[1] = torch.nan
    for from_image in (False, True):
        arguments = boxes, masks, weights, 0.4, 50, 55, from_image
        compare("average_masks", vote_masks_in_python.average_masks, *arguments)


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_shift(dtype: torch.dtype) -> None:
    points = torch.cat([torch.randn(40, 3) + 6 * centre for centre in range(3)]).to(dtype)
    module = mean_shift_in_python
    for seeds in (points[::7], points[:0]):
        compare("shift_seeds", module.shift_seeds, points, seeds, 2.0, 50, 1e-3)
    compare("nearest_centres", module.label_points, points, points[::40], 4.0)
    bins = torch.randint(30, (120,))
    compare("peel_clusters", module.peel, points, bins, 2.0, 50, 1e-3, 3, 20)


@needs_compiled
@pytest.mark.parametrize("widened", [False, True])
def test_lines(widened: bool) -> None:
    labels = torch.randint(4, (20, 30), dtype=torch.uint8)
    semantic = torch.randint(-1, 3, (20, 30))
    compare("decode_lines", sgn_lines._decode_in_python, labels, semantic, widened)
    touches = torch.rand(50) < 0.5
    touches[-1] = False
    compare("group_lines", sgn_lines._group_in_python, torch.randint(50, (80, 2)), touches)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: psroi_pool.pooled_sums(torch.zeros(1, 9, 4), rois(1, 1, 4), 1, 3, 3), ValueError),
        (
            lambda: psroi_pool.pooled_sums(torch.zeros(1, 8, 4, 4), rois(1, 1, 4), 1, 3, 3),
            ValueError,
        ),
        (
            lambda: psroi_pool.pooled_sums(torch.zeros(1, 9, 4, 4), torch.ones(1, 5), 1, 3, 3),
            IndexError,
        ),
        (
            lambda: assemble_instances._in_python(
                torch.zeros(1, 9, 4, 4), torch.tensor([[1, 0, 0]]), 3, 3, 0.0
            ),
            IndexError,
        ),
        (
            lambda: sgn_lines._group_in_python(torch.tensor([[0, 3]]), torch.zeros(3) > 0),
            ValueError,
        ),
    ],
)
def test_bad_arguments_are_refused_as_by_the_compiled_operators(call, kind) -> None:
    with pytest.raises(kind):
        call()


SCRIPT = """
import logging, torch
logging.basicConfig(format="%(message)s")
from instseg.ops import _library
from instseg.ops.psroi_pool import psroi_pool
maps = torch.randn(1, 4, 5, 5, dtype=torch.double, requires_grad=True)
rois = torch.tensor([[0.0, 1, 1, 7, 8], [0, 3, 2, 20, 9]], dtype=torch.double)
pool = lambda x: psroi_pool(x, rois, 0.5, 2, 2)
print(torch.autograd.gradcheck(pool, maps), torch.autograd.gradgradcheck(pool, maps))
torch.library.opcheck(torch.ops.instseg.psroi_pool.default, (maps, rois, 0.5, 2, 2))
from instseg.ops.roi_align import roi_align
assert roi_align(maps, rois, 0.5, 2).shape == (2, 4, 2, 2)
print(_library.described())
"""


def test_without_compiled_operators_everything_works_and_says_once_what_to_type() -> None:
    environment = {**os.environ, "INSTSEG_OPERATORS": "python"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    build = "type `pip install --no-build-isolation -e .` in the folder of setup.py"
    assert done.stdout.splitlines() == ["True True", f"in Python, slower: {build}"]
    told = [line for line in done.stderr.splitlines() if "operators of instseg" in line]
    assert told == [f"the operators of instseg run in Python, slower: {build}"]


@needs_compiled
def test_roi_align() -> None:
    maps, boxes = [torch.randn(2, 18, 9, 11), torch.randn(2, 18, 5, 6)], rois(20, 2, 40)
    boxes[:, 3:] = torch.maximum(boxes[:, 1:3], boxes[:, 3:])
    levels = torch.arange(20) % 2
    sizes = [0.25, 0.125], 4, 3, 2, True
    compare("roi_align", roi_align._align_in_python, maps, boxes, levels, *sizes)
    one_map = [0.25], 4, 3, 2, True
    compare("roi_align", roi_align._align_in_python, maps[:1], boxes, None, *one_map)
    shapes = [0.25, 0.125], [9, 5], [11, 6], 2, 2, True, False
    grad = torch.randn(20, 18, 4, 3)
    compare("roi_align_backward", roi_align._backward_in_python, grad, boxes, levels, *shapes)


@needs_compiled
def test_fast_nms() -> None:
    arguments = rois(40, 2, 40)[:, 1:].sort(dim=1).values, torch.rand(3, 40), 0.3, 20, 0.0
    compare("fast_nms", fast_nms.surviving_boxes_reference, *arguments)
