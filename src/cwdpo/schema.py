"""The JSON schema of a recipe, for editors. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cwdpo.config import Recipe
from cwdpo.judging.base import AUTO, JUDGES, NONE
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.registry import Registry


def _component_schema(
    registry: Registry[Any], defs: dict[str, Any], bare: Sequence[str] = ()
) -> dict[str, Any]:
    """A component in a recipe: its name, or a mapping with its settings.

    Args:
        registry: the components of one kind.
        defs: the schema's ``$defs``; sections inside the components are added.
        bare: further names, without settings.
    """
    branches = []
    for name in registry.names():
        cls = registry.get(name)
        branch = cls.model_json_schema()
        defs |= branch.pop("$defs", {})
        branch["properties"] = {"name": {"const": name}, **branch.get("properties", {})}
        branch["required"] = ["name", *branch.get("required", ())]
        branch["description"] = (cls.__doc__ or "").strip()
        branches.append(branch)
    for name in bare:
        only = {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]}
        branches.append({**only, "additionalProperties": False})
    own = {"type": "object", "properties": {"name": {"pattern": r"\.py:"}}, "required": ["name"]}
    return {"anyOf": [{"enum": [*bare, *registry.names()]}, *branches, own]}


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with the settings of all objectives and judges."""
    schema = Recipe.model_json_schema()
    defs = schema["$defs"]
    defs["Objective"] = _component_schema(OBJECTIVES, defs)
    defs["StageSettings"]["properties"]["objective"] = {"$ref": "#/$defs/Objective"}
    defs["Judge"] = _component_schema(JUDGES, defs, (AUTO, NONE))
    judge = defs["NegativeSettings"]["properties"]["judge"]
    defs["NegativeSettings"]["properties"]["judge"] = {
        "$ref": "#/$defs/Judge", "description": judge["description"], "default": {"name": AUTO},
    }  # fmt: skip
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "cwdpo recipe"
    return schema
