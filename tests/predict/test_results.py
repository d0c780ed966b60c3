"""``instseg results``, and the formats of ``instseg predict`` on images that a model sees."""

import csv
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roifile
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from instseg import cli
from instseg.errors import ConfigError, InstsegError, OutputError
from instseg.masks import as_text, encode
from instseg.predict.conversion import convert
from instseg.predict.earlier import is_ours
from instseg.predict.formats import FORMATS
from tests.inference.test_predictor import PHOTO
from tests.predict.test_predict_again import names
from tests.support.predict_common import arguments_for_tiny_model
from tests.support.video_common import images, write_clip

ALL = ",".join(FORMATS)
OTHERS = ",".join(name for name in FORMATS if name != "coco")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for the tiny model, whose masks are made smaller until one is empty."""
    folder = tmp_path_factory.mktemp("model")
    arguments = arguments_for_tiny_model(folder)
    checkpoint = torch.load(folder / "tiny.pth", weights_only=False)
    checkpoint["model"]["roi_heads.mask_head.predictor.bias"] -= 0.3
    torch.save(checkpoint, folder / "tiny.pth")
    return arguments


@pytest.fixture(scope="module")
def done(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``in`` has two images of one stem, ``out`` their results in all formats."""
    folder = tmp_path_factory.mktemp("done")
    for subfolder, kind in (("in", "png"), ("in/b", "tif")):
        (folder / subfolder).mkdir()
        Image.fromarray(PHOTO[:80, :100]).save(folder / subfolder / f"a.{kind}")
    words = ["--input", str(folder / "in"), "--recursive", "--output", str(folder / "out")]
    assert cli.main([*model, *words, "--format", ALL, "--no-overlay"]) == 0
    return folder


def test_every_format_holds_the_instances_of_the_records(done: Path) -> None:
    output = done / "out"
    stems = ("a", "a_2")
    expected = {"predictions.json", "categories.json", "measurements.csv"}
    ends = ("_labels.tif", ".geojson", "_rois.zip", ".txt")
    assert names(output) == expected | {f"{stem}{end}" for stem in stems for end in ends}
    assert all(is_ours(output / name) for name in names(output))
    coco = COCO(str(output / "categories.json")).loadRes(str(output / "predictions.json"))
    with (output / "measurements.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for image_id, stem in enumerate(stems, start=1):
        records = coco.loadAnns(coco.getAnnIds(image_id))
        masks = [coco.annToMask(record) for record in records]
        filled = sum(bool(mask.any()) for mask in masks)
        assert 0 < filled < len(masks)
        expected_labels = np.zeros(masks[0].shape, dtype=int)
        for number in reversed(range(len(masks))):
            expected_labels[masks[number] > 0] = number + 1
        labels = tifffile.imread(output / f"{stem}_labels.tif")
        np.testing.assert_array_equal(labels, expected_labels)
        features = json.loads((output / f"{stem}.geojson").read_text())["features"]
        assert len(features) == len(roifile.roiread(output / f"{stem}_rois.zip")) == filled
        assert len((output / f"{stem}.txt").read_text().splitlines()) == filled
        of_image = [row for row in rows if Path(row["image"]) == Path(records[0]["file_name"])]
        assert [int(row["area_px"]) for row in of_image] == [int(mask.sum()) for mask in masks]


def test_results_gives_the_files_of_predict(done: Path, tmp_path: Path) -> None:
    words = ["results", str(done / "out/predictions.json"), "--to", ALL]
    assert cli.main([*words, "--output", str(tmp_path)]) == 0
    assert names(tmp_path) == names(done / "out")
    for name in names(tmp_path) - {"categories.json"}:
        ours, theirs = (folder / name for folder in (tmp_path, done / "out"))
        if name.endswith(".tif"):  # with a time stamp or the like
            np.testing.assert_array_equal(tifffile.imread(ours), tifffile.imread(theirs))
        else:
            assert ours.read_bytes() == theirs.read_bytes(), name


def test_images_that_were_moved_are_found(done: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    Image.fromarray(PHOTO[:80, :100]).save(tmp_path / "moved/a.png")
    content = (done / "out/predictions.json").read_text().replace(str(done), "/nowhere")
    (tmp_path / "predictions.json").write_text(content)
    assert cli.main(["results", str(tmp_path / "predictions.json"), "--to", "csv"]) == 0
    assert "mean_intensity" not in (tmp_path / "measurements.csv").read_text()
    words = ["--images", str(tmp_path / "moved")]
    assert cli.main(["results", str(tmp_path / "predictions.json"), "--to", "csv", *words]) == 0
    assert "mean_intensity" in (tmp_path / "measurements.csv").read_text()


def test_a_second_run_removes_formats_of_the_first(
    model: list[str], done: Path, tmp_path: Path
) -> None:
    words = [*model, "--input", str(done / "in/a.png"), "--output", str(tmp_path)]
    assert cli.main([*words, "--format", ALL]) == 0
    (tmp_path / "b.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.2\n")
    assert cli.main([*words, "--format", "labels", "--confidence", "1"]) == 0
    assert names(tmp_path) == {"a.png", "a_labels.tif", "b.txt"}
    assert tifffile.imread(tmp_path / "a_labels.tif").max() == 0


def test_a_users_files_of_these_names_stay(model: list[str], done: Path, tmp_path: Path) -> None:
    mine = {"a.txt": "0 0.1 0.1\n", "a.geojson": "{}", "measurements.csv": "a,b\n"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    tifffile.imwrite(tmp_path / "a_labels.tif", np.zeros((2, 2), np.uint8))
    words = [*model, "--input", str(done / "in/a.png"), "--output", str(tmp_path)]
    assert cli.main(words) == 0
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    assert (tmp_path / "a_labels.tif").exists()


def test_an_unknown_format_is_one_line_before_the_model_is_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["predict", "--config-file", "none", "--input", "a", "--output", "b"]
    assert cli.main([*words, "--format", "coco,svg"]) == 2
    assert "--format has 'svg'; expected one or more of coco, labels" in capsys.readouterr().err


MASK = np.zeros((30, 40), dtype=bool)
MASK[3:10, 5:20] = True


def record(**changes: Any) -> dict[str, Any]:
    """A result as other programs write it."""
    entry = {"image_id": 5, "category_id": 2, "score": 0.5, "segmentation": as_text(encode(MASK))}
    return entry | changes


FRAME = '{"frames": [{"frame": 0, "width": 9, "height": 9, "objects": [7]}]}'


def saved(folder: Path, content: Any, name: str = "found.json", **options: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, **options))
    return path


@pytest.mark.parametrize("indent", [None, 1])
def test_results_of_other_programs_are_converted(tmp_path: Path, indent: int | None) -> None:
    entries = [record(score=0.5), record(score=0.9, category_id=1), record(image_id="b")]
    path = saved(tmp_path, entries, indent=indent)
    assert convert(path, OTHERS) == 0
    with (tmp_path / "measurements.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["score"], row["class"]) for row in rows] == [
        ("5", "0.9", "class 1"),
        ("5", "0.5", "class 2"),
        ("b", "0.5", "class 2"),
    ]
    assert (tifffile.imread(tmp_path / "b_labels.tif") == MASK).all()


def test_polygons_and_images_without_instances_need_the_list_of_images(tmp_path: Path) -> None:
    entry = record(segmentation=[[5, 3, 20, 3, 20, 10, 5, 10]])
    path = saved(tmp_path, [entry], "predictions.json")
    with pytest.raises(ConfigError, match="the size of image 5 is not known; expected categories"):
        convert(path, "labels")
    sizes = [{"id": key, "file_name": f"{key}.png", "width": 40, "height": 30} for key in (5, 6)]
    saved(tmp_path, {"categories": [{"id": 2, "name": "x"}], "images": sizes}, "categories.json")
    assert convert(path, "labels,geojson") == 0
    assert (tifffile.imread(tmp_path / "5_labels.tif") == MASK).all()
    assert tifffile.imread(tmp_path / "6_labels.tif").shape == (30, 40)


def test_the_lines_of_a_run_that_was_killed_are_converted(
    done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = json.loads((done / "out/predictions.json").read_text())
    images = json.loads((done / "out/categories.json").read_text())
    head = {**images, "images": []}
    lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    saved(tmp_path, lines + '{"image_id": 2, "fi', "predictions.jsonl")
    listed = "".join(f"{json.dumps(entry)}\n" for entry in (head, *images["images"]))
    saved(tmp_path, listed, "categories.jsonl")
    assert convert(tmp_path / "predictions.jsonl", "yolo") == 0
    assert "is incomplete and left out" in caplog.text
    for name in ("a.txt", "a_2.txt"):
        assert (tmp_path / name).read_bytes() == (done / "out" / name).read_bytes()


def test_every_frame_of_a_video_is_an_image(model: list[str], tmp_path: Path) -> None:
    write_clip(tmp_path / "v.mp4", images(2))
    words = [*model, "--input", str(tmp_path / "v.mp4"), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--no-overlay"]) == 0
    assert convert(tmp_path / "out/v.json", OTHERS) == 0
    frames = json.loads((tmp_path / "out/v.json").read_text())["frames"]
    for number, frame in enumerate(frames):
        labels = tifffile.imread(tmp_path / f"out/v_frame{number:06d}_labels.tif")
        assert labels.shape == (frame["height"], frame["width"])
    table = (tmp_path / "out/measurements.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == sum(len(frame["objects"]) for frame in frames) > 0
    # As another program writes it, and as a run leaves it that is killed.
    content = json.loads((tmp_path / "out/v.json").read_text())
    head = {key: content[key] for key in content if key not in ("frames", "complete")}
    lines = "".join(f"{json.dumps(line)}\n" for line in (head, *frames))
    (tmp_path / "v.json").write_text(json.dumps(content))
    (tmp_path / "v.jsonl").write_text(lines + '{"frame": 2, "ti')
    for name in ("v.json", "v.jsonl"):
        assert convert(tmp_path / name, "csv") == 0
        assert (tmp_path / "measurements.csv").read_text() == table


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"images": []}', "holds no results; expected predictions.json or the NAME.json"),
        ("", "holds no results"),
        ("[1]", "entry 0 is 1, no JSON object"),
        ("[{", "is no JSON"),
        ('[\n{"image_id": 1},\n{"image', "is damaged behind its first 1 entries"),
        ([{"image_id": 1}], "the size of image 1 is not known"),
        ([record(image_id=None)], "entry 0 has the image_id None"),
        ([record(score=None)], "an instance of 5 has the score None"),
        ([record(score=float("nan"))], "has the score nan"),
        ([record(category_id="x")], "category_id is 'x'"),
        ([record(segmentation={"size": [30, 40], "counts": "0"})], "do not add up to 30 x 40"),
        ([record(segmentation={"size": [0, 40], "counts": "0"})], "has the size"),
        ([record(), record(image_id=6), record()], "results of image 5 are not one after the"),
        ('{"info": {}, "frames": [\n{"frame": "a"}\n]}', "is no frame"),
        ('{"info": {}, "frames": [\n7\n]}', "entry 0 is 7"),
        ('{"info": {}, "frames": [7]}', "entry 0 is 7"),
        ('{"info": {}, "frames": [{"frame": 0, "objects": [7]}]}', "has the size"),
        (FRAME, "expected a JSON object, found 7"),
        ('{"info": x, "frames": [', "is no file of results"),
        ('{"image_id": 1,\n"score": 1}', "expected a list, found {"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, content: Any, reason: str) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(ConfigError, match=reason) as caught:
        convert(path, "labels,csv")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "categories.json cannot be read"),
        ("[]", r"categories.json: expected a JSON object, found \[\]"),
        ({"images": 5}, "the list of images beside it is 5"),
        ({"images": [5]}, "the list of images beside it has 5"),
        ({"images": [{"id": None}]}, "the list of images beside it has {"),
        ({"images": [{"id": 5, "page": "x"}]}, "image 5 has the page 'x'"),
    ],
)
def test_a_list_of_images_that_cannot_be_used_is_one_line(
    tmp_path: Path, content: Any, reason: str
) -> None:
    saved(tmp_path, content, "categories.json")
    with pytest.raises(ConfigError, match=reason) as caught:
        convert(saved(tmp_path, [record()]), "csv")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_boxes_without_masks_are_converted_to_boxes_alone(tmp_path: Path) -> None:
    entry = {"image_id": 5, "category_id": 2, "score": 0.5, "bbox": [5, 3, 15, 7]}
    sizes = {"images": [{"id": 5, "file_name": "5.png", "width": 40, "height": 30}]}
    saved(tmp_path, sizes, "categories.json")
    path = saved(tmp_path, [entry])
    assert convert(path, "coco", tmp_path / "out") == 0
    (written,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert written["bbox"] == entry["bbox"] and "segmentation" not in written
    with pytest.raises(ConfigError, match="5.png: these results have no masks; the only format"):
        convert(path, "labels")


ODD = [None, True, -1, 1.5, float("nan"), 10**40, "", "x", [], [1], [[1, 2]], [None], {}, {"a": 1}]
ODD += [[{"id": 5}], [{"id": 2, "name": "x"}], {"size": [30, 40], "counts": "0"}]
ANYTHING = st.sampled_from(ODD)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.builds(
            lambda changes: record(**changes),
            st.dictionaries(st.sampled_from([*record(), "category_name", "file_name"]), ANYTHING),
        ),
        max_size=3,
    ),
    st.dictionaries(st.sampled_from(["info", "images", "categories"]), ANYTHING),
)
def test_whatever_a_file_holds_it_is_converted_or_refused(entries: Any, listed: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, suppress(InstsegError):
        saved(Path(folder), listed, "categories.json")
        convert(saved(Path(folder), entries), OTHERS)


def test_mistakes_in_arguments_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, [record()])
    for words, reason in (
        (["nowhere.json", "--to", "csv"], "nowhere.json cannot be read: No such file"),
        ([str(tmp_path), "--to", "csv"], "cannot be read: Is a directory"),
        ([str(path), "--to", "svg"], "--to has 'svg'; expected one or more of coco"),
        ([str(path), "--to", "coco"], "--to coco could replace"),
        ([str(path), "--to", "csv", "--images", "nowhere"], "--images nowhere is no folder"),
    ):
        assert cli.main(["results", *words]) == 2
        assert reason in capsys.readouterr().err


def test_a_path_in_a_file_name_writes_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    entries = [record(file_name="../../x.png"), record(image_id=6, file_name="/tmp/..")]
    assert convert(saved(tmp_path, entries), "yolo", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x.txt", "...txt"}


def test_the_names_of_files_follow_the_list_of_images(tmp_path: Path) -> None:
    """Images of one stem, of which only the last has instances, as ``instseg predict`` has them."""
    inputs = [("a.png", None), ("b/A.tif", None)]
    inputs += [(stack, page) for stack in ("s.tif", "b/s.tif") for page in (0, 1)]
    listed = [
        {"id": key, "file_name": name, "width": 40, "height": 30}
        | ({} if page is None else {"page": page})
        for key, (name, page) in enumerate(inputs, 1)
    ]
    saved(tmp_path, {"images": listed}, "categories.json")
    entries = [record(image_id=6), record(image_id=2), record(image_id=7, file_name="c/a.png")]
    stems = ["a", "A_2", "s_page0000", "s_page0001", "s_2_page0000", "s_2_page0001", "a_3"]
    for order in (entries, entries[::-1]):
        assert convert(saved(tmp_path, order), "labels", tmp_path / "out") == 0
        assert names(tmp_path / "out") == {f"{stem}_labels.tif" for stem in stems}
        filled = {
            stem for stem in stems if tifffile.imread(tmp_path / f"out/{stem}_labels.tif").any()
        }
        assert filled == {"A_2", "s_2_page0001", "a_3"}


def test_a_stem_in_the_list_of_images_names_no_file(tmp_path: Path) -> None:
    sizes = [
        {"id": key, "file_name": f"{key}.png", "width": 40, "height": 30, "stem": stem}
        for key, stem in ((5, "../../x"), (6, 5))
    ]
    saved(tmp_path, {"images": sizes}, "categories.json")
    path = saved(tmp_path, [record()], "predictions.json")
    assert convert(path, "labels", tmp_path / "b/out") == 0
    assert {path.name for path in (tmp_path / "b/out").iterdir()} == {
        "5_labels.tif",
        "6_labels.tif",
    }
    assert not list(tmp_path.glob("x*"))


def test_a_name_that_no_file_can_have_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, [record(file_name="a" * 300), record(image_id=6)])
    assert convert(path, "labels,csv", tmp_path / "out") == 1
    assert "cannot be written: File name too long" in capsys.readouterr().err
    assert (tmp_path / "out/6_labels.tif").exists()
    for name in ("a\0b", "\ud800"):
        with pytest.raises(ConfigError, match="an image has the name .*; expected that of a file"):
            convert(saved(tmp_path, [record(file_name=name)]), OTHERS)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("labels", "5_labels.tif"),
        ("csv", "measurements.csv"),
        ("geojson", "5.geojson"),
        ("imagej", "5_rois.zip"),
        ("yolo", "5.txt"),
    ],
)
def test_a_users_file_in_place_of_results_is_refused_and_stays(
    tmp_path: Path, kind: str, name: str
) -> None:
    path = saved(tmp_path, [record()])
    assert convert(path, kind) == convert(path, kind) == 0
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name} is in the way, and no run of instseg") as caught:
        convert(path, kind)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert (tmp_path / name).read_text() == "mine"
