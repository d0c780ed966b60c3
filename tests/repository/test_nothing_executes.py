"""No configuration, option or weight file can make instseg execute code.

Hostile files of single readers are with the tests of those: pickles in ``test_checkpoint_reading``
and ``test_proposal_files``, Lua in ``test_torch7``, links and plugins of HDF5 in
``test_convert_matterport_files``, playlists in ``test_videos``, archives in ``test_export``.
"""

import ast
import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import detection_utils
from PIL import Image

import instseg
from instseg.convert import convert_file
from instseg.data.images import read_image
from instseg.errors import CheckpointError, ConfigError, ImageError
from instseg.projects import converters
from tests.conftest import ROOT

EXECUTING = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.load", "shelve.open"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.jit.load", "torch.export.load"),
    *("torch.hub.load", "torch.package.PackageImporter", "torch.ops.load_library"),
    *("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"),
}


def executing(path: Path) -> list[str]:
    """Calls in a module that could execute what a file holds."""
    allowed = {
        ROOT / "instseg/install_detectron2.py": "subprocess.run",  # runs pip
        ROOT / "instseg/processes.py": "subprocess.Popen",  # starts the commands of our own tools
    }
    refused = EXECUTING - {allowed.get(path)}
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and (ast.unparse(node.func) in refused or unpickles(node))
    ]


def unpickles(call: ast.Call) -> bool:
    """Whether the reader of arrays or tensors that is called may read anything else."""
    name = ast.unparse(call.func)
    keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name == "torch.load":
        return keywords.get("weights_only") != "True"
    return name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False"


def test_no_module_calls_what_executes_what_a_file_holds() -> None:
    modules = sorted([*ROOT.glob("instseg/**/*.py"), *ROOT.glob("projects/**/*.py")])
    assert [line for path in modules for line in executing(path)] == []


TAGS = [
    'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{0}"]',
    'OUTPUT_DIR: !!python/object/new:os.mkdir ["{0}"]',
    'MODEL:\n  WEIGHTS: [1, {{a: !!python/object/apply:os.mkdir ["{0}"]}}]',
    '_BASE_: !!python/object/apply:os.mkdir ["{0}"]',
    '? !!python/object/apply:os.mkdir ["{0}"]\n: 1',
    "OUTPUT_DIR: !!python/name:os.mkdir",
    "OUTPUT_DIR: !!python/module:this",
]


@pytest.mark.parametrize("text", TAGS)
@pytest.mark.parametrize("in_base", [False, True], ids=["file", "base"])
def test_a_tag_of_yaml_executes_nothing(text: str, in_base: bool, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "a.yaml").write_text(f"VERSION: 2\n{text.format(marker)}\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(ConfigError):
        instseg.load_cfg(tmp_path / ("b.yaml" if in_base else "a.yaml"))
    assert not marker.exists()
    assert "this" not in sys.modules


@pytest.mark.parametrize("key", ["SOLVER.MAX_ITER", "DATASETS.TRAIN", "INPUT.MIN_SIZE_TRAIN"])
def test_an_expression_on_the_command_line_is_not_evaluated(key: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    expression = f"__import__('os').mkdir({str(marker)!r})"
    for value in (expression, f"({expression},)", f"[{expression}]"):
        with pytest.raises(ConfigError):
            instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", [key, value])
    assert not marker.exists()


class Payload:
    """Pickled, it makes a folder when it is loaded by an unprotected reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", converters())
@pytest.mark.parametrize("in_zip", [False, True], ids=["pickle", "zip"])
def test_a_payload_for_a_converter_is_refused_and_not_executed(
    name: str, in_zip: bool, tmp_path: Path
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "a.pth"
    content = {"state_dict": {"weight": torch.ones(1)}, "other": Payload(marker)}
    if in_zip:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="a.pth"):
        convert_file(name, str(path), tmp_path / "result.safetensors")
    assert not marker.exists()
    assert not (tmp_path / "result.safetensors").exists()


STARTS = [
    *(b"", b"<html>", b"PK\x03\x04", b"\x80\x02}q\x00"),
    *(b"\x89HDF\r\n\x1a\n", b"\x12\x01" + bytes(6)),
]


@pytest.mark.parametrize("name", converters())
def test_noise_for_a_converter_is_refused_with_the_name_of_the_file(
    name: str, tmp_path: Path
) -> None:
    dice = random.Random(0)
    for start in STARTS:
        for length in (0, 50):
            (tmp_path / "a.bin").write_bytes(start + dice.randbytes(length))
            with pytest.raises(CheckpointError, match="a.bin"):
                convert_file(name, str(tmp_path / "a.bin"), tmp_path / "result.safetensors")


def test_no_reader_has_ghostscript_run_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither ours nor Detectron2's, which training reads images with."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    image = tmp_path / "image.jpg"
    Image.new("RGB", (8, 8)).save(image, format="EPS")
    with pytest.raises(ImageError, match="no image|not an image|cannot"):
        read_image(image)
    with pytest.raises(OSError, match="Ghostscript"):
        detection_utils.read_image(str(image), format="BGR")
    assert not (tmp_path / "executed").exists()
