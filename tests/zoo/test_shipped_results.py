"""Every shipped model still gives its numbers on the first images of its test set."""

from dataclasses import replace
from pathlib import Path

import pytest

from instseg import shipped
from instseg.benchmark.shipped import KEPT, check_shipped
from instseg.data.synthetic import shapes
from instseg.shipped import ShippedModel, shipped_models
from tests.support import tiny_zoo

TOLERANCE = 1.0
"""Per cent: processors round differently, which moves single instances over a threshold."""


def differences(model: ShippedModel) -> list[str]:
    """What a model gives now against what its entry says; only numbers that differ."""
    measured = check_shipped(model.address, model.check_images)
    assert model.check, "there is nothing to compare"
    return [
        f"{name} is {measured.get(name)}, expected {value}"
        for name, value in model.check.items()
        if name not in measured or abs(measured[name] - value) > TOLERANCE
    ]


@pytest.mark.timeout(900)  # image pyramids of proposal systems, on a slow processor
@pytest.mark.parametrize("model", shipped_models(), ids=lambda model: model.name)
def test_a_shipped_model_gives_its_numbers(
    model: ShippedModel, request: pytest.FixtureRequest
) -> None:
    if model.data.startswith("nuclei"):
        request.getfixturevalue("data_root")
    assert differences(model) == []


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ShippedModel:
    """A shipped model, which is random, with four images to test on."""
    json_file = shapes.export("shapes_val", tmp_path / "data", limit=4)
    test_set = f"('coco:{json_file}:{tmp_path / 'data' / 'shapes_val'}',)"
    model = tiny_zoo.make(
        tmp_path / "zoo", overrides=(*tiny_zoo.OVERRIDES, "DATASETS.TEST", test_set)
    )
    tiny_zoo.ship(monkeypatch, tmp_path / "zoo")
    return model


def test_a_change_of_the_numbers_is_seen(tiny: ShippedModel) -> None:
    measured = check_shipped(tiny.address, 3)
    assert measured["ms"] > 0
    assert measured.keys() - {"ms"} <= set(KEPT)
    assert 0 <= measured["segm/AP"] < 20  # it is random
    same = replace(tiny, check={"segm/AP": measured["segm/AP"]}, check_images=3)
    assert differences(same) == []
    other = replace(same, check={"segm/AP": 50.0, "contest/AP": 1.0})
    assert differences(other) == [
        f"segm/AP is {measured['segm/AP']}, expected 50.0",
        "contest/AP is None, expected 1.0",
    ]
    with pytest.raises(AssertionError, match="nothing to compare"):
        differences(replace(same, check={}))


def test_only_the_first_images_count(tiny: ShippedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def build(cfg: object, dataset: object) -> object:
        sizes.append((len(dataset.records), len(dataset.coco.imgs)))  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr("instseg.benchmark.shipped.build_evaluator", build)
    with pytest.raises(KeyboardInterrupt):
        check_shipped(tiny.address, 2)
    assert sizes == [(2, 2)]
    assert len(shipped_models(shipped.zoo_folder())) == 1
