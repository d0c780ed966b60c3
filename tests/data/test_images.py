"""Images from files: 8-bit colour, or an error that names the file and the reason."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import detection_utils
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.file_io import PathManager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from instseg.data import image_headers, images
from instseg.data.images import image_size, read_image
from instseg.data.synthetic.files import IMAGES, VIDEOS
from instseg.errors import ImageError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


@pytest.fixture(autouse=True)
def _log_everything_anew() -> None:
    detectron2_logger._LOG_COUNTER.clear()


def save(folder: Path, name: str, pixels: Any, mode: str | None = None, **options: Any) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(folder / name, **options)
    return folder / name


def png_header(width: int, height: int) -> bytes:
    """A PNG without pixels: just the header and an empty chunk of data."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    file = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + size + b"\x08\x02\0\0\0", b"IDAT"):
        file += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return file


def test_a_colour_image_is_read_in_bgr_order(tmp_path: Path) -> None:
    image = read_image(save(tmp_path, "a.png", RGB))
    assert np.array_equal(image, RGB[:, :, ::-1])
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable


def test_rgb_order_is_read_on_request(tmp_path: Path) -> None:
    assert np.array_equal(read_image(save(tmp_path, "a.png", RGB), format="RGB"), RGB)


def test_another_channel_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'YUV'"):
        read_image(save(tmp_path, "a.png", RGB), format="YUV")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, "a.png", RGB, exif=exif)
    assert np.array_equal(read_image(path, format="RGB"), upright[orientation])


def test_a_broken_exif_block_does_not_cost_the_image(tmp_path: Path) -> None:
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
    path = save(tmp_path, "a.jpg", RGB, quality=95, exif=broken)
    assert read_image(path).shape == RGB.shape


def test_an_exif_block_that_cannot_be_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "the name of a camera"
    block = exif.tobytes().replace(b"\x01\x0f\0\x02", b"\x01\0\0\x02")  # as width of the image
    path = save(tmp_path, "a.jpg", RGB, quality=95, exif=block)
    assert read_image(path).shape == RGB.shape
    assert f"{path}: unreadable EXIF block, orientation ignored" in caplog.text


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_one_bit_images_get_three_equal_channels(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path, "a.png", GREY, mode)
    expected = np.asarray(Image.fromarray(GREY).convert(mode).convert("L"))
    image = read_image(path)
    assert image.shape == RGB.shape
    assert all(np.array_equal(image[:, :, channel], expected) for channel in range(3))


def test_a_palette_image_gets_its_colours(tmp_path: Path) -> None:
    palette = Image.fromarray(RGB).quantize(16)
    path = save(tmp_path, "a.png", palette)
    assert np.array_equal(read_image(path, format="RGB"), np.asarray(palette.convert("RGB")))


def test_a_cmyk_image_is_converted(tmp_path: Path) -> None:
    red = Image.new("CMYK", (20, 12), (0, 255, 255, 0))
    image = read_image(save(tmp_path, "a.jpg", red, quality=95), format="RGB")
    assert image.shape == (12, 20, 3)
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("name", ["rgba.png", "la.png", "palette.png", "bit.png"])
def test_transparency_is_dropped_and_said_once(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    alpha = np.full((12, 20, 1), 7, np.uint8)
    if name == "rgba.png":
        path = save(tmp_path, name, np.dstack([RGB, alpha]))
        expected = RGB
    elif name == "la.png":
        path = save(tmp_path, name, Image.fromarray(np.dstack([RGB, alpha])).convert("LA"))
        expected = np.asarray(Image.fromarray(RGB).convert("L").convert("RGB"))
    else:
        mode = "P" if name == "palette.png" else "1"
        path = save(tmp_path, name, GREY, mode, transparency=b"\0\x80" if mode == "P" else 0)
        expected = np.asarray(Image.fromarray(GREY).convert(mode).convert("RGB"))
    for _ in range(2):
        assert np.array_equal(read_image(path, format="RGB"), expected)
    assert [record.message for record in caplog.records] == [
        f"{path}: transparency is ignored (said once)"
    ]


def test_of_an_animation_the_first_frame_is_read_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (20, 12), colour) for colour in ("red", "lime", "blue")]
    path = save(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.array_equal(read_image(path, format="RGB")[0, 0], [255, 0, 0])
    assert "animated; only the first frame is used" in caplog.text


@pytest.mark.parametrize(
    ("name", "pixels", "description"),
    [
        ("grey.png", GREY.astype(np.uint16) * 257, r"mode I;16, values up to 65\d\d\d"),
        ("grey.tif", GREY.astype(np.uint16) * 257, r"uint16 with values of \d+ to 65\d\d\d"),
        ("long.tif", GREY.astype(np.int32) * 1000, r"int32 with values of \d+ to 2\d\d\d\d\d"),
        ("float.tif", GREY.astype(np.float32) / 300, r"float32 with values of 0\S* to 0\.8\d+"),
    ],
)
def test_more_than_8_bits_of_grey_are_refused(
    tmp_path: Path, name: str, pixels: Any, description: str
) -> None:
    path = save(tmp_path, name, pixels)
    with pytest.raises(
        ImageError,
        match=f"{name}: expected 8 bits per channel, found {description}; set INPUT.NORMALIZE",
    ):
        read_image(path)


@pytest.mark.parametrize("name", ["colour.png", "colour.tif", "colour.ppm", "colour.jp2"])
def test_16_bits_of_colour_are_refused(tmp_path: Path, name: str) -> None:
    import cv2

    # JPEG 2000 is written from 32 pixels a side on.
    assert cv2.imwrite(str(tmp_path / name), np.tile(RGB, (4, 4, 1)).astype(np.uint16) * 257)
    description = "uint16 with values" if name.endswith("tif") else "RGB with 16"
    with pytest.raises(
        ImageError, match=f"{name}: expected 8 bits per channel, found {description}"
    ):
        read_image(tmp_path / name)


def test_16_bits_of_colour_in_an_ascii_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_text("P3\n2 1\n65535\n300 300 300 65535 0 0\n")
    with pytest.raises(ImageError, match="expected 8 bits per channel, found RGB with 16"):
        read_image(path)
    path.write_text("P3\n2 1\n255\n30 30 30 255 0 0\n")
    assert read_image(path, format="RGB").tolist() == [[[30] * 3, [255, 0, 0]]]


def test_a_bitmap_of_16_bits_a_pixel_is_read(tmp_path: Path) -> None:
    """Five or six bits a channel."""
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    info = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    head = struct.pack("<2sIII", b"BM", 70, 0, 66)
    (tmp_path / "a.bmp").write_bytes(head + info + masks + struct.pack("<HH", 0xF800, 0x001F))
    assert read_image(tmp_path / "a.bmp", format="RGB").tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("long", [False, True], ids=["length", "long length"])
def test_the_depth_of_a_jpeg_2000_is_found_behind_any_boxes(tmp_path: Path, long: bool) -> None:
    import cv2

    stream = {}
    large = np.tile(RGB, (4, 4, 1))
    for bits, pixels in ((8, large), (16, large.astype(np.uint16) * 257)):
        _, content = cv2.imencode(".jp2", pixels)
        box = content.tobytes().index(b"jp2c") - 4
        head, codes = content.tobytes()[:box], content.tobytes()[box + 8 :]
        size = struct.pack(">I4sQ", 1, b"jp2c", 16 + len(codes)) if long else b"\0\0\0\0jp2c"
        # Another box may hold anything, such as what looks like the image of 8 bits.
        decoy = stream.get(8, b"")
        stream[bits] = codes[:80]
        other = struct.pack(">I4s", 8 + len(decoy), b"free") + decoy
        (tmp_path / f"{bits}.jp2").write_bytes(head + other + size + codes)
    read_image(tmp_path / "8.jp2")
    with pytest.raises(ImageError, match="found RGB with 16 bits"):
        read_image(tmp_path / "16.jp2")


def test_the_depth_of_a_jpeg_2000_without_boxes_is_found(tmp_path: Path) -> None:
    import cv2

    _, content = cv2.imencode(".jp2", np.tile(RGB, (4, 4, 1)).astype(np.uint16) * 257)
    codes = content.tobytes().partition(b"jp2c")[2]
    (tmp_path / "a.jp2").write_bytes(codes)
    with pytest.raises(ImageError, match="found RGB with 16 bits"):
        read_image(tmp_path / "a.jp2")


def test_a_box_of_a_jpeg_2000_that_ends_before_it_begins_is_an_error(tmp_path: Path) -> None:
    import cv2

    _, content = cv2.imencode(".jp2", np.tile(RGB, (4, 4, 1)))
    box = content.tobytes().index(b"jp2c") - 4
    other = struct.pack(">I4s", 3, b"free")
    (tmp_path / "a.jp2").write_bytes(content.tobytes()[:box] + other + content.tobytes()[box:])
    with pytest.raises(ImageError, match=r"a\.jp2: .*its box b'free' is of 3 bytes"):
        read_image(tmp_path / "a.jp2")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp", "a.jp2"])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, name, RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=name):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"\n<!DOCTYPE html><html>404</html>", "is HTML or XML text, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"\x89PNG\r\n\x1a\n", "cut off in its header"),
    ],
)
def test_what_is_no_image_is_refused_with_what_it_is(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"a.jpg: .*{reason}"):
        read_image(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing.jpg: no such file"):
        read_image(tmp_path / "missing.jpg")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path / ("a" * 5000))


@pytest.mark.parametrize("side", [13_378, 30_000])
def test_a_huge_image_is_refused_from_its_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(ImageError, match=f"a.png.*{side * side}.*at most .*INPUT.MAX_SIZE_TEST"):
        read_image(path)


def test_the_cap_is_checked_before_pixels_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_headers, "MAX_PIXELS", 100)
    path = tmp_path / "a.png"
    path.write_bytes(png_header(20, 12))
    with pytest.raises(ImageError, match="20x12 pixels; at most 100 pixels"):
        read_image(path)


@pytest.mark.parametrize("shape", [(1, 1), (10, 20_000), (20_000, 10)])
def test_extreme_sizes_are_read(tmp_path: Path, shape: tuple[int, int]) -> None:
    assert read_image(save(tmp_path, "a.png", np.zeros(shape, np.uint8))).shape == (*shape, 3)


@given(
    content=st.binary(max_size=300),
    start=st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", ""]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_as_a_file_raise_nothing_but_image_error(
    tmp_path: Path, content: bytes, start: str
) -> None:
    path = tmp_path / "a.jpg"
    if start:
        save(tmp_path, "a.jpg", RGB, format=start)
        content = path.read_bytes()[:40] + content
    path.write_bytes(content)
    try:
        image = read_image(path)
    except ImageError as error:
        assert str(path) in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@given(data=st.data(), format=st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_image_with_changed_bytes_raises_nothing_but_image_error(
    tmp_path: Path, data: st.DataObject, format: str
) -> None:
    path = save(tmp_path, "a.jpg", RGB, format=format)
    content = bytearray(path.read_bytes())
    positions = st.integers(0, len(content) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=5)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        image = read_image(path)
    except ImageError as error:
        assert str(path) in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_the_size_is_read_without_the_pixels(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, name, RGB)
    monkeypatch.setattr(images, "pillow_pixels", None)
    assert image_size(path) == (20, 12)


@pytest.mark.parametrize("name", ["a.bmp", "a.webp", "a.tif", "a.gif"])
def test_the_size_of_other_formats_is_that_of_the_pixels(tmp_path: Path, name: str) -> None:
    assert image_size(save(tmp_path, name, RGB)) == (20, 12)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_image(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, name, RGB, exif=exif)
    height, width, _ = read_image(path).shape
    assert image_size(path) == (width, height)


def test_the_size_of_a_png_is_upright_whatever_tells_its_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    xmp, profile = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    profile.add_text("Raw profile type exif", f"\nexif\n{len(content)}\n{content.hex()}\n")
    for chunks in (xmp, profile):
        path = save(tmp_path, "a.png", RGB, pnginfo=chunks)
        assert read_image(path).shape == (20, 12, 3)
        assert image_size(path) == (12, 20)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_the_size_of_a_truncated_image_is_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, name, RGB)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError, match=rf"{name}: cannot be decoded: .*truncated"):
        image_size(path)


def test_an_image_with_bytes_behind_it_is_no_truncated_one(tmp_path: Path) -> None:
    path = save(tmp_path, "a.jpg", RGB)
    path.write_bytes(path.read_bytes() + bytes(1000))
    assert image_size(path) == (20, 12)


def test_a_synthetic_image_is_what_detectron2_reads() -> None:
    name = f"{IMAGES}shapes_val/128/3"
    assert PathManager.isfile(name) and PathManager.exists(name)
    assert np.array_equal(read_image(name), detection_utils.read_image(name, format="BGR"))
    with pytest.raises(ImageError, match="shapes://shapes_val/128: there is no such synthetic"):
        read_image("shapes://shapes_val/128")


@pytest.mark.parametrize(
    "path",
    [
        *(f"shapes://shapes_val/{size}/0" for size in (-1, 0, 1, 15, 4097, 10**9)),
        "shapes://shapes_val/128/200",
        f"{VIDEOS}shapes_video_val/1/0/0",
        f"{VIDEOS}shapes_video_val/128/0/{10**400}",
    ],
)
def test_a_synthetic_image_that_is_not_there_is_refused_at_once(path: str) -> None:
    with pytest.raises(ImageError, match=r"there is no such synthetic image: .*(expected|\.\.)"):
        read_image(path)
