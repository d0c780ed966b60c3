"""Read video streams from other computers: ``http://``, ``rtsp://`` and the like."""

import re
import time
from typing import Any

from instseg.data.videos import CONTAINERS, VideoFile, require_av
from instseg.errors import ConfigError, ImageError, short
from instseg.optional import AV as av

SCHEMES = ("http", "https", "rtmp", "rtmps", "rtsp", "rtsps")
_TIMEOUT = 10.0
"""A stream ends after this many seconds without an answer or packet."""
# Containers, and also playlists over http, the formats of cameras, and bare codecs.
_FORMATS = f"{CONTAINERS},h264,hevc,hls,live_flv,mjpeg,mpjpeg,rtp,rtsp,sdp"
# Without "file": a server must not be able to have files of this computer read.
_PROTOCOLS = "crypto,http,httpproxy,https,rtmp,rtmps,rtmpt,rtmpts,rtp,srtp,tcp,tls,udp"
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)


def is_url(text: str) -> bool:
    """Whether the text begins with a scheme, as ``rtsp://camera/live`` does."""
    return _URL.fullmatch(text) is not None


def public_name(url: str) -> str:
    """``url`` without its possible secrets: user, password, and everything after ``?`` or ``#``.

    Raises:
        ConfigError: the scheme is unknown, or there is no host.
    """
    match = _URL.fullmatch(url)
    scheme, rest = match.groups() if match else ("", url)
    rest = re.split("[?#]", rest.rpartition("@")[2])[0]
    if scheme.lower() not in SCHEMES:
        raise ConfigError(
            f"--input {short(f'{scheme}://{rest}')} cannot be read; expected a file, a folder, the "
            f"number of a camera, or an address that begins with {'://, '.join(SCHEMES)}://"
        )
    if not rest.strip("/"):
        raise ConfigError(f"--input {scheme}://{rest} names no host")
    return f"{scheme}://{rest}"


class Stream(VideoFile):
    """A stream, decoded as it arrives; it ends when the sender closes it.

    Attributes:
        name: the address without user, password and query.
        length: None for live streams.
    """

    def __init__(self, url: str) -> None:
        """Connect, and read what the sender announces.

        Raises:
            ImageError: nobody answers, or the data are no video.
        """
        name = public_name(url)
        require_av(name)
        options = {
            "format_whitelist": _FORMATS,
            "protocol_whitelist": _PROTOCOLS,
            "rtsp_flags": "prefer_tcp",
        }
        if not url.lower().startswith("rtsp"):
            del options["rtsp_flags"]
        start = time.monotonic()
        try:
            container = av.open(url, options=options, metadata_errors="replace", timeout=_TIMEOUT)
        except (av.FFmpegError, OSError) as error:
            # After a timeout RTSP reports invalid data.
            late = time.monotonic() - start >= _TIMEOUT
            raise ImageError(f"{name}: cannot be read: {_reason(error, late)}") from None
        self._begin(name, container)
        self._end: str | None = None

    def _broke_off(self, error: Any) -> None:
        self._end = _reason(error)

    def _problems(self) -> list[str]:
        return [f"it broke off: {self._end}"] if self._end else super()._problems()


def _reason(error: Any, late: bool = False) -> str:
    if late or isinstance(error, av.ExitError):
        return f"nothing came for {_TIMEOUT:g} seconds"
    return str(error.strerror or type(error).__name__)  # str(error) can hold a password
