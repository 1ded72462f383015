"""What the site shows of docstrings: roles (``:func:`name```) as plain code, and types and defaults of settings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
_CODE = re.compile(r"``([^`]+)``")
_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)


class Roles(griffe.Extension):
    """Replaces roles in every docstring; arguments described together (``low, high: ...``) are listed one by one."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            text = _CODE.sub(r"`\1`", _ROLE.sub(r"`\1`", obj.docstring.value))
            obj.docstring.value = _TOGETHER.sub(_one_by_one, text)


def _one_by_one(found: re.Match[str]) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class Fields(griffe.Extension):
    """Gives a settings class (pydantic) the signature that its fields have.

    Without it, griffe finds no ``__init__``, and the table of the docstring's ``Args`` has no types and calls each
    setting required.
    """

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called by griffe when the members of a class are known."""
        if cls.docstring is None or "Args:" not in cls.docstring.value or "__init__" in cls.members:
            return
        if any("dataclass" in str(one.value) for one in cls.decorators):  # griffe knows these
            return
        fields = [
            griffe.Parameter(
                one.name, annotation=one.annotation, default=_default(one.value), kind=griffe.ParameterKind.keyword_only
            )
            for one in cls.members.values()
            if isinstance(one, griffe.Attribute) and one.annotation and "instance-attribute" in one.labels
        ]  # fmt: skip
        if fields:
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*fields)))


def _default(value: Any) -> Any:
    """The default of a field: of ``Field(0.5, gt=0)`` the first argument; ``None``: it is required."""
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "Field":
        return value
    named = {one.name: one.value for one in value.arguments if isinstance(one, griffe.ExprKeyword)}
    given = [one for one in value.arguments if not isinstance(one, griffe.ExprKeyword)]
    found = given[0] if given else named.get("default")
    if found is None and "default_factory" in named:
        return f"{named['default_factory']}()"
    return None if str(found) == "..." else found
