"""Average recall against numbers worked out by hand and against pycocotools' own."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import instseg
from instseg.data.dataset import load
from instseg.errors import ConfigError, DatasetError
from instseg.evaluation import build_evaluator
from instseg.evaluation.proposals import ProposalEvaluator, area_under

SIZE = 160
SMALL, MEDIUM, LARGE = (0, 0, 20, 20), (40, 0, 90, 50), (20, 55, 140, 155)
"""Corners x1, y1, x2, y2 of squares of 20², 50² and of 120 × 100 pixels."""


def annotation(
    corners: tuple[int, int, int, int], *, category: int = 1, image: int = 1, crowd: bool = False
) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    rle = mask_util.encode(mask)
    return {
        "image_id": image,
        "category_id": category,
        "iscrowd": int(crowd),
        "area": (x2 - x1) * (y2 - y1),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode()},
    }


def write(folder: Path, annotations: list[dict[str, Any]], num_images: int = 1) -> str:
    """A data set of two classes; ids count from 0, which COCOeval itself cannot stand."""
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE}
            for i in range(1, num_images + 1)
        ],
        "annotations": [{**item, "id": i} for i, item in enumerate(annotations)],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return f"coco:{folder}/instances.json"


def evaluator_for(name: str, folder: Path, *overrides: Any) -> Any:
    keys = [
        "DATASETS.TEST",
        f"('{name}',)",
        "OUTPUT_DIR",
        str(folder),
        "TEST.METRICS",
        ("proposals",),
    ]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", [*keys, *overrides])
    return build_evaluator(cfg, load(name))


def proposals(
    *corners: tuple[int, int, int, int], boxes: list[tuple[int, ...]] | None = None
) -> dict[str, Instances]:
    """Rectangles, best first; the first are the worst in memory, so that order must be looked up.

    Args:
        boxes: in place of those around the masks.
    """
    masks = torch.zeros(len(corners), SIZE, SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, corners, strict=True):
        mask[y1:y2, x1:x2] = True
    tensor = torch.tensor(boxes or list(corners), dtype=torch.float32).reshape(-1, 4)
    return {
        "instances": Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(tensor.flip(0)),
            scores=torch.linspace(0.1, 0.9, len(corners)),
            pred_classes=torch.zeros(len(corners), dtype=torch.int64),
            pred_masks=masks.flip(0),
        )
    }


def evaluate(evaluator: Any, *outputs: dict[str, Instances]) -> dict[str, dict[str, float]]:
    evaluator.reset()
    for image_id, output in enumerate(outputs, start=1):
        evaluator.process([{"image_id": image_id}], [output])
    results: dict[str, dict[str, float]] = evaluator.evaluate()
    return results


def test_exact_proposals_have_full_recall(tmp_path: Path) -> None:
    name = write(tmp_path, [annotation(SMALL), annotation(MEDIUM, category=2), annotation(LARGE)])
    results = evaluate(evaluator_for(name, tmp_path), proposals(SMALL, MEDIUM, LARGE))
    assert list(results) == ["proposals_box", "proposals_segm"]
    for numbers in results.values():
        recalls = {key: value for key, value in numbers.items() if key.startswith("AR")}
        assert recalls == {
            f"AR{a}@{n}": 100 for a in ("", "s", "m", "l", "75") for n in (10, 100, 1000)
        }


def test_recall_is_averaged_over_ten_thresholds(tmp_path: Path) -> None:
    """Half of the instances is found, with IoU 0.72: at 0.5, 0.55, 0.6, 0.65, 0.7."""
    name = write(tmp_path, [annotation(MEDIUM), annotation(LARGE)])
    results = evaluate(evaluator_for(name, tmp_path), proposals((40, 0, 90, 36)))
    assert results["proposals_segm"]["AR@10"] == pytest.approx(25)
    assert results["proposals_box"]["AR@10"] == pytest.approx(25)


def test_strict_recall_is_averaged_over_the_thresholds_from_three_quarters(tmp_path: Path) -> None:
    """One of two has IoU 0.86, enough at 0.75, 0.8 and 0.85 of five; the other 0.72, at none."""
    name = write(tmp_path, [annotation(MEDIUM), annotation(LARGE)])
    predicted = proposals((40, 0, 90, 43), (20, 55, 140, 127))
    numbers = evaluate(evaluator_for(name, tmp_path), predicted)["proposals_segm"]
    assert numbers["AR75@10"] == pytest.approx(100 * 3 / 5 / 2)
    assert numbers["AR@10"] == pytest.approx(100 * (8 + 5) / 10 / 2)


def test_instances_are_counted_by_area(tmp_path: Path) -> None:
    name = write(tmp_path, [annotation(SMALL), annotation(MEDIUM)])
    numbers = evaluate(evaluator_for(name, tmp_path), proposals(MEDIUM))["proposals_segm"]
    assert [numbers[f"AR{area}@100"] for area in ("", "s", "m")] == [50, 0, 100]
    assert math.isnan(numbers["ARl@100"]) and math.isnan(numbers["AUCl"])


def test_only_the_best_n_proposals_count(tmp_path: Path) -> None:
    """The two instances are found at the ranks 11 and 101, behind proposals beside any instance."""
    name = write(tmp_path, [annotation(SMALL), annotation(MEDIUM)])
    beside = (150, 150, 155, 155)
    output = proposals(*[beside] * 10, SMALL, *[beside] * 89, MEDIUM)
    for numbers in evaluate(evaluator_for(name, tmp_path), output).values():
        assert [numbers[f"AR@{n}"] for n in (10, 100, 1000)] == [0, 50, 100]


def test_more_than_a_thousand_proposals_are_cut(tmp_path: Path) -> None:
    name = write(tmp_path, [annotation(SMALL)])
    output = proposals(*[(150, 150, 155, 155)] * 1000, SMALL)
    assert evaluate(evaluator_for(name, tmp_path), output)["proposals_segm"]["AR@1000"] == 0


def test_auc_is_the_area_over_the_logarithm_of_the_number(tmp_path: Path) -> None:
    """Nothing up to rank 9, everything from 10: 2/3 and the half of the last step below."""
    name = write(tmp_path, [annotation(SMALL)])
    output = proposals(*[(150, 150, 155, 155)] * 9, SMALL)
    expected = 100 * (2 + (1 - math.log10(9)) / 2) / 3
    numbers = evaluate(evaluator_for(name, tmp_path), output)["proposals_segm"]
    assert numbers["AUC"] == pytest.approx(expected)
    assert numbers["AUCs"] == pytest.approx(expected)


def test_the_area_under_a_constant_is_the_constant() -> None:
    assert area_under(np.full(1000, 37.0)) == pytest.approx(37)


def test_classes_are_not_told_apart(tmp_path: Path) -> None:
    """All proposals have the class 0, the second instance has another one."""
    name = write(tmp_path, [annotation(SMALL, category=1), annotation(MEDIUM, category=2)])
    results = evaluate(evaluator_for(name, tmp_path), proposals(SMALL, MEDIUM))
    assert results["proposals_segm"]["AR@10"] == 100


def test_a_crowd_is_no_instance_to_find(tmp_path: Path) -> None:
    name = write(tmp_path, [annotation(SMALL), annotation(LARGE, crowd=True)])
    results = evaluate(evaluator_for(name, tmp_path), proposals(SMALL, LARGE))
    assert results["proposals_segm"]["AR@10"] == 100
    results = evaluate(evaluator_for(name, tmp_path), proposals(LARGE))
    assert results["proposals_segm"]["AR@10"] == 0


def test_boxes_and_masks_are_judged_apart(tmp_path: Path) -> None:
    name = write(tmp_path, [annotation(SMALL)])
    results = evaluate(evaluator_for(name, tmp_path), proposals(SMALL, boxes=[LARGE]))
    assert results["proposals_segm"]["AR@10"] == 100
    assert results["proposals_box"]["AR@10"] == 0


def test_images_without_proposals_or_instances_count_as_they_should(tmp_path: Path) -> None:
    annotations = [annotation(SMALL, image=1), annotation(SMALL, image=2)]
    name = write(tmp_path, annotations, num_images=4)
    outputs = proposals(SMALL), proposals(), proposals(LARGE), proposals()
    results = evaluate(evaluator_for(name, tmp_path), *outputs)
    assert results["proposals_segm"]["AR@10"] == 50


def test_nothing_to_find_gives_nan(tmp_path: Path) -> None:
    results = evaluate(evaluator_for(write(tmp_path, []), tmp_path), proposals(SMALL))
    assert all(math.isnan(value) for numbers in results.values() for value in numbers.values())


def random_corners(rng: np.random.Generator) -> tuple[int, int, int, int]:
    x, y = rng.integers(0, 60, 2)
    width, height = rng.integers(10, 100, 2)
    return int(x), int(y), int(x + width), int(y + height)


def test_recall_equals_pycocotools_own_summary(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    annotations = [
        annotation(random_corners(rng), image=image, category=int(rng.integers(1, 3)), crowd=i == 4)
        for image in (1, 2, 3)
        for i in range(6)
    ]
    corners = [[random_corners(rng) for _ in range(150)] for _ in range(3)]
    name = write(tmp_path, annotations, num_images=3)
    results = evaluate(evaluator_for(name, tmp_path), *(proposals(*group) for group in corners))
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"] = [{**a, "id": a["id"] + 1} for a in content["annotations"]]
    detections = [
        {**annotation(box, image=image), "score": 1 - rank / 1000}
        for image, group in enumerate(corners, start=1)
        for rank, box in enumerate(group)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        for task, iou_type in (("proposals_segm", "segm"), ("proposals_box", "bbox")):
            official = COCOeval(coco, coco.loadRes(detections), iou_type)
            official.params.useCats = 0
            official.params.maxDets = [10, 100, 1000]
            official.evaluate()
            official.accumulate()
            recall = 100 * official.eval["recall"].mean(axis=0)[0]
            for row, area in zip(recall, ("", "s", "m", "l"), strict=True):
                if row[0] >= 0:  # -1: no instances of that size
                    recalls = [results[task][f"AR{area}@{n}"] for n in (10, 100, 1000)]
                    assert recalls == pytest.approx(row)


def test_counts_of_all_processes_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = [annotation(SMALL, image=1), annotation(SMALL, image=2)]
    name = write(tmp_path, annotations, num_images=2)
    first, second = (evaluator_for(name, tmp_path) for _ in range(2))
    first.process([{"image_id": 1}], [proposals(SMALL)])
    second.process([{"image_id": 2}], [proposals(LARGE)])
    monkeypatch.setattr(comm, "gather", lambda data, dst: [data, second._counts])
    assert first.evaluate()["proposals_segm"]["AR@100"] == 50
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert first.evaluate() is None


def test_instances_without_a_mask_are_refused(tmp_path: Path) -> None:
    name = write(tmp_path, [{**annotation(SMALL), "segmentation": []}])
    with pytest.raises(DatasetError, match=r"1 of 1 images have instances without.*1\.png"):
        evaluator_for(name, tmp_path)


def test_proposals_replace_the_precision_of_classes(tmp_path: Path) -> None:
    name = write(tmp_path, [annotation(SMALL)])
    assert isinstance(evaluator_for(name, tmp_path), ProposalEvaluator)
    for other in ("voc", "coco"):
        message = f"has proposals, .* and {other}, .*; leave one of them out"
        with pytest.raises(ConfigError, match=message):
            evaluator_for(name, tmp_path, "TEST.METRICS", ("proposals", other))
