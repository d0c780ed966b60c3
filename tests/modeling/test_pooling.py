"""Regions are pooled with Detectron2's numbers by our own operator."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

import instseg
from instseg.inference.predictor import Predictor
from instseg.modeling import pooling
from instseg.modeling.pooling import RegionPooler, use_region_poolers
from instseg.training.trainer import Trainer
from tests.inference.test_predictor import tiny_cfg

needs_operators = pytest.mark.skipif(
    not pooling.compiled(), reason="no operators are compiled: torchvision's pool"
)
SCALES = [1 / 4, 1 / 8, 1 / 16]


def maps(scales: list[float]) -> list[Tensor]:
    sides = [int(160 * scale) for scale in scales]
    return [torch.randn(2, 8, side, side + 1, requires_grad=True) for side in sides]


def boxes(count: int) -> list[Boxes]:
    corners = torch.rand(2, count, 2) * 150 - 10
    return [Boxes(torch.cat([x, x + torch.rand(count, 2) ** 2 * 300], dim=1)) for x in corners]


@pytest.mark.parametrize("count", [0, 40])
@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
@pytest.mark.parametrize("scales", [SCALES, SCALES[1:2]])
def test_values_and_gradients_have_the_bits_of_detectron2(
    scales: list[float], kind: str, count: int
) -> None:
    torch.manual_seed(0)
    theirs = ROIPooler((5, 5), scales, 0, kind, canonical_box_size=60, canonical_level=3)
    features, regions = maps(scales), boxes(count)
    results = []
    for pooler in (theirs, RegionPooler.of(theirs)):
        pooled = pooler(features, regions)
        grads = torch.autograd.grad(pooled.square().sum(), features)
        results.append((pooled, *grads))
    assert all(map(torch.equal, *results))
    assert bool(results[0][0].any()) == bool(count)


def test_other_poolers_stay() -> None:
    class OtherPooler(ROIPooler):
        pass

    sizes = (7, [1 / 4], 0)
    model = nn.ModuleDict(
        {"own": OtherPooler(*sizes, "ROIAlign"), "max": ROIPooler(*sizes, "ROIPool")}
    )
    before = dict(model.named_children())
    use_region_poolers(model)
    assert dict(model.named_children()) == before


@pytest.mark.parametrize("compiled", [True, False])
def test_poolers_are_replaced_only_where_operators_are_compiled(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "compiled", lambda: compiled)
    model = nn.ModuleDict({"pooler": ROIPooler(7, [1 / 4], 0, "ROIAlign")})
    use_region_poolers(model)
    assert isinstance(model["pooler"], RegionPooler) == compiled


@needs_operators
@pytest.mark.parametrize(
    "config", ["mask_rcnn/mask_rcnn_shapes.yaml", "mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml"]
)
def test_systems_with_regions_are_trained_with_our_pooler(config: str) -> None:
    model = Trainer.build_model(instseg.load_cfg(config, ["MODEL.DEVICE", "cpu"]))
    poolers = [x for x in model.modules() if isinstance(x, ROIPooler)]
    assert len(poolers) == 2 and all(isinstance(x, RegionPooler) for x in poolers)


@needs_operators
def test_prediction_pools_with_our_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    operator = pooling.roi_align

    def counted(*arguments, **options):
        calls.append(arguments)
        return operator(*arguments, **options)

    monkeypatch.setattr(pooling, "roi_align", counted)
    Predictor(tiny_cfg())(torch.zeros(40, 60, 3, dtype=torch.uint8).numpy())
    assert len(calls) == 2  # boxes and masks
