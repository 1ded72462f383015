"""Reads YAML safely: plain values only, no duplicate keys, and limits against aliases that expand to gigabytes.

``010``, ``12:30`` and ``2024-01-01`` are text; in YAML 1.1 they are 8, 750 and a date. A numeric setting converts such
a text to the decimal number (``010`` is 10).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cwdpo.errors import FileError
from cwdpo.files.reading import read_text

MOST_BYTES = 2**20
MOST_VALUES = 10_000
DEEPEST = 30
# PyYAML does not catch the errors of Python's parsers for wrong numbers and tags, and for deep nesting.
_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with different rules for numbers, and without dates."""


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes texts that either loader would read as a number."""


_KEPT = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in rules if tag in _KEPT])
}
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))

_DECIMAL = re.compile(r"[-+]?[0-9]{1,300}(\.[0-9]*)?([eE][-+]?[0-9]{1,4})?")


def parse_yaml(text: str, where: str, *, words: bool = False) -> Any:
    """The value of a YAML document.

    Args:
        text: YAML.
        where: name of the file, for messages.
        words: read every scalar as text, also ``yes``, ``on`` and ``1``.

    Raises:
        FileError: it is not YAML, has a duplicate key or a custom tag, or is too large or too deep after its aliases
            are expanded.
    """
    try:
        loader = yaml.BaseLoader(text) if words else _Loader(text)
    except _ERRORS as error:
        raise FileError(f"{where}: not valid YAML: {_said(error)}") from None
    try:
        node = loader.get_single_node()
        _refuse_large(node, where, 10 * MOST_VALUES if words else MOST_VALUES)
        return None if node is None else loader.construct_document(node)
    except _ERRORS as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{where}: not valid YAML: {_said(error)}") from None
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """YAML of a value, which :func:`parse_yaml` and YAML 1.1 readers read as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def parse_scalar(text: str) -> Any:
    """The value that a text has as a plain scalar in a YAML file: a number, ``true``, ``null``, or the text."""
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except _ERRORS:
        return text
    finally:
        loader.dispose()


def as_number(value: Any) -> Any:
    """Convert a text with a decimal number: ``010`` to 10, ``5e5`` to 500000. Other values are returned unchanged."""
    if not isinstance(value, str) or _DECIMAL.fullmatch(value.strip()) is None:
        return value
    number = float(value)
    whole = number.is_integer() and "." not in value
    return (int(value) if "e" not in value.lower() else int(number)) if whole else number


def read_yaml(path: Path, *, words: bool = False) -> Any:
    """The value of a YAML file; ``words`` as in :func:`parse_yaml`.

    Raises:
        FileError: see :func:`cwdpo.files.reading.read_text` and :func:`parse_yaml`.
    """
    return parse_yaml(read_text(path, MOST_BYTES), str(path), words=words)


def _refuse_large(node: yaml.Node | None, where: str, most: int) -> None:
    """Count values and depth of the document with all aliases expanded; refuse it above the limits."""
    left = most
    waiting = [] if node is None else [(node, 0)]
    while waiting:
        one, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise FileError(
                f"{where}: nested deeper than {DEEPEST}, or more than {most} values; aliases (*name) that go "
                "in circles or multiply do that: write the values out"
            )
        if isinstance(one, yaml.MappingNode):
            _refuse_twice(one, where)
            waiting += [(part, depth + 1) for pair in one.value for part in pair]
        elif isinstance(one, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in one.value]


def _refuse_twice(node: yaml.MappingNode, where: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise FileError(
                f"{where}: the key {key.value!r} is given twice, in lines {lines[name]} and {line}; only one of them "
                "would be used: join them"
            )
        lines[name] = line


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    return str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
