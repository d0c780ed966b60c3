"""Files of results, each read back by a reader of its own."""

import csv
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import roifile
import shapely
import shapely.geometry
import tifffile
from detectron2.utils import logger as detectron2_logger
from PIL import Image
from skimage.measure import regionprops_table

from instseg.categories import Categories
from instseg.data.pixel_size import pixel_size
from instseg.errors import ConfigError
from instseg.masks import CroppedMasks, as_text, encode
from instseg.predict.earlier import is_ours
from instseg.predict.formats import FORMATS, ImageResult, opened, parse
from tests.data.test_pixel_size import write_tiff

HEIGHT, WIDTH = 40, 50
CATEGORIES = Categories((7, 3), ("cell, large", "debris"))


def masks() -> np.ndarray:
    """A square, a ring, two parts at a corner and far away, one pixel, one that covers others."""
    dense = np.zeros((6, HEIGHT, WIDTH), dtype=bool)
    dense[0, 2:10, 3:9] = True
    dense[1, 10:20, 20:32] = True
    dense[1, 12:16, 22:25] = False
    dense[2, 30:34, 0:4] = dense[2, 34:37, 4:6] = dense[2, 35:40, 44:50] = True
    dense[3, 0, WIDTH - 1] = True
    dense[4, 0:12, 0:15] = True
    return dense


DENSE = masks()
"""The last one is empty."""


def image_result(
    dense: np.ndarray = DENSE, stem: str = "a", path: Path | None = None, **changes: Any
) -> ImageResult:
    records = [
        {
            "category_id": CATEGORIES.ids[number % 2],
            "category_name": CATEGORIES.names[number % 2],
            "bbox": mask_util.toBbox(encode(mask)).tolist(),
            "area": int(mask.sum()),
            "score": 0.9 - number / 100,
            "segmentation": as_text(encode(mask)),
        }
        for number, mask in enumerate(dense)
    ]
    height, width = dense.shape[1:]
    cropped = CroppedMasks.from_dense(dense)
    fields = dict(image_id=1, file_name=f"in/{stem}.png", stem=stem, height=height, width=width)
    return ImageResult(**(fields | dict(records=records, masks=cropped, path=path) | changes))


def write(name: str, output: Path, *results: ImageResult) -> None:
    with opened([name], output, CATEGORIES, {"config": "c"}) as (writer,):
        for result in results:
            writer.add(result)


def drawn(rings: list[Any], height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The pixels inside an odd number of rings, drawn by pycocotools."""
    inside = np.zeros((height, width), dtype=bool)
    for ring in rings:
        flat = [np.asarray(ring, dtype=float).ravel().tolist()]
        inside ^= mask_util.decode(mask_util.frPyObjects(flat, height, width))[:, :, 0] > 0
    return inside


def test_a_label_image_has_the_higher_score_on_top(tmp_path: Path) -> None:
    write("labels", tmp_path, image_result())
    labels = tifffile.imread(tmp_path / "a_labels.tif")
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    for number in reversed(range(len(DENSE))):
        expected[DENSE[number]] = number + 1
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a_labels.tif")), expected)
    assert is_ours(tmp_path / "a_labels.tif")


def test_a_label_image_of_many_instances_has_32_bits(tmp_path: Path) -> None:
    count = 2**16
    crops, corners = [np.ones((1, 1), bool)] * count, [(k % 300, k // 300) for k in range(count)]
    cropped = CroppedMasks.from_crops(crops, corners, (300, 300))
    record = {"category_id": 7, "score": 1.0}
    result = image_result(height=300, width=300, masks=cropped, records=[record] * count)
    write("labels", tmp_path, result)
    labels = tifffile.imread(tmp_path / "a_labels.tif")
    assert labels.dtype == np.uint32 and labels.max() == count
    assert (tmp_path / "a_labels.tif").stat().st_size < labels.nbytes / 2


@pytest.mark.parametrize("classic", [0, 2**32])
def test_a_label_image_of_any_size_is_known_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classic: int
) -> None:
    monkeypatch.setattr("instseg.predict.formats.labels._CLASSIC", classic)
    write("labels", tmp_path, image_result())
    with tifffile.TiffFile(tmp_path / "a_labels.tif") as tiff:
        assert tiff.is_bigtiff == (classic == 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert is_ours(tmp_path / "a_labels.tif")


@pytest.mark.parametrize(("strip", "band"), [(1, 1), (500, 1200), (700, 10**9)])
def test_a_label_image_is_the_same_in_parts_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strip: int, band: int
) -> None:
    monkeypatch.setattr("instseg.predict.formats.labels._STRIP", strip)
    monkeypatch.setattr("instseg.predict.formats.labels._BAND", band)
    write("labels", tmp_path, image_result())
    expected = CroppedMasks.from_dense(DENSE).to_label_image()
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a_labels.tif"), expected)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a_labels.tif")), expected)


def test_a_label_image_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    side = 8192  # 128 MiB
    cropped = CroppedMasks.from_crops([np.ones((30, 20), bool)], [(8000, 8100)], (side, side))
    records = image_result().records[:1]
    result = image_result(masks=cropped, records=records, height=side, width=side)
    tracemalloc.start()
    write("labels", tmp_path, result)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**25
    labels = tifffile.imread(tmp_path / "a_labels.tif")
    assert (
        labels.shape == (side, side) and labels.sum() == labels[8100:8130, 8000:8020].sum() == 600
    )


@pytest.mark.parametrize("kind", ["ome", "imagej", "cm"])
def test_a_label_image_takes_over_the_size_of_a_pixel(tmp_path: Path, kind: str) -> None:
    write_tiff(tmp_path / "a.tif", kind)
    write("labels", tmp_path, image_result(path=tmp_path / "a.tif"))
    assert pixel_size(tmp_path / "a_labels.tif") == pytest.approx((0.5, 0.25))
    with tifffile.TiffFile(tmp_path / "a_labels.tif") as tiff:
        tags = tiff.pages[0].tags
        assert tags["ResolutionUnit"].value == 3
        assert tags["XResolution"].value[0] / tags["XResolution"].value[1] == 20_000


def test_every_geojson_feature_is_a_valid_detection(tmp_path: Path) -> None:
    write("geojson", tmp_path, image_result())
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection" and len(content["features"]) == 5
    colours = set()
    for mask, feature in zip(DENSE, content["features"], strict=False):
        shape = shapely.geometry.shape(feature["geometry"])
        assert feature["type"] == "Feature" and shape.is_valid and shape.area == mask.sum()
        y, x = np.indices(mask.shape) + 0.5
        np.testing.assert_array_equal(shapely.contains_xy(shape, x, y), mask)
        assert feature["properties"]["objectType"] == "detection"
        kind = feature["properties"]["classification"]
        colours.add((kind["name"], tuple(kind["color"])))
    assert {name for name, _ in colours} == set(CATEGORIES.names) and len(colours) == 2
    kinds = [feature["geometry"]["type"] for feature in content["features"]]
    assert kinds == ["Polygon", "Polygon", "MultiPolygon", "Polygon", "Polygon"]
    assert len(content["features"][1]["geometry"]["coordinates"]) == 2  # a hole
    assert content["features"][0]["properties"]["measurements"] == [{"name": "Score", "value": 0.9}]
    assert is_ours(tmp_path / "a.geojson")


def test_an_image_without_instances_has_an_empty_collection(tmp_path: Path) -> None:
    write("geojson", tmp_path, image_result(DENSE[:0]))
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []
    assert is_ours(tmp_path / "a.geojson")


def test_every_roi_covers_its_mask(tmp_path: Path) -> None:
    write("imagej", tmp_path, image_result())
    rois = roifile.roiread(tmp_path / "a_rois.zip")
    names = ["0001_cell_large", "0002_debris", "0003_cell_large", "0004_debris", "0005_cell_large"]
    assert [roi.name for roi in rois] == names
    for mask, roi in zip(DENSE, rois, strict=False):
        np.testing.assert_array_equal(drawn(roi.coordinates(multi=True)), mask)
        assert not roi.subpixelresolution
        rows, columns = np.nonzero(mask)
        assert (roi.left, roi.top) == (columns.min(), rows.min())
    assert [roi.composite for roi in rois] == [False, True, True, False, False]
    assert zipfile.ZipFile(tmp_path / "a_rois.zip").testzip() is None
    assert is_ours(tmp_path / "a_rois.zip")


def test_a_roi_may_lie_beyond_the_numbers_of_imagejs_polygons(tmp_path: Path) -> None:
    cropped = CroppedMasks.from_crops([np.ones((2, 3), bool)], [(40_000, 5)], (10, 50_000))
    records = image_result().records[:1]
    write("imagej", tmp_path, image_result(masks=cropped, records=records, width=50_000))
    roi = roifile.roiread(tmp_path / "a_rois.zip")
    (roi,) = roi if isinstance(roi, list) else [roi]
    assert roi.coordinates(multi=True)[0].max() == 40_003


def test_a_yolo_line_is_the_outline_of_the_largest_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detectron2_logger._LOG_COUNTER.clear()
    write("yolo", tmp_path, image_result())
    assert "only the largest of 3 parts of an instance is written" in caplog.text
    lines = (tmp_path / "a.txt").read_text().splitlines()
    assert len(lines) == 5
    for number, (mask, line) in enumerate(zip(DENSE, lines, strict=False)):
        kind, *values = line.split()
        assert int(kind) == number % 2
        points = np.array(values, dtype=float).reshape(-1, 2)
        assert points.min() >= 0 and points.max() <= 1
        expected = mask.copy()
        if number == 1:
            expected[12:16, 22:25] = True  # holes are filled
        if number == 2:
            expected[:34] &= False
            expected[:, :44] = False
            expected[35:40, 44:50] = True
        np.testing.assert_array_equal(drawn([points * (WIDTH, HEIGHT)]), expected)
    assert is_ours(tmp_path / "a.txt")


def test_a_yolo_file_of_nothing_is_not_written_and_a_users_stays(tmp_path: Path) -> None:
    write("yolo", tmp_path, image_result(DENSE[:0]))
    assert not (tmp_path / "a.txt").exists()
    (tmp_path / "a.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.2\n")
    assert not is_ours(tmp_path / "a.txt")
    write("yolo", tmp_path, image_result(DENSE[:0]))
    assert (tmp_path / "a.txt").exists()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_measurements_are_those_of_scikit_image_on_the_whole_image(tmp_path: Path) -> None:
    dense = DENSE[:4]
    path = tmp_path / "in.png"
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    write("csv", tmp_path, image_result(dense, path=path))
    rows = read_csv(tmp_path / "measurements.csv")
    labels = np.zeros((HEIGHT, WIDTH), dtype=int)
    for number, mask in enumerate(dense):
        labels[mask] = number + 1
    names = ("area", "centroid", "bbox", "eccentricity", "solidity", "intensity_mean")
    table = regionprops_table(labels, pixels, properties=names)
    columns = {
        "area_px": table["area"],
        "centroid_x_px": table["centroid-1"],
        "centroid_y_px": table["centroid-0"],
        "bbox_x_px": table["bbox-1"],
        "bbox_y_px": table["bbox-0"],
        "bbox_width_px": table["bbox-3"] - table["bbox-1"],
        "bbox_height_px": table["bbox-2"] - table["bbox-0"],
        "eccentricity": table["eccentricity"],
        "solidity": table["solidity"],
    }
    for channel in range(3):
        mean = table[f"intensity_mean-{channel}"]
        columns[f"mean_intensity_{channel + 1}"] = mean
        columns[f"sum_intensity_{channel + 1}"] = mean * table["area"]
    for name, values in columns.items():
        np.testing.assert_allclose([float(row[name]) for row in rows], values, err_msg=name)
    assert [row["instance"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["class"] for row in rows] == ["cell, large", "debris"] * 2
    assert {row["image"] for row in rows} == {"in/a.png"} and rows[0]["score"] == "0.9"
    assert "area_um2" not in rows[0]
    assert is_ours(tmp_path / "measurements.csv")


def test_measurements_of_images_that_differ_have_all_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detectron2_logger._LOG_COUNTER.clear()
    write_tiff(tmp_path / "a.tif", "imagej")
    results = [
        image_result(stem="b", path=None),
        image_result(path=tmp_path / "a.tif"),
    ]
    write("csv", tmp_path, *results)
    without, *_, empty = read_csv(tmp_path / "measurements.csv")[:6]
    assert without["mean_intensity"] == without["area_um2"] == ""
    assert empty["area_px"] == "0" and empty["centroid_x_px"] == ""
    first = read_csv(tmp_path / "measurements.csv")[6]
    assert float(first["area_um2"]) == pytest.approx(48 * 0.125)
    assert float(first["centroid_x_um"]) == pytest.approx(float(first["centroid_x_px"]) * 0.5)
    assert float(first["bbox_height_um"]) == pytest.approx(8 * 0.25)
    assert (first["pixel_width_um"], first["pixel_height_um"]) == ("0.5", "0.25")
    pixels = tifffile.imread(tmp_path / "a.tif")[DENSE[0]]
    assert float(first["mean_intensity"]) == pytest.approx(pixels.mean())
    assert float(first["sum_intensity"]) == pixels.sum()
    assert "b.png: no intensities are measured: there is no such file" in caplog.text


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda path: tifffile.imwrite(path, np.zeros((9, 9), np.uint8)), "its size is not "),
        (lambda path: path.write_text("<html>"), "is HTML"),
    ],
)
def test_a_file_that_is_another_by_now_is_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, save: Any, reason: str
) -> None:
    detectron2_logger._LOG_COUNTER.clear()
    save(tmp_path / "a.tif")
    write("csv", tmp_path, image_result(path=tmp_path / "a.tif"))
    row = read_csv(tmp_path / "measurements.csv")[0]
    assert "mean_intensity" not in row and row["area_px"] == "48"
    assert "no intensities are measured: " in caplog.text and reason in caplog.text


def test_intensities_are_those_of_the_file_and_its_page(tmp_path: Path) -> None:
    """16 bits, two channels and three pages."""
    path = tmp_path / "a.ome.tif"
    pixels = np.random.default_rng(0).integers(0, 2**16, (3, 2, HEIGHT, WIDTH), dtype=np.uint16)
    metadata = {"axes": "ZCYX", "PhysicalSizeX": 2.0, "PhysicalSizeY": 3.0}
    tifffile.imwrite(path, pixels, ome=True, metadata=metadata, photometric="minisblack")
    write("csv", tmp_path, image_result(path=path, page=1))
    row = read_csv(tmp_path / "measurements.csv")[2]
    means = pixels[1][:, DENSE[2]].mean(axis=1)
    assert [float(row[f"mean_intensity_{n}"]) for n in (1, 2)] == pytest.approx(means.tolist())
    assert (row["page"], row["pixel_width_um"], row["pixel_height_um"]) == ("1", "2.0", "3.0")


def test_transparency_is_no_channel_and_grey_is_one(tmp_path: Path) -> None:
    for mode, names in (
        ("RGBA", {f"mean_intensity_{n}" for n in (1, 2, 3)}),
        ("L", {"mean_intensity"}),
    ):
        Image.new(mode, (WIDTH, HEIGHT)).save(tmp_path / "a.png")
        write("csv", tmp_path, image_result(path=tmp_path / "a.png"))
        row = read_csv(tmp_path / "measurements.csv")[0]
        assert {name for name in row if name.startswith("mean")} == names


def test_no_measurement_leaves_a_header_and_no_other_file(tmp_path: Path) -> None:
    write("csv", tmp_path, image_result(DENSE[:0]))
    assert (tmp_path / "measurements.csv").read_text() == "image,instance,class,score,area_px\n"
    assert [path.name for path in tmp_path.iterdir()] == ["measurements.csv"]


def test_an_error_keeps_the_measurements_that_were_made(tmp_path: Path) -> None:
    with pytest.raises(KeyError), opened(["csv"], tmp_path, CATEGORIES, {}) as (writer,):
        writer.add(image_result())
        raise KeyError
    assert len(read_csv(tmp_path / "measurements.csv")) == 6


def test_results_without_masks_are_refused_by_all_other_formats(tmp_path: Path) -> None:
    for name in FORMATS:
        if name != "coco":
            with pytest.raises(ConfigError, match=r"in/a\.png: these results have no masks"):
                write(name, tmp_path, image_result(masks=None))


@pytest.mark.parametrize("text", ["", "coco,", "png", "labels,PNG", "coco labels"])
def test_an_unknown_format_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(ConfigError, match="expected one or more of coco, labels, csv, geojson"):
        parse(text, "--format")


def test_formats_are_taken_once_each() -> None:
    assert parse("labels, coco,labels", "--to") == ("labels", "coco")


@pytest.mark.parametrize(
    ("name", "package"), [("labels", "tifffile"), ("csv", "skimage"), ("imagej", "roifile")]
)
def test_a_missing_package_is_named_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setattr("instseg.optional.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{package}, .* pip install 'instseg\[microscopy\]'"):
        parse(name, "--format")


def test_masks_are_never_made_as_large_as_the_image(tmp_path: Path) -> None:
    """An image of 10 gigapixels: any dense mask would take 10 GB."""
    side = 100_000
    crop = np.ones((30, 20), bool)
    cropped = CroppedMasks.from_crops([crop], [(99_000, 98_000)], (side, side))
    records = image_result().records[:1]
    result = image_result(masks=cropped, records=records, height=side, width=side)
    for name in ("csv", "geojson", "imagej", "yolo"):
        write(name, tmp_path, result)
    (row,) = read_csv(tmp_path / "measurements.csv")
    assert (row["area_px"], row["bbox_x_px"]) == ("600", "99000")
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert shapely.geometry.shape(feature["geometry"]).bounds == (99_000, 98_000, 99_020, 98_030)
