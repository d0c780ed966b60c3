"""Class, mask score and area that ``instseg predict`` writes for each instance."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import instseg
from instseg import Predictor, cli
from instseg.categories import Categories
from instseg.checkpoint import Checkpointer
from instseg.data.build import register_datasets
from instseg.data.dataset import load
from instseg.data.synthetic import shapes
from instseg.predict import as_youtube_vis
from instseg.training.trainer import Trainer
from tests.inference.test_predictor import PHOTO, save_weights, tiny_cfg
from tests.support.predict_common import arguments_for_tiny_model, as_lines, assert_refused, results
from tests.support.video_common import images, write_clip
from tests.support.yolact_tiny import decided, tiny_predictor
from tests.support.yolact_tiny import tiny_cfg as yolact_cfg

OURS = Categories((7, 12, 30), ("bolt", "nut", "washer"))
RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows its categories, as a training saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    model = Predictor(tiny_cfg()).model
    Checkpointer(model, str(folder), categories=OURS).save("model_final")
    return folder / "model_final.pth"


@pytest.fixture(scope="module")
def model(weights: Path) -> list[str]:
    config = weights.with_name("tiny.yaml")
    config.write_text(tiny_cfg().dump())
    arguments = ["predict", "--config-file", str(config), "--weights", str(weights)]
    return [*arguments, "--confidence", "0", "--no-overlay"]


@pytest.fixture(scope="module")
def nameless(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for the same model, whose weights tell nothing of its classes."""
    arguments = arguments_for_tiny_model(tmp_path_factory.mktemp("nameless"))
    file = save_weights(tiny_cfg(), weights.with_name("nameless.pth"))
    return [*arguments, "--weights", str(file), "DATASETS.TEST", "()"]


@pytest.fixture(scope="module")
def data_set(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with the ids 5, 40 and 300, annotated with some of what the model finds."""
    folder = tmp_path_factory.mktemp("data")
    predictor = Predictor(tiny_cfg(), weights)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for key, name in {300: "a.png", 5: "sub/b.png", 40: "c.png"}.items():
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file)
        images.append({"id": key, "file_name": name, "height": 48, "width": 64})
        instances = predictor(file)["instances"]
        for index in range(0, len(instances), 2):
            rle = mask_util.encode(np.asfortranarray(instances.pred_masks[index].numpy()))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": key,
                    "category_id": OURS.ids[instances.pred_classes[index]],
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": int(mask_util.area(rle)),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "iscrowd": 0,
                }
            )
    content = {"images": images, "annotations": annotations, "categories": OURS.as_coco()[::-1]}
    (folder / "val.json").write_text(json.dumps(content))
    return folder


def name_of(data_set: Path) -> str:
    return f"coco:{data_set / 'val.json'}:{data_set / 'images'}"


def average_precision(coco: COCO, output: Path) -> float:
    evaluation = COCOeval(coco, coco.loadRes(str(output / "predictions.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def test_pycocotools_gives_the_average_precision_of_the_evaluation(
    model: list[str], weights: Path, data_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert cli.main([*model, "--images-of", name_of(data_set), "--output", str(output)]) == 0
    overrides = ["DATASETS.TEST", (name_of(data_set),), "OUTPUT_DIR", str(tmp_path)]
    cfg = tiny_cfg(*overrides, "DATALOADER.NUM_WORKERS", 0)
    register_datasets(cfg)
    expected = Trainer.test(cfg, Predictor(cfg, weights).model)["segm"]["AP"]
    assert expected > 20
    precision = average_precision(COCO(str(data_set / "val.json")), output)
    assert precision == pytest.approx(expected, abs=1e-6)


def test_results_have_the_ids_of_the_training_set_without_that_set(
    model: list[str], data_set: Path, tmp_path: Path
) -> None:
    shutil.copy(data_set / "images" / "a.png", tmp_path)
    output = tmp_path / "out"
    arguments = ["--input", str(tmp_path / "a.png"), "--output", str(output)]
    assert cli.main([*model, *arguments]) == 0
    pairs = {(record["category_id"], record["category_name"]) for record in results(output)}
    assert pairs and pairs <= set(zip(OURS.ids, OURS.names, strict=True))


def test_results_of_a_set_have_its_image_ids_and_file_names(
    model: list[str], data_set: Path, tmp_path: Path
) -> None:
    assert cli.main([*model, "--images-of", name_of(data_set), "--output", str(tmp_path)]) == 0
    files = {(record["image_id"], record["file_name"]) for record in results(tmp_path)}
    assert files == {(5, "sub/b.png"), (40, "c.png"), (300, "a.png")}


def test_the_files_beside_the_results_make_them_complete(
    model: list[str], data_set: Path, tmp_path: Path
) -> None:
    arguments = ["--images-of", name_of(data_set), "--output", str(tmp_path)]
    assert cli.main([*model, *arguments, "--confidence", "1"]) == 0
    assert results(tmp_path) == []
    content = json.loads((tmp_path / "categories.json").read_text())
    assert content["categories"] == OURS.as_coco()
    assert content["images"][0] == {"id": 5, "file_name": "sub/b.png", "width": 64, "height": 48}
    assert len(content["images"]) == 3
    assert content["info"] == {
        "config": model[2],
        "weights": model[4],
        "overrides": [],
        "confidence": 1.0,
        "rank_by": "class",
        "polygons": False,
        "images_of": name_of(data_set),
    }
    assert cli.main([*model, *arguments]) == 0
    loaded = COCO(str(tmp_path / "categories.json")).loadRes(str(tmp_path / "predictions.json"))
    assert len(loaded.anns) == len(results(tmp_path)) > 0


def test_the_file_of_a_video_has_the_categories(model: list[str], tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "v.mp4", images(2))
    assert cli.main([*model, "--input", str(clip), "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "v.json").read_text())
    assert content["categories"] == OURS.as_coco()
    ids = {entry["category_id"] for frame in content["frames"] for entry in frame["objects"]}
    assert ids and ids <= set(OURS.ids)


def test_a_video_goes_on_with_the_classes_that_were_found(model: list[str], tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "v.mp4", images(3))
    arguments = [*model, "--input", str(clip), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    text = (tmp_path / "out" / "v.json").read_text()
    (tmp_path / "out" / "v.jsonl").write_text("\n".join(as_lines(text).splitlines()[:3]))
    assert cli.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "out" / "v.json").read_text() == text


def test_an_image_or_video_called_categories_keeps_its_files(
    model: list[str], tmp_path: Path
) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    clip = write_clip(tmp_path / "categories.mp4", images(1))
    files = [str(clip), str(tmp_path / "a.png")]
    assert cli.main([*model, "--output", str(tmp_path / "out"), "--input", *files]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "categories.json",
        "categories_2.json",
        "predictions.json",
    }


def test_without_names_results_say_class_0_and_say_so_once(
    nameless: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(PHOTO).save(tmp_path / name)
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--instance-masks"]
    assert cli.main([*nameless[:-2], *arguments, *nameless[-2:]]) == 0
    assert capsys.readouterr().err.count("nothing names the 3 classes of this model") == 1
    for record in results(tmp_path / "out"):
        assert record["category_name"] == f"class {record['category_id']}"
    content = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert content["categories"] == [{"id": n, "name": f"class {n}"} for n in range(3)]
    masks = [path.name for path in (tmp_path / "out" / "a_masks").iterdir()]
    assert masks and all(name[4:11] == "class_" + name[10] for name in masks)


def test_a_model_with_other_classes_never_gets_the_names_of_coco(
    nameless: list[str], tmp_path: Path
) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    arguments = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    overrides = ["DATASETS.TEST", "('coco_2017_val',)"]
    assert cli.main([*nameless[:-2], *arguments, *overrides]) == 0
    names = {record["category_name"] for record in results(tmp_path / "out")}
    assert names and names <= {"class 0", "class 1", "class 2"}


@pytest.mark.parametrize("as_file", [False, True])
def test_classes_on_the_command_line_name_the_results(
    model: list[str], tmp_path: Path, as_file: bool
) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    chosen = Categories((3, 4, 9), ("x", "y", "z")) if as_file else Categories.of_names("xyz")
    text = str(tmp_path / "classes.json") if as_file else "x,y,z"
    (tmp_path / "classes.json").write_text(json.dumps({"categories": chosen.as_coco()}))
    arguments = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert cli.main([*model, *arguments, "--classes", text]) == 0
    pairs = {(x["category_id"], x["category_name"]) for x in results(tmp_path / "out")}
    assert pairs and pairs <= set(zip(chosen.ids, chosen.names, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--input", "a.png", "--classes", "a,b"],
            "--classes names 2 classes, the model has 3 (MODEL.ROI_HEADS.NUM_CLASSES)",
        ),
        (["--input", "a.png", "--classes", "gone.json"], "--classes: data set gone.json cannot"),
        (["--input", "a.png", "--images-of", "shapes_val"], "not allowed with argument --input"),
        (["--images-of", "shape_val"], "no data set is called 'shape_val'; did you mean"),
        (["--images-of", ""], "no data set is called ''"),
        (["--images-of", "coco:gone.json"], "there is no file gone.json"),
        (["--images-of", "coco:nothing"], "cannot read the data set name 'coco:nothing'"),
        (["--input", "a.png", "--rank-by", "mask"], "--rank-by mask needs a model that scores its"),
        (["--input", "a.png", "--rank-by", "size"], "--rank-by is 'size'; expected class or mask"),
        (
            ["--input", "v.mp4", "--polygons", "--resume"],
            "--resume needs the masks found so far in v.mp4, which --polygons does not keep",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    model: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTO).save("a.png")
    Path("v.mp4").touch()
    assert_refused([*model, "--output", "out", *arguments], message, capsys)


def test_a_missing_image_of_a_set_is_one_line_and_the_rest_keeps_its_ids(
    model: list[str], data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_set, tmp_path / "data")
    (tmp_path / "data/images/sub/b.png").unlink()
    output = tmp_path / "out"
    assert cli.main([*model, "--images-of", name_of(tmp_path / "data"), "--output", str(output)])
    assert "sub/b.png: no such file" in capsys.readouterr().err
    assert {record["image_id"] for record in results(output)} == {40, 300}


def test_a_built_in_set_is_predicted_on_without_files(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SPLITS, "shapes_val", 5)
    arguments = ["--images-of", "shapes_val", "--output", str(tmp_path / "out")]
    assert cli.main([*model, *arguments, "DATASETS.SHAPES_SIZE", "16"]) == 0
    content = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert content["images"][3]["id"] == 3
    assert content["images"][3]["file_name"].startswith("shapes://shapes_val/16/")


def test_frames_of_a_set_of_videos_are_images(model: list[str], tmp_path: Path) -> None:
    """Their ids are those that evaluation counts."""
    frames = ["x/0.png", "x/1.png", "y/0.png"]
    for name in frames:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PHOTO).save(tmp_path / name)
    videos = [
        {"id": 9, "file_names": frames[:2], "height": 48, "width": 64},
        {"id": 4, "file_names": frames[2:], "height": 48, "width": 64},
    ]
    content = {"videos": videos, "annotations": [], "categories": OURS.as_coco()[::-1]}
    (tmp_path / "v.json").write_text(json.dumps(content))
    name = f"youtubevis:{tmp_path / 'v.json'}:{tmp_path}"
    assert cli.main([*model, "--images-of", name, "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert [(x["id"], x["file_name"]) for x in written["images"]] == list(enumerate(frames))
    assert load(name).categories == OURS


def test_a_set_with_other_categories_than_the_model_is_told(
    model: list[str], data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*model, "--images-of", name_of(data_set), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert "the model has other categories" not in capsys.readouterr().err
    assert cli.main([*arguments, "--classes", "bolt,nut,washer"]) == 0
    assert "the model has other categories than coco:" in capsys.readouterr().err


def scored(paper: str, folder: Path) -> list[str]:
    """Arguments that predict with a tiny YOLACT++ on a photograph."""
    predictor = tiny_predictor(paper)
    decided(predictor.model)
    Checkpointer(predictor.model, str(folder), categories=OURS).save("m")
    (folder / "tiny.yaml").write_text(yolact_cfg(paper).dump())
    Image.fromarray(PHOTO).save(folder / "a.png")
    arguments = ["predict", "--config-file", str(folder / "tiny.yaml"), "--no-overlay"]
    arguments += ["--weights", str(folder / "m.pth"), "--input", str(folder / "a.png")]
    return [*arguments, "--output", str(folder / "out"), "--confidence"]


def test_scores_of_masks_are_in_the_results(tmp_path: Path) -> None:
    assert cli.main([*scored("yolact_plus", tmp_path), "0"]) == 0
    records = results(tmp_path / "out")
    instances = Predictor(yolact_cfg("yolact_plus"), tmp_path / "m.pth")(PHOTO[:, :, ::-1].copy())
    expected = instances["instances"]
    assert len(records) == len(expected) > 1
    torch.testing.assert_close(
        torch.tensor([record["mask_score"] for record in records]), expected.mask_scores
    )
    assert [record["score"] for record in records] == expected.scores.tolist()
    assert "class_score" not in records[0]


def test_ranking_by_mask_orders_and_chooses_by_the_scores_of_masks(tmp_path: Path) -> None:
    arguments = scored("yolact_plus", tmp_path)
    assert cli.main([*arguments, "0"]) == 0
    by_class = results(tmp_path / "out")
    middle = sorted(record["mask_score"] for record in by_class)[len(by_class) // 2]
    assert cli.main([*arguments, str(middle), "--rank-by", "mask"]) == 0
    records = results(tmp_path / "out")
    kept = [record for record in by_class if record["mask_score"] >= middle]
    assert 0 < len(records) == len(kept) < len(by_class)
    kept.sort(key=lambda record: -record["mask_score"])
    assert [record["score"] for record in records] == [record["mask_score"] for record in kept]
    assert [record["mask_score"] for record in records] == [record["score"] for record in records]
    assert [record["class_score"] for record in records] == [record["score"] for record in kept]
    assert [record["segmentation"] for record in records] == [x["segmentation"] for x in kept]


def test_mask_scoring_r_cnn_says_that_it_scores_masks() -> None:
    from instseg.modeling import gives_mask_scores

    built = {}
    for scoring in (True, False):
        cfg = instseg.load_cfg("mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml")
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.MASKIOU_ON", scoring])
        built[scoring] = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    assert gives_mask_scores(built[True]) and not gives_mask_scores(built[False])


def test_every_object_has_the_area_of_its_mask_or_else_of_its_box(
    model: list[str], tmp_path: Path
) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    arguments = [*model, "--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    for record in results(tmp_path / "out"):
        assert record["area"] == mask_util.decode(record["segmentation"]).sum()
    assert cli.main([*arguments, "--allow-partial", "MODEL.MASK_ON", "False"]) == 0
    assert results(tmp_path / "out")
    for record in results(tmp_path / "out"):
        assert "segmentation" not in record
        assert record["area"] == record["bbox"][2] * record["bbox"][3]


def test_polygons_are_read_by_pycocotools_as_the_masks_without_their_holes(
    model: list[str], data_set: Path, tmp_path: Path
) -> None:
    arguments = [*model, "--images-of", name_of(data_set), "--output"]
    assert cli.main([*arguments, str(tmp_path / "rle")]) == 0
    assert cli.main([*arguments, str(tmp_path / "out"), "--polygons"]) == 0
    coco = COCO(str(tmp_path / "out" / "categories.json"))
    loaded = coco.loadRes(str(tmp_path / "out" / "predictions.json"))
    polygons = 0
    for plain, record in zip(results(tmp_path / "rle"), loaded.anns.values(), strict=True):
        if not isinstance(record["segmentation"], list):  # of a mask without pixels
            assert record["segmentation"] == plain["segmentation"] and not plain["area"]
            continue
        polygons += 1
        mask = mask_util.decode(plain["segmentation"])
        drawn = loaded.annToMask(record)
        assert (drawn >= mask).all()
        assert drawn.sum() < 1.5 * mask.sum()
    assert polygons > 2
    assert json.loads((tmp_path / "out" / "categories.json").read_text())["info"]["polygons"]


def test_tracks_of_polygons_become_masks_for_youtube_vis(tmp_path: Path) -> None:
    square = [[1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 1.0]]
    entry = {"category_id": 3, "score": 0.5, "segmentation": square, "track_id": 0}
    frame = {"height": 6, "width": 5, "objects": [entry]}
    path = tmp_path / "v.json"
    path.write_text(json.dumps({"info": {"track": True}, "frames": [frame]}))
    [track] = as_youtube_vis(path)
    mask = mask_util.decode(track["segmentations"][0])
    assert mask.shape == (6, 5)
    assert mask[1:3, 1:3].all() and mask.sum() == 4
