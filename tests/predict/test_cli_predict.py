"""``instseg predict`` on images: files, exit statuses and messages."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from instseg import Predictor, cli, predict
from instseg.predict import images
from instseg.predict.sources import find_sources
from tests.inference.test_predictor import PHOTO, assert_empty, save_weights, tiny_cfg
from tests.support.predict_common import arguments_for_tiny_model, assert_refused, results

KEYS = "image_id file_name category_id category_name bbox area score segmentation".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for the tiny model, with every instance it finds."""
    return arguments_for_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images, a bad one and a file of another kind."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "b.png", "c.bmp"):
        Image.fromarray(PHOTO).save(folder / name)
    (folder / "bad.jpg").write_text("<html>404</html>")
    (folder / "README.md").write_text("text")
    (folder / ".hidden.jpg").write_text("text")
    return folder


def test_a_folder_gives_overlays_and_coco_results_and_a_line_per_bad_file(
    model: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out"
    assert cli.main([*model, "--input", str(folder), "--output", str(output)]) == 1
    bad = [line for line in capsys.readouterr().err.splitlines() if "bad.jpg" in line]
    assert bad == [f"{folder / 'bad.jpg'}: is HTML or XML text, not an image; did a download fail?"]
    assert sorted(path.name for path in output.iterdir()) == [
        "a.jpg",
        "b.png",
        "c.png",
        "categories.json",
        "predictions.json",
    ]
    records = results(output)
    assert {record["file_name"] for record in records} == {
        str(folder / name) for name in ("a.jpg", "b.png", "c.bmp")
    }
    assert {record["image_id"] for record in records} == {1, 2, 3}
    assert all(list(record) == KEYS for record in records)


def test_the_results_are_those_of_the_predictor(model: list[str], tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    output = tmp_path / "out"
    assert cli.main([*model, "--input", str(tmp_path / "a.png"), "--output", str(output)]) == 0
    instances = Predictor(tiny_cfg(), model[4])(tmp_path / "a.png")["instances"]
    records = results(output)
    assert len(records) == len(instances) > 0
    for index, record in enumerate(records):
        left, top, right, bottom = instances.pred_boxes.tensor[index].tolist()
        assert record["bbox"] == [left, top, right - left, bottom - top]
        assert record["score"] == instances.scores[index].item()
        assert record["category_id"] == int(instances.pred_classes[index])
        assert record["category_name"] == ["a", "b/c", "d"][record["category_id"]]
        decoded = mask_util.decode(record["segmentation"]).astype(bool)
        assert np.array_equal(decoded, instances.pred_masks[index].numpy())


def test_pycocotools_reads_the_results(model: list[str], tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    output = tmp_path / "out"
    assert cli.main([*model, "--input", str(tmp_path / "a.png"), "--output", str(output)]) == 0
    coco = COCO()
    coco.dataset = {"images": [{"id": 1}], "categories": [{"id": 0}, {"id": 1}, {"id": 2}]}
    coco.createIndex()
    loaded = coco.loadRes(str(output / "predictions.json"))
    assert len(loaded.anns) == len(results(output))


def test_only_objects_above_the_confidence_are_written(model: list[str], tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    arguments = [*model, "--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--confidence", "1", "--instance-masks"]) == 0
    assert results(tmp_path / "out") == []
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), PHOTO)
    assert not (tmp_path / "out" / "a_masks").exists()


def test_masks_on_request_are_one_black_and_white_png_per_object(
    model: list[str], tmp_path: Path
) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    arguments = [*model, "--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--instance-masks", "--no-overlay"]) == 0
    assert not (tmp_path / "out" / "a.png").exists()
    files = sorted((tmp_path / "out" / "a_masks").iterdir())
    records = results(tmp_path / "out")
    assert len(files) == len(records)
    for index, (file, record) in enumerate(zip(files, records, strict=True)):
        assert file.name == f"{index:03d}_{record['category_name'].replace('/', '_')}.png"
        decoded = mask_util.decode(record["segmentation"])
        assert np.array_equal(np.asarray(Image.open(file)), decoded * 255)


def test_inputs_of_the_same_name_do_not_overwrite_each_other(
    model: list[str], tmp_path: Path
) -> None:
    files = [tmp_path / "x" / "a.png", tmp_path / "y" / "A.png", tmp_path / "x" / "a.bmp"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(PHOTO).save(file)
    arguments = [*model, "--output", str(tmp_path / "out"), "--instance-masks", "--input"]
    assert cli.main([*arguments, *map(str, files)]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".json"}
    assert names == {"a.png", "A_2.png", "a_3.png", "a_masks", "A_2_masks", "a_3_masks"}


def test_every_kind_of_image_is_predicted_on(model: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    image = Image.fromarray(PHOTO)
    image.convert("L").save(source / "grey.png")
    image.convert("RGBA").save(source / "alpha.png")
    image.convert("CMYK").save(source / "cmyk.jpg")
    image.convert("1").save(source / "bit.png")
    image.save(source / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    for name, size in {"dot": (1, 1), "thin": (1, 4000), "wide": (20_000, 10)}.items():
        Image.new("RGB", size, "red").save(source / f"{name}.png")
    arguments = [*model, "--input", str(source), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    for file in source.iterdir():
        overlay = Image.open(
            tmp_path / "out" / f"{file.stem}{'.jpg' if 'cmyk' in file.stem else '.png'}"
        )
        assert overlay.size == Image.open(file).size


def test_16_bits_and_truncation_are_one_line_each_and_the_rest_is_done(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(PHOTO[:, :, 0].astype(np.uint16) * 257).save(source / "deep.png")
    Image.fromarray(PHOTO).save(source / "good.png")
    Image.fromarray(PHOTO).save(source / "cut.png")
    (source / "cut.png").write_bytes((source / "cut.png").read_bytes()[:3000])
    (source / "empty.heic").touch()
    arguments = [*model, "--input", str(source), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if str(source) in line]
    assert [line.partition(":")[0] for line in lines] == [
        str(source / name) for name in ("cut.png", "deep.png", "empty.heic")
    ]
    assert {record["file_name"] for record in results(tmp_path / "out")} == {
        str(source / "good.png")
    }


def test_an_image_that_no_file_can_hold_the_results_of_is_one_line_and_the_rest_is_done(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    long_name = f"{'n' * 250}.png"  # of a file, but not of a folder with more behind it
    for name in (long_name, "z.png"):
        Image.fromarray(PHOTO).save(source / name)
    Image.new("RGB", (1_200_000, 2)).save(source / "a.png")
    arguments = [*model, "--input", str(source), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--instance-masks"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(lines) == 2
    assert lines[0].endswith("a.png cannot be written: 1200000x2 pixels are too many for .png")
    assert lines[1].endswith("n_masks cannot be written: File name too long")
    assert {record["file_name"] for record in results(tmp_path / "out")} == {str(source / "z.png")}
    assert (tmp_path / "out" / "z.png").is_file()


def test_a_long_class_name_is_cut_in_the_names_of_files(model: list[str], tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    names = ["å" * 500] * 3
    weights = save_weights(tiny_cfg(), tmp_path / "long.pth", class_names=names)
    arguments = [*model, "--weights", str(weights), "--input", str(tmp_path / "a.png")]
    assert cli.main([*arguments, "--output", str(tmp_path / "out"), "--instance-masks"]) == 0
    assert len(list((tmp_path / "out" / "a_masks").iterdir())) == len(results(tmp_path / "out"))


def test_an_interrupt_leaves_valid_results_of_what_was_done(
    model: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(path: Path, image: Any) -> None:
        if path.name == "b.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(images, "write_image", interrupted)
    output = tmp_path / "out"
    assert cli.main([*model, "--input", str(folder), "--output", str(output)]) == 130
    assert {record["image_id"] for record in results(output)} == {1, 2}
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere"], "nothing to predict on: --input nowhere does not exist"),
        (["--input", "EMPTY"], "none of the 1 files in it has the extension of an image or video"),
        (["--input", "a.png", "MODEL.MASK_ON", "False"], "--input MODEL.MASK_ON is a key"),
        (["--input", "a.png", "--output", "a.png/out"], "--output a.png/out cannot be written"),
        (["--input", "a.png", "--output", ""], "argument --output: expected a path, found nothing"),
        (["--input", "a.png", ""], "an --input is empty; is a variable of the shell not set?"),
        (["--input", "a.png", "--output", "."], "--output . is the folder of the input a.png"),
        (
            ["--input", "a.png", "--confidence", "2"],
            "--confidence is 2.0; expected a number from 0",
        ),
        (["--input", "a.png", "--confidence", "x"], "invalid float value: 'x'"),
        (
            ["--input", "a.png", "--labels", "some"],
            "the labels of overlays are 'some'; expected auto, all or none",
        ),
        (["--input", "a.png", "--fill", "-0.1"], "the fill of overlays is -0.1; expected a number"),
        (["--input", "a.png", "--fill", "nan"], "the fill of overlays is nan; expected a number"),
        (["--input", "a.png", "--fill", "inf"], "the fill of overlays is inf; expected a number"),
        (["--input", "a.png", "--fill", "half"], "invalid float value: 'half'"),
        (["--input", "a.png", "--weights", "w.pth"], "checkpoint w.pth does not exist"),
        (["--input", "a.png", "--config-file", "c.yaml"], "config file c.yaml does not exist"),
        (["--input", "a.png", "--", "MODEL.MASK_OM", "True"], "did you mean MODEL.MASK_ON"),
        (["--input", "a.png", "--", "MODEL.MASK_ON"], "must be pairs KEY VALUE"),
        (["--input", "a" * 300], "aaa does not exist"),
        (["--input", "9" * 23], "nothing to predict on: --input 99999999999999999999999 does not"),
        (["--input", "9" * 5000], "999 does not exist"),
        (["--input", "a.png", "--config-file", "a" * 300], "aaa does not exist"),
        (["--no-overlay"], "one of the arguments --input --images-of is required"),
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
    Path("EMPTY").mkdir()
    Path("EMPTY/README.md").touch()
    assert_refused([*model, "--output", "out", *arguments], message, capsys)


def test_an_overlay_never_replaces_the_file_that_an_input_is_a_link_to(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("out", "links"):
        (tmp_path / name).mkdir()
    Image.fromarray(PHOTO).save(tmp_path / "out" / "a.png")
    link = tmp_path / "links" / "a.png"
    link.symlink_to(tmp_path / "out" / "a.png")
    arguments = [*model, "--input", str(link), "--output"]
    assert cli.main([*arguments, str(tmp_path / "out")]) == 2
    assert f"out is the folder of the input {link}, which an overlay" in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open(link)), PHOTO)
    assert cli.main([*arguments, str(tmp_path / "other")]) == 0


@pytest.mark.parametrize("alone", [False, True])
def test_what_is_no_file_in_a_folder_is_not_passed_over(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    source = tmp_path / "in"
    (source / "folder.png").mkdir(parents=True)
    (source / "gone.png").symlink_to("nowhere.png")
    (source / "itself.png").symlink_to("itself.png")
    os.mkfifo(source / "pipe.png")
    if not alone:
        Image.fromarray(PHOTO).save(source / "a.png")
    arguments = [*model, "--input", str(source), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(source))]
    assert lines == [
        f"{source / 'gone.png'}: is a link to a file that is not there",
        f"{source / 'itself.png'}: cannot be read: Too many levels of symbolic links",
        f"{source / 'pipe.png'}: is no regular file",
    ]
    assert bool(results(tmp_path / "out")) is not alone


def test_an_output_folder_that_cannot_be_written_is_found_before_the_model_is_built(
    model: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(predict, "Predictor", build)
    (tmp_path / "file").touch()
    arguments = [*model, "--input", str(folder), "--output", str(tmp_path / "file" / "out")]
    assert cli.main(arguments) == 2


def test_a_full_disk_is_one_line_and_status_2(
    model: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    output = tmp_path / "out"
    assert cli.main([*model, "--input", str(folder), "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {output / 'a.jpg'} cannot be written: No space left on device"
    assert {record["image_id"] for record in results(output)} == {1}


def test_a_model_without_weights_is_not_predicted_with(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    arguments = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert cli.main([*model[:3], *arguments]) == 2
    assert "error: no weights to predict with; pass --weights FILE" in capsys.readouterr().err


def test_a_file_with_a_number_for_a_name_is_no_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("0").touch()
    assert [source.kind for source in find_sources(["0", "1"])] == ["image", "camera"]


def test_a_number_that_no_camera_can_have_is_the_name_of_a_file() -> None:
    sources = find_sources([str(2**31 - 1), str(2**31)])
    assert [source.kind for source in sources] == ["camera", "image"]


def test_a_missing_image_in_capitals_is_no_key() -> None:
    sources = find_sources([__file__, "IMG_1.JPG"])
    assert [source.name for source in sources] == [__file__, "IMG_1.JPG"]


def test_an_empty_result_is_an_empty_list(model: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (4000, 1)).save(tmp_path / "thin.png")
    arguments = [*model, "--input", str(tmp_path / "thin.png"), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert results(tmp_path / "out") == []
    assert_empty(Predictor(tiny_cfg(), model[4])(tmp_path / "thin.png"), 1, 4000)
