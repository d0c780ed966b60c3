"""Videos that a server sends, and files that such a server must not reach."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from instseg.data import streams
from instseg.data.streams import Stream, is_url, public_name
from instseg.errors import ConfigError, ImageError
from tests.support.video_common import images, write_clip


class Handler(SimpleHTTPRequestHandler):
    """Says nothing on stderr, and ends the connection after ``limit`` bytes of a file."""

    limit: int | None = None

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        with contextlib.suppress(OSError):
            outputfile.write(source.read(self.limit))  # type: ignore[attr-defined]


@contextlib.contextmanager
def served(folder: Path, limit: int | None = None) -> Iterator[str]:
    """The address, with a password, at which the files of ``folder`` are."""
    handler = type("Limited", (Handler,), {"limit": limit})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://user:secret@127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    write_clip(folder / "v.mp4", images(12), options={"movflags": "faststart"})
    write_clip(folder / "v.ts", images(12))
    write_clip(folder / "v.mkv", images(12))
    return folder


@pytest.mark.parametrize("name", ["v.mp4", "v.ts", "v.mkv"])
def test_a_video_comes_from_a_server_as_from_a_file(site: Path, name: str) -> None:
    with served(site) as address:
        stream = Stream(f"{address}/{name}?token=hidden")
        assert stream.name == f"http://{address.rpartition('@')[2]}/{name}"
        assert len(list(stream)) == 12
        stream.close()


def test_a_playlist_of_a_server_is_played(site: Path) -> None:
    (site / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\nv.ts\n#EXT-X-ENDLIST\n"
    )
    with served(site) as address:
        assert len(list(Stream(f"{address}/list.m3u8"))) == 12


@pytest.mark.parametrize("prefix", ["file:", "file://", "", "subfile,,start,0,end,0,,:", "concat:"])
@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_what_a_server_sends_opens_no_file_of_this_computer(
    site: Path, tmp_path: Path, prefix: str, kind: str
) -> None:
    local_clip = write_clip(tmp_path / "own.ts", images(3))
    text = f"ffconcat version 1.0\nfile '{prefix}{local_clip}'\n"
    if kind == "hls":
        head = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n"
        text = f"{head}{prefix}{local_clip}\n#EXT-X-ENDLIST\n"
    (site / "list.m3u8").write_text(text)
    with served(site) as address, pytest.raises(ImageError) as error:
        list(Stream(f"{address}/list.m3u8"))
    assert "secret" not in str(error.value)


def test_a_connection_that_breaks_off_gives_its_frames_and_an_error(site: Path) -> None:
    frames = 0
    with served(site, limit=(site / "v.ts").stat().st_size // 2) as address:
        with pytest.raises(ImageError, match="/v.ts: damaged: it broke off: .*; the other frames"):
            for _ in Stream(f"{address}/v.ts"):
                frames += 1
    assert 0 < frames < 12


@pytest.mark.parametrize("scheme", ["http", "https", "rtsp", "rtmp"])
def test_a_port_at_which_nobody_listens_is_one_line(scheme: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ImageError) as error:
            Stream(f"{scheme}://user:secret@127.0.0.1:{port}/live?key=hidden")
    expected = f"{scheme}://127.0.0.1:{port}/live: cannot be read: Connection refused"
    assert str(error.value) == expected
    assert error.value.__cause__ is None  # FFmpeg's own message holds the address


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_server_that_says_nothing_is_not_waited_for(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_TIMEOUT", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with pytest.raises(ImageError, match="cannot be read: nothing came for 0.3 seconds"):
            Stream(f"{scheme}://127.0.0.1:{port}/live")


def test_a_page_that_is_no_video_or_not_there_is_an_error(site: Path) -> None:
    (site / "page.html").write_text("<html>no video</html>")
    with served(site) as address:
        for name, reason in (("page.html", "Invalid data"), ("none.mp4", "404 Not Found")):
            with pytest.raises(ImageError, match=f"/{name}: cannot be read: .*{reason}"):
                Stream(f"{address}/{name}")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rtsp://camera/live", "rtsp://camera/live"),
        ("rtsp://user:p@ss@camera:554/live", "rtsp://camera:554/live"),
        ("rtsp://user:pa/ss@camera/live", "rtsp://camera/live"),
        ("rtsp://user:pa?ss#w@camera/live", "rtsp://camera/live"),
        ("HTTP://camera/video.cgi?user=admin&pwd=secret", "HTTP://camera/video.cgi"),
        ("https://host/a.mp4#t=10", "https://host/a.mp4"),
    ],
)
def test_what_can_be_secret_in_an_address_is_not_shown(url: str, name: str) -> None:
    assert is_url(url) and public_name(url) == name


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "'file:///etc/passwd' cannot be read; expected a file, a folder"),
        ("ftp://user:secret@host/v.mp4", "'ftp://host/v.mp4' cannot be read; expected a file"),
        ("concat://a", "'concat://a' cannot be read"),
        ("http://", "http:// names no host"),
        ("rtsp://user:secret@", "rtsp:// names no host"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        public_name(url)
    assert message in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("text", ["a.mp4", "0", "C:\\v.mp4", "12:30/v.mp4", "frames_%05d.png", ""])
def test_what_is_no_address_is_a_path(text: str) -> None:
    assert not is_url(text)
