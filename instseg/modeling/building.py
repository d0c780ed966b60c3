"""Makes errors of a model under construction errors of its configuration."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instseg.errors import ConfigError, InstsegError

_LIBRARIES = ("detectron2", "fvcore", "torch", "torchvision")
_CALLS_PAPERS = "detectron2.config.config"
"""Calls ``__init__`` with what ``from_config`` gives: if the two do not fit, the paper is wrong."""


@contextmanager
def building() -> Iterator[None]:
    """Turn errors of Detectron2 and torch, while a model is built inside, into a ConfigError.

    Values that do not go together, such as the name of a feature map that the backbone does not
    have, raise many kinds of errors, and few of them name a key.  An error that any other code
    raises, such as a paper's ``__init__``, is a defect of that code and keeps its traceback.
    """
    try:
        yield
    except InstsegError:
        raise
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in _LIBRARIES or module == _CALLS_PAPERS:
            raise
        call = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"the model cannot be built: {error or 'refused'} ({type(error).__name__} in "
            f"{call.name} of {Path(call.filename).name}: {call.line})"
        ) from error
