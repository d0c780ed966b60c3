"""TEST.COCO_EVAL fast gives the numbers of pycocotools to six digits."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

import instseg
from instseg import optional
from instseg.data.dataset import load
from instseg.errors import ConfigError
from instseg.evaluation import build_evaluator, check_evaluation
from instseg.masks import coco_annotation_of

SIZE = 64
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None,
    reason="needs faster-coco-eval (pip install 'instseg[fast-eval]')",
)


def random_mask(generator: np.random.Generator) -> np.ndarray:
    x, y = generator.integers(0, SIZE - 8, 2)
    width, height = generator.integers(2, 50, 2)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def written(folder: Path, generator: np.random.Generator) -> str:
    """A data set of 12 images and three classes: some images without instances, some crowds.

    One class has no instance; ids are neither in order nor without gaps.
    """
    ids = generator.permutation(np.arange(100, 112)).tolist()
    annotations: list[dict[str, Any]] = []
    for image_id in ids[2:]:
        for _ in range(generator.integers(1, 9)):
            entry = coco_annotation_of(random_mask(generator), int(generator.choice([9, 4])))
            entry |= {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**entry, "iscrowd": int(generator.random() < 0.1)})
    content = {
        "images": [
            {"id": image_id, "file_name": f"{image_id}.png", "height": SIZE, "width": SIZE}
            for image_id in ids
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in (9, 4, 7)],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    name = f"coco:{folder}/instances.json"
    configuration(name, folder)  # registers it
    return name


def outputs(dataset: str, generator: np.random.Generator, scored: bool) -> list[tuple[Any, Any]]:
    """Inputs and outputs of the evaluator: instances moved a little, and others; equal scores."""
    pairs = []
    for record in load(dataset).records:
        masks = [random_mask(generator) for _ in range(generator.integers(0, 8))]
        classes = generator.integers(0, 3, len(masks)).tolist()
        for entry in record["annotations"]:
            mask = instseg.masks.decode(entry["segmentation"], SIZE, SIZE)
            masks.append(np.roll(mask, generator.integers(-1, 2, 2), (0, 1)))
            classes.append(entry["category_id"])
        count = len(masks)
        pixels = torch.from_numpy(np.array(masks).reshape(-1, SIZE, SIZE))
        fields = {"mask_scores": torch.rand(count)} if scored else {}
        instances = Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(boxes_of(pixels)),
            scores=torch.from_numpy(generator.integers(1, 10, count) / 10),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
            pred_masks=pixels,
            **fields,
        )
        pairs.append(({"image_id": record["image_id"]}, {"instances": instances}))
    return pairs


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    corners = []
    for mask in masks:
        y, x = mask.nonzero().unbind(dim=1)
        corners.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def configuration(dataset: str, folder: Path, *overrides: Any) -> Any:
    words = ["DATASETS.TEST", (dataset,), "OUTPUT_DIR", str(folder), *overrides]
    return instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)


def evaluate(
    kind: str, dataset: str, folder: Path, pairs: list[tuple[Any, Any]], *overrides: Any
) -> dict[str, dict[str, float]]:
    cfg = configuration(dataset, folder / kind, "TEST.COCO_EVAL", kind, *overrides)
    evaluator = build_evaluator(cfg, load(dataset))
    evaluator.reset()
    for image, output in pairs:
        evaluator.process([image], [output])
    return evaluator.evaluate()


@needs_package
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scored", [False, True])
def test_all_numbers_and_files_are_those_of_pycocotools(
    seed: int, scored: bool, tmp_path: Path
) -> None:
    generator = np.random.default_rng(seed)
    dataset = written(tmp_path, generator)
    torch.manual_seed(seed)
    pairs = outputs(dataset, generator, scored)
    before = copy.deepcopy(load(dataset).coco.dataset)
    limit = ["TEST.DETECTIONS_PER_IMAGE", 300] if seed % 2 else []
    standard = evaluate("standard", dataset, tmp_path, pairs, *limit)
    fast = evaluate("fast", dataset, tmp_path, pairs, *limit)
    assert list(fast) == list(standard) == ["bbox", "segm"]
    for task, expected in standard.items():
        assert list(fast[task]) == list(expected)
        assert 5 < expected["AP"] < 95
        assert fast[task] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    files = [tmp_path / kind for kind in ("standard", "fast")]
    one, other = (next(path.rglob("coco_instances_results.json")).read_text() for path in files)
    assert one == other
    assert load(dataset).coco.dataset == before


@needs_package
def test_nothing_found_is_nan_as_with_pycocotools(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dataset = written(tmp_path, generator)
    pairs = [
        (image, {"instances": output["instances"][:0]})
        for image, output in outputs(dataset, generator, scored=False)
    ]
    standard = evaluate("standard", dataset, tmp_path, pairs)
    fast = evaluate("fast", dataset, tmp_path, pairs)
    assert str(fast) == str(standard) and "nan" in str(fast)


@pytest.mark.parametrize("kind", ["standard", pytest.param("fast", marks=needs_package)])
@pytest.mark.parametrize("number", [3, 4, 9])
def test_a_class_that_the_data_set_does_not_have_is_refused(
    kind: str, number: int, tmp_path: Path
) -> None:
    """Also where its number is the id of another class (4, 9)."""
    generator = np.random.default_rng(0)
    dataset = written(tmp_path, generator)
    pairs = outputs(dataset, generator, scored=False)
    pairs[-1][1]["instances"].pred_classes[0] = number
    message = rf"has the class number {number}; expected less than 3, the number of classes of coco"
    with pytest.raises(ConfigError, match=message):
        evaluate(kind, dataset, tmp_path, pairs)


def test_an_unknown_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TEST.COCO_EVAL is 'faster'; expected standard or fast"):
        configuration("shapes_val", tmp_path, "TEST.COCO_EVAL", "faster")
    with pytest.raises(ConfigError, match="'fast'; expected standard, as MODEL.KEYPOINT_ON"):
        configuration("shapes_val", tmp_path, "TEST.COCO_EVAL", "fast", "MODEL.KEYPOINT_ON", True)


def test_a_missing_package_is_named_before_a_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    dataset = written(tmp_path, np.random.default_rng(0))
    cfg = configuration(dataset, tmp_path, "TEST.COCO_EVAL", "fast")
    message = r"TEST.COCO_EVAL fast needs the package .*pip install 'instseg\[fast-eval\]'"
    with pytest.raises(ConfigError, match=message):
        build_evaluator(cfg, load(dataset))
    cfg = configuration("shapes_val", tmp_path, "TEST.COCO_EVAL", "fast")
    with pytest.raises(ConfigError, match=message):
        check_evaluation(cfg, nn.Module(), [load("shapes_val")])
