"""The table of the hostile tests: every operator with a valid sample and bad input made for it.

test_hostile_input.py changes every tensor in all ways that need no knowledge of it (rank, dtype,
device, layout, a gradient asked for).  This table lists the changes that depend on the meaning of
an argument, under each of ITEMS, or says in a sentence why there is no such argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instseg.ops.assemble_instances import assemble_instances
from instseg.ops.assemble_masks import assemble_masks
from instseg.ops.fast_nms import surviving_boxes
from instseg.ops.fcis_head import fcis_head
from instseg.ops.mean_shift import mean_shift, nearest_centres, peel_clusters
from instseg.ops.psroi_pool import psroi_pool
from instseg.ops.roi_align import roi_align
from instseg.ops.sgn_lines import decode_lines, group_lines
from instseg.ops.vote_masks import vote_masks

Arguments = dict[str, Any]
ITEMS = ("batch index", "places", "channels", "numbers", "empty")
VALUES = ("batch index", "places")
"""On a GPU nobody looks at these: what happens there is in the tests of each operator."""
NAN, INF, HUGE = float("nan"), float("inf"), 2**40


class Refused(NamedTuple):
    """Arguments to replace, and the error that this must be; the message follows the name."""

    change: Arguments
    error: type[Exception]
    message: str


class Accepted(NamedTuple):
    """Arguments to replace, and the shape of the first result; -1 for any length."""

    change: Arguments
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One public function.

    Attributes:
        kernels: the members of ``torch.ops.instseg`` that it runs, backwards included.
        sample: valid arguments.
        items: for each of ITEMS the cases, or why there are none.
        derivatives: how often it can be differentiated; once more must be an error.
        any_dtype: arguments that it converts from any dtype.
        any_device: whether it moves its arguments itself.
        on_gpu: whether it takes tensors on a GPU.
    """

    call: Callable[..., Any]
    kernels: tuple[str, ...]
    sample: Arguments
    items: dict[str, list[Refused | Accepted] | str]
    derivatives: int = 0
    any_dtype: tuple[str, ...] = ()
    any_device: bool = False
    on_gpu: bool = True


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def put(tensor: Tensor, index: tuple[int, ...], value: Any) -> Tensor:
    """A copy with another value at ``index``."""
    changed = tensor.clone()
    changed[index] = torch.as_tensor(value, dtype=tensor.dtype)
    return changed


def index_error(argument: str, tensor: Tensor, values: tuple[Any, ...], message: str) -> list[Any]:
    """Row 1 of a tensor whose first column holds a batch index."""
    return [Refused({argument: put(tensor, (1, 0), v)}, IndexError, message) for v in values]


def value_errors(**numbers: tuple[Any, ...]) -> list[Any]:
    """Each of the numbers alone must be a ValueError that names the argument."""
    return [
        Refused({argument: value}, ValueError, f"{argument} is ")
        for argument, values in numbers.items()
        for value in values
    ]


def odd_boxes(argument: str, boxes: Tensor, first: int, shape: tuple[int, ...]) -> list[Any]:
    """Boxes that are inverted, without area, and enormous; corners from column ``first`` on."""
    corners = [(9, 9, 3, 3), (4, 4, 4, 4), (-1e9, -1e9, 1e9, 1e9), (1e9, 1e9, 2e9, 2e9)]
    accepted = []
    for corner in corners:
        changed = boxes.clone()
        changed[1, first:] = torch.tensor(corner)
        accepted.append(Accepted({argument: changed}, shape))
    return accepted


ROIS = torch.tensor([[0.0, 1, 2, 30, 40], [1, 10.5, -4, 50, 20], [0, 33, 7, 60, 22]])
WINDOWS = torch.tensor([[0, 0, 0], [1, -2, 3], [1, 2, -1]])
BOXES = torch.tensor([[2.0, 3, 15, 14], [4, 1, 20, 12], [1, 5, 9, 19]])
NOT_FINITE = (NAN, INF, -INF)
SPOILT = [put(BOXES, (1, 2), value) for value in NOT_FINITE]
ROI_INDICES = index_error("rois", ROIS, (-1, 2, 2**31, 0.5, NAN), r"rois\[1\] has batch index")
ROI_ERRORS = [
    Refused({"rois": put(ROIS, (1, 3), value)}, ValueError, r"rois\[1\] has coordinate")
    for value in NOT_FINITE
]
ROI_ERRORS.append(Refused({"rois": ROIS.half()}, TypeError, "rois is Half"))
ROI_NUMBERS = value_errors(
    spatial_scale=(0.0, -1.0, NAN, INF), group_size=(0, -1, 2**32), pooled_size=(0, -1, HUGE)
)
POOL, HEAD, COPIED = randn(2, 12, 6, 7), randn(2, 32, 6, 7), randn(2, 9, 5, 4)
CLASSES = torch.tensor([1, -1, 3])
LEVELS = torch.zeros(3, dtype=torch.int64)
PROTOTYPES, COEFFICIENTS = randn(6, 7, 4), randn(3, 4)
MASKS, SCORES = randn(3, 5, 5).sigmoid(), randn(3, 4).softmax(dim=1)
POINTS = randn(40, 3)
SPOILT_POINTS = [
    Accepted({"embeddings": put(POINTS, (7, 1), value)}, (40,))
    for value in (*NOT_FINITE, 1e9, 3e38)
]
WIDE_POINTS = Refused({"embeddings": randn(4, 65)}, ValueError, "embeddings has shape")
FLAT_POINTS = Refused({"embeddings": POINTS[:, :0]}, ValueError, "embeddings has shape")
LABELS = torch.arange(30).view(5, 6).remainder(4).to(torch.uint8)
SEMANTIC = torch.arange(30).view(5, 6).remainder(3)
PAIRS, TOUCHES = torch.tensor([[0, 2], [1, 3]]), torch.tensor([True, False, False, False])

NO_BATCH = "there is no batch: one image, or one set of points, at a time"

OPERATORS = {
    "psroi_pool": Operator(
        psroi_pool,
        ("psroi_pool", "psroi_pool_backward"),
        {"maps": POOL, "rois": ROIS, "spatial_scale": 1 / 8, "group_size": 2, "pooled_size": 5},
        {
            "batch index": ROI_INDICES,
            "places": [
                *odd_boxes("rois", ROIS, 1, (3, 3, 5, 5)),
                *ROI_ERRORS,
            ],
            "channels": [
                Refused({"maps": POOL[:, 1:]}, ValueError, "maps has 11 channels"),
                Refused({"rois": ROIS[:, 1:]}, ValueError, "rois has 4 columns"),
            ],
            "numbers": ROI_NUMBERS,
            "empty": [
                Accepted({"rois": ROIS[:0]}, (0, 3, 5, 5)),
                Accepted({"maps": POOL[:0], "rois": ROIS[:0]}, (0, 3, 5, 5)),
                Accepted({"maps": POOL[:, :0]}, (3, 0, 5, 5)),
                Accepted({"maps": POOL[:, :, :0]}, (3, 3, 5, 5)),
            ],
        },
        derivatives=2,
    ),
    "fcis_head": Operator(
        fcis_head,
        ("fcis_head", "fcis_head_backward"),
        {"maps": HEAD, "rois": ROIS, "classes": CLASSES}
        | {"spatial_scale": 1 / 8, "group_size": 2, "pooled_size": 5},
        {
            "batch index": [
                *ROI_INDICES,
                *(
                    Refused({"classes": put(CLASSES, (1,), v)}, IndexError, r"classes\[1\] is")
                    for v in (-2, 4, HUGE)
                ),
            ],
            "places": [
                *odd_boxes("rois", ROIS, 1, (3, 4)),
                *ROI_ERRORS,
            ],
            "channels": [
                Refused({"maps": HEAD[:, 1:]}, ValueError, "maps has 31 channels"),
                Refused({"maps": HEAD[:, :8], "classes": None}, ValueError, "maps has 8 channels"),
                Refused({"rois": ROIS[:, 1:]}, ValueError, "rois has 4 columns"),
                Refused({"classes": CLASSES[:2]}, ValueError, r"classes is \[2\]"),
            ],
            "numbers": ROI_NUMBERS,
            "empty": [
                Accepted({"rois": ROIS[:0], "classes": None}, (0, 4)),
                Accepted({"maps": HEAD[:0], "rois": ROIS[:0], "classes": CLASSES[:0]}, (0, 4)),
                Accepted({"maps": HEAD[:, :0], "classes": CLASSES * 0 - 1}, (3, 0)),
                Accepted({"maps": HEAD[:, :, :0]}, (3, 4)),
            ],
        },
        derivatives=1,
    ),
    "assemble_instances": Operator(
        assemble_instances,
        ("assemble_instances", "assemble_instances_backward"),
        {"maps": COPIED, "windows": WINDOWS, "parts": 3, "size": 4},
        {
            "batch index": index_error(
                "windows", WINDOWS, (-1, 2, 2**31, -(2**63)), r"windows\[1\] has the batch index"
            ),
            "places": [
                Accepted({"windows": put(WINDOWS, (1, 2), value)}, (3, 4, 4))
                for value in (10**9, -(10**9), 2**63 - 1, -(2**63))
            ],
            "channels": [
                Refused({"maps": COPIED[:, :8]}, ValueError, "maps has 8 channels"),
                Refused({"windows": WINDOWS[:, :2]}, ValueError, "windows has shape"),
            ],
            "numbers": value_errors(parts=(0, -1, HUGE), size=(0, -1, HUGE)),
            "empty": [
                Accepted({"windows": WINDOWS[:0]}, (0, 4, 4)),
                Accepted({"maps": COPIED[:0], "windows": None}, (0, 4, 4)),
                Accepted({"maps": COPIED[:0], "windows": WINDOWS[:0]}, (0, 4, 4)),
                Accepted({"maps": COPIED[:, :, :0]}, (3, 4, 4)),
                Refused({"maps": COPIED[:, :0]}, ValueError, "maps has 0 channels"),
            ],
        },
        derivatives=2,
    ),
    "assemble_masks": Operator(
        assemble_masks,
        ("assemble_masks",),
        {"prototypes": PROTOTYPES, "coefficients": COEFFICIENTS, "boxes": BOXES, "size": (20, 30)},
        {
            "batch index": NO_BATCH,
            "places": [
                *odd_boxes("boxes", BOXES, 0, (3, 20, 30)),
                *(Accepted({"boxes": boxes}, (3, 20, 30)) for boxes in SPOILT),
            ],
            "channels": [
                Refused(
                    {"coefficients": COEFFICIENTS[:, 1:]}, ValueError, "coefficients has shape"
                ),
                Refused({"coefficients": COEFFICIENTS[1:]}, ValueError, "boxes has shape"),
                Refused({"boxes": BOXES[:, 1:]}, ValueError, "boxes has shape"),
            ],
            "numbers": [
                *value_errors(size=((0, 9), (9, -1), (9, HUGE))),
                Refused({"size": (2**24, 2**24)}, RuntimeError, "there is no memory for 3 masks"),
            ],
            "empty": [
                Accepted({"coefficients": COEFFICIENTS[:0], "boxes": BOXES[:0]}, (0, 20, 30)),
                Accepted(
                    {"prototypes": PROTOTYPES[..., :0], "coefficients": COEFFICIENTS[:, :0]},
                    (3, 20, 30),
                ),
                Refused({"prototypes": PROTOTYPES[:0]}, ValueError, "prototypes has shape"),
            ],
        },
    ),
    "vote_masks": Operator(
        vote_masks,
        ("nms_per_class", "average_masks"),
        {"boxes": BOXES, "masks": MASKS, "scores": SCORES, "image_size": (20, 30)},
        {
            "batch index": NO_BATCH,
            "places": [
                *odd_boxes("boxes", BOXES, 0, (-1, 4)),
                *(Accepted({"boxes": boxes}, (-1, 4)) for boxes in SPOILT),
                *(Accepted({"masks": put(MASKS, (1, 2, 2), v)}, (-1, 4)) for v in NOT_FINITE),
                *(Accepted({"scores": put(SCORES, (1, 2), v)}, (-1, 4)) for v in NOT_FINITE),
            ],
            "channels": [
                Refused({"boxes": BOXES[:, 1:]}, ValueError, "boxes has shape"),
                Refused({"masks": MASKS[:, 1:]}, ValueError, "masks has shape"),
                Refused({"masks": MASKS[1:]}, ValueError, "masks has shape"),
                Refused({"scores": SCORES[1:]}, ValueError, "scores has shape"),
            ],
            "numbers": value_errors(
                image_size=((0, 9), (9, -1)),
                nms_threshold=(-0.1, 1.1, NAN),
                merge_threshold=(-0.1, 1.1, NAN),
                mask_threshold=(0.0, 1.1, NAN),
                score_threshold=(-0.1, 1.1, NAN),
                max_detections=(-1,),
                resample=("roi",),
            ),
            "empty": [
                Accepted({"boxes": BOXES[:0], "masks": MASKS[:0], "scores": SCORES[:0]}, (0, 4)),
                Accepted({"scores": SCORES[:, :1]}, (0, 4)),
                Refused({"scores": SCORES[:, :0]}, ValueError, "scores has shape"),
                Refused({"masks": MASKS[:, :0, :0]}, ValueError, "masks has shape"),
            ],
        },
        any_dtype=("boxes", "masks", "scores"),
    ),
    "mean_shift": Operator(
        mean_shift,
        ("shift_seeds", "nearest_centres"),
        {"embeddings": POINTS, "bandwidth": 1.0, "seeds": POINTS[:5]},
        {
            "batch index": NO_BATCH,
            "places": [
                *SPOILT_POINTS,
                *(
                    Refused({"seeds": put(POINTS, (1, 1), v)}, ValueError, "seeds has values that")
                    for v in NOT_FINITE
                ),
            ],
            "channels": [
                WIDE_POINTS,
                Refused({"seeds": POINTS[:, 1:]}, ValueError, "seeds has shape"),
            ],
            "numbers": [
                *value_errors(
                    bandwidth=(0.0, -1.0, NAN, INF), max_iterations=(-1,), tolerance=(-0.1, NAN)
                ),
                Refused({"seeds": None, "min_bin_count": 0}, ValueError, "min_bin_count is 0"),
            ],
            "empty": [
                Accepted({"embeddings": POINTS[:0]}, (0,)),
                Accepted({"embeddings": POINTS[:0], "seeds": None}, (0,)),
                Accepted({"seeds": POINTS[:0]}, (40,)),
                FLAT_POINTS,
            ],
        },
    ),
    "peel_clusters": Operator(
        peel_clusters,
        ("peel_clusters",),
        {"embeddings": POINTS, "bandwidth": 1.0},
        {
            "batch index": NO_BATCH,
            "places": SPOILT_POINTS,
            "channels": [WIDE_POINTS],
            "numbers": [
                *value_errors(
                    bandwidth=(0.0, -1.0, NAN, INF),
                    max_iterations=(-1,),
                    tolerance=(-0.1, NAN),
                    min_points=(0, -1),
                    max_clusters=(-1,),
                ),
                Accepted({"max_clusters": 2**62, "min_points": 2**62}, (40,)),
            ],
            "empty": [Accepted({"embeddings": POINTS[:0]}, (0,)), FLAT_POINTS],
        },
    ),
    "nearest_centres": Operator(
        nearest_centres,
        ("nearest_centres",),
        {"embeddings": POINTS, "centres": POINTS[:5], "radius": 1.0},
        {
            "batch index": NO_BATCH,
            "places": [
                *SPOILT_POINTS,
                *(Accepted({"centres": put(POINTS, (1, 1), v)}, (40,)) for v in NOT_FINITE),
            ],
            "channels": [
                WIDE_POINTS,
                Refused({"centres": POINTS[:, 1:]}, ValueError, "centres has shape"),
            ],
            "numbers": value_errors(radius=(-1.0, NAN)),
            "empty": [
                Accepted({"embeddings": POINTS[:0]}, (0,)),
                Accepted({"centres": POINTS[:0]}, (40,)),
                FLAT_POINTS,
            ],
        },
    ),
    "decode_lines": Operator(
        decode_lines,
        ("decode_lines",),
        {"labels": LABELS, "semantic": SEMANTIC, "widened": True},
        {
            "batch index": NO_BATCH,
            "places": [
                Accepted({"labels": put(LABELS, (1, 1), 255)}, (5, 6)),
                Accepted({"semantic": put(SEMANTIC, (1, 1), -(2**63))}, (5, 6)),
                Accepted({"semantic": put(SEMANTIC, (1, 1), 2**63 - 1)}, (5, 6)),
            ],
            "channels": [Refused({"semantic": SEMANTIC[1:]}, ValueError, "semantic has shape")],
            "numbers": "its only argument beside the maps is a choice of two",
            "empty": [
                Accepted({"labels": LABELS[:0], "semantic": SEMANTIC[:0]}, (0, 6)),
                Accepted({"labels": LABELS[:, :0], "semantic": SEMANTIC[:, :0]}, (5, 0)),
            ],
        },
        any_device=True,
    ),
    "group_lines": Operator(
        group_lines,
        ("group_lines",),
        {"pairs": PAIRS, "touches": TOUCHES},
        {
            "batch index": [
                Refused({"pairs": put(PAIRS, (1, 0), v)}, ValueError, "pair 1 is ")
                for v in (-1, 4, 2**31, -(2**63), 2**63 - 1)
            ],
            "places": [Refused({"touches": ~TOUCHES}, ValueError, "the last line touches one")],
            "channels": [Refused({"pairs": PAIRS[:, :1]}, ValueError, "pairs has shape")],
            "numbers": "it takes no numbers",
            "empty": [
                Accepted({"pairs": PAIRS[:0]}, (4,)),
                Accepted({"pairs": PAIRS[:0], "touches": TOUCHES[:0]}, (0,)),
                Refused({"touches": TOUCHES[:0]}, ValueError, "pair 0 is "),
            ],
        },
        any_device=True,
    ),
    "roi_align": Operator(
        roi_align,
        ("roi_align", "roi_align_backward"),
        {"maps": POOL, "rois": ROIS, "spatial_scale": 1 / 8, "pooled_size": 5}
        | {"sampling_ratio": 2, "levels": LEVELS},
        {
            "batch index": [
                *ROI_INDICES,
                *(
                    Refused({"levels": put(LEVELS, (1,), v)}, IndexError, r"levels\[1\] is")
                    for v in (-1, 1, 2**31)
                ),
            ],
            "places": [
                *odd_boxes("rois", ROIS, 1, (3, 12, 5, 5)),
                *(
                    Accepted(case.change | {"sampling_ratio": 0}, case.shape)
                    for case in odd_boxes("rois", ROIS, 1, (3, 12, 5, 5))
                ),
                *ROI_ERRORS,
            ],
            "channels": [
                Refused({"rois": ROIS[:, 1:]}, ValueError, "rois has 4 columns"),
                Refused({"levels": LEVELS[:2]}, ValueError, "levels has shape"),
            ],
            "numbers": value_errors(
                spatial_scale=(0.0, -1.0, NAN, INF),
                pooled_size=(0, -1, HUGE),
                sampling_ratio=(-1, HUGE),
            ),
            "empty": [
                Accepted({"rois": ROIS[:0], "levels": LEVELS[:0]}, (0, 12, 5, 5)),
                Accepted({"maps": POOL[:0], "rois": ROIS[:0], "levels": LEVELS[:0]}, (0, 12, 5, 5)),
                Accepted({"maps": POOL[:, :0]}, (3, 0, 5, 5)),
                Accepted({"maps": POOL[:, :, :0]}, (3, 12, 5, 5)),
            ],
        },
        derivatives=2,
        on_gpu=False,
    ),
    "fast_nms": Operator(
        surviving_boxes,
        ("fast_nms",),
        {"boxes": BOXES, "scores": randn(4, 3), "iou_threshold": 0.1, "top_k": 2},
        {
            "batch index": NO_BATCH,
            "places": [
                *odd_boxes("boxes", BOXES, 0, (4, 2)),
                *(Accepted({"boxes": boxes}, (4, 2)) for boxes in SPOILT),
                *(Accepted({"scores": put(randn(4, 3), (1, 2), v)}, (4, 2)) for v in NOT_FINITE),
            ],
            "channels": [
                Refused({"boxes": BOXES[:, 1:]}, ValueError, "boxes has shape"),
                Refused({"scores": randn(4, 2)}, ValueError, "scores has shape"),
            ],
            "numbers": value_errors(iou_threshold=(NAN,), min_score=(NAN,), top_k=(-1,)),
            "empty": [
                Accepted({"boxes": BOXES[:0], "scores": randn(4, 0)}, (4, 0)),
                Accepted({"scores": randn(0, 3)}, (0, 2)),
                Accepted({"top_k": 0}, (4, 0)),
            ],
        },
    ),
}
