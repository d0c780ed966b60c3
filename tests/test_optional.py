"""Packages of extras that are missing cost nothing until they are needed, and are then named."""

import subprocess
import sys
from pathlib import Path

import pytest

from instseg import optional
from instseg.data.streams import Stream
from instseg.data.videos import VideoFile
from instseg.errors import ConfigError, ImageError
from instseg.predict import PredictOptions, _check_sources
from instseg.predict.sources import Source
from tests.conftest import ROOT

INSTALL = "needs the package av, which is not installed; type: pip install 'instseg[video]'"


@pytest.fixture
def without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_av")
def test_a_video_and_a_stream_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"video")
    with pytest.raises(ImageError, match=r"v\.mp4: decoding a video needs") as error:
        VideoFile(tmp_path / "v.mp4")
    assert str(error.value).endswith(INSTALL)
    with pytest.raises(ImageError) as error:
        Stream("rtsp://user:secret@camera/live")
    assert str(error.value) == f"rtsp://camera/live: decoding a video {INSTALL}"


@pytest.mark.usefixtures("without_av")
def test_an_overlay_of_frames_is_refused_before_the_model_is_built() -> None:
    sources = [Source("frames", "frames", "sequence", files=("a.png",))]
    options = PredictOptions("a.yaml", ["frames"], Path("out"))
    with pytest.raises(ConfigError, match="overlay of several frames .*--no-overlay") as error:
        _check_sources(options, sources)
    assert str(error.value).endswith(INSTALL)
    _check_sources(PredictOptions("a.yaml", ["frames"], Path("out"), overlay=False), sources)
    _check_sources(options, [Source("a.png", "a", "image")])


def test_prediction_is_loaded_without_packages_of_extras() -> None:
    code = (
        "import sys, instseg.predict, instseg.commands.predict, instseg.training.trainer\n"
        "print(*sorted({'av', 'supervision', 'trackers', 'onnx', 'tifffile'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
