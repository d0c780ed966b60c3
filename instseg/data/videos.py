"""Read video files and cameras frame by frame, and write videos frame by frame.

Decoders conceal damage, and readers stop silently at the end of a truncated file.  Here a damaged
video gives all frames that can be decoded and then raises an error that says what is missing.
"""

import logging
import os
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from instseg.data.colours import tag, to_bgr, to_yuv
from instseg.data.image_headers import MAX_PIXELS
from instseg.data.images import Array
from instseg.errors import ConfigError, ImageError, OutputError
from instseg.optional import AV as av

logger = logging.getLogger(__name__)

# The only containers that are opened: FFmpeg would also open text files and playlists.
CONTAINERS = "asf,avi,flv,m4v,matroska,mov,mpeg,mpegts,mpegvideo,ogg"
# Prefix of paths.  Without it FFmpeg takes the text before a colon for a protocol.
_FILE = "file:"
# For cameras and files that do not state a frame rate.
_DEFAULT_FPS = 25.0
# Ticks per second of written videos.  All usual frame rates, also 30000/1001, take a whole number
# of ticks per frame, and MPEG-4 allows at most 65536.
_TICKS = 60_000


class Frame(NamedTuple):
    """An image (H, W, 3), uint8 in BGR order, and its time in seconds since the first frame.

    ``file`` names the image file of a frame that has its own, and ``page`` its page in a stack.
    """

    image: Array
    time: float
    file: str | None = None
    page: int | None = None


class FrameSource(Protocol):
    """A source of frames, such as a :class:`VideoFile` or a :class:`Camera`; the user closes it.

    Attributes:
        name: error messages call it this.
        fps: announced average of frames per second.
        length: announced number of frames; None if nothing is announced.
    """

    name: str
    fps: float
    length: int | None

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames; raise ImageError after the last one if not everything could be read."""

    def close(self) -> None:
        """Release the file or device."""


class VideoFile:
    """A video file, decoded lazily by FFmpeg; sound is ignored.

    Frames are rotated upright as the file says and keep its time stamps, also at a variable frame
    rate.  Their size may change within a file.  Pixels are used as stored, even if the file says
    that they are not square.  Only one frame is held at a time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file and read what it announces.

        Raises:
            ImageError: the file is missing, empty or no video, or its codec is unknown.
        """
        self._begin(os.fspath(path), _open(Path(path)))

    def _begin(self, name: str, container: Any) -> None:
        self.name = name
        self._container = container
        try:
            self._stream = _video_stream(self._container, self.name)
        except ImageError:
            self._container.close()
            raise
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else _DEFAULT_FPS
        seconds = self._announced()[1]
        self.length: int | None = self._stream.frames or None
        if self.length is None and seconds is not None:
            self.length = round(seconds * self.fps)
        self._lost = self._damaged = 0
        self._longest = 0.0  # time between frames
        # End of the last packet in seconds: of the video stream, and of any stream.
        self._reached = {"video": 0.0, "file": 0.0}

    def __iter__(self) -> Iterator[Frame]:
        """Decode from the beginning to the end; works only once.

        Raises:
            ImageError: after the last frame, if the file could not be decoded completely.
        """
        first = None
        previous = -1 / self.fps
        count = 0
        for frame in self._frames():
            count += 1
            self._damaged += frame.is_corrupt
            if frame.time is not None and first is None:
                first = frame.time
            elif frame.time is not None and frame.time - first < previous:  # time stamps restart
                first = frame.time - previous - 1 / self.fps
            moment = frame.time - first if frame.time is not None else previous + 1 / self.fps
            self._longest = max(self._longest, moment - previous)
            previous = moment
            yield Frame(_upright(frame, self.name), moment)
        if not count:
            raise ImageError(f"{self.name}: no frame can be decoded")
        if problems := self._problems():
            raise ImageError(
                f"{self.name}: damaged: {', '.join(problems)}; the other frames are used"
            )

    def close(self) -> None:
        """Close the file; nothing more can be decoded."""
        self._container.close()

    def _frames(self) -> Iterator[Any]:
        packets = self._container.demux()
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:
                self._broke_off(error)
                yield from self._stream.codec_context.decode(None)
                return
            self._note_reached(packet)
            if packet.stream != self._stream:
                continue
            try:
                yield from packet.decode()
            except av.FFmpegError:
                self._lost += 1

    def _broke_off(self, error: Any) -> None:
        logger.warning("%s: cannot be read further: %s", self.name, error.strerror)
        self._lost += 1

    def _note_reached(self, packet: Any) -> None:
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None:
            return
        end = float((stamp + (packet.duration or 0)) * packet.time_base)
        self._reached["file"] = max(self._reached["file"], end)
        if packet.stream == self._stream:
            self._reached["video"] = max(self._reached["video"], end)

    def _announced(self) -> tuple[str, float | None]:
        """The part whose end the file announces ("video" or "file"), and that end in seconds."""
        stream, container = self._stream, self._container
        ticks = stream.duration or 0
        if container.format.name == "avi":
            ticks = stream.frames  # from the header; FFmpeg guesses the duration from the packets
        if ticks:
            return "video", float((ticks + (stream.start_time or 0)) * stream.time_base)
        return "file", container.duration / av.time_base if container.duration else None

    def _problems(self) -> list[str]:
        problems = []
        if self._lost:
            problems.append(f"packets that cannot be decoded: {self._lost}")
        if self._damaged:
            problems.append(f"incomplete frames: {self._damaged}")
        part, announced = self._announced()
        reached = self._reached[part]
        # Two frames of slack: the duration of the last frame is not always stored.
        slack = min(2 * max(self._longest, 1 / self.fps), 1)
        if announced is not None and 0 < reached < announced - slack - 0.01:
            problems.append(f"it ends after {reached:.2f} of {announced:.2f} seconds")
        return problems


class Camera:
    """A camera, read until it is interrupted; a frame's time is that of its arrival."""

    def __init__(self, number: int) -> None:
        """Open camera ``number`` of this computer.

        Raises:
            ImageError: there is no such camera, or another program uses it.
        """
        self.name = f"camera {number}"
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            self._capture.release()
            raise ImageError(f"{self.name}: there is no such camera, or it is in use")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else _DEFAULT_FPS
        self.length: int | None = None

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames until the camera gives no more.

        Raises:
            ImageError: always at the end, since a camera has no other end.
        """
        start = None
        count = 0
        while True:
            ok, image = self._capture.read()
            if not ok:
                raise ImageError(
                    f"{self.name}: no frame came after the first {count}; was it unplugged?"
                )
            now = time.monotonic()
            start = now if start is None else start
            count += 1
            yield Frame(image, now - start)

    def close(self) -> None:
        """Let other programs use the camera."""
        self._capture.release()


class VideoWriter:
    """An MP4 video without sound: H.264 if FFmpeg can encode it, else MPEG-4.

    All frames get the size of the first one; frames of other sizes are scaled to fit into it, on
    black.  Both codecs need even sizes, so an odd size repeats the last row or column.  Colours are
    BT.709 from 720 lines or 1025 columns on, else BT.601, and the file says which.  The file is
    written in fragments of two seconds: if the process is killed, the complete fragments can be
    played.
    """

    def __init__(self, path: Path, fps: float, *, comment: str = "") -> None:
        """
        Args:
            path: of the file; the first frame creates it.
            fps: expected frames per second; each frame is shown at its own time.
            comment: text for the file's metadata.
        """
        self._path = path
        self._comment = comment
        self._fps = min(max(fps, 1), 240)
        self._container: Any = None
        self._stream: Any = None
        self._size = (0, 0)
        self._last = -1
        self._broken = False

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, frame: Frame) -> None:
        """Append a frame.

        Raises:
            OutputError: the file cannot be written, for example on a full disk.
            ImageError: the encoder does not take this size.
        """
        try:
            if self._container is None:
                self._open(frame.image)
            image = to_yuv(fit(frame.image, *self._size))
            self._last = max(round(frame.time * _TICKS), self._last + 1)
            image.pts, image.time_base = self._last, Fraction(1, _TICKS)
            self._container.mux(self._stream.encode(image))
        except (av.FFmpegError, OSError) as error:
            self._broken = True
            raise self._failure(error) from error

    def close(self) -> None:
        """Complete the file, unless writing has failed.

        Raises:
            OutputError: as :meth:`write`.
        """
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            with container:
                # FFmpeg crashes if it writes again after an error.
                if not self._broken:
                    container.mux(self._stream.encode(None))
        except (av.FFmpegError, OSError) as error:
            raise self._failure(error) from error

    def _open(self, image: Array) -> None:
        height, width = image.shape[:2]
        self._size = (height + height % 2, width + width % 2)
        options = {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"}
        container = av.open(f"{_FILE}{self._path}", "w", format="mp4", options=options)
        container.metadata["comment"] = self._comment
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        # No B-frames: frames that refer only to earlier ones need no memory for later ones.
        options = {"preset": "veryfast", "crf": "20", "bf": "0"} if codec == "libx264" else {}
        self._stream = container.add_stream(codec, Fraction(self._fps).limit_denominator(1001))
        self._stream.options = options
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"
        tag(self._stream.codec_context, *self._size)
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        self._stream.codec_context.gop_size = round(2 * self._fps)
        self._container = container

    def _failure(self, error: Exception) -> ImageError | OutputError:
        height, width = self._size
        text = (
            f"{self._path} cannot be written as video of {width}x{height} pixels: "
            f"{getattr(error, 'strerror', None) or error}"
        )
        if isinstance(error, OSError):
            return OutputError(text)
        # An error of the encoder: it does not take every size.
        return ImageError(f"{text}; predict on it with --no-overlay")


def fit(image: Array, height: int, width: int) -> Array:
    """Scale ``image`` to fit into another size, centred on black.

    Args:
        image: (h, w, 3).  If it lacks only one row or column, the last one is repeated instead.
        height, width: of the result, in pixels.
    Returns:
        (height, width, 3).
    """
    rows, columns = image.shape[:2]
    if 0 <= height - rows <= 1 and 0 <= width - columns <= 1:
        return np.pad(image, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")
    scale = min(height / rows, width / columns)
    inner = (max(int(rows * scale), 1), max(int(columns * scale), 1))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas = np.zeros((height, width, 3), image.dtype)
    scaled = cv2.resize(image, (inner[1], inner[0]), interpolation=cv2.INTER_AREA)
    canvas[top : top + inner[0], left : left + inner[1]] = scaled
    return canvas


def require_av(name: str) -> None:
    """Raise an ImageError that names a video if the package that decodes it is missing."""
    try:
        av.require(f"{name}: decoding a video")
    except ConfigError as error:
        raise ImageError(str(error)) from None


def _open(path: Path) -> Any:
    require_av(str(path))
    if not os.path.exists(path):  # Path.exists() raises for a name that is too long
        raise ImageError(f"{path}: no such file")
    if not path.is_file():
        raise ImageError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}")
    size = path.stat().st_size
    if not size:
        raise ImageError(f"{path}: the file is empty (0 bytes)")
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        return av.open(f"{_FILE}{path}", options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        raise ImageError(
            f"{path}: is not a video that can be decoded, or is cut off ({size} bytes): {reason}"
        ) from error


def _video_stream(container: Any, name: str) -> Any:
    stream = container.streams.best("video")
    # FFmpeg offers the cover of a sound file if there is no video stream.
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise ImageError(f"{name}: holds no video stream")
    if stream.codec_context is None:
        raise ImageError(f"{name}: its codec is not known to FFmpeg")
    return stream


def _upright(frame: Any, name: str) -> Array:
    """Pixels of a decoded frame, (H, W, 3) in BGR order, rotated as its metadata says."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ImageError(
            f"{name}: frames of {frame.width}x{frame.height} pixels; at most {MAX_PIXELS} pixels "
            "are accepted"
        )
    image = to_bgr(frame)
    # FFmpeg and NumPy both rotate counter-clockwise.
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
