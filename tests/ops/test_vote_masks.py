"""Mask voting: the authors' results, the plain NumPy form, hand-made scenes, bad input."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from instseg.ops.vote_masks import vote_masks, vote_masks_reference
from tests.conftest import GOLDEN, close
from tests.support.ops import CUDA, DEVICES

VOTING = GOLDEN / "position_sensitive" / "official_mask_voting.npz"
RESAMPLES = {"cpu": "box", "gpu": "image"}
TIE = 1e-6
Scene = tuple[Tensor, Tensor, Tensor]


def scene(rois: int, classes: int, height: int, width: int, side: int, seed: int) -> Scene:
    """RoIs in overlapping groups, with soft masks of random bumps."""
    random = np.random.default_rng(seed)
    centre = random.uniform(0, (width, height), (max(1, rois // 5), 2))[
        random.integers(0, max(1, rois // 5), rois)
    ]
    half = random.uniform(1, (max(2, width / 3), max(2, height / 3)), (rois, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    boxes = boxes.clip(0, (width - 1, height - 1, width - 1, height - 1))
    masks = random.random((rois, side, side))
    scores = random.dirichlet(np.full(classes, 0.4), rois)
    return (
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(masks, dtype=torch.float32),
        torch.tensor(scores, dtype=torch.float32),
    )


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(("boxes", "scores", "classes", "masks"), actual, expected, strict=True):
        torch.testing.assert_close(
            a.cpu(),
            e,
            rtol=0,
            atol=2e-5 if name == "masks" else 0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top", [100, 12])
@pytest.mark.parametrize("procedure", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_voting_equals_that_of_the_authors(
    name: str, procedure: str, top: int, device: str
) -> None:
    golden = np.load(VOTING)
    given_ = [
        torch.from_numpy(golden[f"vote_{name}_{key}"]).to(device) for key in ("boxes", "masks")
    ]
    scores = torch.from_numpy(golden[f"vote_{name}_scores"]).to(device)
    height, width = golden[f"vote_{name}_hw"].tolist()
    boxes, kept_scores, classes, masks = vote_masks(
        *given_, scores, (height, width), max_detections=top, resample=RESAMPLES[procedure]
    )
    prefix = f"vote_{name}_{procedure}_top{top}_"
    assert np.array_equal(boxes.cpu().numpy(), golden[prefix + "boxes"])
    assert np.array_equal(classes.cpu().numpy(), golden[prefix + "classes"])
    close(kept_scores.cpu().double(), golden[prefix + "scores"], 1e-6)
    close(masks.cpu(), golden[prefix + "masks"], 2e-5)


@pytest.mark.parametrize("resample", ["box", "image"])
@given(
    st.integers(1, 25),
    st.integers(1, 4),
    st.integers(4, 40),
    st.integers(4, 40),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_voting_equals_the_numpy_form(
    resample: str, rois: int, classes: int, height: int, width: int, side: int, seed: int
) -> None:
    pytest.importorskip("cv2")
    given_ = scene(rois, classes, height, width, side, seed)
    size, options = (height, width), {"max_detections": 10, "resample": resample}
    expected = vote_masks_reference(*given_, size, **options)
    # Scenes in which the rounding of a sum decides are left out.
    for move in (-TIE, TIE):
        moved = {"mask_threshold": 0.4 + move, "nms_threshold": 0.3 + move}
        others = vote_masks_reference(*given_, size, **options, **moved)
        assume(all(map(torch.equal, expected, others)))
    assert_same(vote_masks(*given_, size, **options), expected)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("resample", ["box", "image"])
def test_both_devices_give_the_same_bits(resample: str, device: str) -> None:
    given_ = scene(600, 6, 150, 210, 21, 5)  # more regions than a block takes at once
    boxes, masks, scores = given_
    weights = scores.t() / scores.sum(dim=0)[:, None]
    for arguments in ((boxes, masks, weights), (boxes[:0], masks[:0], weights[:, :0])):
        op = torch.ops.instseg.average_masks.default
        expected = op(*arguments, 0.1, 150, 210, resample == "image")
        actual = op(*(a.to(device) for a in arguments), 0.1, 150, 210, resample == "image")
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
    nms = torch.ops.instseg.nms_per_class.default
    expected = nms(boxes, scores.t().contiguous(), 0.3, 0.001, 9)
    actual = nms(boxes.to(device), scores.t().contiguous().to(device), 0.3, 0.001, 9)
    assert torch.equal(actual.cpu(), expected)


def two_rois(device: str) -> Scene:
    """Two RoIs 4 pixels wide and high that share 3 columns (IoU 0.6), all foreground."""
    boxes = torch.tensor([[2.0, 1, 5, 4], [3, 1, 6, 4]], device=device)
    return (
        boxes,
        torch.ones(2, 2, 2, device=device),
        torch.tensor([[0.1, 0.6], [0.4, 0.2]], device=device),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_voters_are_weighted_by_their_probability_of_the_class(device: str) -> None:
    # Weights 0.6 / 0.8, 0.2 / 0.8: columns 2 to 6 average 0.75, 1, 1, 1, 0.25; 0.4 cuts the last.
    boxes, scores, classes, masks = vote_masks(*two_rois(device), (8, 9))
    assert boxes.tolist() == [[2, 1, 5, 4]] and classes.tolist() == [1]
    close(scores.cpu(), np.float32([0.6]), 0)
    close(masks.cpu(), np.float32([[[0.875, 1], [0.875, 1]]]), 1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_resampling_from_the_image_reads_beyond_the_box(device: str) -> None:
    # The first of 9 samples of the 4 x 4 box lies at 2 + 4 / 18 - 0.5 = 2 - 5 / 18.
    given_ = two_rois(device)
    masks = torch.ones(2, 9, 9, device=device)
    inside = vote_masks(given_[0], masks, given_[2], (8, 9), resample="box")[3]
    beyond = vote_masks(given_[0], masks, given_[2], (8, 9), resample="image")[3]
    assert inside[0, 4, 0].item() == 0.75
    assert beyond[0, 4, 0].item() == pytest.approx(0.75 * (1 - 5 / 18), abs=1e-6)


@pytest.mark.parametrize("pairs", [1, 100])
def test_the_result_does_not_depend_on_the_number_averaged_together(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = scene(40, 4, 40, 50, 7, 3)
    expected = vote_masks(*case, (40, 50))
    assert len(expected[0]) > 5
    monkeypatch.setattr(sys.modules[vote_masks.__module__], "_PAIRS", pairs)
    for value, value_expected in zip(vote_masks(*case, (40, 50)), expected, strict=True):
        assert torch.equal(value, value_expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_roi_that_overlaps_too_little_does_not_vote(device: str) -> None:
    given_ = two_rois(device)
    boxes = vote_masks(*given_, (8, 9), merge_threshold=0.6, mask_threshold=0.2)[0]
    assert boxes.tolist() == [[2, 1, 6, 4]]  # an IoU of exactly the threshold votes
    boxes = vote_masks(*given_, (8, 9), merge_threshold=0.61, mask_threshold=0.2)[0]
    assert boxes.tolist() == [[2, 1, 5, 4]]


@pytest.mark.parametrize("device", DEVICES)
def test_an_average_without_pixels_gives_the_centre(device: str) -> None:
    boxes, masks, scores = two_rois(device)
    voted = vote_masks(boxes, masks * 0, scores, (8, 9))
    assert voted[0].tolist() == [[4, 4, 4, 4]] and not voted[3].any()
    assert len(vote_masks(boxes, masks * 0, scores, (8, 9), resample="image")[0]) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resample", ["box", "image"])
def test_classes_ascend_and_scores_descend(resample: str, device: str) -> None:
    given_ = tuple(tensor.to(device) for tensor in scene(80, 5, 90, 120, 21, 1))
    boxes, scores, classes, _ = vote_masks(*given_, (90, 120), resample=resample)
    same_class = classes[1:] == classes[:-1]
    assert (classes[1:] >= classes[:-1]).all() and (scores[1:] <= scores[:-1])[same_class].all()
    assert len(boxes) > 10 and same_class.any() and not same_class.all()


@pytest.mark.parametrize("device", DEVICES)
def test_detections_are_limited_over_all_classes_by_score(device: str) -> None:
    given_ = tuple(tensor.to(device) for tensor in scene(80, 5, 90, 120, 21, 1))
    scores = vote_masks(*given_, (90, 120))[1]
    best = vote_masks(*given_, (90, 120), max_detections=7)[1]
    assert torch.equal(best.sort().values, scores.sort().values[-7:])
    assert len(vote_masks(*given_, (90, 120), max_detections=0)[1]) == 0
    certain = vote_masks(*given_, (90, 120), score_threshold=0.5)[1]
    assert torch.equal(certain, scores[scores >= 0.5]) and len(certain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rois", "classes"), [(0, 4), (3, 1)])
def test_no_rois_or_no_classes_give_no_detections(rois: int, classes: int, device: str) -> None:
    given_ = (torch.zeros(rois, 4), torch.ones(rois, 1, 7, 7), torch.ones(rois, classes))
    boxes, scores, labels, masks = vote_masks(
        *(tensor.to(device) for tensor in given_), (5, 6), resample="image"
    )
    assert boxes.shape == (0, 4) and scores.shape == labels.shape == (0,)
    assert masks.shape == (0, 7, 7) and labels.dtype == torch.int64


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_of_one_pixel_has_a_result(device: str) -> None:
    boxes, masks, scores = two_rois(device)
    voted = vote_masks(boxes, masks, scores, (1, 1))
    assert voted[0].tolist() == [[0, 0, 0, 0]] and (voted[3] == 1).all()
    assert len(vote_masks(boxes, masks, scores, (1, 1), resample="image")[0]) == 0


def spoil_box(boxes: Tensor, masks: Tensor, scores: Tensor) -> None:
    boxes[0, 2] = torch.nan


def spoil_infinite(boxes: Tensor, masks: Tensor, scores: Tensor) -> None:
    boxes[0, 2] = torch.inf


def spoil_order(boxes: Tensor, masks: Tensor, scores: Tensor) -> None:
    boxes[0, 2] = 1


def spoil_score(boxes: Tensor, masks: Tensor, scores: Tensor) -> None:
    scores[0, 0] = torch.nan


def spoil_mask(boxes: Tensor, masks: Tensor, scores: Tensor) -> None:
    masks[0, 1, 1] = -torch.inf


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spoil", [spoil_box, spoil_infinite, spoil_order, spoil_score, spoil_mask])
def test_an_unusable_roi_neither_detects_nor_votes(
    spoil: Callable[[Tensor, Tensor, Tensor], None], device: str
) -> None:
    boxes, masks, scores = two_rois(device)
    alone = vote_masks(boxes[1:], masks[1:], scores[1:], (8, 9))
    spoil(boxes, masks, scores)
    assert_same(vote_masks(boxes, masks, scores, (8, 9)), tuple(a.cpu() for a in alone))


@pytest.mark.parametrize("device", DEVICES)
def test_a_huge_box_is_clipped_to_the_image(device: str) -> None:
    boxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9]], device=device)
    voted = vote_masks(boxes, torch.ones(1, 3, 3, device=device), boxes[:, :2] * 0 + 1, (8, 9))
    assert voted[0].tolist() == [[0, 0, 8, 7]] and (voted[3] == 1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [1e9, -1e9, 3e38, torch.inf, torch.nan])
def test_the_operator_reads_and_writes_inside_for_any_box(value: float, device: str) -> None:
    boxes = torch.tensor([[2.0, 1, 5, 4]], device=device).repeat(5, 1)
    boxes[torch.arange(1, 5), torch.arange(4)] = value
    masks = torch.ones(5, 3, 3, device=device)
    weights = torch.eye(5, device=device)
    averaged, averages = torch.ops.instseg.average_masks.default(
        boxes, masks, weights, 0.4, 8, 9, False
    )
    assert averaged[0].tolist() == [2, 1, 5, 4]
    assert (averaged >= 0).all() and (averaged[:, 0::2] < 9).all() and (averaged[:, 1::2] < 8).all()
    assert averages.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [torch.nan, -1.0, 0.0])
def test_a_weight_that_is_none_counts_nothing(weight: float, device: str) -> None:
    boxes, masks, _ = two_rois(device)
    weights = torch.tensor([[1.0, weight]], device=device)
    averaged, _ = torch.ops.instseg.average_masks.default(boxes, masks, weights, 0.4, 8, 9, False)
    assert averaged.tolist() == [[2, 1, 5, 4]]


@pytest.mark.parametrize("device", DEVICES)
def test_halves_and_strided_tensors_are_accepted(device: str) -> None:
    boxes, masks, scores = two_rois(device)
    expected = tuple(t.cpu() for t in vote_masks(boxes, masks, scores.half().float(), (8, 9)))
    strided = (boxes.half().t().contiguous().t(), masks.half().expand(2, 2, 2), scores.half())
    assert_same(vote_masks(*strided, (8, 9)), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_suppression_keeps_the_first_of_equal_scores(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [20, 0, 29, 9]], device=device)
    scores = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.2, 0.9], [0.0, 0.0, 0.0]], device=device)
    keep = torch.ops.instseg.nms_per_class.default(boxes, scores, 0.3, 0.001, 100)
    assert keep.tolist() == [[True, False, True], [False, True, True], [False] * 3]


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device: str) -> None:
    boxes, masks, scores = (t.to(device) for t in scene(12, 3, 20, 30, 5, 0))
    by_class = scores.t().contiguous()
    nms = torch.ops.instseg.nms_per_class.default
    torch.library.opcheck(nms, (boxes, by_class, 0.3, 0.001, 5))
    average = torch.ops.instseg.average_masks.default
    torch.library.opcheck(average, (boxes, masks, by_class, 0.4, 20, 30, False))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_gives_the_same(device: str) -> None:
    arguments = tuple(t.to(device) for t in scene(12, 3, 20, 30, 5, 0))

    def average(boxes: Tensor, masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        op = torch.ops.instseg.average_masks.default
        return op(boxes, masks, scores.t().contiguous(), 0.4, 20, 30, True)

    compiled = torch.compile(average, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), average(*arguments), strict=True):
        assert torch.equal(actual, expected)
