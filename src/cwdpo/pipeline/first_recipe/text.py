"""A recipe as text: each section with its keys, and above a key why it has its value."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.files.yamlfile import dump_yaml

WIDTH = 110
_PLAIN = re.compile(r"[\w./-]{1,60}")
"""Texts that mean the same within brackets as outside."""


@dataclass(frozen=True)
class Decision:
    """A key of the recipe.

    Attributes:
        key: ``section.key``, or a key of the top level.
        value: what YAML can hold.
        why: one or two sentences; empty for what needs no reason.
    """

    key: str
    value: Any
    why: str = ""


def recipe_text(head: Sequence[str], decisions: Iterable[Decision]) -> str:
    """The YAML of a recipe; keys of a section follow each other.

    Args:
        head: lines of the comment at the start.
        decisions: in the order of the file.
    """
    lines, section = [line for text in head for line in _comment(text, "")], ""
    for one in decisions:
        own, _, key = one.key.rpartition(".")
        if own and own != section:
            lines.append(f"{own}:")
        section, indent = own, "  " * bool(own)
        lines += _comment(one.why, indent)
        lines.append(f"{indent}{key}: {_flow(one.value)}")
    return "\n".join(lines) + "\n"


def as_tree(decisions: Iterable[Decision]) -> dict[str, Any]:
    """The same as the tree that a recipe is parsed from."""
    tree: dict[str, Any] = {}
    for one in decisions:
        section, _, key = one.key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = one.value
    return tree


def _comment(text: str, indent: str) -> list[str]:
    if not text:
        return []
    start = f"{indent}# "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _flow(value: Any) -> str:
    """YAML of a value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return json.dumps(value, ensure_ascii=False)  # YAML reads JSON's texts
    return dump_yaml([value]).removeprefix("- ").strip()  # quotes null, 010 and the like
