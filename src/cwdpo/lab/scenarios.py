"""Runs that go wrong in a known way, and runs that do not: what the diagnosis is measured on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cwdpo.lab.cell import CellJob
from cwdpo.lab.demo import KIND_SHARES
from cwdpo.lab.methods import cell_recipe, swept_methods
from cwdpo.lab.traced import with_recipe, write_variant
from cwdpo.models.load import EMBEDDED
from cwdpo.worlds.shapes import ShapesSettings, materialise, paraphrases

Row = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One way to set up a run.

    Attributes:
        name: of the scenario.
        provokes: the findings that it must raise, any of them; empty for a healthy run.
        method: whose swept settings it starts from.
        sections: of the recipe, merged over the method's.
        change: what is done to every row of the data.
        rows: training rows used; ``None`` for all.
        shares: of the world's kinds of negatives.
        rate_factor: on the method's swept learning rate of stage 2.
    """

    name: str
    provokes: tuple[str, ...] = ()
    method: str = "dpo"
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    change: Callable[[Row], Row] | None = None
    rows: int | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: dict(KIND_SHARES))
    rate_factor: float = 1.0

    @property
    def variant(self) -> str:
        """Names the data."""
        shares = "-".join(f"{k}{v:g}" for k, v in sorted(self.shares.items()))
        return f"{shares}{'' if self.change is None else '-' + self.change.__name__.strip('_')}"


def _with_rejected(row: Row, text: str, kind: str) -> Row:
    return {**row, "rejected": text, "negatives": [{"text": text, "kind": kind, "origin": "dataset"}]}


def _long(row: Row) -> Row:
    """The rejected response goes on: the same text with two more objects behind it."""
    rng = random.Random(row["id"])
    text = row["negatives"][0]["text"].removesuffix(" .")
    choices = (("small", "large"), ("red", "blue", "green"), ("circle", "square", "ring"))
    more = " and ".join(f"a {' '.join(map(rng.choice, choices))}" for _ in range(3))
    return _with_rejected(row, f"{text} and {more} .", "long")


def _equal(row: Row) -> Row:
    """The rejected response says what the chosen one says."""
    said = row["chosen"][0]["content"][0]["text"]
    return _with_rejected(row, random.Random(row["id"]).choice(paraphrases(said)), "equal")


def _objective(name: str, rate: float, steps: int = 100, **settings: Any) -> dict[str, Any]:
    return {"stage2": {"objective": {"name": name, **settings}, "learning_rate": rate, "steps": steps}}


HEALTHY = tuple(Scenario(f"healthy_{name}", method=name) for name in ("cw_dpo", "dpo", "dpo_sft"))
PROVOKED = (
    Scenario("hot_dpo", ("too_hot",), sections=_objective("dpo", 4e-4, beta=0.3)),
    Scenario("displaced", ("likelihood_displacement",), sections=_objective("dpo", 2e-4, 150, beta=0.3)),
    Scenario("squeezed", ("squeezing",), sections=_objective("dpo", 3e-4, 200, beta=0.3)),
    Scenario("broken", ("repetition_or_ill_formed",), sections={
        **_objective("dpo", 1e-3, 150, beta=0.1), "probes": {"types": ["chosen_initial", "on_policy"]},
    }),
    Scenario("drifting", ("reference_drift",), sections=_objective("dpo", 3e-4, 150, beta=0.3, sft_weight=5.0)),
    Scenario("floor_high", ("everything_cooled",), "cw_dpo", _objective("cw_dpo", 5e-5, floor=3.0, tau=0.5)),
    Scenario("floor_low", ("nothing_cooled",), "cw_dpo", _objective("cw_dpo", 5e-5, floor=-20.0, tau=0.5)),
    Scenario("tau_small", ("cooling_is_a_switch",), "cw_dpo", _objective("cw_dpo", 5e-5, tau=0.005)),
    Scenario("tau_large", ("nothing_cooled",), "cw_dpo", _objective("cw_dpo", 5e-5, tau=50.0)),
    Scenario("strong_stage1", ("stage1_too_strong",), "cw_dpo", {
        "stage1": {"objective": {"name": "sft_constrained", "penalty": 3.0, "constraint": 4.0},
                   "learning_rate": 2e-4, "steps": 50},
    }),
    Scenario("trivial", ("easy_negatives_carry_the_gradient",), shares={"shuffled": 1.0}),
    Scenario("long_rejected", ("length_bias",), change=_long),
    Scenario("equal_pairs", ("pairs_nearly_equal",), change=_equal),
    Scenario("overfit", ("overfitting",), rows=80, sections=_objective("dpo", 2e-4, 200, beta=0.3, sft_weight=1.0)),
    Scenario("stale", ("stale_negatives",), sections=_objective("dpo", 1e-4, 400, beta=1.0, sft_weight=5.0), rows=400),
    Scenario("saturated", ("saturated_loss",), shares={"shuffled": 0.5, "easy": 0.5},
             sections=_objective("dpo", 1e-4, 150, beta=3.0, sft_weight=1.0)),
    Scenario("few_probes", ("noisy_probes",), sections={"probes": {"prompts": 5}}),
)  # fmt: skip
SCENARIOS = {s.name: s for s in (*HEALTHY, *PROVOKED)}
TRAIN_ROWS = 1600


def job_of(scenario: Scenario, seed: int, out: Path, test: Path) -> CellJob:
    """The cell of a scenario and a seed; its data is written where it is not there yet."""
    folder = out / "data" / f"{scenario.variant}-seed{seed}"
    world = ShapesSettings(
        seed=seed, train=TRAIN_ROWS, validation=64, test=0, shares=scenario.shares, questions=0.0
    )
    paths = materialise(world, folder)
    data, held = paths["train"], paths["validation"]
    if scenario.change is not None or scenario.rows is not None:
        change = scenario.change or dict
        data = write_variant(data, scenario.name, change, scenario.rows)
        held = write_variant(held, scenario.name, change, None)
    method = next(m for m in swept_methods() if m.name == scenario.method)
    recipe = cell_recipe(method, seed, str(data), str(held), str(EMBEDDED), scenario.rate_factor)
    tree = recipe.model_dump(mode="json")
    probes = {
        "every": 10,
        "prompts": 48,
        "budget": 0.3,
        "types": ["chosen_initial", "chosen_paraphrase", "other_test"],
    }
    sections = {name: {**tree[name], **scenario.sections.get(name, {})} for name in ("stage1", "stage2")}
    sections["probes"] = {**tree["probes"], **probes, **scenario.sections.get("probes", {})}
    key = f"{scenario.name}-seed{seed}"
    return with_recipe(
        CellJob(key, recipe, out / "cells" / key, test, "stage2"), {**sections, "stop": [], "name": key}
    )
