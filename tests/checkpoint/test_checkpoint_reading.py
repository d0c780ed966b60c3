"""Weight files that are damaged or hostile are refused, and nothing in them is executed."""

import hashlib
import json
import logging
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from instseg.checkpoint import read_weights, save_safetensors
from instseg.errors import CheckpointError
from instseg.pickles import read_array_pickle

FAILING = Path("/proc/self/mem")  # a file whose first byte cannot be read
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"


def state() -> dict[str, torch.Tensor]:
    """Tensors of several types and shapes, as a state dict has them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)).state_dict()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Payload:
    """Pickled, it makes a folder when it is loaded by an unprotected reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, like the files of Detectron's first model zoo."""

    def save_string(self, value) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def python2_pickle(path: Path, value: object) -> Path:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pyth", "", ".safetensors"])
@pytest.mark.parametrize("content", [b"", PAGE, b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_weight_file_at_all_is_refused_with_its_size(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights.* is corrupt \({len(content)} bytes\)"):
        read_weights(path)


def test_an_html_page_is_recognised_as_a_failed_download(tmp_path):
    (tmp_path / "a.pth").write_bytes(PAGE)
    with pytest.raises(CheckpointError, match="HTML page, so the download failed"):
        read_weights(tmp_path / "a.pth")


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path):
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(CheckpointError, match=r"does not exist; did you mean .*model_final.pth\?"):
        read_weights(tmp_path / "model_fnal.pth")


def test_a_file_in_a_missing_folder_is_refused_naming_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder .*nowhere"):
        read_weights(tmp_path / "nowhere" / "a.pth")


def test_a_folder_is_refused_as_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        read_weights(tmp_path)


@pytest.mark.skipif(not FAILING.exists(), reason="needs a file that fails as a broken disk does")
@pytest.mark.parametrize("read", [read_weights, read_array_pickle])
def test_a_disk_that_fails_is_told_by_the_name_of_the_file(read):
    with pytest.raises(CheckpointError, match=f"{FAILING} cannot be read: .*Input/output error"):
        read(str(FAILING))


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {"model": {"a": "b"}}, {1: torch.ones(1)}]
)
def test_a_file_without_tensors_is_refused_saying_what_was_expected(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a.pth (holds|is no).*expected"):
        read_weights(tmp_path / "a.pth")


def test_a_pkl_without_names_is_refused_saying_what_was_expected(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="a.pkl holds a list; expected a dict of arrays"):
        read_weights(tmp_path / "a.pkl")


def test_a_sparse_tensor_is_refused_by_name(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="'w' as a tensor that is not dense"):
        read_weights(tmp_path / "a.pth")


def test_a_bare_state_dict_is_read_as_the_model(tmp_path):
    torch.save(state(), tmp_path / "a.pth")
    assert list(read_weights(tmp_path / "a.pth")["model"]) == list(state())


def test_a_state_dict_keeps_its_module_versions(tmp_path):
    torch.save(state(), tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["model"]._metadata["1"] == {"version": 2}


def test_a_pycls_file_is_matched_by_name_suffixes(tmp_path):
    torch.save({"model_state": state(), "epoch": 1}, tmp_path / "a.pyth")
    checkpoint = read_weights(tmp_path / "a.pyth")
    assert checkpoint["matching_heuristics"]
    assert list(checkpoint["model"]) == [k for k in state() if k != "1.num_batches_tracked"]


def test_a_pyth_file_from_elsewhere_is_refused(tmp_path):
    torch.save(state(), tmp_path / "a.pyth")
    with pytest.raises(CheckpointError, match="'model_state'"):
        read_weights(tmp_path / "a.pyth")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A folder for property tests, which must not have one per test."""
    return tmp_path_factory.mktemp("fuzz")


SUFFIXES = st.sampled_from([".pth", ".pt", ".pyth", "", ".safetensors", ".pkl"])
MAGIC = st.sampled_from(
    [b"", b"PK\x03\x04", b"\x80\x02}q\x00", b"\x10" + b"\0" * 7 + b'{"a":{"dtype"']
)


@given(SUFFIXES, MAGIC, st.binary(max_size=200))
def test_random_bytes_under_any_extension_raise_nothing_but_checkpoint_error(
    scratch, suffix, magic, tail
):
    path = scratch / f"random{suffix}"
    path.write_bytes(magic + tail)
    try:
        checkpoint = read_weights(path, sha256(path) if suffix == ".pkl" else "")
    except CheckpointError:
        return
    assert checkpoint["model"] == {}  # a few bytes make a valid pickle of an empty dict


@pytest.fixture(scope="module")
def good_files(scratch) -> dict[str, bytes]:
    tensors = state()
    torch.save({"model": tensors, "iteration": 3}, scratch / "good.pth")
    torch.save(tensors, scratch / "good.pt", _use_new_zipfile_serialization=False)
    save_safetensors(scratch / "good.safetensors", tensors, {"class_names": ["a"]})
    arrays = {k: v.numpy() for k, v in tensors.items()}
    python2_pickle(scratch / "good.pkl", {"blobs": arrays})
    return {file.suffix: file.read_bytes() for file in scratch.glob("good.*")}


@given(st.data())
def test_a_good_file_with_flipped_or_missing_bytes_is_read_or_refused(scratch, good_files, data):
    suffix = data.draw(st.sampled_from(sorted(good_files)))
    content = bytearray(good_files[suffix])
    positions = st.integers(0, len(content) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=5)):
        content[position] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(positions) :]
    path = scratch / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        checkpoint = read_weights(path, sha256(path) if suffix == ".pkl" else "")
    except CheckpointError as error:
        assert "damaged" in str(error)
    else:
        tensors = checkpoint["model"]
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        if suffix == ".pth":  # the only format with checksums
            assert all(torch.equal(v, state()[k]) for k, v in tensors.items())


def save_zip(value: object, path: Path) -> None:
    torch.save(value, path)


def save_legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_pickle(value: object, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(value, protocol))


def test_the_payload_of_these_tests_is_one(tmp_path):
    save_pickle(Payload(tmp_path / "executed"), tmp_path / "a.pkl")
    pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert (tmp_path / "executed").exists()


def test_weights_with_nan_are_refused_by_name_and_infinity_is_not(tmp_path):
    weights = {"good": torch.tensor([-float("inf"), 1.0]), "bad": torch.tensor([1.0, float("nan")])}
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth has values that are not a number .* bad;"):
        read_weights(tmp_path / "a.pth")
    torch.save({"good": weights["good"]}, tmp_path / "a.pth")
    assert torch.equal(read_weights(tmp_path / "a.pth")["model"]["good"], weights["good"])


@pytest.mark.parametrize("write", [save_zip, save_legacy])
def test_a_tensor_that_repeats_what_is_stored_is_refused_by_name(tmp_path, write):
    """A value may stand for terabytes, where it should stand for a few others at most."""
    few = torch.zeros(1).expand(1 << 10)
    write({"few": few}, tmp_path / "a.pth")
    assert torch.equal(read_weights(tmp_path / "a.pth")["model"]["few"], few)
    write({"few": few, "bad": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="'bad' as a tensor of 1099511627776 values"):
        read_weights(tmp_path / "a.pth")


def test_a_tar_file_is_refused_without_advice_to_switch_protection_off(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "a.pth")
    with tarfile.open(tmp_path / "b.pth", "w") as archive:
        archive.add(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a TorchScript archive or a tar file") as caught:
        read_weights(tmp_path / "b.pth")
    assert "weights_only" not in str(caught.value)


def test_what_is_no_regular_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    for name in ("pipe.pth", "loop.pth"):
        with pytest.raises(CheckpointError, match="is a device, a pipe, or a link to no file"):
            read_weights(tmp_path / name)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(CheckpointError, match="its part a/data.pkl is compressed"):
        read_weights(path)


@pytest.mark.parametrize("write", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pyth", ""])
def test_a_payload_in_a_pytorch_file_is_blocked_and_never_executed(tmp_path, write, suffix):
    marker, path = tmp_path / "executed", tmp_path / f"a{suffix}"
    write({"model": {"w": torch.ones(1)}, "x": Payload(marker)}, path)
    with pytest.raises(CheckpointError):
        read_weights(path)
    assert not marker.exists()


def test_a_blocked_payload_is_named_together_with_the_hash_of_the_file(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": Payload(tmp_path / "executed")}, path)
    message = f"refers to posix.mkdir, .* nothing was executed.*{sha256(path)}"
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", [lambda x: {"blobs": {"w": x}}, lambda x: [x], lambda x: x])
def test_a_payload_in_a_pkl_is_blocked_with_its_hash_and_without(tmp_path, protocol, content):
    marker, path = tmp_path / "executed", tmp_path / "a.pkl"
    save_pickle(content(Payload(marker)), path, protocol)
    for digest in ("", sha256(path)):
        with pytest.raises(CheckpointError, match=f"refers to posix.mkdir.*{sha256(path)}"):
            read_weights(path, digest)
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [np.dtype("O"), np.dtype("S4"), np.dtype([("a", "f4")])], ids=str)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, dtype):
    path = tmp_path / "a.pkl"
    save_pickle({"w": np.zeros(2, dtype)}, path)
    with pytest.raises(CheckpointError, match="expected numbers"):
        read_weights(path)


@pytest.mark.parametrize("name", ["builtins\neval", "numpy\nload", "functools\npartial"])
def test_every_other_global_in_a_pkl_is_blocked_by_name(tmp_path, name):
    path = tmp_path / "a.pkl"
    path.write_bytes(f"c{name}\n.".encode())
    with pytest.raises(CheckpointError, match=name.replace("\n", ".")):
        read_weights(path)


def test_a_pkl_cannot_set_attributes_on_the_reader(tmp_path):
    # Pushes the stand-in of numpy.ndarray and asks to set its attribute "hooked" to 1.
    path = tmp_path / "a.pkl"
    path.write_bytes(b"cnumpy\nndarray\n(N}X\x06\x00\x00\x00hookedK\x01stb.")
    with pytest.raises(CheckpointError, match="corrupt"):
        read_weights(path)


def test_a_pkl_cannot_make_the_reader_take_memory_that_it_does_not_fill(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 1 << 22) + b".")  # a memo of 4M entries
    tracemalloc.start()
    try:
        read_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [9, 1 << 33, (1 << 64) - 1])
def test_a_pkl_that_announces_more_bytes_than_it_has_is_refused_at_once(tmp_path, size):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", size) + bytes(7))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"claims {size} bytes"):
            read_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(7), np.bool_(True)])
def test_a_number_of_numpy_beside_the_weights_is_read(tmp_path, number, save):
    save({"state_dict": {"w": torch.ones(1)}, "best": number}, tmp_path / "a.pth")
    best = read_weights(tmp_path / "a.pth")["best"]
    assert best == number and type(best) is type(number.item())


@pytest.mark.parametrize("value", [np.array([{}])[0:1], np.str_("a"), np.void(b"ab")], ids=repr)
def test_other_values_of_numpy_beside_the_weights_are_refused(tmp_path, value):
    torch.save({"model": {"w": torch.ones(1)}, "best": value}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="blocked|corrupt"):
        read_weights(tmp_path / "a.pth")
    with pytest.raises(Exception, match="numpy"):  # nothing stays allowed
        torch.load(tmp_path / "a.pth", weights_only=True)


def test_a_pkl_is_read_without_a_hash(tmp_path):
    save_pickle({"w": np.ones(2)}, tmp_path / "R-50.pkl")
    assert read_weights(tmp_path / "R-50.pkl")["model"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_a_wrong_hash_is_refused_naming_both(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=f"{sha256(path)}.*{'0' * 64}"):
        read_weights(path, "0" * 64)


def test_a_hash_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.pth").touch()
    with pytest.raises(CheckpointError, match="expected 64 hexadecimal digits"):
        read_weights(tmp_path / "a.pth", "md5:123")


def test_a_confirmed_hash_is_logged(tmp_path, caplog):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(1)}, path)
    with caplog.at_level(logging.INFO, "instseg"):
        read_weights(path, sha256(path).upper())
    assert sha256(path) in caplog.text


def test_caffe2_blobs_written_by_python_2_are_read_without_their_momentum(tmp_path):
    conv, empty = np.arange(6, dtype=">f4").reshape(2, 3), np.zeros((0, 4), np.float64)
    blobs = {"conv1_w": conv, "conv1_w_momentum": conv, "t": np.asfortranarray(conv), "e": empty}
    path = python2_pickle(tmp_path / "a.pkl", {"blobs": blobs, "cfg": "text"})
    checkpoint = read_weights(path)
    weights = checkpoint.pop("model")
    assert checkpoint == {"__author__": "Caffe2", "matching_heuristics": True}
    assert weights.keys() == {"conv1_w", "t", "e"}
    assert weights["conv1_w"].tolist() == weights["t"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights["e"].shape == (0, 4) and weights["e"].dtype == torch.float64


@pytest.mark.parametrize("protocol", range(6))
def test_detectron2_zoo_files_are_read_at_every_pickle_protocol(tmp_path, protocol):
    array = np.array([[1, 2], [3, 4]], np.int64)
    value = {
        "model": OrderedDict(w=array, s=np.float32(5), f=np.asfortranarray(array)),
        "__author__": "zoo",
        "matching_heuristics": True,
    }
    path = tmp_path / "a.pkl"
    save_pickle(value, path, protocol)
    checkpoint = read_weights(path)
    assert checkpoint["model"]["w"].tolist() == array.tolist() and checkpoint["model"]["s"] == 5
    assert checkpoint["model"]["f"].tolist() == array.tolist()
    assert checkpoint["__author__"] == "zoo" and checkpoint["matching_heuristics"] is True


def safetensors_file(path: Path, header: dict, data: bytes, claimed: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


@pytest.mark.parametrize(
    "shape, offsets, claimed",
    [
        ([4], [0, 1 << 40], None),
        ([4], [1 << 40, (1 << 40) + 16], None),
        ([1 << 62], [0, 16], None),
        ([4], [16, 0], None),
        ([4], [0, 8], None),
        ([4], [0, 16], 1 << 62),
        ([4], [0, 16], 5),
    ],
)
def test_a_safetensors_file_with_a_lying_header_is_refused(tmp_path, shape, offsets, claimed):
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    path = safetensors_file(tmp_path / "a.safetensors", header, bytes(16), claimed)
    with pytest.raises(CheckpointError, match="is corrupt"):
        read_weights(path)


@pytest.mark.parametrize("text", ["[" * 10000, "{", "[1]"], ids=["deep", "cut", "list"])
def test_metadata_that_is_no_json_object_is_refused(tmp_path, text):
    header = {"__metadata__": {"instseg": text}}
    with pytest.raises(CheckpointError, match="is corrupt"):
        read_weights(safetensors_file(tmp_path / "a.safetensors", header, b""))
