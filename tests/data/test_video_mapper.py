"""Frames with an earlier one and the flow between them, and the files that flows come from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import instseg
from instseg.config.nodes import CfgNode
from instseg.data.augmentations import CanvasTransform, PhotometricTransform
from instseg.data.flow import decode_flow, encode_flow, read_flow, transform_flow
from instseg.data.mappers import build_train_mapper
from instseg.data.readers import flying_chairs
from instseg.data.synthetic import shapes_video
from instseg.data.video_mapper import VideoMapper
from instseg.errors import ConfigError, DatasetError
from instseg.training.trainer import Trainer
from tests.support.video_data import warp

SSD = ["INPUT.AUGMENTATION", "ssd", "INPUT.SQUARE_SIZE", 192, "INPUT.SSD_EXPAND_RATIO", 1.5]
VIDEO = ["INPUT.VIDEO_REFERENCE", (2, 5), "INPUT.VIDEO_FLOW", True]


@pytest.fixture(autouse=True)
def _seed() -> None:
    np.random.seed(0)
    torch.manual_seed(0)


def config_with(*overrides: Any) -> CfgNode:
    return instseg.load_cfg("yolact/yolact_shapes.yaml", [*SSD, *VIDEO, *overrides])


def mapper_with(*overrides: Any, augment: bool = True) -> VideoMapper:
    mapper = build_train_mapper(config_with(*overrides), augment=augment)
    assert isinstance(mapper.mapper, VideoMapper)
    return mapper.mapper


def frame(index: int, clip: int = 0) -> dict[str, Any]:
    return shapes_video.load("shapes_video_val", 128, [clip])[index]


def numbered(height: int, width: int) -> np.ndarray:
    """A flow whose every value is different."""
    return np.arange(height * width * 2, dtype=np.float32).reshape(height, width, 2)


def test_a_flow_file_holds_what_was_written_and_unknown_stays_unknown(tmp_path: Path) -> None:
    flow = numbered(3, 5) - 7.25
    flow[1, 2] = np.nan
    (tmp_path / "a.flo").write_bytes(encode_flow(flow))
    np.testing.assert_array_equal(read_flow(str(tmp_path / "a.flo")), flow)


def test_a_flow_file_is_laid_out_as_middlebury_defines_it() -> None:
    """Tag, width, height, then u and v of each pixel, row by row; 1e10 is unknown."""
    values = np.array([1, 2, 3, 4, 1e10, 0], "<f4")
    content = b"PIEH" + np.array([3, 1], "<i4").tobytes() + values.tobytes()
    flow = decode_flow(content, "a.flo")
    np.testing.assert_array_equal(flow, [[[1, 2], [3, 4], [np.nan, np.nan]]])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no .flo file"),
        (b"P6 3 1 255 ", "no .flo file"),
        (b"PIEH" + np.array([3, 1], "<i4").tobytes() + bytes(23), "damaged"),
        (b"PIEH" + np.array([-3, 1], "<i4").tobytes(), "claims to be -3 x 1"),
        (b"PIEH" + np.array([2**30, 2**30], "<i4").tobytes(), "claims to be"),
    ],
)
def test_what_is_no_flow_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.flo").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"bad\.flo .*{reason}"):
        read_flow(str(tmp_path / "bad.flo"))


def test_a_missing_flow_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.flo cannot be read"):
        read_flow(str(tmp_path / "none.flo"))


def test_mirroring_turns_the_flow_around() -> None:
    flow = transform_flow(numbered(2, 3), T.TransformList([T.HFlipTransform(3)]))
    np.testing.assert_array_equal(flow[0, 0], [-4, 5])
    flow = transform_flow(numbered(2, 3), T.TransformList([T.VFlipTransform(2)]))
    np.testing.assert_array_equal(flow[0, 0], [6, -7])


def test_cropping_and_expanding_move_the_flow_without_changing_it() -> None:
    steps = [T.CropTransform(1, 0, 2, 2, 3, 2), CanvasTransform(1, 2, 4, 5)]
    flow = transform_flow(numbered(2, 3), T.TransformList(steps))
    assert flow.shape == (5, 4, 2)
    np.testing.assert_array_equal(flow[2:4, 1:3], numbered(2, 3)[:, 1:])
    assert np.isnan(flow).sum() == 2 * (20 - 4)


def test_stretching_scales_x_and_y_on_their_own() -> None:
    resize = T.ResizeTransform(2, 2, 6, 4, Image.Resampling.BILINEAR)
    flow = transform_flow(numbered(2, 2), T.TransformList([resize]))
    assert flow.shape == (6, 4, 2)
    np.testing.assert_array_equal(flow[0, 0], [0 * 2, 1 * 3])
    np.testing.assert_array_equal(flow[5, 3], [6 * 2, 7 * 3])


def test_colours_leave_the_flow_alone() -> None:
    steps = T.TransformList([PhotometricTransform("RGB", hue=20), T.NoOpTransform()])
    np.testing.assert_array_equal(transform_flow(numbered(2, 3), steps), numbered(2, 3))


def test_a_transform_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="RotationTransform"):
        transform_flow(numbered(4, 4), T.TransformList([T.RotationTransform(4, 4, 30)]))


def test_a_sample_has_two_images_instances_and_the_flow_all_of_one_size() -> None:
    sample = mapper_with()(frame(12))
    assert sample["image"].shape == sample["reference_image"].shape == (3, 192, 192)
    assert sample["image"].dtype == sample["reference_image"].dtype == torch.float32
    assert sample["flow"].shape == (2, 192, 192) and sample["flow"].dtype == torch.float32
    assert sample["instances"].image_size == (192, 192) and len(sample["instances"]) > 0
    assert "reference_files" not in sample and "flow_files" not in sample


TURNED = ["INPUT.RANDOM_ROTATION", (-180.0, 180.0), "INPUT.RANDOM_SCALE", (0.8, 1.3)]
TURNED += ["INPUT.RANDOM_DIHEDRAL", True, "INPUT.RANDOM_GAMMA", (0.7, 1.4)]


@pytest.mark.parametrize("words", [[], TURNED], ids=["ssd", "turned"])
@settings(max_examples=12)
@given(seed=st.integers(0, 1000), index=st.integers(5, 19))
def test_the_flow_fits_the_images_after_every_augmentation(
    words: list[Any], seed: int, index: int
) -> None:
    """Known flow warps the reference onto the frame: both had the same crop, mirror
    and colours, and the flow followed."""
    np.random.seed(seed)
    sample = mapper_with(*words)(frame(index, clip=6))
    image, reference = sample["image"][None], sample["reference_image"][None]
    flow = sample["flow"]
    y, x = torch.meshgrid(torch.arange(192), torch.arange(192), indexing="ij")
    at = torch.stack([x, y]) + flow
    known = ((at >= 0) & (at <= 191)).all(dim=0)
    assert known.any()
    warped = warp(reference, flow.nan_to_num()[None])
    off, without = ((z - image).abs().mean(dim=1)[0][known].mean() for z in (warped, reference))
    assert off < 0.6 * without


def test_without_augmentation_the_sample_is_the_frame_the_reference_and_their_flow() -> None:
    mapper = mapper_with("INPUT.VIDEO_REFERENCE", (3, 3), augment=False)
    sample = mapper(frame(12))
    for key, number in (("image", 12), ("reference_image", 9)):
        image = shapes_video.image("shapes_video_val", 0, number, 128)
        assert (sample[key].permute(1, 2, 0).numpy() == image).all()
    flow = shapes_video.flow("shapes_video_val", 0, 12, 9, 128)
    np.testing.assert_array_equal(sample["flow"].permute(1, 2, 0), flow)


def test_references_are_drawn_from_the_whole_range() -> None:
    mapper = mapper_with("INPUT.VIDEO_FLOW", False, augment=False)
    images = {
        shapes_video.image("shapes_video_val", 0, 12 - distance, 128).tobytes(): distance
        for distance in range(1, 8)
    }
    drawn = {
        images[mapper(frame(12))["reference_image"].permute(1, 2, 0).numpy().tobytes()]
        for _ in range(30)
    }
    assert drawn == {2, 3, 4, 5}


@pytest.mark.parametrize("index", [0, 1])
def test_early_frames_take_the_first_frame_of_their_clip(index: int) -> None:
    sample = mapper_with(augment=False)(frame(index))
    first = shapes_video.image("shapes_video_val", 0, 0, 128)
    assert (sample["reference_image"].permute(1, 2, 0).numpy() == first).all()
    assert bool((sample["flow"] == 0).all()) == (index == 0)


def test_a_still_image_is_a_clip_of_one_frame() -> None:
    instseg.get_cfg()
    sample = mapper_with()(DatasetCatalog.get("shapes_val")[0])
    assert torch.equal(sample["image"], sample["reference_image"])
    assert (sample["flow"].nan_to_num() == 0).all()


def test_a_reference_of_another_size_is_refused_with_both_names(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "small.png")
    record = {**frame(1), "reference_files": [str(tmp_path / "small.png")]}
    with pytest.raises(DatasetError, match=r"small\.png is 20 x 30 .*shapes-video.* 128 x 128"):
        mapper_with()(record)


def test_a_flow_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.flo").write_bytes(encode_flow(numbered(4, 6)))
    with pytest.raises(DatasetError, match=r"a\.flo is \(6, 4\)"):
        mapper_with()({**frame(1), "flow_files": [str(tmp_path / "a.flo")]})


def video_cfg(tmp_path: Path, *overrides: Any) -> Any:
    common = ["OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0]
    return instseg.load_cfg("yolact/yolact_shapes.yaml", [*common, *SSD, *VIDEO, *overrides])


def test_still_images_alone_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shapes_val has still images only"):
        Trainer.build_train_loader(video_cfg(tmp_path, "DATASETS.TRAIN", ("shapes_val",)))


def test_a_data_set_without_flow_is_refused_before_training(tmp_path: Path) -> None:
    instseg.get_cfg()
    records = [{k: v for k, v in frame(3).items() if k != "flow_files"}]
    DatasetCatalog.register("test_no_flow", lambda: records)
    MetadataCatalog.get("test_no_flow").thing_classes = ["circle", "square", "triangle"]
    try:
        with pytest.raises(ConfigError, match="does not know the flow"):
            Trainer.build_train_loader(video_cfg(tmp_path, "DATASETS.TRAIN", ("test_no_flow",)))
    finally:
        DatasetCatalog.remove("test_no_flow")
        MetadataCatalog.remove("test_no_flow")


def test_the_train_loader_gives_video_samples(tmp_path: Path) -> None:
    cfg = video_cfg(tmp_path, "DATASETS.TRAIN", ("shapes_video_val",), "SOLVER.IMS_PER_BATCH", 2)
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len(batch) == 2 and all("reference_image" in sample for sample in batch)


@pytest.mark.parametrize("value", [(2,), (0, 3), (5, 2), (2, 11), (1.5, 2)])
def test_a_range_of_references_that_makes_no_sense_is_refused(value: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"INPUT\.VIDEO_REFERENCE is .*between 1 and 10"):
        config_with("INPUT.VIDEO_REFERENCE", value)


def test_videos_need_the_augmentations_whose_flow_is_known() -> None:
    with pytest.raises(ConfigError, match="ssd, which INPUT.VIDEO_REFERENCE needs"):
        instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", VIDEO)


@pytest.fixture
def chairs(tmp_path: Path) -> Path:
    """Three pairs as released; the first and the third train."""
    root = tmp_path / flying_chairs.FOLDER
    (root / "data").mkdir(parents=True)
    (root / flying_chairs.SPLIT_FILE).write_text("1\n2\n1\n")
    random = np.random.default_rng(0)
    for number in (1, 2, 3):
        for part in ("img1", "img2"):
            pixels = random.integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / "data" / f"{number:05d}_{part}.ppm")
        flow = encode_flow(numbered(24, 32) * number)
        (root / "data" / f"{number:05d}_flow.flo").write_bytes(flow)
    return root


def test_flying_chairs_are_read_as_released(chairs: Path) -> None:
    train, val = (flying_chairs.load("x", str(chairs), split) for split in ("train", "val"))
    assert [r["image_id"] for r in train] == [1, 3] and [r["image_id"] for r in val] == [2]
    assert (val[0]["height"], val[0]["width"]) == (24, 32)


def test_a_pair_of_chairs_becomes_a_sample_with_its_flow(chairs: Path) -> None:
    (record,) = flying_chairs.load("x", str(chairs), "val")
    sample = mapper_with("INPUT.VIDEO_REFERENCE", (1, 1), augment=False)(record)
    for key, part in (("image", "img1"), ("reference_image", "img2")):
        image = np.asarray(Image.open(chairs / "data" / f"00002_{part}.ppm"))
        assert (sample[key].permute(1, 2, 0).numpy() == image).all()
    np.testing.assert_array_equal(sample["flow"].permute(1, 2, 0), numbered(24, 32) * 2)
    assert len(sample["instances"]) == 0


def test_chairs_are_trained_on_although_they_have_no_instances(
    chairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        DatasetCatalog.remove(f"flying_chairs_{split}")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    try:
        chosen = ("DATASETS.TRAIN", ("flying_chairs_train",), "SOLVER.IMS_PER_BATCH", 2)
        cfg = video_cfg(tmp_path, *chosen)
        batch = next(iter(Trainer.build_train_loader(cfg)))
    finally:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"flying_chairs_{split}")
    assert all(sample["flow"].shape == (2, 192, 192) for sample in batch)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (flying_chairs.SPLIT_FILE, None, "there is no file"),
        (flying_chairs.SPLIT_FILE, b"1\n3\n1\n", "has '3'; expected a line with 1"),
        (flying_chairs.SPLIT_FILE, b"\xff\xfe", "is no list of marks"),
        (flying_chairs.SPLIT_FILE, b"2\n2\n2\n", "gives no pair the mark 1"),
        (flying_chairs.SPLIT_FILE, b"1\n2\n1\n1\n", "00004_img1.ppm"),
        ("data/00003_flow.flo", None, "00003_flow.flo; set DETECTRON2_DATASETS"),
        ("data/00003_img1.ppm", b"<html>", "no PPM image"),
        ("data/00003_img1.ppm", b"", "no PPM image"),
    ],
)
def test_damaged_chairs_are_refused(
    chairs: Path, file: str, content: bytes | None, reason: str
) -> None:
    (chairs / file).unlink()
    if content is not None:
        (chairs / file).write_bytes(content)
    with pytest.raises(DatasetError, match=reason):
        flying_chairs.load("chairs", str(chairs), "train")
