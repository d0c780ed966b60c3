"""The FCIS head against the authors' operators and its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.ops.fcis_head import fcis_head, fcis_head_reference, to_fcis_head_order
from instseg.ops.psroi_pool import psroi_pool
from tests.support.ops import CUDA, DEVICES
from tests.support.position_sensitive import (
    FOLDER,
    SIZES,
    golden,
    head_classes,
    head_maps,
    ordered,
    sample_rois,
    signed,
    sizes,
)

OFFICIAL = (1 / 16, 7, 21)
DTYPES = [("float32", 1e-5, 1e-5), ("float64", 1e-7, 1e-11)]  # tolerance of values, of gradients


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.detach().cpu(), torch.from_numpy(expected), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance, _", DTYPES)
def test_scores_and_logits_of_labels_are_the_official_ones(dtype, tolerance, _, device):
    arrays, maps, rois = golden("official_head", dtype, device, factor=4)
    labels = torch.from_numpy(arrays["labels"]).to(device)
    maps = ordered(arrays, maps)
    scores, logits, classes = fcis_head(maps, rois, labels, *sizes(arrays))
    suffix = "_f" + dtype[-2:]
    assert_close(scores, arrays["cls_score" + suffix], tolerance)
    assert_close(scores.softmax(1), arrays["cls_prob" + suffix], tolerance)
    assert_close(logits, arrays["label_seg_logits" + suffix], tolerance)
    assert torch.equal(classes, labels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance, _", DTYPES)
def test_best_class_and_its_mask_are_the_official_ones(dtype, tolerance, _, device):
    arrays, maps, rois = golden("official_head", dtype, device, factor=4)
    maps = ordered(arrays, maps)
    _, logits, classes = fcis_head(maps, rois, None, *sizes(arrays))
    suffix = "_f" + dtype[-2:]
    assert classes.tolist() == arrays["best_class" + suffix].tolist()
    assert_close(logits.softmax(1), arrays["seg_pred" + suffix], tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, _, tolerance", DTYPES)
def test_gradients_are_the_official_ones(dtype, _, tolerance, device):
    arrays, maps, rois = golden("official_head", dtype, device, factor=4)
    labels = torch.from_numpy(arrays["labels"]).to(device)
    inputs = ordered(arrays, maps.requires_grad_())
    outputs = fcis_head(inputs, rois, labels, *sizes(arrays))[:2]
    grads = np.load(FOLDER / "official_head_grad.npz")
    for name, output in zip(("cls", "seg"), outputs, strict=True):
        seed, kind = int(arrays["seed"]), np.dtype(dtype)
        upstream = signed(f"official_head.upstream_{name}", output.shape, seed, kind)
        upstream = torch.from_numpy(upstream).to(device)
        (grad,) = torch.autograd.grad(output, maps, upstream, retain_graph=True)
        assert_close(grad, grads[f"grad_{name}_f{dtype[-2:]}"], tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_head_at_coco_size_is_the_official_one(device):
    arrays, maps, rois = golden("official_coco_size", "float32", device, factor=4)
    maps = ordered(arrays, maps)
    scores, logits, classes = fcis_head(maps, rois, None, *sizes(arrays))
    clear = (arrays["best_logit_margin"] == 0) | (arrays["best_logit_margin"] >= 1e-5)
    # In separate rounding, as here, no RoI needs to be left out for a fused multiply-add.
    assert_close(scores.double(), arrays["cls_score"], 1e-5)
    assert_close(scores.softmax(1), arrays["cls_prob"], 1e-5)
    assert classes.cpu().numpy()[clear].tolist() == arrays["best_class"][clear].tolist()
    foreground = logits.softmax(1)[torch.from_numpy(clear).to(device), 1]
    assert_close(foreground, arrays["foreground_prob"][clear], 1e-5)


def test_score_is_the_mean_of_the_larger_of_both_maps():
    # One part, two classes, one row of two cells, and a RoI of both: its bins are the cells.
    outside, inside = [[1.0, -2.0], [3.0, 0.0]], [[0.0, 5.0], [4.0, 1.0]]  # class, cell
    maps = torch.tensor([*outside, *inside]).view(1, 4, 1, 2)
    rois = torch.tensor([[0.0, 0, 0, 1, 0]])
    scores, logits, classes = fcis_head(maps, rois, None, 1.0, 1, 2)
    # Both rows of bins read the same row of cells: (1 + 5) / 2 and (4 + 1) / 2.
    assert scores.tolist() == [[3.0, 2.5]]
    assert classes.tolist() == [1]
    assert logits[0].tolist() == [[[3.0, 0.0]] * 2, [[4.0, 1.0]] * 2]


def test_gradient_of_a_tie_goes_to_outside_and_is_shared_by_the_cells():
    maps = torch.zeros(1, 4, 1, 2, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 1, 0]])
    fcis_head(maps, rois, torch.tensor([-1]), 1.0, 1, 1)[0][0, 1].backward()
    assert maps.grad[0, :, 0].tolist() == [[0, 0], [0.5, 0.5], [0, 0], [0, 0]]


@pytest.mark.parametrize("device", DEVICES)
def test_the_lowest_of_the_best_classes_is_chosen_and_never_the_background(device):
    maps = torch.zeros(1, 8, 3, 3, device=device)
    maps[:, 0] = 9  # outside of the background
    rois = torch.tensor([[0.0, 0, 0, 20, 20], [0, 100, 100, 120, 120]], device=device)
    assert fcis_head(maps, rois, None, 1 / 8, 1, 2)[2].tolist() == [1, 1]
    maps[:, 2:4] = 1  # outside of classes 2 and 3
    assert fcis_head(maps, rois, None, 1 / 8, 1, 2)[2].tolist() == [2, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channel", [1, 3])
def test_a_map_that_is_not_a_number_is_not_hidden(channel, device):
    maps = torch.zeros(1, 4, 3, 3, device=device)
    maps[:, channel] = torch.nan  # outside or inside of class 1
    rois = torch.tensor([[0.0, 0, 0, 20, 20]], device=device)
    assert fcis_head(maps, rois, None, 1 / 8, 1, 2)[0].isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("device", DEVICES)
def test_class_minus_one_has_zero_logits_and_no_gradient_from_them(device):
    maps, rois = head_maps(device).requires_grad_(), sample_rois()[:4].to(device)
    none = torch.full((4,), -1, device=device)
    _, logits, classes = fcis_head(maps, rois, none, *SIZES)
    logits.sum().backward()
    assert not logits.any() and not maps.grad.any() and torch.equal(classes, none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("labelled", [True, False])
def test_operator_and_reference_agree_wherever_the_roi_lies(labelled, device, dtype):
    maps, rois = head_maps(device, dtype), sample_rois().to(device)
    classes = head_classes(len(rois), device) if labelled else None
    for actual, expected in zip(
        fcis_head(maps, rois, classes, *SIZES),
        fcis_head_reference(maps, rois, classes, *SIZES),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


corner = st.floats(-40, 90, width=32)


@given(
    corners=st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=4),
    num_classes=st.integers(2, 20),
    group=st.integers(1, 4),
    pooled=st.integers(1, 6),
    height=st.integers(0, 6),
    width=st.integers(1, 7),
    scale=st.sampled_from([1 / 16, 1 / 8, 0.3]),
)
def test_operator_and_reference_agree_on_random_input(
    corners, num_classes, group, pooled, height, width, scale
):
    rois = torch.tensor([[i % 2, *row] for i, row in enumerate(corners)])
    shape = (2, 2 * num_classes * group**2, height, width)
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    shape_of_bins = (scale, group, pooled)
    scores, logits, classes = fcis_head(maps, rois, None, *shape_of_bins)
    expected_scores, expected_logits, _ = fcis_head_reference(maps, rois, classes, *shape_of_bins)
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(logits, expected_logits)
    assert torch.equal(scores[:, 1:].argmax(1) + 1, classes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("labelled", [True, False])
def test_gradient_is_the_numerical_one_wherever_the_roi_lies(labelled, device):
    maps = head_maps(device, torch.float64).requires_grad_()
    rois = sample_rois(dtype=torch.float64).to(device)
    classes = head_classes(len(rois), device) if labelled else None
    assert torch.autograd.gradcheck(lambda m: fcis_head(m, rois, classes, *SIZES)[:2], maps)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_keeps_the_rules_of_torch(device):
    maps, rois = head_maps(device), sample_rois().to(device)
    maps = maps.contiguous(memory_format=torch.channels_last)
    classes = head_classes(len(rois), device)
    operator = torch.ops.instseg.fcis_head.default
    for leaf in (maps, maps.clone().requires_grad_()):
        torch.library.opcheck(operator, (leaf, rois, classes, *SIZES))
        torch.library.opcheck(operator, (leaf, rois, None, *SIZES))
        torch.library.opcheck(operator, (leaf, rois[:0], None, *SIZES))


@pytest.mark.parametrize("device", DEVICES)
def test_backward_operator_keeps_the_rules_of_torch(device):
    maps, rois = head_maps(device), sample_rois().to(device)
    grads = torch.randn(len(rois), 4), torch.randn(len(rois), 2, 5, 5)
    arguments = (
        *(grad.to(device) for grad in grads),
        maps,
        rois,
        head_classes(len(rois), device),
    )
    torch.library.opcheck(
        torch.ops.instseg.fcis_head_backward.default,
        (*arguments, *SIZES),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_operator_compiles_into_one_graph():
    maps, rois = head_maps().requires_grad_(), sample_rois()
    compiled = torch.compile(fcis_head, fullgraph=True, backend="aot_eager")

    def run(head) -> list[Tensor]:
        scores, logits, classes = head(maps, rois, None, *SIZES)
        (scores.square().sum() + logits.square().sum()).backward()
        grad, maps.grad = maps.grad, None
        return [scores, logits, classes, grad]

    assert all(map(torch.equal, run(compiled), run(fcis_head)))


@pytest.mark.parametrize("device", DEVICES)
def test_memory_format_does_not_matter(device):
    maps, rois = head_maps(device), sample_rois().to(device)
    grads = [torch.randn(len(rois), 4), torch.randn(len(rois), 2, 5, 5)]
    classes = head_classes(len(rois), device)

    def run(maps: Tensor, grads: list[Tensor]) -> list[Tensor]:
        leaf = maps.detach().requires_grad_()
        outputs = fcis_head(leaf, rois, classes, *SIZES)[:2]
        torch.autograd.backward(outputs, [grad.to(device) for grad in grads])
        return [*outputs, leaf.grad]

    expected = run(maps, grads)
    turned = [grad.transpose(-1, -2).clone().transpose(-1, -2) for grad in grads]
    for other in (
        torch.stack([maps, maps], -1)[..., 0],
        maps.contiguous(memory_format=torch.channels_last),
        maps.transpose(2, 3).clone().transpose(2, 3),
    ):
        assert all(map(torch.equal, run(other, turned), expected))


def test_gradient_of_the_maps_is_channels_last():
    maps = head_maps().contiguous(memory_format=torch.channels_last).requires_grad_()
    fcis_head(maps, sample_rois(), None, *SIZES)[0].sum().backward()
    assert maps.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("images, height, count", [(2, 6, 0), (0, 6, 0), (2, 0, 4)])
def test_empty_input_gives_empty_output_and_zero_gradient(images, height, count, device):
    maps = torch.randn(images, 32, height, 7, device=device, requires_grad=True)
    rois = sample_rois()[:count].to(device)
    scores, logits, classes = fcis_head(maps, rois, None, *SIZES)
    (scores.sum() + logits.sum()).backward()
    assert scores.shape == (count, 4) and logits.shape == (count, 2, 5, 5)
    assert not scores.any() and not logits.any() and classes.tolist() == [1] * count
    assert maps.grad.shape == maps.shape and not maps.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_from_float32(dtype, device):
    maps, rois = head_maps(device, dtype), sample_rois().to(device)
    classes = head_classes(len(rois), device)
    results = []
    for leaf in (maps.clone().requires_grad_(), maps.float().requires_grad_()):
        outputs = fcis_head(leaf, rois, classes, *SIZES)[:2]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        results.append([tensor.to(dtype) for tensor in (*outputs, leaf.grad)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", DEVICES)
def test_an_roi_has_the_same_bits_alone_and_among_others(device):
    maps, rois = head_maps(device), sample_rois().to(device)
    together = fcis_head(maps, rois, None, *SIZES)
    for i in range(len(rois)):
        alone = fcis_head(maps, rois[i : i + 1], None, *SIZES)
        assert all(torch.equal(one[0], all_[i]) for one, all_ in zip(alone, together, strict=True))


def test_the_number_of_threads_does_not_matter():
    maps, rois = head_maps().requires_grad_(), sample_rois()
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 9):
        torch.set_num_threads(number)
        scores, logits, _ = fcis_head(maps, rois, None, *SIZES)
        (grad,) = torch.autograd.grad(scores.square().sum() + logits.square().sum(), maps)
        results.append((scores, logits, grad))
    torch.set_num_threads(threads)
    assert all(all(map(torch.equal, result, results[0])) for result in results[1:])


def test_memory_of_the_pooled_maps_is_never_taken():
    maps = torch.randn(1, 49 * 2 * 81, 10, 10).contiguous(memory_format=torch.channels_last)
    rois = torch.tensor([[0.0, 0, 0, 159, 159]]).repeat(100, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        fcis_head(maps, rois, None, *OFFICIAL)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    pooled = 100 * 2 * 81 * 21 * 21 * 4
    assert 0 < taken < pooled / 20


def test_channels_of_the_authors_are_put_in_order():
    maps, rois = head_maps(dtype=torch.float64), sample_rois(dtype=torch.float64)
    # 2 * c + t is the dimension of psroi_pool in the authors' order.
    pooled = psroi_pool(maps, rois, *SIZES).unflatten(1, (4, 2))
    ours = to_fcis_head_order(maps, 4, 2, dim=1)
    scores, logits, _ = fcis_head(ours, rois, torch.full((len(rois),), 3), *SIZES)
    torch.testing.assert_close(scores, pooled.amax(2).mean((2, 3)))
    torch.testing.assert_close(logits, pooled[:, 3])


def test_order_of_another_number_of_channels_is_an_error():
    with pytest.raises(ValueError, match="has 32 channels along dimension 1; expected 40"):
        to_fcis_head_order(head_maps(), 5, 2, dim=1)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_cpu_and_gpu_give_the_same_bits(dtype, device):
    maps, rois = head_maps(dtype=dtype), sample_rois()
    for classes in (None, head_classes(len(rois))):
        results = []
        for backend in ("cpu", device):
            leaf = maps.to(backend).requires_grad_()
            labels = classes if classes is None else classes.to(backend)
            outputs = fcis_head(leaf, rois.to(backend), labels, *SIZES)
            torch.autograd.backward(outputs[:2], [output.detach() for output in outputs[:2]])
            results.append([tensor.cpu() for tensor in (*outputs, leaf.grad)])
        assert all(map(torch.equal, *results))


ROW = (0.0, 1.0, 1.0, 20.0, 20.0)


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
