"""SIGTERM and Ctrl-C end a training with a checkpoint."""

import logging
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from instseg.checkpoint import Checkpointer

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption(HookBase):
    """Ends training after the iteration in which SIGTERM or SIGINT comes, with a checkpoint.

    The exit status is 128 + the number of the signal: 143 after SIGTERM, 130 after Ctrl-C.  A
    second Ctrl-C ends at once.  A signal to one of several processes stops all of them.  A hook
    that follows the iteration, such as an evaluation, is not finished; the checkpoint is still that
    of the iteration.

    Must run after the hooks that change weights or learning rates, before those that save them.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        """
        Args:
            checkpointer: the one that training resumes from.
        """
        self._checkpointer = checkpointer
        self._device = next(checkpointer.model.parameters()).device
        self._received = 0
        # The iteration that gave the weights; None during an iteration.
        self._finished: int | None = None
        self._former: dict[signal.Signals, Any] = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # other threads get no signals
            self._former = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def before_step(self) -> None:
        self._finished = None

    def after_step(self) -> None:
        if comm.get_world_size() > 1:
            number = torch.tensor(self._received, device=self._device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self._received = int(number)
        self._finished = self.trainer.iter
        if self._received:
            self._save(self._finished)
            comm.synchronize()  # the launcher kills the other processes once one has ended
            raise SystemExit(128 + self._received)

    def after_train(self) -> None:
        if self._received and self._finished is not None:
            self._save(self._finished)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            if number == self._received == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received = number
        if self._finished is not None:
            # The signal may have ended data workers as well, which is no longer an error.
            _accept_lost_workers()
            raise SystemExit(128 + number)

    def _save(self, iteration: int) -> None:
        self.trainer.iter = iteration  # it is one too high if the next iteration was about to begin
        is_last = iteration + 1 >= self.trainer.max_iter
        name = "model_final" if is_last else f"model_{iteration:07d}"
        self._checkpointer.save(name, iteration=iteration)
        self._finished = None
        self.trainer.max_iter += 1  # or Detectron2 would go on with the final evaluation
        logger.info(
            f"{signal.Signals(self._received).name}: training ends after iteration {iteration}, "
            "which is saved; --resume goes on"
        )


@contextmanager
def signals_held() -> Iterator[None]:
    """Hide SIGTERM and SIGINT from processes started inside, and delay them for the caller.

    Protects the workers that load training data: signals often go to a whole group of processes,
    and an iteration cannot be finished without data.
    """
    before = set(multiprocessing.active_children())
    if sys.platform != "win32":  # which has no such signals; Ctrl-C reaches every process there
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        for process in set(multiprocessing.active_children()) - before:
            # multiprocessing would send SIGTERM to the remaining ones and then wait for ever.
            Finalize(None, _kill, args=(process,), exitpriority=1)


def _kill(process: BaseProcess) -> None:
    """Kill a worker when this process ends, also if an error keeps its data loader alive."""
    if process.is_alive():
        _accept_lost_workers()
        process.kill()


def _accept_lost_workers() -> None:
    """Keep PyTorch from reporting data workers that end."""
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def signals_forwarded() -> Iterator[None]:
    """Inside, forward SIGTERM and SIGINT as SIGTERM to the processes that this one started."""

    def forward(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    former: dict[signal.Signals, Callable[..., Any] | int | None] = {}
    for number in _SIGNALS:
        former[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
