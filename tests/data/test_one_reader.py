"""One reader of images for training, evaluation, validation losses, prediction and check-data."""

import base64
import copy
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.file_io import PathManager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from iopath.common.file_io import PathHandler
from PIL import Image

import instseg
from instseg import Predictor
from instseg.check_data import check_data
from instseg.data import image_headers, images
from instseg.data.images import image_size, read_image
from instseg.data.mappers import build_test_mapper, build_train_mapper
from instseg.data.pillow_images import convert_image
from instseg.data.readers.coco_check import Kind
from instseg.data.samples import build_sample_loader
from instseg.errors import ImageError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]
DEEP = GREY.astype(np.uint16) * 257
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("INPUT.MIN_SIZE_TEST", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 5),
]
ONE_CHANNEL = ("MODEL.PIXEL_MEAN", "[110.0]", "MODEL.PIXEL_STD", "[50.0]")
SSD = ["INPUT.AUGMENTATION", "ssd", "INPUT.SQUARE_SIZE", 32]
# 64 x 64 grey pixels of 10 bits, which Pillow cannot write, by SVT-AV1.
DEEP_AVIF = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUIAAAD5bWV0YQAAAAAAAAAvaGRscgAAAAAAAAAAcGljdAAA"
    "AAAAAAAAAAAAAFBpY3R1cmVIYW5kbGVyAAAAAA5waXRtAAAAAAABAAAAHmlsb2MAAAAARAAAAQABAAAAAQAAASEA"
    "AAAdAAAAKGlpbmYAAAAAAAEAAAAaaW5mZQIAAAAAAQAAYXYwMUNvbG9yAAAAAGppcHJwAAAAS2lwY28AAAAUaXNw"
    "ZQAAAAAAAABAAAAAQAAAABBwaXhpAAAAAAMKCgoAAAAMYXYxQ4EATAAAAAATY29scm5jbHgAAgACAAIAAAAAF2lw"
    "bWEAAAAAAAAAAQABBAECgwQAAAAlbWRhdAoKAAAAAq//jV84CDIPEAC6AgssUUEAAAgAldCC"
)
VIDEO = [*SSD, "INPUT.VIDEO_REFERENCE", (1, 1)]


@functools.cache
def config(*overrides: Any) -> CfgNode:
    return instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", [*SMALL, *overrides])


def flip_bits(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]


def png_chunks(content: bytes) -> dict[bytes, tuple[int, int]]:
    """Kind of chunk → where its data begin and end."""
    position, chunks = 8, {}
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        chunks[kind] = position + 8, position + 8 + length
        position += 12 + length
    return chunks


def save_pillow(path: Path, pixels: Any, **options: Any) -> None:
    Image.fromarray(pixels).save(path, **options)


def save_damaged_png(path: Path, position: int) -> None:
    """Change a byte at ``position`` of its compressed pixels, or of their checksum from -1 on."""
    save_pillow(path, RGB)
    start, end = png_chunks(path.read_bytes())[b"IDAT"]
    path.write_bytes(flip_bits(path.read_bytes(), end if position < 0 else start + position))


def save_cut_off(path: Path) -> None:
    save_pillow(path, RGB, quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_pages(path: Path, count: int) -> None:
    pages = [Image.fromarray(RGB)] * count
    pages[0].save(path, save_all=True, append_images=pages[1:])


def save_float_colour(path: Path) -> None:
    assert cv2.imwrite(str(path), (RGB / 255).astype(np.float32))


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "16 bits of grey, PNG": ("png", lambda p: save_pillow(p, DEEP), "expected 8 bits per channel"),
    "16 bits of grey, TIFF": ("tif", lambda p: save_pillow(p, DEEP), "expected 8 bits per channel"),
    "10 bits of colour, AVIF": (
        "avif",
        lambda p: p.write_bytes(DEEP_AVIF),
        "expected 8 bits per channel, found RGB with 10 bits",
    ),
    "16 bits of grey, PGM": (
        "pgm",
        lambda p: cv2.imwrite(str(p), DEEP),
        "expected 8 bits per channel",
    ),
    "int32": ("tif", lambda p: save_pillow(p, DEEP.astype(np.int32)), "expected 8 bits"),
    "floats in 0..1": (
        "tif",
        lambda p: save_pillow(p, (GREY / 255).astype(np.float32)),
        "expected 8 bits per channel, found .*float32 with values of 0",
    ),
    "floats in colour": ("tif", save_float_colour, "expected 8 bits per channel, found .*float32"),
    "16 bits of colour, PNG": (
        "png",
        lambda p: cv2.imwrite(str(p), RGB.astype(np.uint16) * 257),
        "found (RGB with 16 bits|3 channels of uint16)",
    ),
    "16 bits of colour, TIFF": (
        "tif",
        lambda p: cv2.imwrite(str(p), RGB.astype(np.uint16) * 257),
        "found .*uint16 with values of 0 to 65535",
    ),
    "damaged pixels": ("png", lambda p: save_damaged_png(p, 900), "checksum of its chunk IDAT"),
    "a damaged checksum": ("png", lambda p: save_damaged_png(p, -1), "checksum of its chunk IDAT"),
    "a JPEG cut off": ("jpg", save_cut_off, "cannot be decoded: .*truncated"),
    "a PNG cut off": ("png", save_cut_off, "cannot be decoded: .*truncated"),
    "a stack": ("tif", lambda p: save_pages(p, 3), "a TIFF of 3 images; expected one.*split it"),
}


def through_training(file: str) -> None:
    build_train_mapper(config(), augment=True)(record(file))


def through_validation_losses(file: str) -> None:
    build_train_mapper(config(), augment=False)(record(file))


def through_evaluation(file: str) -> None:
    build_test_mapper(config())(record(file))


def through_ssd(file: str) -> None:
    build_train_mapper(config(*SSD), augment=True)(record(file))


def through_reference_frames(file: str) -> None:
    frame = record("shapes://shapes_val/32/0") | {"reference_files": [file]}
    frame |= {"height": 32, "width": 32}
    build_train_mapper(config(*VIDEO), augment=True)(frame)


def through_patches(file: str) -> None:
    next(iter(build_sample_loader(deepmask(), [record(file)])))


@functools.cache
def deepmask() -> CfgNode:
    return instseg.load_cfg("deepmask/deepmask_shapes.yaml", SMALL)


def through_check_data(file: str) -> None:
    name = f"one image {file}"
    DatasetCatalog.register(name, lambda: [record(file)])
    MetadataCatalog.get(name).set(thing_classes=["one"])
    (checked,) = check_data([name])
    examples = checked.report.examples
    if checked.report.ids:
        raise ImageError(examples.get(Kind.DEPTH) or examples[Kind.UNREADABLE_IMAGE])


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(config())


READERS = [
    through_training,
    through_validation_losses,
    through_evaluation,
    through_ssd,
    through_reference_frames,
    through_patches,
    through_check_data,
    read_image,
]


def record(file: str) -> dict[str, Any]:
    mask = np.zeros((30, 40), np.uint8, order="F")
    mask[2:28, 2:36] = 1
    box = {"bbox": [2.0, 2, 34, 26], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    annotation = box | {"segmentation": mask_util.encode(mask), "id": 1}
    return {
        "file_name": file,
        "image_id": 1,
        "height": 30,
        "width": 40,
        "annotations": [annotation],
    }


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_model_can_use_is_refused_alike_everywhere(
    tmp_path: Path, kind: str, read: Callable[[str], object]
) -> None:
    suffix, save, reason = REFUSED[kind]
    save(tmp_path / f"bad.{suffix}")
    with pytest.raises(ImageError, match=rf"bad\.{suffix}: .*{reason}"):
        read(str(tmp_path / f"bad.{suffix}"))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_predictor_refuses_it_too(tmp_path: Path, kind: str, predictor: Predictor) -> None:
    suffix, save, reason = REFUSED[kind]
    save(tmp_path / f"bad.{suffix}")
    with pytest.raises(ImageError, match=rf"bad\.{suffix}: .*{reason}"):
        predictor(tmp_path / f"bad.{suffix}")


def test_images_of_a_long_stack_are_not_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_headers, "MOST_COUNTED", 3)
    monkeypatch.setattr(images, "MOST_COUNTED", 3)
    save_pages(tmp_path / "a.tif", 5)
    with pytest.raises(ImageError, match=r"a\.tif: is a TIFF of more than 3 images"):
        read_image(tmp_path / "a.tif")


def test_smaller_copies_of_its_image_make_no_stack_of_a_tiff(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Image.fromarray(RGB[::2, ::2].copy())
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(RGB).save(tmp_path / "a.tif", save_all=True, append_images=[copy])
    assert Image.open(tmp_path / "a.tif").n_frames == 2
    assert np.array_equal(read_image(tmp_path / "a.tif", format="RGB"), RGB)
    assert image_size(tmp_path / "a.tif") == (40, 30)
    assert not caplog.records


def test_a_page_that_was_taken_out_of_a_stack_is_an_image(tmp_path: Path) -> None:
    save_pages(tmp_path / "a.tif", 2)
    with Image.open(tmp_path / "a.tif") as stack:
        with pytest.raises(ImageError, match="image: is a TIFF of 2 images"):
            convert_image(stack)
        assert np.array_equal(convert_image(stack.copy(), format="RGB"), RGB)


def test_an_animation_is_told_once_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    detectron2_logger._LOG_COUNTER.clear()
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    mapper = build_train_mapper(config(), augment=False)
    for name in ("a.gif", "b.png", "c.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        for _ in range(2):
            mapper(record(str(tmp_path / name)))
    assert [line.split("/")[-1] for line in caplog.messages if "animated" in line] == [
        f"{name}: animated; only the first frame is used (said once)"
        for name in ("a.gif", "b.png", "c.webp")
    ]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_check_data_refuses_a_damaged_png_where_training_does(
    tmp_path: Path, data: st.DataObject
) -> None:
    file = tmp_path / "a.png"
    save_pillow(file, RGB)
    changed = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=3)):
        changed[position] = data.draw(st.integers(0, 255))
    file.write_bytes(changed)
    assert _refusal(image_size, file) == _refusal(read_image, file)


def _refusal(read: Callable[[Path], object], file: Path) -> str | None:
    try:
        read(file)
    except ImageError as error:
        return str(error)
    return None


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6
USABLE: dict[str, Callable[[Path], object]] = {
    "a.png": lambda p: save_pillow(p, RGB),
    "grey.png": lambda p: save_pillow(p, GREY),
    "bilevel.png": lambda p: Image.fromarray(GREY).convert("1").save(p),
    "palette.png": lambda p: Image.fromarray(RGB).quantize(16).save(p),
    "transparent.png": lambda p: save_pillow(p, np.dstack([RGB, GREY])),
    "transparent grey.png": lambda p: Image.fromarray(RGB).convert("LA").save(p),
    "palette.gif": lambda p: save_pillow(p, RGB),
    "a.jpg": lambda p: save_pillow(p, RGB),
    "grey.jpg": lambda p: save_pillow(p, GREY),
    "cmyk.jpg": lambda p: Image.fromarray(RGB).convert("CMYK").save(p),
    "a.tif": lambda p: save_pillow(p, RGB),
    "a.bmp": lambda p: save_pillow(p, RGB),
    "a.webp": lambda p: save_pillow(p, RGB),
    "a.ppm": lambda p: save_pillow(p, RGB),
    "turned.jpg": lambda p: save_pillow(p, RGB.transpose(1, 0, 2), exif=ORIENTED),
    "turned.png": lambda p: save_pillow(p, RGB.transpose(1, 0, 2), exif=ORIENTED),
}


@pytest.mark.parametrize("format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("name", USABLE)
def test_what_detectron2_reads_well_is_read_the_same(
    tmp_path: Path, name: str, format: str
) -> None:
    USABLE[name](tmp_path / name)
    expected = utils.read_image(str(tmp_path / name), format=format)
    image = read_image(tmp_path / name, format=format)
    assert image.dtype == np.uint8 and np.array_equal(image, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("format", ["BGR", "L"])
@pytest.mark.parametrize("name", USABLE)
def test_a_mapper_gives_what_detectron2s_gives(
    tmp_path: Path, name: str, format: str, training: bool
) -> None:
    USABLE[name](tmp_path / name)
    Image.fromarray(GREY // 100).save(tmp_path / "labels.png")
    normalised = ONE_CHANNEL if format == "L" else ()
    cfg = config("INPUT.CROP.ENABLED", True, "INPUT.FORMAT", format, *normalised)
    item = record(str(tmp_path / name)) | {"sem_seg_file_name": str(tmp_path / "labels.png")}
    mapper = build_train_mapper(cfg, augment=True) if training else build_test_mapper(cfg)
    samples = []
    for read in (mapper, DatasetMapper(cfg, is_train=training)):
        np.random.seed(3)
        samples.append(read(copy.deepcopy(item)))
    ours, stock = samples
    assert ours.keys() == stock.keys()
    assert torch.equal(ours["image"], stock["image"])
    assert torch.equal(ours["sem_seg"], stock["sem_seg"])
    if training:
        mine, theirs = ours["instances"], stock["instances"]
        assert torch.equal(mine.gt_boxes.tensor, theirs.gt_boxes.tensor)
        assert torch.equal(mine.gt_masks.tensor, theirs.gt_masks.tensor)


LABELS = np.tile(np.arange(40) % 3, (30, 1))


@pytest.mark.parametrize(
    ("labels", "mode"),
    [(LABELS, "L"), (LABELS, "P"), (LABELS % 2, "1"), (LABELS * 300, "I;16"), (LABELS * 300, "I")],
)
def test_labels_of_pixels_are_their_numbers_whatever_the_kind_of_file(
    tmp_path: Path, labels: np.ndarray, mode: str
) -> None:
    image = Image.fromarray(labels.astype(np.uint8))
    if mode == "P":
        image.putpalette(RGB.tobytes()[:768])
    elif mode == "1":
        image = Image.fromarray(labels.astype(bool))
    elif mode != "L":
        image = Image.fromarray(labels.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    image.save(tmp_path / "labels.tif")
    save_pillow(tmp_path / "a.png", RGB)
    item = record(str(tmp_path / "a.png")) | {"sem_seg_file_name": str(tmp_path / "labels.tif")}
    sample = build_test_mapper(config("INPUT.MIN_SIZE_TEST", 0))(item)
    assert np.array_equal(sample["sem_seg"].numpy(), labels)


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda p: save_pillow(p, RGB), "has pixels of mode RGB; expected one number per pixel"),
        (lambda p: save_pillow(p, GREY[1:]), "is 40 x 29 pixels, the data set says 40 x 30"),
        (lambda p: save_pages(p, 2), "is a TIFF of 2 images"),
        (lambda p: p.write_text("no image"), "is not an image"),
    ],
)
def test_labels_that_cannot_be_used_are_named(
    tmp_path: Path, save: Callable[[Path], object], reason: str
) -> None:
    save(tmp_path / "labels.tif")
    save_pillow(tmp_path / "a.png", RGB)
    item = record(str(tmp_path / "a.png")) | {"sem_seg_file_name": str(tmp_path / "labels.tif")}
    with pytest.raises(ImageError, match=rf"labels\.tif:? {reason}"):
        build_train_mapper(config(), augment=True)(item)


def test_a_record_without_sizes_gets_those_of_its_image(tmp_path: Path) -> None:
    save_pillow(tmp_path / "a.png", RGB)
    item = {"file_name": str(tmp_path / "a.png")}
    sample = build_test_mapper(config())(item)
    assert (sample["width"], sample["height"]) == (40, 30)
    assert item == {"file_name": str(tmp_path / "a.png")}


def test_an_image_that_a_handler_of_paths_serves_is_read(tmp_path: Path) -> None:
    save_pillow(tmp_path / "a.png", RGB)

    class Handler(PathHandler):
        def _get_supported_prefixes(self) -> list[str]:
            return ["bucket://"]

        def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
            return open(tmp_path / path.removeprefix("bucket://"), mode)

    PathManager.register_handler(Handler(), allow_override=True)
    assert np.array_equal(read_image("bucket://a.png", format="RGB"), RGB)
    assert image_size("bucket://a.png") == (40, 30)
    with pytest.raises(ImageError, match="bucket://b.png: cannot be read: .*No such file"):
        read_image("bucket://b.png")
    with pytest.raises(ImageError, match="nowhere://b.png: cannot be read"):
        read_image("nowhere://b.png")
