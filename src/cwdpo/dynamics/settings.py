"""Sections of the recipe for probes and curriculum. Does not import torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from cwdpo.curriculum.base import CURRICULA
from cwdpo.errors import nearest
from cwdpo.probes.base import PROBES
from cwdpo.records import NEW_TOKENS
from cwdpo.registry import Settings

TYPES = (
    "chosen_initial", "chosen_paraphrase", "rejected_paraphrase", "other_train", "other_test", "unrelated",
    "shuffled", "on_policy",
)  # fmt: skip
"""Response types that ``probes.types`` may name, in addition to ``chosen`` and the kinds of negatives."""


class ProbeSettings(Settings):
    """Held-out readings during training."""

    every: int = Field(25, gt=0, description="optimizer steps between two measurements")
    prompts: int = Field(
        64, gt=0, description="held-out prompts per measurement, fewer if the budget does not allow them"
    )
    types: tuple[str, ...] = Field(
        TYPES[:-1],
        description="response types in addition to chosen and the negatives; on_policy generates new samples each time",
    )
    budget: float = Field(
        0.1,
        ge=0,
        description="largest share of the stage's compute, in tokens, that the measurements may use",
    )
    max_new_tokens: int = Field(
        NEW_TOKENS, gt=0, description="largest number of tokens in a sampled response"
    )
    file: str | None = Field(
        None, description="a probe set of your own, or in Ren's format, instead of the validation split"
    )
    influence: int = Field(
        0, ge=0, description="training examples whose one-step influence is measured each time; 0: none"
    )

    extra: tuple[dict[str, Any], ...] = Field(
        (), description="probes of your own, in addition to the shipped ones, e.g. ['my_probe.py:MyProbe']"
    )

    @field_validator("extra", mode="before")
    @classmethod
    def _specs(cls, specs: Any) -> Any:
        return [_spec(spec) for spec in specs] if isinstance(specs, list | tuple) else specs

    @field_validator("extra")
    @classmethod
    def _buildable_probes(cls, specs: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for spec in specs:
            PROBES.build(spec)
        return specs

    @field_validator("types")
    @classmethod
    def _known(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        for name in types:
            if name not in TYPES:
                raise ValueError(f"unknown type {name!r}{nearest(name, TYPES)}; allowed: {', '.join(TYPES)}")
        return types


def _spec(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _buildable(spec: dict[str, Any]) -> dict[str, Any]:
    CURRICULA.build(spec)
    return spec


CurriculumSpec = Annotated[dict[str, Any], BeforeValidator(_spec), AfterValidator(_buildable)]
"""``name`` and settings of a curriculum."""
