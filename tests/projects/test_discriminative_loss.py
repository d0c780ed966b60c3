"""The discriminative loss as a whole; its loss is in ``test_discriminative_losses.py``."""

import math
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import instseg
from instseg.config.classes import num_classes_key
from instseg.data.synthetic import shapes
from instseg.errors import CheckpointError, ConfigError
from instseg.projects.discriminative_loss import (
    BackboneNetwork,
    DiscriminativeLoss,
    ENet,
    Maps,
    MultiBranchENet,
    ReSeg,
    StackedRecurrentHourglass,
    add_positions,
    with_coordinates,
)
from instseg.training.trainer import Trainer
from tests.conftest import close
from tests.support.dense_common import (
    PIXELS,
    Rectangle,
    cluster_settings,
    discriminative_settings,
    edge_batches,
    rectangles,
)

SHAPES = "discriminative_loss/discriminative_loss_shapes.yaml"
NODE = "MODEL.DISCRIMINATIVE_LOSS"
# Narrow enough for a step in tenths of a second.
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3']"),
    *(f"{NODE}.CHANNELS", 32),
    *(f"{NODE}.MIN_PIXELS_TEST", 1),
]


class Perfect(nn.Module):
    """Reads from red the class (0 background) and from green the instance of every pixel."""

    size_divisibility = 4
    min_size = 1

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, images: Tensor) -> Maps:
        sampled = images[:, :, self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]
        semantic = 10 * torch.stack([(sampled[:, 0] == kind).float() for kind in range(3)], dim=1)
        return Maps(semantic, 10 * sampled[:, 1:2].repeat(1, 2, 1, 1), None)


def perfect(stride: int = 1, **settings: Any) -> DiscriminativeLoss:
    return DiscriminativeLoss(
        network=Perfect(stride),
        pixel_mean=[0.0, 0, 0],
        pixel_std=[1.0, 1, 1],
        output_stride=stride,
        **{
            "position_scale": 0.0,
            "loss_settings": discriminative_settings(),
            "weights": {},
            "max_count": 20,
            "cluster_settings": cluster_settings(min_pixels=1),
            "give_semantic": False,
            **settings,
        },
    ).eval()


def image(size: tuple[int, int], *objects: Rectangle) -> dict[str, Any]:
    """An input for :class:`Perfect`, with rectangles as instances."""
    image = torch.zeros(3, *size)
    for number, (kind, y1, x1, y2, x2) in enumerate(objects):
        image[0, y1:y2, x1:x2] = kind + 1
        image[1, y1:y2, x1:x2] = number + 1
    return {"image": image, "instances": rectangles(size, *objects)}


def small(*overrides: Any) -> DiscriminativeLoss:
    torch.manual_seed(0)
    model = Trainer.build_model(instseg.load_cfg(SHAPES, [*SMALL, *overrides]))
    assert isinstance(model, DiscriminativeLoss)
    return model


def masks_by_pixel(instances: Instances) -> set[tuple[int, bytes]]:
    """(class, mask) of every instance, in no order."""
    return {
        (int(kind), mask.numpy().tobytes())
        for kind, mask in zip(instances.pred_classes, instances.pred_masks, strict=True)
    }


def test_perfect_maps_give_the_instances_back() -> None:
    """Two touching of one class, one of another, one in two parts."""
    item = image((12, 16), (0, 0, 0, 6, 5), (0, 0, 5, 6, 9), (1, 6, 0, 12, 9), (0, 0, 12, 3, 16))
    item["image"][1, 8:10, 12:16] = 4
    item["image"][0, 8:10, 12:16] = 1
    item["instances"].gt_masks.tensor[3, 8:10, 12:16] = True
    instances = perfect()([item])[0]["instances"]
    ground_truth = Instances((12, 16))
    ground_truth.pred_classes = item["instances"].gt_classes
    ground_truth.pred_masks = item["instances"].gt_masks.tensor
    assert masks_by_pixel(instances) == masks_by_pixel(ground_truth)
    assert instances.scores.min() > 0.99


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_results_have_the_size_asked_for(stride: int) -> None:
    item = image((16, 24), (0, 0, 0, 8, 12), (1, 8, 12, 16, 24)) | {"height": 32, "width": 72}
    instances = perfect(stride)([item])[0]["instances"]
    assert instances.image_size == (32, 72)
    order = instances.pred_classes.argsort()
    expected = torch.zeros(2, 32, 72, dtype=torch.bool)
    expected[0, :16, :36] = expected[1, 16:, 36:] = True
    assert torch.equal(instances.pred_masks[order], expected)


def test_an_instance_that_vanishes_in_a_smaller_result_is_left_out() -> None:
    item = image((12, 12), (0, 0, 0, 12, 5), (0, 0, 5, 1, 6)) | {"height": 3, "width": 3}
    assert len(perfect()([item])[0]["instances"]) == 1


def test_the_semantic_map_may_be_given() -> None:
    """With the true semantic map, wrong predictions of the network do not matter."""
    item = image((8, 8), (0, 0, 0, 8, 4), (0, 0, 4, 8, 8))
    item["given_semantic"] = torch.ones(8, 8, dtype=torch.int64)
    item["given_semantic"][:4] = 0
    instances = perfect()([item])[0]["instances"]
    assert len(instances) == 2
    assert not instances.pred_masks[:, :4].any() and instances.pred_masks[:, 4:].any(dim=0).all()


def test_the_true_semantic_map_of_a_data_set_is_not_used() -> None:
    """Detectron2's mapper puts it into ``sem_seg`` for testing too."""
    item = image((8, 8), (0, 0, 0, 8, 4)) | {"sem_seg": torch.zeros(8, 8, dtype=torch.int64)}
    assert len(perfect()([item])[0]["instances"]) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((8, 8), 255), "labels from 255 to 255; expected 0 .* and 1 to 2"),
        (torch.full((8, 8), -1), "labels from -1 to -1"),
        (torch.zeros(8, 8), "type torch.float32; expected"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), r"shape \(1, 8, 8\)"),
        (torch.zeros(0, 8, dtype=torch.int64), r"shape \(0, 8\)"),
    ],
)
def test_a_given_map_of_other_labels_is_refused(labels: Tensor, message: str) -> None:
    item = image((8, 8), (0, 0, 0, 8, 4)) | {"given_semantic": labels}
    with pytest.raises(ValueError, match=message):
        perfect()([item])


def test_the_semantic_probabilities_are_given_on_request() -> None:
    item = image((8, 8), (1, 0, 0, 8, 4)) | {"height": 16, "width": 16}
    result = perfect(give_semantic=True)([item])[0]
    assert result["sem_seg"].shape == (3, 16, 16)
    assert result["sem_seg"].argmax(dim=0)[0].tolist() == [2] * 8 + [0] * 8
    assert "sem_seg" not in perfect()([item])[0]


def test_a_batch_gives_what_images_give_alone() -> None:
    model = small().eval()
    items = [{"image": torch.rand(3, *size) * 255} for size in ((40, 70), (96, 33), (64, 64))]
    together = model(items)
    for item, result in zip(items, together, strict=True):
        (alone,) = model([item])
        for field in ("scores", "pred_masks", "pred_classes"):
            assert torch.equal(result["instances"].get(field), alone["instances"].get(field))


@pytest.mark.parametrize("network", ["backbone", "enet", "reseg", "hourglass"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 18)])
def test_images_of_any_size_are_taken(network: str, size: tuple[int, int]) -> None:
    model = small(f"{NODE}.NETWORK", network).eval()
    instances = model([{"image": torch.full((3, *size), 90.0)}])[0]["instances"]
    assert instances.image_size == size
    assert instances.pred_masks.shape == (len(instances), *size)


@edge_batches
def test_a_step_reaches_every_parameter(batch: list[Any]) -> None:
    model = small().train()
    with EventStorage(0):
        losses = model([image(*one) for one in batch])
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_four_hundred_instances_are_found() -> None:
    item = image((64, 64), *PIXELS)
    settings = cluster_settings(min_pixels=1, max_instances=400)
    instances = perfect(cluster_settings=settings)([item])[0]["instances"]
    assert len(instances) == 400
    assert (instances.pred_masks.sum(dim=(1, 2)) == 1).all()


@pytest.mark.parametrize("network", ["backbone", "reseg"])
def test_losses_are_reported_one_by_one(network: str) -> None:
    model = small(f"{NODE}.NETWORK", network, f"{NODE}.DICE_WEIGHT", 0.5).train()
    names = {f"loss_{x}" for x in ("variance", "distance", "regulariser", "semantic", "dice")}
    names |= {"loss_count"} if network == "reseg" else set()
    assert set(model([image((64, 64), (0, 0, 0, 9, 9))] * 2)) == names


def test_positions_move_embeddings_by_columns_and_rows() -> None:
    moved = add_positions(torch.zeros(1, 3, 2, 3), 0.5)
    assert moved[0, 0].tolist() == [[0, 0.5, 1]] * 2
    assert moved[0, 1].tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert not moved[0, 2].any()


def test_positions_are_in_pixels_of_the_image_whatever_the_stride() -> None:
    close(
        *(
            perfect(stride, position_scale=8.0).maps([torch.zeros(3, 8, 8)]).embeddings[0, 0, 0, -1]
            + (7 - last) / 8
            for stride, last in ((1, 7), (4, 4))
        )
    )


def test_coordinates_go_from_minus_one_to_one_with_the_radius() -> None:
    grid = with_coordinates(torch.zeros(1, 1, 3, 5))[0]
    assert grid[0, :, 0].tolist() == [-1, 0, 1]
    assert grid[1, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert (float(grid[2, 0, 0]), float(grid[2, 1, 2])) == (1, 0)
    assert len(grid) == 4


def test_new_weights_for_coordinates_change_nothing_at_first() -> None:
    torch.manual_seed(0)
    plain = ReSeg(1, 4, coordinates=False)
    torch.manual_seed(0)
    seeing = ReSeg(1, 4, coordinates=True)
    x = torch.randn(1, 3, 16, 16)
    for name, features in plain.vgg(x).items():
        close(seeing.vgg(x)[name], features.detach())


def test_the_recurrent_networks_train_on_current_torch() -> None:
    """The public code's hourglass fails in its backward pass."""
    network = StackedRecurrentHourglass(1, 4, coordinates=False)
    maps = network(torch.randn(1, 3, 16, 16))
    assert maps.counts is not None
    (maps.semantic.sum() + maps.embeddings.sum() + maps.counts.sum()).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_enet_has_a_branch_for_each_output() -> None:
    """Twenty classes, eight dimensions and depth, as in arXiv 1708.02550."""
    network = MultiBranchENet((20, 8, 1), "BN").eval()
    outputs = network(torch.randn(1, 3, 32, 48))
    assert [tuple(x.shape) for x in outputs] == [(1, n, 32, 48) for n in (20, 8, 1)]


def test_enet_shares_what_comes_before_its_third_section() -> None:
    network = ENet(7, 8, norm="BN")
    shared = [name for name, _ in network.net.named_children() if name != "branches"]
    assert shared == ["initial", "down1", "section1", "down2", "section2"]
    maps = network.eval()(torch.randn(1, 3, 16, 16))
    maps.embeddings.sum().backward()
    assert all(p.grad is None for p in network.net.branches[0].parameters())
    assert all(p.grad is not None for p in network.net.section2.parameters())


def test_enet_works_without_normalisation() -> None:
    network = ENet(7, 8, norm="")
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    assert network(torch.randn(1, 3, 16, 16)).embeddings.shape == (1, 8, 16, 16)


class OneLevel(Backbone):
    """A map of stride 8 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"only": self.conv(x)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"only": ShapeSpec(channels=6, stride=8)}


@pytest.mark.parametrize(("details", "stride"), [(0, 8), (4, 2)])
def test_a_backbone_with_one_level_is_enough(details: int, stride: int) -> None:
    network = BackboneNetwork(
        backbone=OneLevel(),
        num_classes=2,
        embedding_dim=5,
        channels=8,
        detail_channels=details,
        norm="",
        in_channels=3,
    )
    assert network.size_divisibility == 8
    maps = network(torch.randn(1, 3, 16, 24))
    assert maps.semantic.shape == (1, 3, 16 // stride, 24 // stride)
    assert maps.embeddings.shape == (1, 5, 16 // stride, 24 // stride)


def test_one_image_is_learnt_by_heart() -> None:
    """Touching shapes of one class come back as they are."""
    torch.manual_seed(0)
    cfg = instseg.load_cfg(SHAPES, SMALL)
    model = build_model(cfg).train()
    objects = shapes.scene("shapes_train", 0, 64)
    pixels = torch.rand(3, 64, 64) * 40
    instances = Instances((64, 64))
    instances.gt_classes = torch.tensor([shape.kind for shape in objects])
    instances.gt_masks = BitMasks(torch.stack([torch.from_numpy(s.mask) for s in objects]))
    for number, mask in enumerate(instances.gt_masks.tensor):
        pixels[:, mask] += 40 * (number % 3 + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    items = [{"image": pixels, "instances": instances}] * 2
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(items).values()).backward()
        optimizer.step()
    with torch.no_grad():
        detections = model.eval()([{"image": pixels}])[0]["instances"]
    true_masks = instances.gt_masks.tensor
    shared = (true_masks[:, None] & detections.pred_masks).sum(dim=(2, 3))
    union = (true_masks[:, None] | detections.pred_masks).sum(dim=(2, 3))
    best = (shared / union).max(dim=1)
    assert best.values.min() > 0.7
    assert torch.equal(detections.pred_classes[best.indices], instances.gt_classes)


def test_values_that_are_not_finite_are_an_error() -> None:
    model = perfect()
    with pytest.raises(CheckpointError, match="not finite"):
        model([{"image": torch.full((3, 8, 8), torch.nan)}])
    counting = small(f"{NODE}.NETWORK", "hourglass").eval()
    torch.nn.init.constant_(counting.network.counter.linear.bias, torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        counting([{"image": torch.zeros(3, 8, 8)}])


def test_k_means_takes_the_number_that_an_input_gives() -> None:
    model = perfect(cluster_settings=cluster_settings(method="k_means", min_pixels=1))
    item = image((8, 8), (0, 0, 0, 8, 3), (0, 0, 3, 8, 8))
    assert len(model([item | {"num_instances": 2}])[0]["instances"]) == 2
    with pytest.raises(ConfigError, match="give it as num_instances"):
        model([item])


def test_the_class_count_is_found_by_name() -> None:
    assert num_classes_key(instseg.load_cfg(SHAPES)) == f"{NODE}.NUM_CLASSES"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NETWORK", "unet", "NETWORK is 'unet'; expected backbone, enet, reseg or hourglass"),
        ("OUTPUT_STRIDE", 3, "OUTPUT_STRIDE is 3; expected 1, 2, 4 or 8"),
        ("EMBEDDING_DIM", 1, "EMBEDDING_DIM is 1"),
        ("POSITION_SCALE", -1.0, "POSITION_SCALE is -1.0"),
        ("CLUSTERING", "dbscan", "CLUSTERING is 'dbscan'; expected mean_shift or k_means"),
        ("BANDWIDTH_TEST", -1.0, "BANDWIDTH_TEST is -1.0"),
        ("BANDWIDTH_TEST", math.nan, "BANDWIDTH_TEST is nan"),
        ("MIN_PIXELS_TEST", 0, "MIN_PIXELS_TEST is 0"),
        ("NORM_TYPE", "L3", "NORM_TYPE is 'L3'; expected L1 or L2"),
        ("VARIANCE_MEAN", "mean", "VARIANCE_MEAN is 'mean'; expected instance or pixel"),
        ("DELTA_VAR", -1.0, "DELTA_VAR is -1.0"),
        ("DELTA_DIST", 0.0, "DELTA_DIST is 0.0; expected a number above 0"),
    ],
)
def test_impossible_keys_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(f"{NODE}.{key}", value)
