"""Building a model from a configuration that may not suit it."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instseg.errors import ConfigError, InstsegError


@contextmanager
def building() -> Iterator[None]:
    """While a model is built inside, what Detectron2 or torch raise is a ConfigError.

    A part of the model finds values that do not go together, such as the name of a feature map
    that the backbone does not have, in many ways, and few of them name a key.
    """
    try:
        yield
    except InstsegError:
        raise
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"the model cannot be built: {error or 'refused'} ({type(error).__name__} in "
            f"{place.name} of {Path(place.filename).name}: {place.line})"
        ) from error
