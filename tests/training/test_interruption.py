"""SIGTERM and Ctrl-C end a training with a checkpoint; an output folder belongs to one run."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from torch import nn

from instseg.checkpoint import Checkpointer, read_weights
from instseg.errors import OutputError
from instseg.files import lock_folder
from instseg.training.interruption import Interruption, signals_forwarded, signals_held


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


class Counter(TrainerBase):
    """Each iteration adds 1 to the weight; ``during`` one of them something happens."""

    def __init__(self, folder: Path, during: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)
        nn.init.zeros_(self.model.weight)
        self.during = during
        self.evaluated = []
        self.evaluation: Callable[[], None] = lambda: None
        checkpointer = Checkpointer(self.model, str(folder))
        saving = PeriodicCheckpointer(checkpointer, 1000)
        self.register_hooks([Interruption(checkpointer), saving, EvalHook(3, self.evaluate)])

    def run_step(self) -> None:
        self.during.get(self.iter, lambda: None)()
        self.model.weight.data += 1

    def evaluate(self) -> None:
        self.evaluated.append(self.iter)
        self.evaluation()


def status(trainer: Counter, last: int = 5) -> object:
    """The exit status of training iterations 0 to ``last``, None where nothing ended it."""
    try:
        trainer.train(0, last + 1)
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_after_the_iteration_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    trainer = Counter(tmp_path, {1: lambda: send(number)})
    assert status(trainer) == expected
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    saved = read_weights(tmp_path / "model_0000001.pth")
    assert saved["iteration"] == 1
    assert saved["model"]["weight"].item() == 2
    assert not trainer.evaluated


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    trainer = Counter(tmp_path, {1: lambda: send(signal.SIGINT, signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        trainer.train(0, 6)
    assert trainer.model.weight.item() == 1
    assert not list(tmp_path.iterdir())


def test_a_second_sigterm_does_not_keep_the_checkpoint_from_being_saved(tmp_path: Path) -> None:
    trainer = Counter(tmp_path, {1: lambda: send(signal.SIGTERM, signal.SIGTERM)})
    assert status(trainer) == 143
    assert read_weights(tmp_path / "model_0000001.pth")["iteration"] == 1


def test_an_evaluation_is_not_finished_and_its_iteration_is_saved(tmp_path: Path) -> None:
    trainer = Counter(tmp_path, {})
    trainer.evaluation = lambda: (send(signal.SIGTERM), pytest.fail("the evaluation went on"))
    assert status(trainer) == 143
    assert read_weights(tmp_path / "model_0000002.pth")["iteration"] == 2


def test_a_signal_in_the_last_iteration_saves_the_end_and_does_not_evaluate(
    tmp_path: Path,
) -> None:
    trainer = Counter(tmp_path, {1: lambda: send(signal.SIGTERM)})
    assert status(trainer, last=1) == 143
    assert read_weights(tmp_path / "model_final.pth")["iteration"] == 1
    assert not trainer.evaluated


def test_the_log_says_how_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "instseg"):
        status(Counter(tmp_path, {1: lambda: send(signal.SIGTERM)}))
    assert (
        "SIGTERM: training ends after iteration 1, which is saved; --resume goes on" in caplog.text
    )


def test_after_training_signals_do_what_they_did(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for trainer in (Counter(tmp_path, {}), Counter(tmp_path, {1: lambda: send(signal.SIGTERM)})):
        status(trainer)
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_training_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    trainer = Counter(tmp_path, {})
    thread = threading.Thread(target=trainer.train, args=(0, 2))
    thread.start()
    thread.join()
    assert trainer.model.weight.item() == 2


def test_processes_started_while_signals_are_held_survive_them() -> None:
    with signals_held():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    child.communicate(b"\n", timeout=60)
    assert child.returncode == 0


def test_a_launcher_passes_signals_on_to_the_processes_it_started() -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    before = signal.getsignal(signal.SIGINT)
    with signals_forwarded():
        send(signal.SIGINT)
        child.join(30)
    assert child.exitcode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == before


HOLDER = """
import os, sys, time
from instseg.files import lock_folder
lock_folder(sys.argv[1])
if len(sys.argv) > 2 and os.fork() == 0:  # a worker that outlives us
    os.closerange(0, 3)
    time.sleep(20)
    os._exit(0)
print("locked", flush=True)
sys.stdin.read()
"""


def holder_of(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, str(folder), *words]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_in_a_folder_is_refused_naming_the_first(tmp_path: Path) -> None:
    process = holder_of(tmp_path)
    with pytest.raises(OutputError) as caught:
        lock_folder(tmp_path)
    process.communicate("")
    for part in (f"OUTPUT_DIR {tmp_path} is in use", f"process {process.pid} on", "choose another"):
        assert part in str(caught.value)
    lock_folder(tmp_path)


def test_a_killed_run_stops_nobody(tmp_path: Path) -> None:
    process = holder_of(tmp_path)
    process.kill()
    process.communicate()
    lock_folder(tmp_path)


def test_forked_workers_do_not_keep_the_folder_of_a_killed_run(tmp_path: Path) -> None:
    process = holder_of(tmp_path, "with a worker")
    process.kill()
    process.communicate()
    lock_folder(tmp_path)


def test_a_folder_that_cannot_be_locked_at_all_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(OutputError, match="cannot be locked: .*Is a directory"):
        lock_folder(tmp_path)


def test_one_process_may_use_a_folder_again(tmp_path: Path) -> None:
    lock_folder(tmp_path)
    lock_folder(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(("end", "status"), [("", 0), ("raise RuntimeError", 1)])
def test_a_process_ends_whose_loader_is_alive_at_its_end(end: str, status: int) -> None:
    """Its workers do not get the SIGTERM by which multiprocessing ends leftover processes."""
    script = f"""
from torch.utils.data import DataLoader
from instseg.training.interruption import signals_held
with signals_held():
    batches = iter(DataLoader(range(100), num_workers=1))
    next(batches)
{end}
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=100).returncode == status
