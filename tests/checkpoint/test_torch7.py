"""Torch7 files: every kind of value, and whatever a damaged or hostile file may claim."""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instseg.checkpoint.torch7 import Torch7Object, read_torch7
from instseg.errors import CheckpointError
from tests.support.torch7_writer import Cuda, Obj, Writer, listed, save


def test_plain_values_come_back(tmp_path: Path) -> None:
    value = {"a": 1, "b": 2.5, "c": True, "d": None, "e": "text", 1: {"f": False}, 2: "é"}
    assert read_torch7(str(save(tmp_path / "x.t7", value))) == value


@pytest.mark.parametrize("kind", ["u1", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("versions", [True, False], ids=["versions", "without"])
def test_a_tensor_comes_back_with_its_type(tmp_path: Path, kind: str, versions: bool) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    tensor = read_torch7(str(save(tmp_path / "x.t7", array, versions)))
    assert tensor.dtype == array.dtype and np.array_equal(tensor, array)


def test_a_gpus_tensor_is_read_as_float32(tmp_path: Path) -> None:
    tensor = read_torch7(str(save(tmp_path / "x.t7", Cuda(np.float32([1, 2])))))
    assert tensor.dtype == np.float32 and tensor.tolist() == [1, 2]


def test_a_transposed_tensor_comes_back(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tensor = read_torch7(str(save(tmp_path / "x.t7", array)))
    assert np.array_equal(tensor, [[0, 3], [1, 4], [2, 5]])


def test_a_tensor_without_storage_is_empty(tmp_path: Path) -> None:
    writer = Writer()
    writer.ints(4, 1)
    writer.head("torch.FloatTensor")
    writer.ints(0)
    writer.longs(1)
    path = tmp_path / "x.t7"
    path.write_bytes(writer.write(None).content)
    assert read_torch7(str(path)).shape == (0,)


def test_a_text_in_another_code_than_utf_8_is_read_as_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "x.t7"
    path.write_bytes(struct.pack("<ii", 2, 4) + "café".encode("latin1"))
    assert read_torch7(str(path)) == "café"


def test_what_appears_twice_is_one_object(tmp_path: Path) -> None:
    shared = Obj("nn.Linear", weight=np.ones(3, np.float32))
    shared.fields["self"] = shared
    table = read_torch7(str(save(tmp_path / "x.t7", listed(shared, shared))))
    assert isinstance(table[1], Torch7Object) and table[1].class_name == "nn.Linear"
    assert table[1] is table[2] is table[1].fields["self"]


@pytest.mark.parametrize("kind", [6, 7, 8])
def test_a_lua_function_is_skipped(tmp_path: Path, kind: int) -> None:
    writer = Writer()
    writer.ints(3, 1, 2)
    writer.write("f")
    writer.ints(kind, 2)
    writer.last = 2
    writer.text("os.execute('touch pwned')")
    writer.write({})
    writer.write("g").write(7)
    path = tmp_path / "x.t7"
    path.write_bytes(writer.content)
    assert read_torch7(str(path)) == {"f": None, "g": 7}


def tensor(
    shape: list[int], strides: list[int], offset: int, count: int, kind: str = "Float"
) -> bytes:
    """A tensor that claims these things, on a storage of ``count`` numbers."""
    writer = Writer()
    writer.ints(4, 1)
    writer.head("torch.FloatTensor")
    writer.ints(len(shape))
    writer.longs(*shape, *strides, offset)
    writer.last = 1
    writer.storage(np.zeros(count, "i8" if kind == "Long" else "f4"), kind)
    return writer.content


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ([5], [1], 1),  # longer than its storage
        ([2], [1], 4),  # begins so that it ends outside
        ([2], [1], 0),  # begins before it
        ([2], [-1], 2),
        ([2], [2**60], 1),
        ([0], [1], 1),
        ([-1], [1], 1),
        ([1000, 1000], [0, 0], 1),  # repeats a number a million times
        ([2**62, 4], [0, 0], 1),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(
    tmp_path: Path, shape: list[int], strides: list[int], offset: int
) -> None:
    path = tmp_path / "x.t7"
    path.write_bytes(tensor(shape, strides, offset, 4))
    with pytest.raises(CheckpointError, match="x.t7 .*does not lie within its storage"):
        read_torch7(str(path))


def nested(depth: int) -> bytes:
    parts = [struct.pack("<iii", 3, i + 1, 1) + struct.pack("<id", 1, 1.0) for i in range(depth)]
    return b"".join(parts) + struct.pack("<i", 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 are left"),
        (b"\x01\x00", "2 are left"),
        (b"<html>not found</html>", "unknown kind"),
        (b"4\n1\n3\nV 1\n", "unknown kind"),  # the format in text
        (struct.pack("<ii", 2, -5), "claims -5 characters"),
        (struct.pack("<ii", 2, 2**31 - 1), "claims 2147483647 characters"),
        (struct.pack("<iii", 3, 1, 2**31 - 1), "claims 2147483647 entries"),
        (struct.pack("<iii", 3, 1, 1) + struct.pack("<iiii", 0, 5, 1, 0), "key of type NoneType"),
        (Writer().write(7).content + b"x", "1 bytes follow"),
        (tensor([1] * 99, [1] * 99, 1, 4), "a torch.FloatTensor has 99 axes; expected 0 to 16"),
        (tensor([4], [1], 1, 4, "Long"), "a torch.FloatTensor has no storage of its kind"),
        (nested(5000), "nested more than 100 times"),
        (Writer().write(Obj("nn.A")).content[:-12] + struct.pack("<i", 0), "no table of fields"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "x.t7"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.t7 is no Torch7 file, or damaged.*{said}"):
        read_torch7(str(path))


def test_values_may_be_nested_a_hundred_times(tmp_path: Path) -> None:
    path = tmp_path / "x.t7"
    path.write_bytes(nested(100))
    value, depth = read_torch7(str(path)), 0
    while value is not None:
        value, depth = value[1], depth + 1
    assert depth == 100


def test_storage_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    content = tensor([4], [1], 1, 4)
    path = tmp_path / "x.t7"
    path.write_bytes(content.replace(struct.pack("<q", 4) + bytes(16), struct.pack("<q", 2**50)))
    with pytest.raises(CheckpointError, match="claims 1125899906842624 numbers of a storage"):
        read_torch7(str(path))


def test_storage_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.t7"
    path.write_bytes(tensor([4], [1], 1, 4).replace(b"FloatStorage", b"ByteStorage\0"))
    with pytest.raises(CheckpointError):
        read_torch7(str(path))


def test_too_many_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.t7"
    pair = struct.pack("<iii", 5, 1, 0)  # true -> nil
    path.write_bytes(struct.pack("<iii", 3, 1, 600_000) + pair * 600_000)
    with pytest.raises(CheckpointError, match="more than 1000000 values"):
        read_torch7(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing.t7"):
        read_torch7(str(tmp_path / "nothing.t7"))


SAMPLE = (
    Writer()
    .write(
        {
            "model": Obj("nn.A", weight=np.arange(6, dtype=np.float32).reshape(2, 3), name="x"),
            "config": listed(1, 2.5, True),
        }
    )
    .content
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255), st.integers(0, len(SAMPLE)))
def test_a_changed_or_cut_file_is_read_or_refused(
    tmp_path: Path, position: int, byte: int, end: int
) -> None:
    content = bytearray(SAMPLE)
    content[position] = byte
    path = tmp_path / "x.t7"
    path.write_bytes(content[:end])
    with suppress(CheckpointError):  # nothing else may escape
        read_torch7(str(path))
