"""Errors that a user can cause and correct.

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
    """Base class of the errors below; never raised itself."""


class ConfigError(InstsegError, ValueError):
    """A configuration file, key, value or command-line option that cannot be used."""


class DatasetError(InstsegError, ValueError):
    """A data set that is missing, malformed or does not fit the configuration."""


class CheckpointError(InstsegError, ValueError):
    """A weight file that is missing, corrupt, unsafe or belongs to another architecture."""


class ImageError(InstsegError, ValueError):
    """An image or video that cannot be read, or that no model can use."""


class OutputError(InstsegError, OSError):
    """A folder or file that cannot be written."""


class TrainingError(InstsegError, RuntimeError):
    """Training that cannot go on, e.g. because a loss is not finite."""


class ProcessError(InstsegError, RuntimeError):
    """A process that cannot compute because of the way it was started."""


def short(value: Any) -> str:
    """A value as short text for a message; values of users may be extremely long."""
    return _SHORT.repr(value)


def reason_of(error: BaseException) -> str:
    """The message of an exception of other code, short enough for one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


def one_line(error: InstsegError) -> str:
    """The message of an error on one line."""
    return " ".join(message(error).split("\n")).strip()


def message(error: InstsegError) -> str:
    """The original message of an error.

    If a data-loading process raised the error, torch has put a traceback before the message.
    """
    text = str(error)
    if "Original Traceback" not in text:
        return text
    kind = type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__name__}: ")[2].strip()
