"""Files of every other kind with random and with damaged content: none but our errors escape.

Images, weights, proposals and annotations have such tests beside their others.
``make fuzz`` runs all of them with ten thousand examples each.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import instseg
from instseg.checkpoint.keras_hdf5 import read_keras_hdf5
from instseg.data.flow import decode_flow, encode_flow
from instseg.data.videos import VideoFile
from instseg.errors import CheckpointError, ConfigError, DatasetError, ImageError
from tests.support.video_common import images, write_clip

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """The content with some bytes changed, and maybe a piece taken out or its end cut off."""
    changed = bytearray(content)
    positions = st.integers(0, len(content) - 1)
    for position in draw(st.lists(positions, max_size=6)):
        changed[position] = draw(st.integers(0, 255))
    start = draw(positions)
    end = draw(st.sampled_from([start, start + 1, start + 9, len(content)]))
    del changed[start:end]
    return bytes(changed)


def replaced(draw: Any, tree: Any, value: Any) -> Any:
    """A copy of nested dicts and lists with another value somewhere, or without that entry."""
    node = changed = {"": copy.deepcopy(tree)}
    key: Any = ""
    while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
        node = node[key]
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
    if key != "" and draw(st.integers(0, 4)) == 0:
        del node[key]
    else:
        node[key] = value
    return changed[""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Warnings of FFmpeg for each of ten thousand damaged videos."""
    level = av.logging.get_level()
    av.logging.set_level(None)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    av.logging.set_level(level)


CONFIG = {
    "VERSION": 2,
    "_BASE_": [],
    "MODEL": {
        "META_ARCHITECTURE": "YOLACT",
        "PIXEL_MEAN": [118.0, 118.0, 118.0],
        "YOLACT": {"NUM_CLASSES": 3, "ANCHOR_SCALES": [[20], [30]], "NORM": "BN"},
        "ROI_HEADS": {"NAME": "StandardROIHeads"},
    },
    "DATASETS": {"TRAIN": ["shapes_train"], "TEST": ["shapes_val"], "SHAPES_SIZE": 128},
    "SOLVER": {"BASE_LR": 0.002, "STEPS": [10, 20], "CLIP_GRADIENTS": {"ENABLED": True}},
    "SEED": 1,
}
TAGS = st.sampled_from(["!!python/name:os.system", "!!binary x", "*a", "&a", "!!set", "1e9", "("])


@settings(max_examples=max(settings().max_examples // 10, 25))  # a tenth of a second each
@given(st.data())
def test_a_configuration_with_any_value_anywhere_is_loaded_or_refused(
    folder: Path, data: st.DataObject
) -> None:
    value = data.draw(VALUES | TAGS)
    text = yaml.safe_dump(replaced(data.draw, CONFIG, value))
    if data.draw(st.booleans()):
        text = text.replace(f"'{value}'", str(value))  # a tag, no longer a text
    path = folder / "config.yaml"
    path.write_text(text, errors="replace")
    with suppress(ConfigError, DatasetError):
        instseg.load_cfg(path)


@pytest.fixture(scope="module")
def clips(folder: Path) -> list[bytes]:
    names = ["a.mp4", "a.mkv", "a.avi", "a.ts"]
    return [write_clip(folder / name, images(3, 16, 16)).read_bytes() for name in names]


@given(st.data())
def test_a_damaged_video_gives_frames_and_at_most_an_image_error(
    folder: Path, clips: list[bytes], data: st.DataObject
) -> None:
    path = folder / "damaged"
    path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(clips)))))
    with suppress(ImageError):
        for frame in VideoFile(path):
            assert frame.image.dtype == np.uint8 and frame.image.shape[2:] == (3,)
            assert np.isfinite(frame.time)


@pytest.fixture(scope="module")
def keras_file(folder: Path) -> bytes:
    path = folder / "good.h5"
    with h5py.File(path, "w") as file:
        file["conv/conv/kernel:0"] = np.ones((1, 1, 2, 3), np.float32)
        file["conv/conv/bias:0"] = np.ones(3, np.float32)
    return path.read_bytes()


@given(st.data())
def test_a_damaged_keras_file_is_read_or_refused(
    folder: Path, keras_file: bytes, data: st.DataObject
) -> None:
    path = folder / "damaged.h5"
    path.write_bytes(data.draw(damaged(keras_file)))
    with suppress(CheckpointError):
        read_keras_hdf5(str(path), set())


FLOW = encode_flow(np.ones((2, 3, 2), np.float32))


@given(st.binary(max_size=60) | damaged(FLOW))
def test_random_and_damaged_bytes_as_a_flow_are_read_or_refused(content: bytes) -> None:
    with suppress(DatasetError):
        assert decode_flow(content, "a.flo").shape[2] == 2
