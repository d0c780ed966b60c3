"""Rectangles of large images: the same pixels as of the whole image, without reading it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from instseg.data import regions
from instseg.data.images import read_pixels
from instseg.data.intensity import Intensity
from instseg.data.regions import open_regions, sample
from instseg.errors import ImageError

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 60000, (70, 90, 3), dtype=np.uint16)
GREY = DEEP[:, :, 0]


def write_ome_zarr(
    path: Path, levels: list[np.ndarray], axes: str = "cyx", version: int = 2
) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=version)
    for number, level in enumerate(levels):
        array = group.create_array(
            str(number), shape=level.shape, chunks=(1, 32, 32)[-level.ndim :], dtype=level.dtype
        )
        array[:] = level
    scales = [
        {
            "axes": [{"name": axis, "type": "x"} for axis in axes],
            "datasets": [{"path": str(number)} for number in range(len(levels))],
        }
    ]
    if version == 2:
        group.attrs["multiscales"] = scales
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": scales}


def write_pyramid(path: Path, *levels: np.ndarray) -> None:
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(levels[0], subifds=len(levels) - 1, tile=(16, 16), metadata={"axes": "YX"})
        for level in levels[1:]:
            file.write(level, subfiletype=1, tile=(16, 16))


def write_plain_zarr(path: Path, pixels: np.ndarray) -> None:
    zarr.create_array(str(path), shape=pixels.shape, chunks=(32, 32, 3), dtype=pixels.dtype)[:] = (
        pixels
    )


KINDS: dict[str, tuple[np.ndarray, Callable[[Path], object]]] = {
    "mapped.tif": (GREY, lambda p: tifffile.imwrite(p, GREY)),
    "big_endian.tif": (GREY, lambda p: tifffile.imwrite(p, GREY, byteorder=">")),
    "colour.tif": (DEEP, lambda p: tifffile.imwrite(p, DEEP, photometric="rgb")),
    "planar.tif": (
        DEEP,
        lambda p: tifffile.imwrite(
            p, np.moveaxis(DEEP, 2, 0), photometric="rgb", planarconfig="separate"
        ),
    ),
    "planar_tiles.tif": (
        DEEP,
        lambda p: tifffile.imwrite(
            p,
            np.moveaxis(DEEP, 2, 0),
            photometric="rgb",
            planarconfig="separate",
            tile=(16, 32),
            compression="zlib",
        ),
    ),
    "tiles.tif": (DEEP, lambda p: tifffile.imwrite(p, DEEP, tile=(32, 16), compression="zstd")),
    "strips.tif": (
        GREY,
        lambda p: tifffile.imwrite(p, GREY, rowsperstrip=7, compression="lzw", predictor=True),
    ),
    "channels.ome.tif": (
        DEEP,
        lambda p: tifffile.imwrite(
            p, np.moveaxis(DEEP, 2, 0), metadata={"axes": "CYX"}, tile=(16, 16), compression="zlib"
        ),
    ),
    "white.tif": (
        GREY,
        lambda p: tifffile.imwrite(p, np.invert(GREY), photometric="miniswhite"),
    ),
    "pyramid.ome.tif": (GREY, lambda p: write_pyramid(p, GREY, GREY[::2, ::2], GREY[::4, ::4])),
    "turned.tif": (
        GREY,
        lambda p: tifffile.imwrite(p, GREY.T[:, ::-1], extratags=[(274, "H", 1, 8, True)]),
    ),
    "floats.tif": (
        GREY.astype(np.float32),
        lambda p: tifffile.imwrite(p, GREY.astype(np.float32), compression="zlib"),
    ),
    "a.png": (GREY, lambda p: Image.fromarray(GREY).save(p)),
    "old.zarr": (DEEP, lambda p: write_ome_zarr(p, [np.moveaxis(DEEP, 2, 0)])),
    "new.zarr": (
        GREY,
        lambda p: write_ome_zarr(p, [GREY, GREY[::2, ::2]], axes="yx", version=3),
    ),
    "plain.zarr": (DEEP, lambda p: write_plain_zarr(p, DEEP)),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_rectangle_holds_the_pixels_of_the_whole_image(tmp_path: Path, name: str) -> None:
    pixels, save = KINDS[name]
    save(tmp_path / name)
    expected = pixels if pixels.ndim == 3 else pixels[:, :, None]
    with open_regions(tmp_path / name) as image:
        assert image.shape == expected.shape and image.dtype == expected.dtype
        for y0, y1, x0, x1 in [(0, 70, 0, 90), (13, 41, 30, 77), (69, 70, 89, 90)]:
            part = image.read(y0, y1, x0, x1)
            assert np.array_equal(part, expected[y0:y1, x0:x1])
            assert part.dtype == image.dtype and part.flags.c_contiguous
    if not name.endswith(".zarr"):
        assert np.array_equal(read_pixels(tmp_path / name), expected)


@pytest.mark.parametrize("kind", ["CMYK", "LA", "RGBX"])
def test_colours_that_only_pillow_reads_are_read_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tif"
    pixels = RNG.integers(0, 256, (30, 40, len(kind)), dtype=np.uint8)
    if kind == "RGBX":
        tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["unspecified"])
    else:
        Image.frombytes(kind, (40, 30), pixels.tobytes()).save(path)
    expected = read_pixels(path)
    with open_regions(path) as image:
        assert np.array_equal(image.read(3, 20, 5, 30), expected[3:20, 5:30])
        assert image.shape[2] == 3 or (image.shape[2] == 4 and image.alpha)


def test_a_rectangle_outside_the_image_is_an_error(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    with open_regions(tmp_path / "a.tif") as opened:
        for rectangle in ((0, 71, 0, 9), (0, 9, -1, 9), (5, 5, 0, 9)):
            with pytest.raises(ValueError, match=r"rows .* are not in 90 x 70"):
                opened.read(*rectangle)


def test_only_the_tiles_of_a_rectangle_are_decoded(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, tile=(16, 16), compression="zlib")
    with open_regions(tmp_path / "a.tif") as image:
        content = bytearray((tmp_path / "a.tif").read_bytes())
        with tifffile.TiffFile(tmp_path / "a.tif") as file:
            start, size = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
        content[start : start + size] = bytes(size)
        (tmp_path / "a.tif").write_bytes(content)
        assert np.array_equal(image.read(0, 64, 0, 80)[:, :, 0], GREY[:64, :80])
        with pytest.raises(ImageError, match=r"a\.tif: cannot be decoded"):
            image.read(0, 70, 0, 90)


def test_a_page_of_a_stack_is_chosen(tmp_path: Path) -> None:
    stack = RNG.integers(0, 60000, (2, 3, 4, 40, 50), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, metadata={"axes": "TCZYX"}, tile=(16, 16))
    with pytest.raises(ImageError, match=r"a\.ome\.tif: is a TIFF of 8 images"):
        open_regions(tmp_path / "a.ome.tif")
    with open_regions(tmp_path / "a.ome.tif", page=6) as image:
        assert np.array_equal(image.read(5, 25, 7, 9), stack[1, :, 2, 5:25, 7:9].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("first", "second"),
    [(GREY, GREY[::2, ::3]), (GREY[::2, ::2], GREY), (GREY, GREY[:30, :45].T)],
)
def test_a_pyramid_whose_levels_disagree_is_refused(
    tmp_path: Path, first: np.ndarray, second: np.ndarray
) -> None:
    write_pyramid(tmp_path / "a.ome.tif", first, second)
    write_ome_zarr(tmp_path / "a.zarr", [first, second], axes="yx")
    for name in ("a.ome.tif", "a.zarr"):
        with pytest.raises(ImageError, match=f"{name}: the levels of its pyramid disagree: level"):
            open_regions(tmp_path / name)


def claim(path: Path, width: int, height: int) -> None:
    """Make the header of a TIFF claim another size."""
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["ImageWidth"].overwrite(width)
        file.pages[0].tags["ImageLength"].overwrite(height)


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}])
def test_a_size_that_the_file_does_not_hold_is_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, **options)
    claim(tmp_path / "a.tif", 10**6, 10**6)
    with pytest.raises(ImageError, match=r"a\.tif: .*1000000 ?x ?1000000 pixels"):
        open_regions(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: 1000000x1000000 pixels; at most"):
        read_pixels(tmp_path / "a.tif")


FAILING = Path("/proc/self/mem")  # a file whose first byte cannot be read


@pytest.mark.skipif(not FAILING.exists(), reason="needs a file that fails as a broken disk does")
def test_a_disk_that_fails_is_told_by_the_name_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "a.tif").symlink_to(FAILING)
    with pytest.raises(ImageError, match=r"a\.tif: cannot be read: Input/output error"):
        open_regions(tmp_path / "a.tif")


def test_a_large_image_in_one_piece_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is turned is decoded as a whole."""
    tifffile.imwrite(tmp_path / "a.tif", DEEP, extratags=[(274, "H", 1, 6, True)])
    monkeypatch.setattr(regions, "MAX_PIXELS", 70 * 90 - 1)
    with pytest.raises(ImageError, match=r"a\.tif: 90 x 70 pixels in one strip or in colours"):
        open_regions(tmp_path / "a.tif")


def refused_zarr(path: Path, kind: str) -> None:
    if kind == "no image":
        zarr.open_group(path, mode="w")
    elif kind == "further axes":
        write_ome_zarr(path, [np.zeros((2, 30, 40), np.uint8)], axes="zyx")
    elif kind == "two X axes":
        write_ome_zarr(path, [np.zeros((2, 30, 40), np.uint8)], axes="yxx")
    elif kind == "shape":
        zarr.create_array(str(path), shape=(5, 6, 70), dtype="uint8")
    elif kind == "damaged":
        zarr.create_array(str(path), shape=(5, 6), dtype="uint8")
        (path / "zarr.json").write_text("{")
    else:  # unpickling a chunk could execute anything
        zarr.create_array(
            str(path), shape=(5, 6), dtype="uint8", zarr_format=2, filters=None, compressors=None
        )
        text = (path / ".zarray").read_text()
        new = '[{"id": "pickle"}]' if kind == "filters" else '{"id": "pickle"}'
        assert f'"{kind}": null' in text
        (path / ".zarray").write_text(text.replace(f'"{kind}": null', f'"{kind}": {new}'))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no image", "is a group of zarr without multiscales"),
        ("further axes", "has {'Z': 2} positions along further axes"),
        ("two X axes", r"has axes YXX and an array of shape \(2, 30, 40\); expected one axis per"),
        ("shape", r"is an array of shape \(5, 6, 70\)"),
        ("damaged", "cannot be decoded"),
        ("filters", "cannot be decoded: .*pickle"),
        ("compressor", "cannot be decoded: .*pickle"),
    ],
)
def test_what_is_no_image_of_zarr_is_one_line(tmp_path: Path, kind: str, reason: str) -> None:
    refused_zarr(tmp_path / "a.zarr", kind)
    with pytest.raises(ImageError, match=f"a\\.zarr: {reason}"):
        open_regions(tmp_path / "a.zarr")


def test_a_chunk_too_large_to_be_decoded_for_a_rectangle_is_refused(tmp_path: Path) -> None:
    side = 2**16
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(side, side), chunks=(side, side), dtype="u1")
    with pytest.raises(ImageError, match=r"a\.zarr: has chunks of 65536 x 65536 pixels of type"):
        open_regions(tmp_path / "a.zarr")


def test_limits_count_the_bytes_of_pixels_not_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = RNG.random((100, 90, 3)).astype(np.float64)
    bytes_of_strip, limit = deep.nbytes, deep.nbytes // 4
    assert deep.size < limit < bytes_of_strip
    monkeypatch.setattr(regions, "_LARGEST_CHUNK", limit)
    monkeypatch.setattr("instseg.data.image_headers.MAX_BYTES", limit)
    for dtype in (np.uint8, np.float64):
        pixels = (200 * deep).astype(dtype)
        options: dict[str, Any] = {"photometric": "rgb", "compression": "zlib"}
        tifffile.imwrite(tmp_path / "a.tif", pixels, rowsperstrip=100, **options)
        tifffile.imwrite(tmp_path / "tiles.tif", pixels, tile=(16, 16), **options)
        chunks = {"shape": pixels.shape, "chunks": pixels.shape, "dtype": pixels.dtype}
        zarr.create_array(str(tmp_path / f"{pixels.dtype}.zarr"), **chunks)[:] = pixels
        paths = [tmp_path / "a.tif", tmp_path / f"{pixels.dtype}.zarr"]
        if dtype is np.uint8:
            for path in paths:
                with open_regions(path) as image:
                    assert np.array_equal(image.read(0, 100, 0, 90), pixels)
            continue
        for path, what in zip(paths, ("216000 bytes; at most 54000", "at most 54000"), strict=True):
            with pytest.raises(ImageError, match=what):
                open_regions(path)
        for page in (None, 0):
            with pytest.raises(ImageError, match=r"90 x 100 pixels of 3 channels of type float64"):
                read_pixels(tmp_path / "a.tif", page=page)
        with open_regions(tmp_path / "tiles.tif") as image:
            assert np.array_equal(image.read(0, 50, 0, 90), pixels[:50])


@pytest.mark.parametrize("version", [2, 3])
def test_a_missing_chunk_is_told_and_a_damaged_one_refused(
    tmp_path: Path, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.zarr"
    options = {"shape": (64, 64), "chunks": (32, 32), "dtype": "u2", "zarr_format": version}
    zarr.create_array(str(path), **options)[:] = 5
    with open_regions(path) as image:
        assert (image.read(0, 64, 0, 64) == 5).all()
    assert not caplog.messages
    chunk = path / ("0.0" if version == 2 else "c/0/0")
    content = chunk.read_bytes()
    chunk.unlink()
    for _ in range(2):
        with open_regions(path) as image:
            assert (image.read(0, 32, 0, 32) == 0).all() and (image.read(32, 64, 0, 64) == 5).all()
    (line,) = caplog.messages
    assert "a.zarr: 1 of its 4 chunks are not there, and their pixels count as 0: if" in line
    for damaged in (b"", content[:-5], b"x" * len(content)):
        chunk.write_bytes(damaged)
        with open_regions(path) as image, pytest.raises(ImageError, match=r"a\.zarr: cannot be de"):
            image.read(0, 32, 0, 32)


def test_a_missing_shard_is_told_and_a_complete_array_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.zarr"
    sizes = {"shape": (100, 100), "chunks": (10, 10), "shards": (30, 30)}
    zarr.create_array(str(path), **sizes, dtype="u1")[:] = 5
    with open_regions(path) as image:
        assert (image.read(90, 100, 90, 100) == 5).all()
    assert not caplog.messages
    (path / "c/1/1").unlink()
    with open_regions(path) as image:
        assert (image.read(30, 60, 30, 60) == 0).all()
    (line,) = caplog.messages
    assert "a.zarr: 1 of its 16 shards are not there" in line


@pytest.mark.parametrize(("dtype", "channels"), [("f4", 1), ("u2", 3), ("u1", 4)])
def test_images_of_as_many_bytes_are_sampled_alike(
    tmp_path: Path, dtype: str, channels: int
) -> None:
    """All pixels are taken of an image that takes what ``limit`` pixels of 16-bit colours take."""
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(600, 600, channels), dtype=dtype)[:] = 5
    with open_regions(tmp_path / "a.zarr") as image:
        assert len(sample(image, 600 * 600)) == 600 * 600
        assert len(sample(image, 300 * 600)) == 512 * 512


def test_a_codec_that_could_execute_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that zarr itself would take."""
    for version in (2, 3):
        write_ome_zarr(tmp_path / f"{version}.zarr", [GREY], axes="yx", version=version)
        monkeypatch.setattr(regions, f"_CODECS_{version}", frozenset(["bytes"]))
        with pytest.raises(ImageError, match=f"{version}.zarr: its codec (blosc|zstd) is not read"):
            open_regions(tmp_path / f"{version}.zarr")


def test_a_sample_of_a_large_image_has_its_percentiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = RNG.normal(1000, 100, (400, 900)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    intensity = Intensity("percentile")
    monkeypatch.setattr(regions, "_SAMPLE_SIDE", 32)
    with open_regions(tmp_path / "a.tif") as image:
        every = sample(image)
        some = sample(image, 20_000)
    assert np.array_equal(every.ravel(), pixels.ravel())
    assert 10_000 < some.size <= 20_000
    exact = intensity.scaling(every, source="a").limits
    near = intensity.scaling(some, source="a").limits
    assert exact is not None and near is not None
    assert exact[0] == pytest.approx(np.percentile(pixels, (1, 99.8)))
    assert near[0] == pytest.approx(exact[0], rel=0.05)


def test_a_sample_of_many_channels_takes_no_more_bytes_than_of_16_bit_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = RNG.integers(0, 256, (30, 200, 200), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": "CYX"})
    monkeypatch.setattr(regions, "_SAMPLE_SIDE", 16)
    with open_regions(tmp_path / "a.ome.tif") as image:
        some = sample(image, 20_000)
    assert some.shape[2] == 30 and 60_000 < some.nbytes <= 120_000


def test_a_sample_of_many_bits_is_no_larger_than_of_16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RNG.random((200, 200, 3)), photometric="rgb")
    monkeypatch.setattr(regions, "_SAMPLE_SIDE", 16)
    with open_regions(tmp_path / "a.tif") as image:
        some = sample(image, 20_000)
    assert some.dtype == np.float64 and 60_000 < some.nbytes <= 120_000


def test_without_its_package_a_stack_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError, match="needs the package tifffile, .*pip install tifffile"):
        open_regions(tmp_path / "a.tif")
