"""``train_net.py`` and ``instseg`` in this process, which has loaded torch already."""

import contextlib
import io
import logging
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from detectron2.utils.logger import setup_logger

from instseg import cli
from tests.conftest import ROOT


class Done(NamedTuple):
    """Exit status and output of a program, as after ``subprocess.run``."""

    returncode: int
    stdout: str
    stderr: str


def train_net(*words: str) -> Done:
    """Run ``python train_net.py WORDS``; defects of the program are raised."""
    script = str(ROOT / "train_net.py")
    with mock.patch.object(sys, "argv", [script, *words]), _loggers_as_at_the_start():
        return _run(lambda: runpy.run_path(script, run_name="__main__"))


def instseg(*words: str) -> Done:
    """Run ``instseg WORDS``; defects of the program are raised."""
    return _run(lambda: sys.exit(cli.main(words)))


def in_this_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Stand-in for ``in_fresh_process``, which loads torch; a pickle must hold what is passed."""
    function, arguments = pickle.loads(pickle.dumps((function, arguments)))
    return function(*arguments)


def _run(program: Callable[[], object]) -> Done:
    status: object = 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            program()
        except SystemExit as end:
            status = end.code or 0
    assert isinstance(status, int), status
    return Done(status, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _loggers_as_at_the_start() -> Iterator[None]:
    """Let the program set up its loggers as in a new process, then restore them."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "instseg")]
    kept = [(log.level, log.propagate, log.handlers) for log in loggers]
    setup_logger.cache_clear()
    try:
        for log in loggers:
            log.handlers = []
        yield
    finally:
        for log, (level, propagate, handlers) in zip(loggers, kept, strict=True):
            log.setLevel(level)
            log.propagate = propagate
            log.handlers = handlers
        setup_logger.cache_clear()
