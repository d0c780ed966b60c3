"""Packages of extras, imported when they are first used."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from instseg.errors import ConfigError


def require(package: str, extra: str, purpose: str) -> None:
    """Raise a ConfigError that says what to type if a package of an extra is missing.

    Args:
        package: its name.
        extra: of instseg, which installs it.
        purpose: the subject of the message, such as "reading videos".
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"{purpose} needs the package {package}, which is not installed; type: "
            f"pip install 'instseg[{extra}]'"
        )


class Optional:
    """Stands for a package that may be missing; its attributes are those of the package."""

    def __init__(self, name: str, extra: str) -> None:
        """
        Args:
            name: of the package.
            extra: of instseg, which installs it.
        """
        self._name = name
        self._extra = extra

    def require(self, purpose: str) -> None:
        """See :func:`require`."""
        require(self._name, self._extra, purpose)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


AV: Any = Optional("av", "video")
"""PyAV, which brings FFmpeg with encoders under the GPL."""
