"""Checks that a model keeps the contract of :mod:`instseg.modeling.contract`.

Used like scikit-learn's ``check_estimator``::

    from instseg.testing import check_system

    check_system("my_paper.yaml")

or, one test for each check::

    system = System("my_paper.yaml")

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_paper(check):
        check(system)

A check is a function that raises an AssertionError if the model breaks its rule.
"""

import copy
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2.structures import BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image, ImageDraw
from torch import nn

from instseg.checkpoint import Checkpointer
from instseg.config.classes import class_count
from instseg.config.nodes import load_cfg
from instseg.config.rules import check_values
from instseg.data.mappers import build_train_mapper
from instseg.data.samples import build_samples
from instseg.errors import CheckpointError, ImageError
from instseg.inference.predictor import Predictor
from instseg.inference.video import VideoPredictor
from instseg.masks import CroppedMasks, encode

SMALL: tuple[Any, ...] = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "TEST.DETECTIONS_PER_IMAGE", 8),
    *("INPUT.MAX_SIZE_TEST", 128, "INPUT.SQUARE_SIZE", 64, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
)
"""Overrides of every system that is checked: small images, eight instances."""
SMALL_TRAINING: tuple[Any, ...] = (
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.SQUARE_SIZE", 160),
)
"""The same for steps of a training; some networks need more pixels there."""
_GENERATOR = np.random.default_rng(0)
PHOTO = _GENERATOR.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
"""(48, 64, 3) blots of 8 x 8 pixels."""
ODD: dict[str, Any] = {
    "one pixel": PHOTO[:1, :1],
    "a thin line": np.ascontiguousarray(PHOTO[:1].repeat(70, axis=1)[:, :4000]),
    "a thin column": np.ascontiguousarray(PHOTO[:, :1].repeat(100, axis=0)[:4000]),
    "grey": PHOTO[:, :, 0],
    "grey with a third axis": PHOTO[:, :, :1],
    "transparent": np.dstack([PHOTO, PHOTO[:, :, 0]]),
    "black": np.zeros_like(PHOTO),
    "mirrored, negative strides": PHOTO[:, ::-1],
    "floats": PHOTO.astype(np.float32),
    "bilevel": Image.fromarray(PHOTO).convert("1"),
    "CMYK": Image.fromarray(PHOTO).convert("CMYK"),
}
"""Unusual images that can be used."""
REFUSED: tuple[tuple[Any, type[Exception], str], ...] = (
    (None, ImageError, "image is None"),
    (PHOTO.astype(np.uint16), ImageError, "expected uint8 in 0 to 255, found uint16"),
    (PHOTO / 255, ImageError, "multiply by 255"),
    (np.full((9, 9, 3), np.nan), ImageError, "non-finite"),
    (np.full((9, 9, 3), np.inf), ImageError, "non-finite"),
    (PHOTO[:0], ImageError, "image is empty"),
    (PHOTO.transpose(2, 0, 1), TypeError, "channels first"),
    (torch.zeros(3, 9, 9), TypeError, "torch.Tensor"),
    ("nowhere.jpg", ImageError, "nowhere.jpg: no such file"),
    (np.broadcast_to(PHOTO[:1, :1], (30_000, 30_000, 3)), ImageError, "INPUT.MAX_SIZE_TEST"),
)
"""Unusable images, each with the class of its error and a part of the message."""


@dataclass(frozen=True)
class System:
    """A configuration to be checked, untrained.

    Attributes:
        config_file: a path, or a name inside ``configs/``.
        overrides: ``(KEY, VALUE, ...)`` after :data:`SMALL`, with which the untrained network is
            small and finds instances in an image of random blots.
    """

    config_file: str
    overrides: tuple[Any, ...] = ()

    def build(self, *overrides: Any) -> Predictor:
        """A predictor with weights that are random and always the same."""
        torch.manual_seed(0)
        all_overrides = [*SMALL, *self.overrides, *overrides]
        return Predictor(self.config_file, overrides=all_overrides, batch_size=8)

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The predictor that all checks share and none changes."""
        return self.build()


def check_system(config_file: str | os.PathLike[str], overrides: Sequence[Any] = ()) -> None:
    """Run every check of :data:`CHECKS` on a configuration; takes seconds for a small one.

    Args:
        config_file, overrides: see :class:`System`.
    Raises:
        AssertionError: the model breaks the contract.
    """
    system = System(os.fspath(config_file), tuple(overrides))
    for check in CHECKS:
        check(system)


def check_number_of_classes(system: System) -> None:
    """The declared key exists and holds a number, and ``pred_classes`` are below it."""
    classes = class_count(system.predictor.cfg)
    pred_classes = system.predictor(PHOTO)["instances"].pred_classes
    if classes is None:
        assert not pred_classes.any(), "the model makes proposals, whose classes are 0"
        return
    assert isinstance(classes.count, int), f"{classes.key} is {classes.count!r}"
    below = bool((pred_classes < classes.count).all())
    assert below, f"{pred_classes.tolist()} with {classes.key} {classes.count}"


def check_instances_are_found(system: System) -> None:
    """The untrained network finds instances; without any the other checks would test nothing."""
    count = len(system.predictor(PHOTO)["instances"])
    assert count > 1, (
        f"{count} instances in an image of random blots; lower the score threshold for the check"
    )


def check_training(system: System) -> None:
    """A step with and one without instances gives finite losses that reach every parameter."""
    cfg = load_cfg(system.config_file, [*system.overrides, *SMALL_TRAINING])
    with tempfile.TemporaryDirectory() as folder:
        check_training_on(cfg, example_records(Path(folder)))


def check_training_on(cfg: CfgNode, records: list[dict[str, Any]]) -> nn.Module:
    """Build the model, have it compute losses of every record, and return it.

    Args:
        records: see :func:`train_batches`.
    Raises:
        AssertionError: the model breaks the contract.
        ConfigError: a value cannot be used.
    """
    check_values(cfg)
    torch.manual_seed(0)
    model: nn.Module = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # without statistics 100 random layers overflow
            nn.init.constant_(module.weight, 0.5)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for batch in train_batches(cfg, records):
        model.zero_grad()
        with EventStorage(0):
            losses = model(batch)
        assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values()), losses
        sum(losses.values()).backward()
        without = [n for n, p in trainable.items() if p.grad is None]
        assert not without, f"no gradient reaches {without} for {batch[0].get('file_name')}"
    return model


def check_odd_images(system: System) -> None:
    """Images of one pixel, of a line, of one colour and the like give valid results."""
    for kind, image in ODD.items():
        try:
            instances = system.predictor(image)["instances"]
            limit = system.predictor.cfg.TEST.DETECTIONS_PER_IMAGE
            assert_valid(instances, *shape_of(image), limit)
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error


def check_refused(system: System) -> None:
    """The predictor refuses unusable images before the network runs."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("the network ran")

    hooks = [part.register_forward_pre_hook(fail) for part in system.predictor.model.modules()]
    try:
        for item, kind, message in REFUSED:
            error = _error_of(functools.partial(system.predictor, item))
            assert isinstance(error, kind) and message in str(error), f"{message}: {error!r}"
    finally:
        for hook in hooks:
            hook.remove()


def check_batch(system: System) -> None:
    """Images of very different sizes give the same results in a batch as alone."""
    shapes = [(48, 64), (64, 48), (1, 1), (48, 64), (20, 90), (90, 20), (1, 4000), (47, 64)]
    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    for image, together in zip(images, system.predictor(images), strict=True):
        assert_same(system.predictor(image)["instances"], together["instances"])


def check_saving(system: System) -> None:
    """Saved and loaded into another model, the weights give the same results."""
    cfg = system.predictor.cfg
    with tempfile.TemporaryDirectory() as folder:
        check_saving_of(system.predictor.model, cfg, Path(folder), [{"image": _tensor(cfg)}])


@torch.no_grad()
def check_saving_of(
    model: nn.Module, cfg: CfgNode, folder: Path, inputs: list[dict[str, Any]]
) -> Instances:
    """Save ``model`` to ``folder``, load it into another one, compare, and return the result.

    Args:
        model: in evaluation mode, built from ``cfg``.
        inputs: one image.
    """
    before: Instances = model(inputs)[0]["instances"]
    Checkpointer(model, str(folder)).save("weights")
    other = build_model(cfg).eval()
    Checkpointer(other).load(str(folder / "weights.pth"))
    after = other(inputs)[0]["instances"]
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(before.get(field), after.get(field)), f"{field} differ after reloading"
    assert torch.equal(before.pred_boxes.tensor, after.pred_boxes.tensor), "boxes differ"
    return before


def check_weights_that_are_not_finite(system: System) -> None:
    """NaN in a parameter is an error and never a result, in every part of the network.

    A parameter that only training uses changes nothing.
    """
    predictor = system.predictor
    used_parameters: set[nn.Parameter] = set()
    hooks = [
        part.register_forward_hook(
            lambda part, *_: used_parameters.update(part.parameters(recurse=False))
        )
        for part in predictor.model.modules()
    ]
    sound = predictor(PHOTO)["instances"]
    for hook in hooks:
        hook.remove()
    raised = 0
    for name, parameter in _one_of_each_part(predictor.model):
        original = parameter.detach().clone()
        parameter.data.fill_(torch.nan)
        try:
            instances = predictor(PHOTO)["instances"]
        except CheckpointError as error:
            assert "values that are not finite" in str(error), str(error)
            raised += 1
        else:
            assert parameter not in used_parameters, f"{name} is NaN, and there is a result"
            assert torch.equal(instances.pred_masks, sound.pred_masks), f"{name} changes masks"
            assert torch.equal(instances.scores, sound.scores), f"{name} changes scores"
        finally:
            parameter.data.copy_(original)
    assert raised > 1, "NaN in a parameter is no error; see instseg.modeling.check_finite"
    assert_same(predictor(PHOTO)["instances"], sound)


def check_limited_memory(system: System) -> None:
    """If memory suffices for some instances only (``max_instances``), these are the best."""
    all_instances = system.predictor(PHOTO)["instances"]
    limited = copy.copy(system.predictor)
    limited.cfg = system.predictor.cfg.clone()
    limited.cfg.defrost()
    limited.cfg.TEST.MASK_MEMORY = 1.5 * PHOTO[:, :, 0].size / 1e9
    (best,) = limited([PHOTO])
    assert_same(best["instances"], all_instances[:1])


def check_cropped_masks(system: System) -> None:
    """Cropped masks (``masks`` of an input) are the dense ones, and their number has no limit."""
    tall = np.ascontiguousarray(np.tile(PHOTO, (3, 1, 1)))
    dense = [result["instances"] for result in system.predictor([PHOTO, tall])]
    cropping = copy.copy(system.predictor)
    cropping.cfg = system.predictor.cfg.clone()
    cropping.cfg.defrost()
    cropping.cfg.TEST.MASKS, cropping.cfg.TEST.MASK_MEMORY = "cropped", 1e-9
    for dense_instances, result in zip(dense, cropping([PHOTO, tall]), strict=True):
        cropped = result["instances"]
        assert isinstance(cropped.pred_masks, CroppedMasks), f"masks are {type(cropped.pred_masks)}"
        assert cropped.pred_masks.to_rle() == [encode(mask) for mask in dense_instances.pred_masks]
        cropped.pred_masks = cropped.pred_masks.to_dense().to(dense_instances.pred_masks.device)
        assert_same(dense_instances, cropped)


def check_bfloat16(system: System) -> None:
    """In bfloat16 the model finds instances too, in single precision."""
    predictor = system.build("MODEL.DTYPE_TEST", "bfloat16")
    instances: Instances = predictor(PHOTO)["instances"]
    assert len(instances) > 1, f"{len(instances)} instances in bfloat16"
    assert_valid(instances, *shape_of(PHOTO), predictor.cfg.TEST.DETECTIONS_PER_IMAGE)
    for name, value in instances.get_fields().items():
        tensor = getattr(value, "tensor", value)
        halves = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16
        assert not halves, f"{name} is in bfloat16; make it of the network's outputs as float()"


def check_odd_frames(system: System) -> None:
    """A model whose frames share work gives valid results for odd key frames and others."""
    if system.predictor.video() is None:
        return
    video = VideoPredictor(system.predictor)
    limit = system.predictor.cfg.TEST.DETECTIONS_PER_IMAGE
    for kind, image in ODD.items():
        video.reset()
        thin = kind in ("a thin line", "a thin column")  # the network may not see it at all
        for keyframe in (True, False):
            result = video(image)
            is_keyframe = result["keyframe"]
            assert is_keyframe == keyframe or thin, f"{kind}: keyframe is {is_keyframe}"
            assert_valid(result["instances"], *shape_of(image), limit)


CHECKS: tuple[Callable[[System], None], ...] = (
    check_number_of_classes,
    check_instances_are_found,
    check_training,
    check_odd_images,
    check_refused,
    check_batch,
    check_saving,
    check_weights_that_are_not_finite,
    check_limited_memory,
    check_cropped_masks,
    check_bfloat16,
    check_odd_frames,
)
"""The checks, one for each rule of the contract."""


def assert_valid(instances: Instances, height: int, width: int, max_instances: int) -> None:
    """The fields of a result have the shapes, types and values that the contract asks for.

    Args:
        height, width: of the image.
        max_instances: largest number of instances.
    """
    count = len(instances)
    assert instances.image_size == (height, width), f"{instances.image_size} of {height}x{width}"
    assert count <= max_instances, f"{count} instances; expected at most {max_instances}"
    masks, boxes = instances.pred_masks, instances.pred_boxes.tensor
    assert masks.shape == (count, height, width), f"masks of shape {tuple(masks.shape)}"
    assert masks.dtype == torch.bool, f"masks of type {masks.dtype}"
    assert instances.scores.shape == instances.pred_classes.shape == (count,)
    assert bool(instances.scores.isfinite().all()), f"scores {instances.scores.tolist()}"
    falling = bool((instances.scores.diff() <= 0).all())
    assert falling, f"scores are not in descending order: {instances.scores.tolist()}"
    assert boxes.shape == (count, 4), f"boxes of shape {tuple(boxes.shape)}"
    inside = (boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all()
    assert bool(inside), f"boxes outside {height}x{width}: {boxes.tolist()}"


def assert_same(one: Instances, other: Instances) -> None:
    """Two results agree up to rounding."""
    assert one.image_size == other.image_size
    assert len(one) == len(other), f"{len(one)} instances and {len(other)}"
    # A batch may run through other kernels, so the last bits are free to differ.
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=1e-2)
    torch.testing.assert_close(one.scores, other.scores)
    assert torch.equal(one.pred_classes, other.pred_classes), "classes differ"
    differing = (one.pred_masks != other.pred_masks).float().mean() if len(one) else 0
    assert differing < 1e-3, f"masks differ in {differing:.2%} of the pixels"


def shape_of(image: Any) -> tuple[int, int]:
    """Height and width."""
    height, width = np.asarray(image).shape[:2]
    return height, width


def example_records(folder: Path) -> list[dict[str, Any]]:
    """Records of an image with a square, and of the same without annotations.

    Args:
        folder: where the image goes.
    """
    image = Image.new("RGB", (96, 96))
    path = folder / "square.png"
    ImageDraw.Draw(image).rectangle((24, 24, 71, 71), fill=(255, 200, 0))
    image.save(path)
    square = {
        "bbox": [24, 24, 72, 72],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "segmentation": [[24, 24, 72, 24, 72, 72, 24, 72]],
    }
    common = {"file_name": str(path), "height": 96, "width": 96, "image_id": 0}
    return [{**common, "annotations": [square]}, {**common, "annotations": []}]


def train_batches(cfg: CfgNode, records: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A batch for each record; where a project draws samples, some batches of every kind."""
    if not cfg.INPUT.SAMPLES:
        yield from (batch_of(cfg, record, training=True) for record in records)
        return
    samples = iter(build_samples(cfg, records, batch_size=2))
    for _ in range(4):
        yield [next(samples), next(samples)]


def batch_of(cfg: CfgNode, record: dict[str, Any], training: bool) -> list[dict[str, Any]]:
    """A batch of one record as the model gets it, with classes below the model's number."""
    if cfg.MODEL.LOAD_PROPOSALS:
        record = _with_proposals(record)
    # To a mapper of videos a still image is a clip of one frame.
    video = training and cfg.INPUT.VIDEO_REFERENCE
    mapper = build_train_mapper(cfg, augment=True) if video else DatasetMapper(cfg, training)
    sample: dict[str, Any] = mapper(record)
    classes = class_count(cfg)
    if training and classes is not None:
        sample["instances"].gt_classes %= classes.count
    return [sample]


def _with_proposals(record: dict[str, Any]) -> dict[str, Any]:
    """The whole image and its quarters, as read from a proposal file."""
    width, height = record["width"], record["height"]
    x, y = width / 2, height / 2
    corners = [[0, 0, width, height], [0, 0, x, y], [x, 0, width, y], [0, y, x, height]]
    return {
        **record,
        "proposal_boxes": np.array(corners, dtype=np.float32),
        "proposal_objectness_logits": np.zeros(len(corners), dtype=np.float32),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }


def _tensor(cfg: CfgNode) -> torch.Tensor:
    """:data:`PHOTO` as models get images."""
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    return torch.from_numpy(PHOTO[:, :, :channels].transpose(2, 0, 1).astype(np.float32))


def _one_of_each_part(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    parts = set()
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        if part not in parts:
            parts.add(part)
            yield name, parameter


def _error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None
