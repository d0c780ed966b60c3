"""TIFF files of any kind: the pixels that they hold, or one line that says why not."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from instseg.data.images import (
    PageReader,
    describe_image,
    image_size,
    read_image,
    read_labels,
    read_pixels,
)
from instseg.data.intensity import Intensity
from instseg.errors import ImageError

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 60000, (5, 40, 50), dtype=np.uint16)
GREY = STACK[0]
BYTES = (STACK // 257).astype(np.uint8)
PERCENTILE = Intensity("percentile")


def write_mixed(path: Path) -> None:
    """Pages of two sizes, in turns."""
    with tifffile.TiffWriter(path) as file:
        for page in (STACK[0], STACK[1, :20], STACK[2]):
            file.write(page, metadata=None)


STACKS: dict[str, tuple[list[np.ndarray], Callable[[Path], object]]] = {
    "plain": (list(STACK), lambda p: tifffile.imwrite(p, STACK)),
    "bytes": (list(BYTES), lambda p: tifffile.imwrite(p, BYTES, metadata=None)),
    "compressed": (
        list(STACK),
        lambda p: tifffile.imwrite(p, STACK, compression="lzw", metadata=None),
    ),
    "BigTIFF": (list(STACK), lambda p: tifffile.imwrite(p, STACK, bigtiff=True, byteorder=">")),
    "ImageJ": (
        list(STACK),
        lambda p: tifffile.imwrite(p, STACK, imagej=True, metadata={"axes": "TYX"}),
    ),
    "ImageJ without axes": (
        list(np.concatenate([STACK, STACK])),
        lambda p: tifffile.imwrite(p, np.concatenate([STACK, STACK]), imagej=True),
    ),
    "OME": (
        list(STACK),
        lambda p: tifffile.imwrite(p, STACK, metadata={"axes": "ZYX"}, ome=True),
    ),
    "three planes as samples": (
        list(STACK[:3]),
        lambda p: tifffile.imwrite(p, STACK[:3], photometric="rgb", metadata={"axes": "ZYX"}),
    ),
    "volume": (
        list(STACK),
        lambda p: tifffile.imwrite(p, STACK, volumetric=True, metadata=None, tile=(1, 16, 16)),
    ),
    "mixed": ([STACK[0], STACK[1, :20], STACK[2]], write_mixed),
}


@pytest.mark.parametrize("kind", STACKS)
def test_the_pages_of_a_stack_are_images(tmp_path: Path, kind: str) -> None:
    pages, save = STACKS[kind]
    save(tmp_path / "a.tif")
    for number, page in enumerate(pages):
        assert np.array_equal(read_pixels(tmp_path / "a.tif", page=number)[:, :, 0], page)
    count = len(pages)
    with pytest.raises(
        ImageError, match=rf"a\.tif: there is no page {count}: it has {count} pages"
    ):
        read_image(tmp_path / "a.tif", page=count)
    with pytest.raises(ImageError, match=rf"a\.tif: is a TIFF of {count} images; .*--pages all"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("options", [{"imagej": True}, {"shaped": True}])
@pytest.mark.parametrize("with_tifffile", [True, False])
def test_a_stack_of_bytes_with_one_directory_is_no_single_image(
    tmp_path: Path, options: Any, with_tifffile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ImageJ writes those above 4 GB; Pillow sees the first image only."""
    axes = {"axes": "ZYX"}
    for name, pixels in (("stack", BYTES), ("single", BYTES[:1])):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, pixels, truncate=True, metadata=axes, **options)
    if with_tifffile:
        assert np.array_equal(read_pixels(tmp_path / "stack.tif", page=4)[:, :, 0], BYTES[4])
    else:
        monkeypatch.setitem(sys.modules, "tifffile", None)
        monkeypatch.setattr("instseg.data.images.find_spec", lambda name: None)
    for read in (read_image, read_pixels, read_labels, image_size):
        with pytest.raises(ImageError, match=r"stack\.tif: is a TIFF of (5|several) images"):
            read(tmp_path / "stack.tif")
    assert np.array_equal(read_image(tmp_path / "single.tif")[:, :, 0], BYTES[0])


def test_a_stack_is_opened_once_for_all_of_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(tmp_path / name, STACK)
    tiff_file = tifffile.TiffFile

    def open_and_count(path: Path) -> Any:
        opened.append(path.name)
        return tiff_file(path)

    monkeypatch.setattr(tifffile, "TiffFile", open_and_count)
    reader = PageReader(PERCENTILE)
    for name in ("a.tif", "b.tif"):
        for number, page in enumerate(STACK):
            image = reader.read(str(tmp_path / name), number)
            expected = PERCENTILE.apply(page[:, :, None], source="a", format="BGR")
            assert np.array_equal(image, expected)
    reader.close()
    assert opened == ["a.tif", "b.tif"]


def test_axes_of_time_and_depth_are_pages_and_channels_are_channels(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 60000, (2, 4, 3, 20, 30), dtype=np.uint16)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, pixels, metadata={"axes": "TZCYX"})
    for page in range(8):
        expected = pixels[page // 4, page % 4].transpose(1, 2, 0)
        assert np.array_equal(read_pixels(path, page=page), expected)


def test_a_file_whose_pages_are_channels_is_one_image(tmp_path: Path) -> None:
    """Also with 8 bits, which Pillow takes for a stack."""
    for name, stack in (("deep.ome.tif", STACK[:3]), ("bytes.ome.tif", BYTES[:3])):
        tifffile.imwrite(tmp_path / name, stack, metadata={"axes": "CYX"})
        assert np.array_equal(read_pixels(tmp_path / name), stack.transpose(1, 2, 0))
        assert image_size(tmp_path / name) == (50, 40)
    rgb = read_image(tmp_path / "bytes.ome.tif", format="RGB")
    assert np.array_equal(rgb, BYTES[:3].transpose(1, 2, 0))


def test_the_levels_of_a_pyramid_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(GREY, metadata=None)
        file.write(GREY[::2, ::2], subfiletype=1, metadata=None)
    assert np.array_equal(read_pixels(tmp_path / "a.tif")[:, :, 0], GREY)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_deep_image_is_turned_as_one_of_8_bits(tmp_path: Path, orientation: int) -> None:
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "8.tif", BYTES[0], extratags=tags, metadata=None)
    tifffile.imwrite(tmp_path / "16.tif", BYTES[0].astype(np.uint16), extratags=tags, metadata=None)
    expected = read_image(tmp_path / "8.tif")[:, :, :1]
    assert np.array_equal(read_pixels(tmp_path / "16.tif"), expected)


def test_white_below_black_palettes_and_few_bits_mean_what_they_show(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "white.tif", STACK, photometric="miniswhite", metadata=None)
    assert np.array_equal(read_pixels(tmp_path / "white.tif", page=1)[:, :, 0], ~STACK[1])
    bits = [Image.fromarray(page > 100) for page in BYTES]
    colours = [Image.fromarray(page).quantize(16) for page in BYTES]
    for name, pages in (("bits.tif", bits), ("colours.tif", colours)):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        for number, page in enumerate(pages):
            expected = np.asarray(page.convert("RGB"))
            assert np.array_equal(read_image(tmp_path / name, format="RGB", page=number), expected)


def test_the_alpha_of_a_deep_image_is_dropped_but_four_channels_are_not(tmp_path: Path) -> None:
    four = RNG.integers(0, 60000, (20, 30, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "rgba.tif", four, photometric="rgb", extrasamples=["unassalpha"])
    image = read_image(tmp_path / "rgba.tif", format="RGB", intensity=PERCENTILE)
    expected = PERCENTILE.apply(four[:, :, :3], source="a", format="RGB")
    assert np.array_equal(image, expected)
    tifffile.imwrite(tmp_path / "four.ome.tif", np.moveaxis(four, 2, 0), metadata={"axes": "CYX"})
    with pytest.raises(ImageError, match="has 4 channels; expected 1 or 3: set INPUT.CHANNELS"):
        read_image(tmp_path / "four.ome.tif", intensity=PERCENTILE)
    assert describe_image(tmp_path / "rgba.tif").channels == 3
    assert describe_image(tmp_path / "four.ome.tif").channels == 4


def test_an_unknown_kind_of_further_sample_is_no_alpha(tmp_path: Path) -> None:
    four = RNG.integers(0, 60000, (20, 30, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", four, photometric="rgb", extrasamples=["unassalpha"])
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        file.pages[0].tags["ExtraSamples"].overwrite((999,))
    assert describe_image(tmp_path / "a.tif").channels == 4


def damage_page(path: Path, number: int) -> None:
    with tifffile.TiffFile(path) as file:
        page = file.pages[number]
        start, size = page.dataoffsets[0], page.databytecounts[0]
    content = bytearray(path.read_bytes())
    content[start + 20 : start + size] = bytes(size - 20)
    path.write_bytes(content)


def test_a_damaged_page_is_named_and_the_others_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression="zlib", metadata=None)
    damage_page(tmp_path / "a.tif", 1)
    with pytest.raises(ImageError, match=r"a\.tif page 1: cannot be decoded"):
        read_pixels(tmp_path / "a.tif", page=1)
    assert np.array_equal(read_pixels(tmp_path / "a.tif", page=2)[:, :, 0], STACK[2])


@pytest.mark.parametrize("part", [0.1, 0.4, 0.6, 0.95])
@pytest.mark.parametrize("metadata", [None, {"axes": "ZYX"}])
def test_a_stack_that_is_cut_off_is_never_silently_shorter(
    tmp_path: Path, part: float, metadata: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK, metadata=metadata)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    refused = []
    for page in range(6):
        try:
            assert np.array_equal(read_pixels(path, page=page)[:, :, 0], STACK[page])
        except ImageError as error:
            refused.append(str(error))
    assert len(refused) >= 6 - int(part * 5)
    assert all("cut off" in line for line in refused[:-1])
    with pytest.raises(ImageError, match="cut off|is a TIFF of . images"):
        read_pixels(path)
    assert capfd.readouterr().err == ""  # tifffile logs lines of its own


def overwrite(path: Path, tag: str, value: int) -> None:
    tifffile.imwrite(path, GREY)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags[tag].overwrite(value)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown compression": (
        lambda p: overwrite(p, "Compression", 31337),
        "cannot be decoded: 31337 is not a known COMPRESSION",
    ),
    "no codec": (lambda p: overwrite(p, "Compression", 34661), "cannot be decoded|imagecodecs"),
    "unknown colours": (
        lambda p: overwrite(p, "PhotometricInterpretation", 32803),
        "its colours are CFA; expected grey, RGB or a palette",
    ),
    "complex numbers": (
        lambda p: tifffile.imwrite(p, GREY.astype(np.complex64)),
        "has pixels of type complex64; expected numbers",
    ),
    "NaN": (
        lambda p: tifffile.imwrite(p, np.where(GREY < 30000, np.nan, 1).astype(np.float32)),
        r"contains non-finite values \(NaN or infinity\)",
    ),
    "no page": (lambda p: p.write_bytes(b"II*\0" + bytes(40)), "is a TIFF without images"),
    "header only": (lambda p: p.write_bytes(b"II*\0\x08\0\0\0\x05\0"), "corrupted"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, kind: str) -> None:
    save, message = REFUSED[kind]
    save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=rf"a\.tif: .*({message})") as caught:
        read_image(tmp_path / "a.tif", intensity=PERCENTILE)
    assert "\n" not in str(caught.value)


def test_changed_bytes_raise_nothing_but_image_error(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK[:, :8, :8], compression="zlib")
    content = (tmp_path / "a.tif").read_bytes()
    for _ in range(300):
        changed = bytearray(content)
        for position in RNG.integers(0, len(content), 3):
            changed[position] = RNG.integers(0, 256)
        (tmp_path / "b.tif").write_bytes(changed)
        try:
            assert read_pixels(tmp_path / "b.tif", page=1).ndim == 3
        except ImageError as error:
            assert "b.tif" in str(error)


def test_a_page_of_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    Image.fromarray(BYTES[0]).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", page=0).shape == (40, 50, 3)
    with pytest.raises(ImageError, match=r"a\.png: there is no page 2; only TIFFs have several"):
        read_image(tmp_path / "a.png", page=2)


def test_without_tifffile_plain_images_are_read_and_pages_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    Image.fromarray(BYTES[0]).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif")[:, :, 0], BYTES[0])
    Image.fromarray(GREY).save(tmp_path / "deep.tif")
    with pytest.raises(ImageError, match="pip install tifffile imagecodecs zarr"):
        read_image(tmp_path / "deep.tif", page=0)


def test_without_imagecodecs_a_compressed_file_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, compression="zstd")

    def fail(*_: Any) -> None:
        raise KeyError("<COMPRESSION.ZSTD: 50000> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", fail)
    with pytest.raises(ImageError, match="needs the package imagecodecs .*; type: pip install"):
        read_image(tmp_path / "a.tif", intensity=PERCENTILE)
