"""The declarations of models about themselves, and models without them."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import nn

import instseg
from instseg.config.classes import num_classes_key
from instseg.errors import ConfigError
from instseg.modeling.contract import architectures, as_split, lr_multipliers, padded_shape
from instseg.testing import assert_valid


class Silent(nn.Module):
    """An architecture of somebody else that declares nothing."""


class Heir(GeneralizedRCNN):
    """One that descends from Detectron2's."""


class WithKey(GeneralizedRCNN):
    """One with a key of its own."""

    num_classes_key = "MODEL.OWN.NUM_CLASSES"


class Heirs(WithKey):
    """One that inherits it."""


def silent_function(cfg: object) -> None:
    """Anything that can be called may be registered."""


def key_of(kind: object, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Tested", kind)
    cfg = instseg.get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Tested"
    return num_classes_key(cfg)


@pytest.mark.parametrize("kind", [Silent, silent_function])
def test_an_architecture_that_says_nothing_of_its_classes_is_told_what_to_declare(
    kind: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="MODEL.META_ARCHITECTURE Tested .* num_classes_key"):
        key_of(kind, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (Heir, "MODEL.ROI_HEADS.NUM_CLASSES"),
        (WithKey, "MODEL.OWN.NUM_CLASSES"),
        (Heirs, "MODEL.OWN.NUM_CLASSES"),
    ],
)
def test_the_nearest_ancestor_says_which_key_has_the_number_of_classes(
    kind: object, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert key_of(kind, monkeypatch) == key


def test_every_registered_architecture_says_which_key_has_its_number_of_classes() -> None:
    for name in architectures(lambda kind: issubclass(kind, nn.Module)):
        cfg = instseg.get_cfg()
        cfg.MODEL.META_ARCHITECTURE = name
        if name in META_ARCH_REGISTRY and (key := num_classes_key(cfg)) is not None:
            node = cfg
            for part in key.split("."):
                node = node[part]
            assert isinstance(node, int)


def test_a_message_names_the_architectures_that_can_do_it() -> None:
    instseg.get_cfg()
    with pytest.raises(ConfigError, match="Silent cannot be exported: .*YOLACT, .* can$"):
        as_split(Silent(), "exported")


def test_rates_are_declared_below_any_parent() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fast = nn.Linear(1, 1)

        def lr_multipliers(self) -> dict[str, float]:
            return {"fast": 3.0}

    assert lr_multipliers(nn.ModuleDict({"head": Head()})) == [("head.fast", 3.0)]
    assert lr_multipliers(Head()) == [("fast", 3.0)]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_results_are_in_descending_order_of_their_scores(order: list[int]) -> None:
    fields = {"scores": torch.tensor([0.9, 0.1]), "pred_classes": torch.zeros(2, dtype=torch.long)}
    masks = torch.ones(2, 3, 4, dtype=torch.bool)
    boxes = Boxes(torch.tensor([[0.0, 0.0, 4.0, 3.0]] * 2))
    instances = Instances((3, 4), pred_boxes=boxes, pred_masks=masks, **fields)[order]
    if order == [0, 1]:
        assert_valid(instances, 3, 4, max_instances=2)
        return
    with pytest.raises(AssertionError, match="not in descending order"):
        assert_valid(instances, 3, 4, max_instances=2)


def test_a_model_without_a_backbone_is_taken_to_pad_as_it_likes() -> None:
    model = Silent()
    assert padded_shape(model, 5, 7) == (5, 7)
    model.backbone = nn.Identity()
    assert padded_shape(model, 5, 7) == (5, 7)
    model.backbone.size_divisibility = 4  # type: ignore[assignment]
    assert padded_shape(model, 5, 7) == (8, 8)
    model.backbone.padding_constraints = {"square_size": 10}  # type: ignore[assignment]
    assert padded_shape(model, 5, 7) == (12, 12)
