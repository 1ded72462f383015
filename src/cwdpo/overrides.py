"""Applies ``section.key=value`` to a recipe's tree. A value with a bracket or a quote at its start is YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cwdpo.errors import FileError, RecipeError
from cwdpo.files.yamlfile import as_number, parse_scalar, parse_yaml

COMPONENTS = ("objective", "judge", "curriculum", "format")
"""Keys of components: a text there is the short form of a mapping with that ``name``."""


def apply_override(
    tree: dict[str, Any], override: str, is_text: Callable[[Sequence[str]], bool] = lambda path: False
) -> None:
    """Set one key of a recipe's tree.

    Args:
        tree: changed in place.
        override: ``section.key=value``. A value that begins with a bracket or a quote is parsed as YAML. Any other is a
            single value: ``/a #1/t.jsonl`` is a path, ``010`` is ten, ``5e5`` a number; ``null`` is null.
        is_text: whether the key at a path takes text only; then ``12`` is not converted to a number.

    Raises:
        RecipeError: there is no ``=``, the value is not YAML, or a key before the last one has a value, not a section.
    """
    key, equals, text = override.partition("=")
    parts, text = key.strip().split("."), text.strip()
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: write section.key=value, e.g. stage2.learning_rate=1e-5")
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if isinstance(child, str) and part in COMPONENTS:
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {part!r} is a value, not a section")
        node[part] = child
        node = child
    value = _value(text, override, is_text(parts))
    # A data source given on the command line replaces the recipe's.
    if parts in (["data", "path"], ["data", "world"]) and value is not None:
        node.pop("world" if parts[1] == "path" else "path", None)
    node[parts[-1]] = value


def _value(text: str, override: str, is_text: bool) -> Any:
    if text.startswith(("[", "{", '"', "'")):
        try:
            return parse_yaml(text, f"override {override!r}")
        except FileError as error:
            raise RecipeError(str(error)) from None
    plain = parse_scalar(text)
    return text if is_text and plain is not None else as_number(plain)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted keys; an empty mapping is a value."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
