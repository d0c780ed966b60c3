"""No end of a process and no full disk costs more than the work since the last checkpoint."""

import logging
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from instseg.checkpoint import Checkpointer, read_weights
from instseg.errors import CheckpointError, OutputError
from instseg.files import TEMPORARY, atomic_write
from tests.checkpoint.test_checkpoint import net, same


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``size`` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("width", [100, 1000])
def test_a_full_disk_leaves_the_previous_checkpoint_and_its_tag(tmp_path, width):
    model = nn.Linear(width, width)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with disk_of(10000), pytest.raises(OutputError, match=r"model_0000002.pth.*bytes free in"):
        checkpointer.save("model_0000002", iteration=2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write .*file/run/m.pth"):
        Checkpointer(net(), str(tmp_path / "file" / "run")).save("m")


def test_a_device_is_written_to_and_never_replaced(tmp_path):
    sink, full = tmp_path / "sink", tmp_path / "full"
    sink.symlink_to("/dev/null")
    full.symlink_to("/dev/full")
    atomic_write(sink, lambda file: file.write(b"x"))
    assert sink.is_symlink() and not list(tmp_path.glob(f"*{TEMPORARY}"))
    with pytest.raises(OutputError, match="full: .*No space left on device"):
        atomic_write(full, lambda file: file.write(b"x"))
    assert full.is_symlink()


def test_the_tag_is_written_after_the_checkpoint_it_names(tmp_path, monkeypatch):
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(Path(b).name), replace(a, b)))
    Checkpointer(net(), str(tmp_path)).save("m")
    assert replaced == ["m.pth", "last_checkpoint"]


def test_files_reach_the_disk_before_they_take_their_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    atomic_write(tmp_path / "a", lambda file: file.write(b"x"))
    assert events == ["fsync", "replace", "fsync"]


def test_leftovers_of_a_killed_process_are_removed_by_the_next_save(tmp_path):
    stale = [tmp_path / f".{name}.0123abcd.instseg-tmp" for name in ("m.pth", "last_checkpoint")]
    for file in stale:
        file.touch()
    checkpointer = Checkpointer(net(), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    checkpointer.save("m")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last_checkpoint", "m.pth"]


def test_a_checkpoint_has_the_permissions_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").touch()
    atomic_write(tmp_path / "ours", lambda file: file.write(b"x"))
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    checkpointer = Checkpointer(net(), str(tmp_path))
    checkpointer.save("m", iteration=1)
    with pytest.raises(TypeError, match="plain values"):
        checkpointer.save("m", iteration=2, metric=np.float64(0.5))
    assert read_weights(tmp_path / "m.pth")["iteration"] == 1


def save_for_ever(folder: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(1000, 1000), str(folder))
    for iteration in range(10**6):
        checkpointer.save(f"model_{iteration % 3:07d}", iteration=iteration)


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11])
def test_killing_a_process_that_saves_leaves_a_checkpoint_to_resume_from(tmp_path, delay):
    process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.join()
    checkpointer = Checkpointer(nn.Linear(1000, 1000), str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True)["iteration"] >= 0


def test_killing_a_process_in_the_middle_of_a_file_leaves_the_one_before(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def half(file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=atomic_write, args=(path, half))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == b"before"


def training(folder: Path, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Checkpointer]:
    model = net(seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 + seed, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return model, optimizer, Checkpointer(model, str(folder), optimizer=optimizer)


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with three checkpoints, the last one of iteration 29."""
    for iteration in (9, 19, 29):
        training(tmp_path, iteration)[2].save(f"model_{iteration:07d}", iteration=iteration)
    os.utime(tmp_path / "model_0000009.pth")  # being touched last makes no checkpoint the newest
    return tmp_path


def test_resuming_restores_model_optimizer_and_iteration(run):
    model, optimizer, checkpointer = training(run)
    extra = checkpointer.resume_or_load("elsewhere.pth", resume=True)
    saved_model, saved_optimizer, _ = training(run, 29)
    assert same(model, saved_model) and extra["iteration"] == 29
    assert optimizer.state_dict()["param_groups"] == saved_optimizer.state_dict()["param_groups"]
    momenta = [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()]
    assert momenta and all(torch.is_tensor(m) for m in momenta)


def test_loading_without_resuming_takes_the_weights_alone(run):
    model, optimizer, checkpointer = training(run)
    checkpointer.resume_or_load(str(run / "model_0000009.pth"), resume=False)
    assert same(model, training(run, 9)[0]) and optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("tag", [b"", b"gone.pth", b"\xff\x00\n", b"../x", None], ids=str)
def test_without_a_usable_tag_the_newest_checkpoint_is_resumed_with_a_warning(run, caplog, tag):
    if tag is None:
        (run / "last_checkpoint").unlink()
    else:
        (run / "last_checkpoint").write_bytes(tag)
    checkpointer = training(run)[2]
    with caplog.at_level(logging.WARNING, "instseg"):
        assert checkpointer.get_checkpoint_file() == str(run / "model_0000029.pth")
    assert "names no readable checkpoint" in caplog.text
    assert checkpointer.resume_or_load("")["iteration"] == 29


def test_a_truncated_last_checkpoint_gives_way_to_the_one_before(run, caplog):
    last = run / "model_0000029.pth"
    last.write_bytes(last.read_bytes()[:-100])
    checkpointer = training(run)[2]
    with caplog.at_level(logging.WARNING, "instseg"):
        assert checkpointer.has_checkpoint()
        assert checkpointer.resume_or_load("")["iteration"] == 19
    assert "the newest readable one is" in caplog.text and "model_0000019.pth" in caplog.text


def test_a_last_checkpoint_with_a_flipped_bit_gives_way_to_the_one_before(run, caplog):
    last = run / "model_0000029.pth"
    weight = training(run, 29)[0].body.weight.detach().numpy().tobytes()
    content = last.read_bytes()
    last.write_bytes(content.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1])))
    assert last.read_bytes() != content
    with caplog.at_level(logging.WARNING, "instseg"):
        assert training(run)[2].resume_or_load("")["iteration"] == 19
    assert "model_0000029.pth is corrupt" in caplog.text


def test_a_folder_without_a_readable_checkpoint_counts_as_empty(run):
    for file in run.glob("*.pth"):
        file.write_bytes(b"")
    checkpointer = training(run)[2]
    assert not checkpointer.has_checkpoint() and checkpointer.get_checkpoint_file() == ""
    assert checkpointer.resume_or_load("") == {}


def test_without_a_folder_nothing_is_resumed_from_the_current_one(run, monkeypatch):
    monkeypatch.chdir(run)
    assert not Checkpointer(net()).has_checkpoint()
    assert Checkpointer(net()).resume_or_load("") == {}


def test_a_checkpoint_is_saved_in_its_folder_alone(tmp_path):
    with pytest.raises(ValueError, match="'../m' is no file name"):
        Checkpointer(net(), str(tmp_path / "out")).save("../m")
    assert not list(tmp_path.rglob("*.pth"))


def test_weights_put_beside_the_checkpoints_are_not_resumed_from(tmp_path):
    torch.save(net().state_dict(), tmp_path / "R-50.pth")
    assert not Checkpointer(net(), str(tmp_path)).has_checkpoint()


def test_resuming_with_another_model_is_refused_and_changes_nothing(run):
    model = net(classes=5)
    checkpointer = Checkpointer(model, str(run), allow_partial=True)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*number of classes"):
        checkpointer.resume_or_load("")
    assert same(model, net(classes=5))


def test_resuming_without_the_saved_optimizer_is_refused(tmp_path):
    Checkpointer(net(), str(tmp_path)).save("m", iteration=1)
    with pytest.raises(CheckpointError, match="saved state missing: optimizer"):
        training(tmp_path)[2].resume_or_load("")


def test_resuming_with_another_optimizer_is_an_explained_error(run):
    model = net()
    optimizer = torch.optim.SGD([model.stem.weight], lr=1.0)
    with pytest.raises(CheckpointError, match="the state of 'optimizer' in .* does not fit"):
        Checkpointer(model, str(run), optimizer=optimizer).resume_or_load("")


def test_the_hash_of_the_initial_weights_is_not_asked_of_a_checkpoint_to_resume(run):
    checkpointer = Checkpointer(net(), str(run), sha256="0" * 64)
    assert checkpointer.resume_or_load("R-50.pkl")["iteration"] == 29
