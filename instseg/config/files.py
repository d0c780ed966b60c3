"""Read configuration files: plain YAML that names its base files under ``_BASE_``."""

import os
from typing import Any, TextIO

import yaml

from instseg.errors import ConfigError, short
from instseg.files import is_device

_BASE_KEY = "_BASE_"
_VERSIONS = (1, 2)
"""Versions of Detectron2's keys."""
_LARGEST = 1_000_000
"""Largest number of values and characters in a file; an alias counts its values again."""


def load_yaml(filename: str) -> dict[str, Any]:
    """Read a file and its ``_BASE_`` files, whose paths are relative to it, into one dict.

    Raises:
        ConfigError: a file is missing, empty, malformed or excessive, has tags that execute code, a
            cyclic ``_BASE_``, or a ``VERSION`` that Detectron2 does not know.
    """
    merged = _load(filename, (), {})
    version = merged.get("VERSION", _VERSIONS[-1])
    if type(version) is not int or version not in _VERSIONS:
        raise ConfigError(f"{filename}: VERSION is {short(version)}; expected {_VERSIONS[-1]}")
    return merged


def _load(
    filename: str, chain: tuple[str, ...], loaded: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """
    Args:
        filename: the file to read.
        chain: the files that led here by ``_BASE_``.
        loaded: content of the files read so far, by path; this file is added.
    """
    origin = f" (named as _BASE_ of {chain[-1]})" if chain else ""
    try:
        real = os.path.realpath(filename)
    except ValueError as error:
        raise ConfigError(f"{filename!r}: is no file name{origin}: {error}") from None
    if real in chain:
        raise ConfigError(f"{filename}: _BASE_ is cyclic: {' -> '.join((*chain, real))}")
    if real in loaded:
        return loaded[real]
    if is_device(real):
        raise ConfigError(f"{filename}: is no regular file{origin}")
    try:
        content = _parse(filename)
    except OSError as error:
        raise ConfigError(f"{filename}: cannot be read{origin}: {error.strerror}") from None
    bases = content.pop(_BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{filename}: _BASE_ is {short(bases)}; expected a file name or a list of them"
        )
    merged: dict[str, Any] = {}
    # A base that is named twice counts at its last mention.
    for base in reversed(dict.fromkeys(reversed(bases))):
        path = os.path.join(os.path.dirname(filename), os.path.expanduser(base))
        _merge(_load(path, (*chain, real), loaded), merged)
    _merge(content, merged)
    loaded[real] = merged
    return merged


def _parse(filename: str) -> dict[str, Any]:
    """The keys of the file itself, without its bases."""
    with open(filename, encoding="utf-8") as file:
        return parse_yaml(file, filename)


def parse_yaml(text: str | TextIO, filename: str) -> dict[str, Any]:
    """The keys of a configuration in plain YAML.

    Args:
        text: YAML, or an open file.
        filename: its name in error messages.
    Raises:
        ConfigError: the text is not YAML, has tags or too many values, or no keys.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if _is_excessive(node):
            raise ConfigError(
                f"{filename}: values are too many, nested too deeply or contain themselves; "
                f"expected fewer than {_LARGEST}"
            )
        if repeated := _repeated_key(node):
            raise ConfigError(
                f"{filename}: {repeated}; YAML would ignore the first, so put both into one"
            )
        content = loader.construct_document(node) if node is not None else None
    except (OSError, ConfigError):
        raise
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{filename}: only plain YAML values are allowed, never tags that execute code: "
            f"{_yaml_problem(error)}"
        ) from None
    except Exception as error:  # a malformed value can make the parser raise anything
        raise ConfigError(f"{filename}: not a YAML file: {_yaml_problem(error)}") from None
    if content is None:
        raise ConfigError(
            f"{filename}: the file is empty; expected configuration keys such as MODEL or SOLVER"
        )
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{filename}: expected `KEY: value` lines, found a {type(content).__name__}"
        )
    return content


def _is_excessive(node: yaml.Node | None) -> bool:
    """Whether there are too many values, for example through nested lists of aliases."""
    nodes = [node]
    size = 0
    while nodes and size + len(nodes) <= _LARGEST:
        node = nodes.pop()
        size += 1
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.ScalarNode):
            size += len(node.value)
    return bool(nodes)


def _repeated_key(root: yaml.Node | None) -> str:
    """Message about a key that is written twice, which PyYAML ignores; "" if there is none."""
    nodes, visited = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:  # by an alias
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                nodes.append(value)
                if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                    continue
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    return f"{key.value} appears twice, in lines {lines[name]} and {line}"
                lines[name] = line
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return ""


def _merge(new: dict[str, Any], into: dict[str, Any]) -> None:
    """Merge ``new`` into ``into``; copies groups, since several files and keys may share one."""
    for key, value in new.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(value, into[key])
        else:
            into[key] = value


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" (line {mark.line + 1})" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or error}{line}".replace("\n", " ")
