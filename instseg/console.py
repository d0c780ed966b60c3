"""How the commands of instseg read arguments and print messages."""

import argparse
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from instseg.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises mistakes as ConfigError, which is printed as one line, instead of printing the usage.

    Positional arguments may stand before, between and behind options: ``KEY VALUE`` pairs come
    last.
    """

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # argparse cannot mix options with commands, nor with a rest that takes all (Detectron2).
        rest = (argparse.PARSER, argparse.REMAINDER)
        if self._mixing or any(action.nargs in rest for action in self._actions):
            return super().parse_known_args(args, namespace)
        self._mixing = True  # the next line comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


@contextmanager
def console() -> Iterator[None]:
    """Show instseg's own messages while a command runs, and hide PyTorch's for developers.

    Prints characters that the terminal cannot show, such as names of files that are no UTF-8, as
    escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python sets it for stderr
    logger = logging.getLogger("instseg")
    # Detectron2's models make it log a line about tracing in every run.
    tracing = logging.getLogger("torch.fx")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    level, propagate, tracing_level = logger.level, logger.propagate, tracing.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    tracing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        tracing.setLevel(tracing_level)
