"""MXNet's parameter files: golden samples of all layouts, and files that lie."""

import re
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instseg.checkpoint.mxnet_params import read_params
from instseg.errors import CheckpointError
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "fcis_forward"
LAYOUTS = ("tiny_v0.params", "tiny_v1.params", "tiny_v2.params")
SAMPLES = [(FOLDER / name).read_bytes() for name in LAYOUTS]
LONG_DIMS, WITH_STORAGE = 0xF993FAC8, 0xF993FAC9


def header(count: int, *, magic: int = 0x112) -> bytes:
    return struct.pack("<QQQ", magic, 0, count)


def array(
    *, tag: int = WITH_STORAGE, storage: int = 0, shape: tuple[int, ...] = (2,), dtype: int = 0
) -> bytes:
    """A float32 array (1, 2) unless told otherwise."""
    start = struct.pack("<I", tag)
    if tag == WITH_STORAGE:
        start += struct.pack("<i", storage)
    start += struct.pack(f"<I{len(shape)}q", len(shape), *shape)
    return start + struct.pack("<iii2f", 1, 0, dtype, 1.0, 2.0)


def names(*texts: str | bytes) -> bytes:
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    return struct.pack("<Q", len(texts)) + b"".join(
        struct.pack("<Q", len(text)) + text for text in encoded
    )


def read(tmp_path: Path, content: bytes) -> dict[str, torch.Tensor]:
    file = tmp_path / "net-0000.params"
    file.write_bytes(content)
    return read_params(file)


def refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(reason)) as caught:
        read(tmp_path, content)
    assert "net-0000.params" in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_golden_arrays(layout: str) -> None:
    arrays = read_params(FOLDER / layout)
    with np.load(FOLDER / "tiny_params.npz") as expected:
        assert list(arrays) == list(expected)
        for name, value in arrays.items():
            assert value.numpy().dtype == expected[name].dtype
            np.testing.assert_array_equal(value.numpy(), expected[name])


def test_tensors_own_writable_memory(tmp_path: Path) -> None:
    first = read(tmp_path, header(1) + array() + names("arg:a"))["arg:a"]
    first += 1
    assert first.tolist() == [2.0, 3.0]
    assert read_params(tmp_path / "net-0000.params")["arg:a"].tolist() == [1.0, 2.0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.params does not exist"):
        read_params(tmp_path / "none.params")


@pytest.mark.parametrize("sample", SAMPLES, ids=LAYOUTS)
def test_every_truncation_is_refused(tmp_path: Path, sample: bytes) -> None:
    for length in range(0, len(sample), 61):
        with pytest.raises(CheckpointError):
            read(tmp_path, sample[:length])


def test_another_kind_of_file_is_refused_with_its_start(tmp_path: Path) -> None:
    refused(tmp_path, b"", "should take 16 bytes, 0 are left")
    refused(tmp_path, header(1, magic=0x113) + array(), "starts with 0x113, 0x0; expected 0x112")


def test_counts_that_do_not_fit_the_file_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, header(2**63) + array(), f"claims {2**63} arrays, but only")
    lie = header(1) + array() + struct.pack("<Q", 2**40)
    refused(tmp_path, lie, f"claims {2**40} names, but only 0 bytes follow")
    refused(tmp_path, header(1) + array() + names("a", "b"), "1 arrays and 2 names")
    refused(tmp_path, header(1) + array() + names(), "1 arrays and 0 names")


def test_shapes_that_do_not_fit_the_file_are_refused(tmp_path: Path) -> None:
    for shape in ((3,), (2**40,), (2**62, 2**62)):
        refused(tmp_path, header(1) + array(shape=shape), f"float32 of shape {shape} should take")
    refused(tmp_path, header(1) + array(shape=(2, -1)), "shape (2, -1); expected positive sizes")
    refused(tmp_path, header(1) + array(shape=(0,)), "shape (0,); expected positive sizes")


def test_impossible_numbers_of_axes_are_refused(tmp_path: Path) -> None:
    for tag in (WITH_STORAGE, LONG_DIMS):
        refused(tmp_path, header(1) + array(tag=tag, shape=()), "has 0 (0x0) axes")
        refused(tmp_path, header(1) + array(tag=tag, shape=(1,) * 33), "has 33 (0x21) axes")
    untagged = struct.pack("<I", 0xF993FACA) + bytes(40)
    refused(tmp_path, header(1) + untagged, "(0xf993faca) axes; expected 1 to 32")


def test_unknown_number_types_are_refused(tmp_path: Path) -> None:
    for dtype in (-1, 7, 12):
        refused(tmp_path, header(1) + array(dtype=dtype), f"unknown number type {dtype}; known")


def test_sparse_arrays_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, header(1) + array(storage=1), "is row-sparse (type 1); expected dense")
    refused(tmp_path, header(1) + array(storage=2), "is compressed sparse row (type 2)")
    refused(tmp_path, header(1) + array(storage=9), "is of unknown storage (type 9)")


def test_bad_names_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, header(1) + array() + names(b"\xff\xfe"), r"is b'\xff\xfe'; expected UTF-8")
    refused(tmp_path, header(2) + array() * 2 + names("a", "a"), "holds 'a' twice")
    lie = header(1) + array() + struct.pack("<QQ", 1, 2**63)
    refused(tmp_path, lie, f"name 1 of 1 should take {2**63} bytes, 0 are left")


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, header(1) + array() + names("a") + b"xyz", "3 bytes follow")


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    st.binary(max_size=12),
    st.integers(0, 10**6),
)
def test_a_mutated_file_is_read_or_refused(
    sample: bytes,
    changes: list[tuple[int, int]],
    inserted: bytes,
    start: int,
) -> None:
    content = bytearray(sample)
    for position, value in changes:
        # Most of a sample is numbers, which may be anything: half of the changes go elsewhere.
        content[position % (len(content) if position % 2 else 80)] = value
    content[start % len(content) : start % len(content)] = inserted
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.params")
        file.write_bytes(content)
        try:
            arrays = read_params(file)
        except CheckpointError as error:
            assert "a.params" in str(error)
        else:
            assert sum(value.nbytes for value in arrays.values()) < len(content)
