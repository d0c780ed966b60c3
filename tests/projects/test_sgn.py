"""SGN as a whole: losses, merging, sources of each stage, any image, any number of instances."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from PIL import Image
from torch import Tensor, nn

import instseg
from instseg.config.classes import num_classes_key
from instseg.data.semantic import with_semantic_files
from instseg.data.synthetic import shapes
from instseg.errors import CheckpointError, ConfigError, DatasetError
from instseg.modeling import dense_targets
from instseg.projects.sgn import (
    SGN,
    BreakpointNet,
    MergerNet,
)
from instseg.training.trainer import Trainer
from tests.conftest import close
from tests.support.dense_common import Rectangle, edge_batches, rectangles

SHAPES = "sgn/sgn_shapes.yaml"
NODE = "MODEL.SGN"
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *(f"{NODE}.CHANNELS", "16", f"{NODE}.DETAIL_CHANNELS", "4", f"{NODE}.LINE_CHANNELS", "4"),
]
GROUND_TRUTH = [
    *(f"{NODE}.SEMANTIC", "truth", f"{NODE}.BREAKPOINTS_TEST", "truth"),
    *(f"{NODE}.LINKS_TEST", "truth", f"{NODE}.MERGES_TEST", "truth"),
]


def small(*overrides: Any) -> SGN:
    """A network of the right form that has learnt nothing."""
    return Trainer.build_model(instseg.load_cfg(SHAPES, [*SMALL, *overrides]))


def image(size: tuple[int, int], *objects: Rectangle) -> dict[str, Any]:
    """An input with rectangles as instances."""
    return {"image": torch.randint(0, 256, (3, *size)), "instances": rectangles(size, *objects)}


def test_the_heads_may_learn_faster_than_the_backbone() -> None:
    cfg = instseg.load_cfg(SHAPES, [*SMALL, f"{NODE}.HEAD_LR_FACTOR", 10.0])
    model = build_model(cfg)
    rates = {
        id(p): group["lr"]
        for group in Trainer.build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    base = cfg.SOLVER.BASE_LR
    network: BreakpointNet = model.breakpoints
    assert {rates[id(p)] for p in network.backbone.parameters()} == {base}
    assert {rates[id(p)] for p in network.decoder.parameters()} == {10 * base}
    assert {rates[id(p)] for p in model.lines.parameters()} == {base}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_the_truth_of_all_stages_gives_the_true_instances(direction: str, stride: int) -> None:
    """A bar in front of an instance of its own class, a touching pair, another class."""
    keys = (f"{NODE}.LINES", direction, f"{NODE}.OUTPUT_STRIDE", stride, f"{NODE}.WIDENING", 0)
    model = small(*GROUND_TRUTH, *keys, f"{NODE}.MIN_AREA_TEST", 1).eval()
    item = image(
        (40, 56), (0, 4, 4, 20, 30), (0, 10, 0, 14, 40), (1, 24, 8, 38, 20), (1, 24, 20, 38, 30)
    )
    true_masks = item["instances"].gt_masks.tensor
    true_masks[0] &= ~true_masks[1]
    instances = model([item])[0]["instances"]
    assert len(instances) == 4 and (instances.scores == 1).all()
    for mask, kind in zip(true_masks, item["instances"].gt_classes, strict=True):
        same = (instances.pred_masks == mask).flatten(1).all(dim=1)
        assert same.sum() == 1 and instances.pred_classes[same] == kind


def test_merger_net_sees_the_breakpoints_it_was_trained_on_beside_true_lines() -> None:
    """One and zero, which it has never seen, would have it merge whatever touches."""
    all_crops = []

    class Spy(MergerNet):
        def forward(self, crops: Tensor) -> Tensor:
            all_crops.append(crops[:, -2:])
            return crops.new_full((len(crops),), -9.0)

    model = small(*GROUND_TRUTH, f"{NODE}.MERGES_TEST", "own", f"{NODE}.MIN_AREA_TEST", 1).eval()
    model.merger = Spy()
    objects = [(0, 4, 4, 20, 20), (0, 4, 20, 20, 36)]
    assert len(model([image((40, 56), *objects)])[0]["instances"]) == 2
    inside = all_crops[0][:, :, 24:40, 24:40]
    assert ((inside > 0.01) & (inside < 0.99)).all()


@pytest.mark.parametrize("stage", ["breakpoints", "lines", "merger"])
def test_a_stage_is_trained_by_itself(stage: str) -> None:
    model = small(f"{NODE}.STAGES", [stage]).train()
    networks = {name: getattr(model, name) for name in ("breakpoints", "lines", "merger")}
    losses = model([image((64, 64), (0, 0, 0, 30, 30), (0, 0, 30, 30, 60))] * 2)
    sum(losses.values()).backward()
    for name, network in networks.items():
        selected = name == stage
        assert network.training == selected
        assert all(p.requires_grad == selected for p in network.parameters())
        assert all((p.grad is not None) == selected for p in network.parameters())


@edge_batches
def test_a_step_reaches_every_parameter(batch: list[Any]) -> None:
    model = small().train()
    losses = model([image(*one) for one in batch])
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Constant(nn.Module):
    """A breakpoint network that says the same of every pixel."""

    size_divisibility = 1

    def __init__(self, kind: int, label: int) -> None:
        super().__init__()
        self.semantic = torch.zeros(4, 1, 1)
        self.semantic[kind] = 9.0
        self.labels = torch.zeros(2, 4, 1, 1)
        self.labels[:, label] = 9.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        size = images.shape[-2:]
        return self.semantic.expand(1, 4, *size), self.labels.expand(1, 2, 4, *size)


@pytest.mark.parametrize("label", range(4))
@pytest.mark.parametrize("kind", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (20, 18)])
def test_maps_of_one_label_give_sensible_instances(
    size: tuple[int, int], kind: int, label: int
) -> None:
    """Nothing where there is no foreground; one instance if it has no breakpoint inside."""
    model = small(f"{NODE}.LINKS_TEST", "breakpoints", f"{NODE}.MIN_AREA_TEST", 1).eval()
    model.breakpoints = Constant(kind, label)
    instances = model([{"image": torch.zeros(3, *size)}])[0]["instances"]
    assert instances.pred_masks.shape == (len(instances), *size)
    assert len(instances) == (1 if kind else 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 18)])
def test_images_of_any_size_are_taken(size: tuple[int, int]) -> None:
    model = small(f"{NODE}.MIN_AREA_TEST", 1).eval()
    instances = model([{"image": torch.full((3, *size), 90.0)}])[0]["instances"]
    assert instances.image_size == size and instances.pred_masks.shape == (len(instances), *size)
    assert instances.pred_masks.sum(dim=0).max() <= 1 if len(instances) else True


def test_results_have_the_size_asked_for() -> None:
    model = small(*GROUND_TRUTH).eval()
    item = image((16, 24), (0, 0, 0, 8, 12)) | {"height": 32, "width": 72}
    instances = model([item])[0]["instances"]
    expected = torch.zeros(1, 32, 72, dtype=torch.bool)
    expected[0, :16, :36] = True
    assert torch.equal(instances.pred_masks, expected)
    assert instances.pred_boxes.tensor.tolist() == [[0, 0, 36, 16]]


def test_a_batch_gives_what_images_give_alone() -> None:
    model = small(f"{NODE}.MIN_AREA_TEST", 1).eval()
    items = [{"image": torch.rand(3, *size) * 255} for size in ((40, 70), (96, 33), (64, 64))]
    together = model(items)
    assert sum(len(result["instances"]) for result in together)
    for item, result in zip(items, together, strict=True):
        (alone,) = model([item])
        for field in ("scores", "pred_masks", "pred_classes"):
            assert torch.equal(result["instances"].get(field), alone["instances"].get(field))


def test_only_the_best_instances_are_given() -> None:
    model = small(*GROUND_TRUTH, "TEST.DETECTIONS_PER_IMAGE", 2).eval()
    item = image((40, 40), (0, 0, 0, 10, 10), (1, 20, 0, 30, 10), (2, 20, 20, 30, 30))
    assert len(model([item])[0]["instances"]) == 2


def test_a_class_that_changes_inside_an_instance_splits_it_unless_told_not_to() -> None:
    """A file calls a third of the instance another class."""
    labels = torch.ones(12, 12, dtype=torch.int64)
    labels[:, :4] = 2
    for aware, classes in ((True, [0, 1]), (False, [0])):
        keys = (f"{NODE}.SEMANTIC", "files", f"{NODE}.LINKS_TEST", "breakpoints")
        model = small(*keys, f"{NODE}.CLASS_AWARE", aware, f"{NODE}.MIN_AREA_TEST", 1).eval()
        model.breakpoints = Constant(1, 1)
        result = model([{"image": torch.zeros(3, 12, 12), "sem_seg": labels}])[0]["instances"]
        assert sorted(result.pred_classes.tolist()) == classes
    close(result.scores, np.float32([2 / 3]))


@pytest.mark.parametrize("aware", [False, True])
def test_touching_instances_of_two_classes_are_told_apart(aware: bool) -> None:
    model = small(*GROUND_TRUTH, f"{NODE}.CLASS_AWARE", aware).eval()
    instances = model([image((40, 40), (0, 0, 0, 40, 20), (2, 0, 20, 40, 40))])[0]["instances"]
    assert sorted(instances.pred_classes.tolist()) == [0, 2]


def test_the_semantic_map_may_come_from_a_file() -> None:
    model = small(f"{NODE}.SEMANTIC", "files", f"{NODE}.LINKS_TEST", "breakpoints").eval()
    model.breakpoints = Constant(1, 1)
    labels = torch.zeros(20, 30, dtype=torch.int64)
    labels[:10, :10], labels[10:, 20:] = 3, 255
    result = model([{"image": torch.zeros(3, 20, 30), "sem_seg": labels}])[0]["instances"]
    assert result.pred_classes.tolist() == [2]
    assert torch.equal(result.pred_masks[0], labels == 3)


def test_the_semantic_map_may_be_logits_of_another_size() -> None:
    """Up-scaled twice bilinearly, then the softmax: half way between 0 and 4 lies 1 and 3."""
    model = small(f"{NODE}.SEMANTIC", "files", f"{NODE}.SEMANTIC_TEST", True).eval()
    logits = torch.zeros(4, 1, 2)
    logits[3, 0, 1] = 4
    result = model([{"image": torch.zeros(3, 1, 4), "sem_seg": logits.double()}])[0]["sem_seg"]
    powers = np.exp(np.float32([0, 1, 3, 4]))
    close(result[3, 0], powers / (powers + 3))
    close(result[:3, 0], np.tile(1 / (powers + 3), (3, 1)))


def test_logits_of_the_semantic_map_give_what_their_labels_give() -> None:
    model = small(f"{NODE}.SEMANTIC", "files", f"{NODE}.LINKS_TEST", "breakpoints").eval()
    model.breakpoints = Constant(1, 1)
    labels = torch.zeros(20, 30, dtype=torch.int64)
    labels[:10, :10], labels[12:, 20:] = 3, 1
    logits = nn.functional.one_hot(labels, 4).movedim(-1, 0) * 50.0
    by_label, by_logit = (
        model([{"image": torch.zeros(3, 20, 30), "sem_seg": given}])[0]["instances"]
        for given in (labels, logits)
    )
    assert torch.equal(by_label.pred_masks, by_logit.pred_masks) and len(by_label) == 2
    assert torch.equal(by_label.pred_classes, by_logit.pred_classes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 20, 30), r"shape \(3, 20, 30\) .*expected labels .* logits \(4, H, W\)"),
        (torch.zeros(4, 20, 30, dtype=torch.int64), r"shape \(4, 20, 30\) and type torch.int64"),
        (torch.zeros(20, 30), r"shape \(20, 30\) and type torch.float32"),
        (torch.zeros(1, 4, 20, 30), r"shape \(1, 4, 20, 30\)"),
        (torch.zeros(0, 30, dtype=torch.int64), r"shape \(0, 30\)"),
        (torch.full((4, 20, 30), torch.nan), "logits that are not finite"),
    ],
)
def test_a_semantic_map_of_another_form_is_refused(given: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(f"{NODE}.SEMANTIC", "files").eval()(
            [{"image": torch.zeros(3, 20, 30), "sem_seg": given}]
        )


@pytest.mark.parametrize("given", [torch.zeros(64, 64, dtype=torch.int64), torch.zeros(4, 64, 64)])
def test_training_may_use_a_semantic_map_from_a_file(given: Tensor) -> None:
    model = small(f"{NODE}.SEMANTIC", "files").train()
    item = image((64, 64), (0, 0, 0, 30, 30))
    item["sem_seg"] = given
    assert all(loss.isfinite() for loss in model([item]).values())


def test_the_semantic_probabilities_are_given_on_request() -> None:
    model = small(f"{NODE}.SEMANTIC_TEST", True).eval()
    result = model([{"image": torch.zeros(3, 20, 30), "height": 40, "width": 30}])[0]
    close(result["sem_seg"].sum(dim=0), torch.ones(40, 30))


@pytest.mark.parametrize(
    ("overrides", "item", "message"),
    [
        ((f"{NODE}.SEMANTIC", "files"), {}, "no sem_seg; set INPUT.SEMANTIC_ROOT"),
        (
            (f"{NODE}.SEMANTIC", "files"),
            {"sem_seg": torch.full((20, 30), 4)},
            r"labels from 4 to 4; expected 0 \(background\) to 3",
        ),
        (
            (f"{NODE}.LINKS_TEST", "truth"),
            {},
            "MODEL.SGN.LINKS_TEST: truth needs the annotations",
        ),
    ],
)
def test_inputs_that_lack_what_a_source_needs_are_refused(
    overrides: tuple[str, ...], item: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(*overrides).eval()([{"image": torch.zeros(3, 20, 30), **item}])


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        small().eval()([{"image": torch.full((3, 8, 8), torch.nan)}])


def test_label_files_are_read_with_their_images(tmp_path: Path) -> None:
    """Through the Trainer's loader, with annotations, as for an evaluation with oracles."""
    for name, value in (("a", 90), ("labels/a", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 30), value, np.uint8)).save(tmp_path / f"{name}.png")
    json_file = tmp_path / "set.json"
    json_file.write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],'
        ' "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 36,'
        ' "bbox": [2, 2, 6, 6], "segmentation": [[2, 2, 8, 2, 8, 8, 2, 8]]}],'
        ' "categories": [{"id": 1, "name": "x"}]}'
    )
    name = f"coco:{json_file}:{tmp_path}"
    keys = [*("DATASETS.TEST", f"('{name}',)"), *("INPUT.SEMANTIC_ROOT", str(tmp_path / "labels"))]
    cfg = instseg.load_cfg(SHAPES, [*SMALL, *keys, *("INPUT.TRUTH_TEST", True)])
    cfg.DATALOADER.NUM_WORKERS = 0
    [[item]] = Trainer.build_test_loader(cfg, name)
    assert item["sem_seg"].unique().tolist() == [2]
    assert item["sem_seg"].shape == item["image"].shape[1:]
    assert len(item["instances"]) == 1 and item["height"] == 20
    (tmp_path / "labels/a.png").unlink()
    with pytest.raises(DatasetError, match=r"there is no .*labels/a.png for .*a.png"):
        with_semantic_files(cfg, [{"file_name": "a.png"}])


def test_one_image_is_learnt_by_heart() -> None:
    """Touching shapes of one class come back as they are, by all three networks."""
    torch.manual_seed(0)
    model = small(f"{NODE}.DETAIL_CHANNELS", 8).train()
    objects = shapes.scene("shapes_train", 0, 64)
    pixels = torch.rand(3, 64, 64) * 40
    instances = Instances((64, 64))
    instances.gt_classes = torch.tensor([shape.kind for shape in objects])
    instances.gt_masks = BitMasks(torch.stack([torch.from_numpy(s.mask) for s in objects]))
    for number, mask in enumerate(instances.gt_masks.tensor):
        pixels[:, mask] += 40 * (number % 3 + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        sum(model([{"image": pixels, "instances": instances}]).values()).backward()
        optimizer.step()
    with torch.no_grad():
        detections = model.eval()([{"image": pixels}])[0]["instances"]
    targets = dense_targets([instances], (64, 64), 1, torch.device("cpu"))
    true_masks = torch.stack([targets.owners[0] == i for i in range(len(objects))])
    shared = (true_masks[:, None] & detections.pred_masks).sum(dim=(2, 3))
    union = (true_masks[:, None] | detections.pred_masks).sum(dim=(2, 3))
    best = (shared / union).max(dim=1)
    assert best.values.mean() > 0.8
    assert torch.equal(detections.pred_classes[best.indices], instances.gt_classes)


def test_the_class_count_is_found_by_name() -> None:
    assert num_classes_key(instseg.load_cfg(SHAPES)) == f"{NODE}.NUM_CLASSES"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SEMANTIC", "mine", "SEMANTIC is 'mine'; expected own, truth or files"),
        ("MERGES_TEST", "all", "MERGES_TEST is 'all'; expected own, none or truth"),
        ("LINES", "both", "LINES is 'both'; expected rows or columns"),
        ("STAGES", [], "STAGES is .*; expected some of breakpoints, lines, merger"),
        ("STAGES", ["boxes"], "STAGES is .*'boxes'"),
        ("OUTPUT_STRIDE", 3, "OUTPUT_STRIDE is 3; expected 1, 2, 4 or 8"),
        ("LINE_CHANNELS", 0, "LINE_CHANNELS is 0; expected a whole number of at least 1"),
        ("WIDENING", -1, "WIDENING is -1; expected a whole number of at least 0"),
        ("MERGE_MAX_COMPONENTS", 0, "MERGE_MAX_COMPONENTS is 0; expected a whole"),
        ("MERGE_PAIRS_TRAIN", 1, "MERGE_PAIRS_TRAIN is 1; expected at least 2"),
        ("LINK_THRESH_TEST", 1.5, "LINK_THRESH_TEST is 1.5; expected a probability"),
    ],
)
def test_impossible_keys_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(f"{NODE}.{key}", value)
