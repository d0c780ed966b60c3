"""Errors that a user can cause and mend.

Every entry point (``train_net.py``, the ``instseg`` command) prints the message of an InstsegError
on one line of stderr and exits with status 2; any other exception is a defect of instseg and keeps
its traceback.  A message names what was found, what was expected and what to change.
"""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 100


class InstsegError(Exception):
    """Base of all errors below; never raised itself."""


class ConfigError(InstsegError, ValueError):
    """A configuration file, key, value or command-line option that cannot be used."""


class DatasetError(InstsegError, ValueError):
    """A data set that is missing, malformed or does not fit the configuration."""


class CheckpointError(InstsegError, ValueError):
    """A weight file that is missing, corrupt, unsafe or belongs to another architecture."""


class ImageError(InstsegError, ValueError):
    """An image or video that cannot be read or has content no model can use."""


class OutputError(InstsegError, OSError):
    """A folder or file that cannot be written."""


class TrainingError(InstsegError, RuntimeError):
    """Training that cannot go on, e.g. because a loss is not finite."""


class ProcessError(InstsegError, RuntimeError):
    """A process that cannot compute, because of how it was started."""


def short(value: Any) -> str:
    """A value in a message; what somebody wrote may be longer than memory."""
    return _SHORT.repr(value)


def one_line(error: InstsegError) -> str:
    """Its message on one line."""
    return " ".join(message(error).split("\n")).strip()


def message(error: InstsegError) -> str:
    """What was said where it was raised.

    If a process that loads data raised it, torch has put the traceback there before it.
    """
    text = str(error)
    if "Original Traceback" not in text:
        return text
    kind = type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__name__}: ")[2].strip()
