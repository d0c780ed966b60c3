"""``instseg evaluate``: equal to pycocotools, its own numbers by hand, its files, bad input."""

import contextlib
import csv
import io
import json
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instseg import cli
from instseg.evaluation.results import (
    Record,
    confusion,
    crowding,
    evaluate_task,
    within_limit,
)
from instseg.masks import as_text, encode, rle_box
from instseg.reports import plots
from instseg.reports.evaluate import EvaluateOptions, evaluate
from instseg.reports.worst import OUTCOMES
from tests.support.coco_data import HEIGHT, WIDTH, content, write_set
from tests.support.predict_common import assert_refused

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")


def noisy(coco: COCO) -> list[Record]:
    """Instances that are shifted, left out, doubled or of another class; also false alarms."""
    rng = np.random.default_rng(0)
    categories = sorted(coco.cats)
    results = []
    for annotation in coco.anns.values():
        if annotation["iscrowd"] or rng.random() < 0.2:
            continue
        mask = coco.annToMask(annotation) > 0
        for _ in range(1 + (rng.random() < 0.1)):
            shift = rng.integers(-3, 4, 2)
            if rng.random() < 0.1:
                shift = shift * 20
            rle = encode(np.roll(mask, tuple(shift), (0, 1)))
            category = annotation["category_id"]
            if rng.random() < 0.15:
                category = int(rng.choice(categories))
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category,
                    "bbox": rle_box(rle),
                    "segmentation": as_text(rle),
                    "score": round(float(rng.random()), 2),  # some are equal
                }
            )
    return [results[index] for index in rng.permutation(len(results))]


@pytest.mark.parametrize("folder", ["coco_mini", "nuclei"])
def test_every_number_is_that_of_pycocotools(data_root: Path, tmp_path: Path, folder: str) -> None:
    json_file = data_root / folder / "instances_val.json"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(json_file))
    results = noisy(coco)
    (tmp_path / "found.json").write_text(json.dumps(results))
    name = f"coco:{json_file}:{data_root / folder / 'images'}"
    evaluate(EvaluateOptions(tmp_path / "found.json", name, output=tmp_path / "out", worst=0))
    tasks = json.loads((tmp_path / "out/metrics.json").read_text())["tasks"]
    assert set(tasks) == {"bbox", "segm"}
    for task, numbers in tasks.items():
        key = "bbox" if task == "bbox" else "segmentation"
        fields = ("image_id", "category_id", "score", key)
        bare = [{field: result[field] for field in fields} for result in results]
        with contextlib.redirect_stdout(io.StringIO()):
            official = COCOeval(coco, coco.loadRes(bare), task)
            official.evaluate()
            official.accumulate()
            official.summarize()
        (overall,) = numbers["overall"]
        # AP, AP50, AP75, by size; AR of 100 detections, by size.
        for index, column in zip((0, 1, 2, 3, 4, 5, 8, 9, 10, 11), list(overall)[2:], strict=True):
            assert_equal(overall[column], official.stats[index])
        for row, area in zip(numbers["by_size"], (1, 2, 3), strict=True):
            assert_equal(row["AP50"], mean(official.eval["precision"][0, :, :, area, 2]))
            assert_equal(row["AR"], mean(official.eval["recall"][:, :, area, 2]))
        rows = {row["class"]: row for row in numbers["by_class"]}
        assert len(rows) >= (70 if folder == "coco_mini" else 1)
        precision, recall = official.eval["precision"][..., 2], official.eval["recall"][..., 2]
        for number, category in enumerate(official.params.catIds):
            row = rows.get(coco.cats[category]["name"])
            if row is None:  # neither instances nor detections
                assert precision[:, :, number].max() == -1
                continue
            assert_equal(row["AP"], mean(precision[:, :, number, 0]))
            assert_equal(row["AP50"], mean(precision[0, :, number, 0]))
            assert_equal(row["AP75"], mean(precision[5, :, number, 0]))
            for area, column in enumerate(("APs", "APm", "APl"), start=1):
                assert_equal(row[column], mean(precision[:, :, number, area]))
            assert_equal(row["AR"], mean(recall[:, number, 0]))


def mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def assert_equal(per_cent: float | None, official: float) -> None:
    """Equal to six digits, and missing where pycocotools gives -1."""
    if per_cent is None:
        assert official == -1
    else:
        assert abs(per_cent / 100 - official) < 5e-7


def result(x: int, y: int, size: int = 10, **fields: Any) -> Record:
    """A square on the image 1."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + size, x : x + size] = True
    box = {"bbox": [x, y, size, size], "segmentation": as_text(encode(mask))}
    return {"image_id": 1, "category_id": 7, "score": 0.9, **box, **fields}


def squares() -> dict[str, Any]:
    """Image 1 with cats at (0, 0) and (20, 0), a dog at (25, 0), and a cat on image 2."""
    given = content()
    squares_at = [(1, 7, 0), (1, 7, 20), (1, 8, 25), (2, 7, 0)]
    given["annotations"] = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": [x, 0, 10, 10],
            "segmentation": [[x, 0, x + 10, 0, x + 10, 10, x, 10]],
            "area": 100,
            "iscrowd": 0,
        }
        for number, (image, category, x) in enumerate(squares_at, start=1)
    ]
    return given


def coco_of(given: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = given
    coco.createIndex()
    return coco


HAND = [
    result(0, 0, score=0.9),  # hits the first cat
    result(1, 0, score=0.8),  # the same again: a false alarm
    result(25, 0, score=0.7),  # the dog, taken for a cat
    result(0, 15, score=0.6, category_id=8),  # nothing is there
    result(20, 0, score=0.3),  # hits the second cat
]


@pytest.mark.parametrize("task", ["segm", "bbox"])
def test_precision_recall_and_confusions_are_those_by_hand(task: str) -> None:
    coco = coco_of(squares())
    numbers = evaluate_task(coco, HAND, task, 100)
    at = numbers.at(0.5)
    assert (at.hits, at.false_alarms, at.misses) == (1, 3, 3)
    assert (at.precision, at.recall, at.f1) == (1 / 4, 1 / 4, 2 / 8)
    of_cats = numbers.at(0.5, 0)
    assert (of_cats.hits, of_cats.false_alarms, of_cats.misses) == (1, 2, 2)
    # F1 of all is 2/5, 2/6, 2/7, 2/8, 4/9 at the five scores, and for cats 2/4, 2/5, 2/6, 4/7.
    best = numbers.best()
    assert best is not None and (best.score, best.f1) == (0.3, 4 / 9)
    best_of_cats = numbers.best(0)
    assert best_of_cats is not None and (best_of_cats.score, best_of_cats.f1) == (0.3, 4 / 7)
    assert numbers.best(1) is None
    # Whatever the class: the dog is matched by the cat at (25, 0).
    assert confusion(coco, HAND, task, 0.5).tolist() == [[1, 0, 2], [1, 0, 0], [1, 1, 0]]
    assert confusion(coco, HAND, task, 0.3).tolist() == [[2, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert confusion(coco, HAND, task, 1).tolist() == [[0, 0, 3], [0, 0, 1], [0, 0, 0]]


def test_crowds_and_detections_on_them_are_in_no_number() -> None:
    given = squares()
    given["annotations"][3] |= {"iscrowd": 1, "image_id": 1, "bbox": [0, 15, 10, 10]}
    given["annotations"][3]["segmentation"] = [[0, 15, 10, 15, 10, 25, 0, 25]]
    coco = coco_of(given)
    on_crowd = [result(0, 15, size=5), result(5, 15, size=5)]
    numbers = evaluate_task(coco, on_crowd, "segm", 100)
    assert (numbers.at(0).hits, numbers.at(0).false_alarms, numbers.at(0).misses) == (0, 0, 3)
    assert confusion(coco, on_crowd, "segm", 0).tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]


def test_equal_scores_count_together() -> None:
    coco = coco_of(squares())
    results = [result(0, 0, score=0.5), result(0, 15, score=0.5), result(20, 0, score=0.4)]
    best = evaluate_task(coco, results, "segm", 100).best()
    assert best is not None and (best.score, best.hits, best.false_alarms) == (0.4, 2, 1)


def test_crowding_is_the_largest_iou_with_another_box_of_the_image() -> None:
    values = crowding(coco_of(squares()), np.array([4, 1, 2, 3]))
    assert values.tolist() == [0, 0, 50 / 150, 50 / 150]


def test_the_best_results_of_an_image_and_class_are_within_the_limit() -> None:
    chosen = within_limit(HAND, 2)
    assert [record["score"] for record in chosen] == [0.9, 0.8, 0.6]


def test_many_masks_of_a_large_image_take_little_memory() -> None:
    side = 3000
    mask = np.zeros((side, side), dtype=bool)
    mask[100:2000, 100:2000] = True
    rle = as_text(encode(mask))
    given = squares()
    given["images"] = [{"id": 1, "file_name": "1.png", "width": side, "height": side}]
    del given["annotations"][3]
    coco = coco_of(given)
    many = [result(0, 0) | {"segmentation": dict(rle), "score": k / 100} for k in range(100)]
    tracemalloc.start()
    evaluate_task(coco, many, "segm", 100)
    confusion(coco, many, "segm", 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * side * side < 100 * side * side


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_set(tmp_path / "set", squares())


def saved(folder: Path, given: Any) -> str:
    path = folder / "found.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return str(path)


def test_the_command_prints_and_writes_everything(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", saved(tmp_path, HAND), dataset, "--by", "size,class,crowding"]
    output = tmp_path / "out"
    assert cli.main([*words, "--output", str(output), "--score", "0.5"]) == 0
    printed = capsys.readouterr().out
    for part in ("masks by class", "boxes by size", "masks by crowding", "0.3000 (best F1)"):
        assert part in printed
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["confusion"]["counts"] == [[1, 0, 2], [1, 0, 0], [1, 1, 0]]
    assert metrics["confusion"]["classes"] == ["cat", "dog", "(background)"]
    assert (metrics["images"], metrics["detections"]) == (3, 5)
    crowded = metrics["tasks"]["segm"]["by_crowding"]
    assert [row["instances"] for row in crowded] == [2, 0, 0, 2]
    assert [row["recall"] for row in crowded] == [50, None, None, 50]
    assert [row["recall at score"] for row in crowded] == [50, None, None, 0]
    with (output / "images.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:3] == [["1", "1.png", "1", "2", "3"], ["2", "2.png", "0", "1", "0"]]
    for name in ("precision_recall", "confusion"):
        assert (output / f"{name}.csv").is_file()
        assert cv2.imread(str(output / f"{name}.png")).std() > 10
    with (output / "segm_classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    expected = metrics["tasks"]["segm"]["by_class"]
    assert [float(row["AP"]) for row in classes] == [row["AP"] for row in expected]


def test_the_worst_images_show_hits_misses_and_false_alarms(dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = EvaluateOptions(
        Path(saved(tmp_path, HAND)), dataset, score=0.5, output=output, worst=1
    )
    evaluate(options)
    (file,) = (output / "worst").iterdir()
    assert file.name == "001_1.png"
    scene = cv2.imread(str(file))
    hit, miss, alarm = (np.array(colour) for colour in OUTCOMES.values())
    # Later instances of the same size lie on top: the duplicate leaves one column of the hit.
    assert (scene[5, 0] == hit).all()
    assert (scene[0, 22] == miss).all()
    assert (scene[20, 0] == alarm).all()
    (output / "worst/notes.txt").write_text("mine")
    (output / "worst/009_mine.png").write_bytes(b"mine")
    options = EvaluateOptions(Path(saved(tmp_path, [])), dataset, score=0.5, output=output, worst=9)
    evaluate(options)
    names = sorted(path.name for path in (output / "worst").iterdir())
    assert names == ["001_1.png", "002_2.png", "009_mine.png", "notes.txt"]


def test_the_colours_differ_for_every_colour_vision() -> None:
    """Distances in CIELAB after the simulation of Machado et al. (2009) at full severity."""
    kinds = {
        "normal": np.eye(3),
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    colours = np.array(list(OUTCOMES.values()), dtype=np.float32)[:, ::-1] / 255
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055) ** 2.4, colours / 12.92)
    for matrix in kinds.values():
        seen_colours = (linear @ np.array(matrix).T).clip(0, 1).astype(np.float32)
        lab = cv2.cvtColor(seen_colours[None], cv2.COLOR_LRGB2LAB)[0]
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)
        assert distances[np.triu_indices(3, 1)].min() > 30  # 2 is seen side by side


def test_images_that_cannot_be_drawn_give_a_line_and_status_1(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set/images/1.png").unlink()
    words = ["evaluate", saved(tmp_path, HAND), dataset, "--output", str(tmp_path / "out")]
    assert cli.main(words) == 1
    assert "1.png: no such file" in capsys.readouterr().err
    assert (tmp_path / "out/worst/002_2.png").is_file()


def test_a_metrics_file_of_a_training_is_not_replaced(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 1}\n')
    words = ["evaluate", saved(tmp_path, HAND), dataset, "--output", str(tmp_path)]
    assert_refused(words, "metrics.json is in the way", capsys)
    assert (tmp_path / "metrics.json").read_text() == '{"iteration": 1}\n'


def test_missing_matplotlib_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        plots, "find_spec", lambda name: None if name == "matplotlib" else find_spec
    )
    words = ["evaluate", "none.json", "none", "--output", str(tmp_path)]
    assert_refused(words, "need the package matplotlib, which is not installed; type: pip", capsys)


def without(key: str) -> list[Record]:
    return [{name: value for name, value in result(0, 0).items() if name != key}]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([result(0, 0, image_id=99)], "the image_id 99 is not in coco:"),
        ([result(0, 0, image_id=None)], "entry 0 has the image_id None"),
        ([result(0, 0, category_id=3)], "the category_id 3; coco:"),
        (without("category_id"), "the category_id None"),
        ([result(0, 0, score=float("nan"))], "an instance of image 1 has the score nan"),
        (without("score"), "an instance of image 1 has the score None"),
        ([result(0, 0, bbox=[0, 0, float("inf"), 1])], "expected finite numbers"),
        ([result(0, 0, bbox=[0, 0, -1, 1])], "of negative size"),
        ([result(0, 0, bbox="x")], "expected 4 numbers"),
        ([result(0, 0, segmentation={"size": [9, 9], "counts": "1"})], "the mask is of [9, 9]"),
        (
            [result(0, 0, segmentation={"size": [HEIGHT, WIDTH], "counts": "01"})],
            "the runs do not add up",
        ),
        ([result(0, 0, bbox=None, segmentation=None)], "neither bbox nor segmentation"),
        ([*without("segmentation"), result(0, 0)], "entry 1 has a mask and entry 0 has none"),
        ('{"info": {}, "frames": []}', "holds the frames of a video"),
        ("{}", "holds no results"),
    ],
)
def test_results_that_cannot_be_used_are_one_line(
    dataset: str, tmp_path: Path, given: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["evaluate", saved(tmp_path, given), dataset], reason, capsys)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--by", "size,colour"], "--by has 'colour'; expected one or more of size, class, crow"),
        (["--by", ""], "--by has ''"),
        (["--score", "nan"], "--score is nan"),
        (["--max-detections", "0"], "--max-detections is 0; expected at least 1"),
        (["--worst", "-1"], "--worst is -1; expected at least 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_one_line(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["evaluate", "none.json", "none", *words], reason, capsys)


def test_a_set_without_images_or_ground_truth_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = content() | {"images": [], "annotations": []}
    for folder, given, reason in (
        ("empty", empty, "there are no images"),
        ("bare", {key: value for key, value in content().items() if key != "annotations"}, "anno"),
    ):
        name = write_set(tmp_path / folder, given)
        assert_refused(["evaluate", saved(tmp_path, HAND), name], reason, capsys)


def test_no_results_are_all_missed_and_copies_are_false_alarms(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", saved(tmp_path, []), dataset]) == 0
    printed = capsys.readouterr()
    assert "holds no instance: all those of the ground truth count as missed" in printed.err
    assert "0.0000" in printed.out
    twice = [result(0, 0), result(0, 0)]
    assert cli.main(["evaluate", saved(tmp_path, twice), dataset]) == 0
    printed = capsys.readouterr()
    assert "1 of 2 instances are copies of others" in printed.err
    row = next(line for line in printed.out.splitlines() if "(best F1)" in line)
    assert row.split()[-3:] == ["1", "1", "3"]


def test_instances_without_masks_are_compared_by_boxes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = squares()
    for annotation in given["annotations"]:
        del annotation["segmentation"]
    name = write_set(tmp_path / "boxes", given)
    assert cli.main(["evaluate", saved(tmp_path, HAND), name]) == 0
    printed = capsys.readouterr()
    assert "boxes alone are evaluated" in printed.err
    assert "masks" not in printed.out


def test_images_without_instances_have_false_alarms_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_set(tmp_path / "none", content() | {"annotations": []})
    assert cli.main(["evaluate", saved(tmp_path, HAND), name, "--output", str(tmp_path / "o")]) == 0
    assert (
        json.loads((tmp_path / "o/metrics.json").read_text())["tasks"]["segm"]["overall"][0]["AP"]
        is None
    )
