"""The summary of a trained policy: generated responses to held-out prompts, and the last readings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.models.load import Policy
from cwdpo.models.sample import sample
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.tracker_kinds import Result
from cwdpo.waiting import from_first


def evaluate_policy(
    policy: Policy,
    encoder: Encoder,
    examples: Sequence[Example],
    recipe: Recipe,
    run: RunDir,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Generate responses to held-out prompts, write samples.jsonl, and return the run's summary.

    All processes call this together: each generates a part of the responses, and the first one writes.

    Args:
        policy: the trained policy.
        encoder: of the policy.
        examples: held-out examples; responses are generated for the first ones.
        recipe: the run's recipe; its section ``evaluation`` is used.
        run: the run folder.
        resume: whether the stored samples are from this policy, so that only missing ones are generated.

    Returns:
        The last readings of each stage, and figures of the generated responses.
    """
    settings = recipe.evaluation
    chosen = encoder.readable(examples, settings.prompts)
    rows: list[dict[str, Any]] = [
        {
            "id": e.id,
            "image": str(e.images[0].path) if e.images and e.images[0].path else None,
            **({"video": str(e.videos[0].path)} if e.videos and e.videos[0].path else {}),
            "prompt": e.prompt_text,
            "chosen": e.chosen.text,
            "responses": [],
        }
        for e in chosen
    ]
    temperatures = [0.0, *[1.0] * settings.samples] if chosen else []
    if resume:
        rows = from_first(_with_stored(rows, run.samples()) if run.writes else rows, "reading stored samples")
    have = len(rows[0]["responses"]) if rows else 0
    for draw, temperature in list(enumerate(temperatures))[have:]:
        samples = sample(
            policy.model,
            encoder,
            chosen,
            temperature=temperature,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            seed=recipe.seed + draw,
            together=True,
        )
        for row, s in zip(rows, samples, strict=True):
            row["responses"].append({"temperature": temperature, "text": s.text, "ended": s.ended})
        _write_samples(run, rows)  # after each round of samples, so that a kill loses at most one
    if not temperatures:
        _write_samples(run, rows)
    return {"stages": last_readings(run), "generated": _generated(rows)}


def result_of(run: RunDir, findings: Sequence[str]) -> Result:
    """What trackers get of a finished run."""
    names = ("report.html", "summary.json", "samples.jsonl", "model/README.md")
    return Result(
        figures={
            f"evaluation/{name}": value for name, value in run.json("summary.json")["generated"].items()
        },
        samples=run.samples(),
        findings=findings,
        files=[path for name in names if (path := run.path / name).is_file()],
    )


def _write_samples(run: RunDir, rows: Sequence[dict[str, Any]]) -> None:
    if not run.writes:
        return
    run.write_text("samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def _with_stored(rows: list[dict[str, Any]], stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stored rows if they have the same prompts and the same number of responses each; else ``rows``."""
    bare = [{**row, "responses": []} for row in stored]
    alike = len({len(row["responses"]) for row in stored}) == 1
    return stored if bare == rows and alike else rows


def last_readings(run: RunDir) -> dict[str, dict[str, Any]]:
    """For each stage, the last step and the value and count of each reading there.

    If a stage was rolled back to an earlier step, the readings of that step, which are those of the model.
    """
    stages: dict[str, dict[str, Any]] = {}
    kept = {stage: run.json(f"stopped-{stage}.json").get("rolled_back_to") for stage in ("stage1", "stage2")}
    for row in run.readings():
        back = kept.get(row["stage"])
        if back is not None and row["step"] > back:
            continue
        stage = stages.setdefault(row["stage"], {"step": 0, "readings": {}})
        stage["step"] = max(stage["step"], row["step"])
        stage["readings"][row["name"]] = {"value": row["value"], "n": row["n"], "unit": row["unit"]}
    return stages


def _generated(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"prompts": len(rows)}
    greedy = [r["responses"][0] for r in rows if r["responses"]]
    if greedy:
        out["ended_share"] = sum(g["ended"] for g in greedy) / len(greedy)
        out["mean_words"] = sum(len(g["text"].split()) for g in greedy) / len(greedy)
        out["distinct_share"] = len({g["text"] for g in greedy}) / len(greedy)
    return out
