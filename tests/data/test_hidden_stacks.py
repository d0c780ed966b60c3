"""TIFFs with more images than their chain of directories shows."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.utils import logger as detectron2_logger

from instseg.data.images import image_size, read_image, read_labels, read_pixels
from instseg.data.regions import open_regions
from instseg.data.tiff import TiffImages
from instseg.errors import ImageError

tifffile = pytest.importorskip("tifffile")

STACK = np.random.default_rng(0).integers(0, 200, (3, 40, 50), dtype=np.uint8)
DTYPES = pytest.mark.parametrize("dtype", [np.uint8, np.uint16])


def write_in_sub_directories(path: Path, pages: Any, **options: Any) -> None:
    """The first page in the chain of directories, the others in its SubIFDs."""
    options.setdefault("metadata", None)
    kind = {name: options.pop(name) for name in ("bigtiff", "ome") if name in options}
    with tifffile.TiffWriter(path, **kind) as file:
        file.write(pages[0], subifds=len(pages) - 1, **options)
        for page in pages[1:]:
            file.write(page, **options)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"bigtiff": True}])
def test_images_in_sub_directories_are_pages(
    tmp_path: Path, dtype: type, options: dict[str, Any]
) -> None:
    write_in_sub_directories(tmp_path / "a.tif", STACK.astype(dtype), **options)
    for read in (read_image, read_pixels, read_labels, image_size, open_regions):
        with pytest.raises(ImageError, match=r"a\.tif: is a TIFF of 3 images; .* --pages all"):
            read(tmp_path / "a.tif")
    for number, page in enumerate(STACK):
        pixels = read_pixels(tmp_path / "a.tif", page=number)
        assert np.array_equal(pixels[:, :, 0], page)


def test_images_in_sub_directories_are_seen_without_tifffile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_in_sub_directories(tmp_path / "a.tif", STACK)
    monkeypatch.setattr("instseg.data.images.find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"a\.tif: is a TIFF of several images"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("subfiletype", [0, 1])
def test_smaller_copies_in_sub_directories_are_no_pages(tmp_path: Path, subfiletype: int) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(STACK[0], subifds=1, metadata=None)
        file.write(STACK[0, ::2, ::2], subfiletype=subfiletype, metadata=None)
    assert np.array_equal(read_pixels(tmp_path / "a.tif")[:, :, 0], STACK[0])


@DTYPES
def test_levels_of_one_size_are_refused(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "a.ome.tif"
    write_in_sub_directories(path, STACK.astype(dtype), ome=True, metadata={"axes": "YX"})
    for read in (read_pixels, open_regions):
        with pytest.raises(ImageError, match=r"a\.ome\.tif: has further images of its size"):
            read(path)


def test_a_stack_beyond_4_gb_has_all_pages_in_one_directory(tmp_path: Path) -> None:
    """As ImageJ writes it; most of the file is a hole."""
    side, count = 256, 70_000
    path = tmp_path / "a.tif"
    text = f"ImageJ=1.54\nimages={count}\nframes={count}\n"
    first = np.full((side, side), 3, dtype=np.uint8)
    with tifffile.TiffWriter(path, byteorder=">") as file:
        start, _ = file.write(first, description=text, metadata=None, returnoffset=True)
    assert os.path.getsize(path) == start + side**2
    with path.open("r+b") as raw:
        raw.truncate(start + count * side**2)
        raw.seek(-(side**2), os.SEEK_END)
        raw.write(bytes([7]) * side**2)
    assert os.path.getsize(path) > 2**32
    for read in (read_image, open_regions):
        with pytest.raises(ImageError, match=rf"a\.tif: is a TIFF of {count} images"):
            read(path)
    assert (read_pixels(path, page=0) == 3).all()
    assert (read_pixels(path, page=count - 1) == 7).all()
    with open_regions(path, count - 1) as regions:
        assert (regions.read(250, 256, 0, 9) == 7).all()


def ome_xml(number: int, dtype: Any, images: list[str], sizes: str) -> str:
    """OME metadata of the file with this number in a set of files.

    Args:
        images: TiffData of each image of the set.
    """
    pixels = (
        f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="{np.dtype(dtype)}" SizeX="50" '
        f'SizeY="40" {sizes} SizeT="1">'
    )
    content = "".join(
        f'<Image ID="Image:{i}">{pixels}<Channel ID="Channel:{i}:0" SamplesPerPixel="1"/>{planes}'
        "</Pixels></Image>"
        for i, planes in enumerate(images)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/'
        f'OME/2016-06" UUID="{uuid(number)}">{content}</OME>'
    )


def uuid(number: int) -> str:
    return f"urn:uuid:0000000{number}-0000-0000-0000-000000000000"


def planes_in(number: int, *, axis: str = "Z", first: int = 0, count: int = 1) -> str:
    """Planes of an image that are in one of the files."""
    return (
        f'<TiffData First{axis}="{first}" IFD="0" PlaneCount="{count}"><UUID FileName="{number}.'
        f'ome.tif">{uuid(number)}</UUID></TiffData>'
    )


@DTYPES
@pytest.mark.parametrize("neighbour", ["there", "missing", "damaged"])
def test_a_file_of_a_set_stands_for_its_own_plane(
    tmp_path: Path, dtype: type, neighbour: str, caplog: pytest.LogCaptureFixture
) -> None:
    detectron2_logger._LOG_COUNTER.clear()
    planes = "".join(planes_in(number, first=number) for number in range(3))
    for number, page in enumerate(STACK.astype(dtype)):
        text = ome_xml(number, dtype, [planes], 'SizeZ="3" SizeC="1"')
        path = tmp_path / f"{number}.ome.tif"
        tifffile.imwrite(path, page, description=text, metadata=None, compression="zlib")
    if neighbour == "missing":
        (tmp_path / "2.ome.tif").unlink()
    if neighbour == "damaged":
        (tmp_path / "2.ome.tif").write_bytes((tmp_path / "2.ome.tif").read_bytes()[:300])
    for number in range(2):
        path = tmp_path / f"{number}.ome.tif"
        for page in (None, 0):
            assert np.array_equal(read_pixels(path, page=page)[:, :, 0], STACK[number])
            with open_regions(path, page) as regions:
                assert np.array_equal(regions.read(3, 40, 0, 9)[:, :, 0], STACK[number, 3:, :9])
        with pytest.raises(ImageError, match=r"there is no page 1: it has 1 page"):
            read_pixels(path, page=1)
    (line,) = caplog.messages
    assert line.endswith(
        "2 further images of its OME metadata are in other files, which are to be "
        "given too (said once)"
    )


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_an_image_in_each_file_of_a_set_is_read_from_its_own(
    tmp_path: Path, compression: str | None
) -> None:
    """As Micro-Manager writes positions: every file lists the images of all."""
    images = [planes_in(number, count=2) for number in range(2)]
    stacks = [STACK[:2], STACK[1:]]
    for number, pages in enumerate(stacks):
        text = ome_xml(number, np.uint8, images, 'SizeZ="2" SizeC="1"')
        options = {"description": text, "metadata": None, "compression": compression}
        tifffile.imwrite(tmp_path / f"{number}.ome.tif", pages, **options)
    for number, pages in enumerate(stacks):
        path = tmp_path / f"{number}.ome.tif"
        with TiffImages(path) as file:
            assert len(file.pages) == 2
        for index, page in enumerate(pages):
            assert np.array_equal(read_pixels(path, page=index)[:, :, 0], page)


def test_channels_in_several_files_are_one_image(tmp_path: Path) -> None:
    planes = "".join(planes_in(number, axis="C", first=number) for number in range(2))
    pixels = STACK.astype(np.uint16)
    for number in range(2):
        text = ome_xml(number, np.uint16, [planes], 'SizeZ="1" SizeC="2"')
        path = tmp_path / f"{number}.ome.tif"
        tifffile.imwrite(path, pixels[number], description=text, metadata=None)
    for number in range(2):
        read = read_pixels(tmp_path / f"{number}.ome.tif")
        assert np.array_equal(read, np.moveaxis(pixels[:2], 0, 2))
    (tmp_path / "1.ome.tif").unlink()
    with pytest.raises(ImageError, match=r"0\.ome\.tif: its plane 1 is missing"):
        read_pixels(tmp_path / "0.ome.tif")
