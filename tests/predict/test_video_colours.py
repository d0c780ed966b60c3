"""Colours of videos that are read and written: matrix, range and their tags."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from instseg.data.videos import Frame, VideoFile, VideoWriter

PURE = [(0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 255, 255), (255, 0, 255), (40, 120, 200)]
HD, SD = (720, 1280), (480, 640)
# H.273: numbers of BT.709 and of SMPTE 170M, for matrix, primaries and transfer alike.
TAG = {HD: 1, SD: 6}
MATRIX = {HD: Colorspace.ITU709, SD: Colorspace.ITU601}


def bars(height: int, width: int) -> np.ndarray:
    """Saturated colours side by side, in BGR order."""
    image = np.zeros((height, width, 3), np.uint8)
    for number, colour in enumerate(PURE):
        image[:, number * width // len(PURE) : (number + 1) * width // len(PURE)] = colour
    return image


def error(image: np.ndarray) -> int:
    """Levels by which the middle of the worst bar is off."""
    height, width = image.shape[:2]
    middles = [(2 * number + 1) * width // (2 * len(PURE)) for number in range(len(PURE))]
    return int(np.abs(image[height // 2, middles].astype(int) - PURE).max())


def encoded(
    path: Path, size: tuple[int, int], matrix: Colorspace, tag: int, full_range: bool = False
) -> Path:
    """The bars as video, converted by ``matrix`` and tagged with ``tag``; 2 says nothing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", 10)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        context, levels = stream.codec_context, ColorRange.JPEG if full_range else ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = tag
        context.color_range = levels if tag != 2 else ColorRange.UNSPECIFIED
        frame = av.VideoFrame.from_ndarray(bars(*size), format="bgr24").reformat(
            format="yuv420p", dst_colorspace=matrix, dst_color_range=levels
        )
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [HD, SD])
def test_a_written_video_says_its_colours_and_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], codec: str
) -> None:
    monkeypatch.setattr(av, "codecs_available", {codec})
    with VideoWriter(tmp_path / "v.mp4", 10) as writer:
        writer.write(Frame(bars(*size), 0.0))
    with av.open(str(tmp_path / "v.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert tags == (TAG[size],) * 3
        assert context.color_range == ColorRange.MPEG
        frame = next(container.decode(video=0))
        # With the matrix named here, not the one that the tags name.
        assert error(frame.to_ndarray(format="bgr24", src_colorspace=MATRIX[size])) < 10
    assert error(next(iter(VideoFile(tmp_path / "v.mp4"))).image) < 10


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("size", [HD, SD])
@pytest.mark.parametrize(("matrix", "tag"), [(Colorspace.ITU709, 1), (Colorspace.ITU601, 6)])
def test_the_tags_of_a_video_are_believed(
    tmp_path: Path, size: tuple[int, int], matrix: Colorspace, tag: int, full_range: bool
) -> None:
    path = encoded(tmp_path / "v.mp4", size, matrix, tag, full_range)
    assert error(next(iter(VideoFile(path))).image) < 10


@pytest.mark.parametrize("size", [HD, (1280, 720), (576, 1920), SD, (576, 720)])
def test_a_video_without_tags_has_the_colours_that_players_assume_for_its_size(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    large = size[0] >= 720 or size[1] > 1024
    matrix = Colorspace.ITU709 if large else Colorspace.ITU601
    assert error(next(iter(VideoFile(encoded(tmp_path / "v.mp4", size, matrix, 2)))).image) < 10
