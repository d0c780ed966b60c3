"""No process outlives the one that started it."""

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

from instseg.benchmark.rows import in_fresh_process
from instseg.errors import ConfigError
from instseg.processes import end_with, end_with_starter, run
from tests.conftest import ROOT

# A child writes its id when it can be killed, and on SIGTERM that it was told.
CHILD = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(number, frame):
    time.sleep(0.2)  # saves a checkpoint
    (folder / "ended").write_text("in order")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
(folder / "child.tmp").write_text(str(os.getpid()))
(folder / "child.tmp").rename(folder / "child")
time.sleep(600)  # longer than anything here waits
"""
PARENTS = {
    "run": f"""
import sys
from instseg.processes import run
run([sys.executable, "-c", {CHILD!r}, sys.argv[1]])
""",
    "fork": f"""
import os, sys
from instseg.processes import end_with
own = os.getpid()
if os.fork():
    os.wait()
else:
    end_with(own)
    exec({CHILD!r})
""",
    "make": f"""
import os, subprocess, sys
child = "from instseg.processes import end_with_make; end_with_make()" + {CHILD!r}
subprocess.run([sys.executable, "-c", child, sys.argv[1]], env={{**os.environ, "MAKELEVEL": "1"}})
""",
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="the system cannot do it")


STARTED = """
import multiprocessing, os, sys
child = "from instseg.processes import end_with_starter; end_with_starter()\\n" + {child!r}
child = "import sys; sys.argv = " + repr(sys.argv) + "\\n" + child
process = multiprocessing.get_context({method!r}).Process(target=exec, args=(child, {{}}))
process.start()
process.join()
"""
PARENTS_BY_METHOD = {
    method: STARTED.format(child=CHILD, method=method) for method in ("fork", "spawn", "forkserver")
}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start(kind: str, folder: Path) -> tuple["subprocess.Popen[bytes]", int]:
    """A parent, and the id of its child once that is at work."""
    return start_script(PARENTS[kind], folder)


def start_script(script: str, folder: Path) -> tuple["subprocess.Popen[bytes]", int]:
    """As :func:`start` for a script."""
    parent = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT)
    until((folder / "child").exists)
    return parent, int((folder / "child").read_text())


@linux
@pytest.mark.parametrize("method", PARENTS_BY_METHOD)
def test_a_killed_process_takes_those_of_any_start_method_with_it(
    method: str, tmp_path: Path
) -> None:
    parent, child = start_script(PARENTS_BY_METHOD[method], tmp_path)
    parent.kill()
    parent.wait()
    until(lambda: not is_alive(child))


@linux
@pytest.mark.parametrize("kind", PARENTS)
def test_a_killed_parent_takes_its_child_with_it(kind: str, tmp_path: Path) -> None:
    parent, child = start(kind, tmp_path)
    parent.kill()
    parent.wait()
    until(lambda: not is_alive(child))
    assert (tmp_path / "ended").read_text() == "in order"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_the_end_of_the_child_waited_for(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    parent, child = start("run", tmp_path)
    parent.send_signal(number)
    assert parent.wait(60) == status
    assert not is_alive(child)
    assert (tmp_path / "ended").read_text() == "in order"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_child_can_end_its_parent_and_is_ended_by_it(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    """The handler of the parent runs while it waits."""
    code = f"import os, sys\nos.kill(os.getppid(), {int(number)})"
    # The handler of the child stands before the signal is sent.
    code = CHILD.replace("time.sleep(600)", f"{code}\ntime.sleep(600)")
    with pytest.raises(SystemExit) as end:
        run([sys.executable, "-c", code, str(tmp_path)])
    assert end.value.code == status
    assert (tmp_path / "ended").read_text() == "in order"


def test_a_process_that_multiprocessing_did_not_start_is_left_alone() -> None:
    before = threading.active_count()
    end_with_starter()
    assert threading.active_count() == before


@linux
def test_a_child_whose_parent_ended_before_it_asked_ends_at_once() -> None:
    child = os.fork()
    if not child:
        end_with(1 if os.getppid() != 1 else 2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM


@pytest.mark.parametrize(
    ("code", "status"), [("exit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_status_of_a_child_that_failed_is_passed_on(code: str, status: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        run([sys.executable, "-c", code])
    assert end.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_child_that_did_its_work_ends_nothing(tmp_path: Path) -> None:
    run([sys.executable, "-c", f"open({str(tmp_path / 'done')!r}, 'w')"])
    assert (tmp_path / "done").exists()


def death_signal() -> float:
    """The signal that the system sends this process when its parent ends."""
    import ctypes

    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))
    return float(number.value)


@linux
def test_a_process_that_measures_memory_ends_with_the_benchmark() -> None:
    assert in_fresh_process(death_signal) == signal.SIGTERM


def refused() -> None:
    raise ConfigError("a line for the user")


def test_an_error_of_the_user_in_a_new_process_is_one_of_the_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forked here: the new interpreter of the test above takes seconds to load torch."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    with pytest.raises(ConfigError, match="a line for the user"):
        in_fresh_process(refused)


def test_a_process_that_ends_without_a_result_is_a_warning_with_its_status(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    assert in_fresh_process(os._exit, 3) is None
    assert caplog.messages == ["the process that measures ended with status 3"]


STARTS = ("subprocess.run(", "subprocess.Popen(", "os.fork()", "context.Process(")
# All but the first run pip, git or this test suite in the foreground, which end by themselves.
BOUNDED = {
    "instseg/processes.py",
    "instseg/install_detectron2.py",
    "tools/dev.py",
    "tools/zoo_add.py",
}


def test_whatever_starts_a_process_says_how_it_ends() -> None:
    files = [
        file
        for folder in ("instseg", "tools", "projects")
        for file in ROOT.glob(f"{folder}/**/*.py")
    ]
    starting = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if any(call in file.read_text() for call in STARTS)
    }
    careless = {name for name in starting - BOUNDED if "end_with(" not in (ROOT / name).read_text()}
    assert "tools/chaos.py" in starting and not careless
