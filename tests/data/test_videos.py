"""Reading frames from video files and cameras, and writing videos."""

import os
import shutil
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition

from instseg.data import videos
from instseg.data.videos import Camera, Frame, VideoFile, VideoWriter, fit
from instseg.errors import ImageError, OutputError
from tests.support.video_common import images, turned, write_clip


def read(path: Path) -> list[Frame]:
    video = VideoFile(path)
    frames = list(video)
    video.close()
    return frames


def read_until_error(path: Path) -> tuple[int, str]:
    """Number of frames before the error, and the error."""
    count = 0
    with pytest.raises(ImageError) as error:
        for _ in VideoFile(path):
            count += 1
    return count, str(error.value)


def test_lossless_frames_come_back_in_order(tmp_path: Path) -> None:
    written = images(5)
    frames = read(write_clip(tmp_path / "v.mkv", written, codec="ffv1"))
    assert len(frames) == 5
    for frame, image in zip(frames, written, strict=True):
        assert frame.image.dtype == np.uint8 and frame.image.flags.c_contiguous
        assert np.abs(frame.image.astype(int) - image).max() <= 3  # the way to YCbCr and back


@pytest.mark.parametrize("name", ["v.mp4", "v.avi", "v.mkv", "v.ts", "v.mov", "a:b.mp4"])
def test_every_frame_of_a_container_is_read(tmp_path: Path, name: str) -> None:
    video = VideoFile(write_clip(tmp_path / name, images(12)))
    assert len(list(video)) == 12


def test_rate_and_length_are_those_announced(tmp_path: Path) -> None:
    video = VideoFile(write_clip(tmp_path / "v.mp4", images(12)))
    assert (video.fps, video.length) == (10, 12)


def test_times_of_a_variable_frame_rate_are_kept(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.6, 0.7]
    frames = read(write_clip(tmp_path / "v.mp4", images(5), times))
    assert [frame.time for frame in frames] == pytest.approx(times)


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    frames = read(write_clip(tmp_path / "v.mkv", images(3), [7.0, 7.1, 7.2]))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.2])


def test_times_go_on_where_those_of_the_file_begin_anew(tmp_path: Path) -> None:
    late = write_clip(tmp_path / "a.ts", images(3), [5.0, 5.1, 5.2])
    joined = tmp_path / "joined.ts"
    joined.write_bytes(late.read_bytes() + write_clip(tmp_path / "b.ts", images(3)).read_bytes())
    assert [frame.time for frame in read(joined)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_metadata_that_is_no_text_does_not_cost_the_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mkv", images(3))
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"\x80avf"))
    assert len(read(path)) == 3


def test_a_clip_may_have_one_frame(tmp_path: Path) -> None:
    assert len(read(write_clip(tmp_path / "v.mp4", images(1)))) == 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_turned_as_the_file_says(tmp_path: Path, degrees: int) -> None:
    path = write_clip(tmp_path / "v.mp4", images(1))
    lying = read(path)[0].image
    upright = read(turned(path, degrees))[0].image
    assert np.array_equal(upright, np.rot90(lying, -degrees // 90))  # rot90 is counter-clockwise
    ok, opencv = cv2.VideoCapture(str(path)).read()
    assert ok and np.array_equal(upright, opencv)


def test_frames_of_another_size_come_as_they_are(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "a.ts", images(5))
    large = write_clip(tmp_path / "b.ts", images(5, 96, 128), [0.5, 0.6, 0.7, 0.8, 0.9])
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    shapes = [frame.image.shape[:2] for frame in read(joined)]
    assert shapes == [(48, 64)] * 5 + [(96, 128)] * 5


@pytest.mark.parametrize(
    ("name", "options"), [("v.mp4", {"movflags": "faststart"}), ("v.mkv", {}), ("v.avi", {})]
)
def test_a_truncated_file_gives_its_frames_and_an_error(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    path = write_clip(tmp_path / name, images(40), options=options)
    os.truncate(path, path.stat().st_size // 2)
    count, error = read_until_error(path)
    assert 5 < count < 40
    assert error.startswith(f"{path}: damaged: ")


def test_a_file_that_ends_early_is_told_by_its_announced_length(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mkv", images(40))
    os.truncate(path, path.stat().st_size // 2)
    assert "of 4.00 seconds; the other frames are used" in read_until_error(path)[1]


def spoil(path: Path, numbers: slice, start: int = 0) -> None:
    """Overwrite some of an AVI file's packets from byte ``start`` of each on."""
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        spans = [(packet.pos, packet.size) for packet in packets[numbers]]
    for position, size in spans:
        spoiled = b"\xff" * (size - start)
        data = data[: position + start] + spoiled + data[position + size :]
    path.write_bytes(data)


def test_packets_that_cannot_be_decoded_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.avi", images(20), codec="mjpeg")
    spoil(path, slice(7, 9))
    assert read_until_error(path) == (
        18,
        f"{path}: damaged: packets that cannot be decoded: 2; the other frames are used",
    )


def test_frames_that_the_decoder_mends_are_counted(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.avi", images(20))
    spoil(path, slice(7, 9), start=20)
    count, error = read_until_error(path)
    assert count == 20
    assert "damaged: incomplete frames: " in error


def test_garbage_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"x" * 1000)
    with pytest.raises(ImageError, match=r"v.mp4: is not a video .* \(1000 bytes\)"):
        VideoFile(tmp_path / "v.mp4")


def test_a_file_cut_before_its_index_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mp4", images(20))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ImageError, match="or is cut off"):
        VideoFile(path)


def test_missing_and_empty_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    for name, reason in (("no.mp4", "no such file"), ("empty.mp4", "empty"), ("", "is a folder")):
        with pytest.raises(ImageError, match=reason):
            VideoFile(tmp_path / name)


def test_a_file_with_sound_only_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", 8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ImageError, match="holds no video stream"):
        VideoFile(tmp_path / "v.mkv")


def test_the_cover_of_a_file_with_sound_only_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", 1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame.from_ndarray(images(1)[0], format="bgr24")))
    with pytest.raises(ImageError, match="holds no video stream"):
        VideoFile(path)


def test_sound_longer_than_the_images_is_no_damage(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        sound = container.add_stream("pcm_s16le", 8000)
        video = container.add_stream("mpeg4", 10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 80_000), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        for image in images(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(video.encode(None))
    assert len(read(tmp_path / "v.mkv")) == 5


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile v.ts\n",
    ],
    ids=["hls", "concat"],
)
def test_a_playlist_named_as_video_opens_no_other_file(tmp_path: Path, playlist: str) -> None:
    write_clip(tmp_path / "v.ts", images(3))
    (tmp_path / "list.mp4").write_text(playlist)
    with pytest.raises(ImageError, match="list.mp4: is not a video"):
        VideoFile(tmp_path / "list.mp4")


def test_a_camera_that_stops_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = cv2.VideoCapture(str(write_clip(tmp_path / "v.mp4", images(3))))
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: capture)
    with pytest.raises(ImageError, match="camera 0: no frame came after the first 3"):
        list(Camera(0))


def test_frames_of_a_camera_have_the_time_of_their_arrival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = cv2.VideoCapture(str(write_clip(tmp_path / "v.mp4", images(3))))
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: capture)
    clock = iter([5.0, 5.5, 7.0])
    monkeypatch.setattr("instseg.data.videos.time.monotonic", lambda: next(clock))
    frames = iter(Camera(0))
    assert [next(frames).time for _ in range(3)] == [0, 0.5, 2]


def test_a_missing_camera_is_an_error() -> None:
    with pytest.raises(ImageError, match="camera 97: there is no such camera"):
        Camera(97)


@pytest.mark.parametrize("shape", [(48, 64), (47, 63), (1, 1), (2, 300)])
def test_a_written_video_has_all_frames_at_even_size(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    written = images(4, *shape)
    with VideoWriter(tmp_path / "v.mp4", 10) as writer:
        for number, image in enumerate(written):
            writer.write(Frame(image, number / 10))
    frames = read(tmp_path / "v.mp4")
    assert len(frames) == 4
    assert all(
        f.image.shape == (shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3) for f in frames
    )
    assert np.abs(frames[0].image[: shape[0], : shape[1]].astype(int) - written[0]).mean() < 12


def test_a_written_video_keeps_times(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.6, 0.7]
    with VideoWriter(tmp_path / "v.mp4", 30000 / 1001) as writer:
        for image, time in zip(images(5), times, strict=True):
            writer.write(Frame(image, time))
    assert [frame.time for frame in read(tmp_path / "v.mp4")] == pytest.approx(times, abs=1e-4)


def test_a_colon_in_the_name_of_a_folder_is_no_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("12:30").mkdir()
    with VideoWriter(Path("12:30/v.mp4"), 10) as writer:
        writer.write(Frame(images(1)[0], 0.0))
    assert len(read(Path("12:30/v.mp4"))) == 1


def test_a_size_that_no_video_can_have_is_an_error_of_that_video(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 10) as writer:
        with pytest.raises(ImageError, match="cannot be written as video of 20000x2 pixels"):
            writer.write(Frame(np.zeros((2, 20_000, 3), np.uint8), 0.0))


def test_a_video_with_frames_that_are_too_large_is_an_error_of_that_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "v.mp4", images(2))
    monkeypatch.setattr(videos, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ImageError, match=r"v\.mp4: frames of 64x48 pixels; at most 3071 pixels"):
        list(VideoFile(tmp_path / "v.mp4"))


def test_times_that_stand_still_are_spread(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 10) as writer:
        for image in images(4):
            writer.write(Frame(image, 0.0))
    assert len(read(tmp_path / "v.mp4")) == 4


def test_a_writer_without_frames_leaves_no_file(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 10):
        pass
    assert not (tmp_path / "v.mp4").exists()


def test_what_a_killed_writer_left_can_be_read(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 10) as writer:
        for number, image in enumerate(images(100)):
            writer.write(Frame(image, number / 10))
        shutil.copy(tmp_path / "v.mp4", tmp_path / "killed.mp4")
    count = 0
    try:
        for _ in VideoFile(tmp_path / "killed.mp4"):
            count += 1
    except ImageError as error:
        assert "damaged" in str(error)
    assert 40 <= count < 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("count", [1, 100])
def test_a_full_disk_is_an_error_while_frames_are_written_or_at_the_end(count: int) -> None:
    with pytest.raises(OutputError, match="/dev/full cannot be written as video of 64x48 pixels"):
        with VideoWriter(Path("/dev/full"), 10) as writer:
            for number, image in enumerate(images(count)):
                writer.write(Frame(image, number / 10))


def test_a_frame_of_another_size_is_fitted_on_black() -> None:
    fitted = fit(np.full((10, 40, 3), 200, np.uint8), 40, 40)
    assert (fitted[15:25] == 200).all()
    assert not fitted[:15].any() and not fitted[25:].any()


def test_a_frame_of_the_same_size_is_not_changed() -> None:
    image = images(1)[0]
    assert np.array_equal(fit(image, *image.shape[:2]), image)
