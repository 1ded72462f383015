"""The page's section on the negatives of the rounds of stage 2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cwdpo.records import ImageEdit
from cwdpo.report._page import Folder, mapping, records
from cwdpo.report._text import MISSING, finite, number, picture_uri, plain, shortened, strip_uri

ORIGINS = ("dataset", "perturbed", "on_policy")
_WORD = re.compile(r"\s+|\S+")
_LONGEST = 600
"""Number of characters of a response that are compared and shown."""


def negatives_section(folder: Folder, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rounds by origin, and pairs with their differences marked; empty if the run had no rounds."""
    rounds = folder.rows("rounds.jsonl")
    logged = [row for row in metrics if row.get("stage") == "stage2"]
    shown = [pair for row in rounds for pair in records(row.get("pairs"))[:6]]
    return {
        "rounds": [_round(row, logged) for row in rounds],
        "pairs": [_pair(pair, folder) for pair in shown],
    }


def _round(row: dict[str, Any], logged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    begin, end = finite(row.get("step")) or 0.0, finite(row.get("end")) or 0.0
    own = [r for r in logged if begin < (finite(r.get("step")) or 0.0) <= end]
    found = mapping(row.get("by_origin"))
    dropped = ", ".join(f"{plain(n)} {plain(why)}" for why, n in sorted(mapping(row.get("dropped")).items()))
    facts = [
        f"{plain(row.get('prompts'))} prompts, {plain(row.get('left_out'))} without a negative",
        f"{plain(row.get('samples'))} samples, of which did not become negatives: {dropped or 'none'}"
        + ("" if row.get("judged") else " (no judge: a sample that differs from chosen counts as wrong)"),
    ]
    if row.get("replaced_chosen"):
        facts.append(f"{plain(row['replaced_chosen'])} chosen responses are samples judged right")
    if row.get("short"):
        facts.append(f"{plain(row['short'])} negatives are missing because no source had one")
    return {
        "name": f"{plain(row.get('round'))}: steps {begin:.0f} to {end:.0f}",
        "asked": number(row.get("asked"), 2),
        "facts": "; ".join(facts),
        "origins": [
            _origin(name, mapping(found[name]), own, end - begin) for name in ORIGINS if name in found
        ],
    }


def _origin(
    name: str, counts: dict[str, Any], logged: Sequence[dict[str, Any]], steps: float
) -> dict[str, Any]:
    age = "made before training"
    if name == "on_policy":
        age = f"0 to {steps - 1:.0f} steps, mean {(steps - 1) / 2:.1f}"
    return {
        "name": name,
        "n": plain(counts.get("n")),
        "share": number(counts.get("share")),
        "reference": number(counts.get("reference_mean_logp")),
        "policy": _mean(logged, name, "logps_mean"),
        "weight": _mean(logged, name, "weight"),
        "age": age,
    }


def _mean(logged: Sequence[dict[str, Any]], origin: str, what: str) -> str:
    """The mean over the round's logged rows, weighted by their number of negatives; and the total number."""
    known = [
        (n, value)
        for row in logged
        if (n := finite(row.get(f"negatives/{origin}/n")))
        and (value := finite(row.get(f"negatives/{origin}/{what}"))) is not None
    ]
    total = sum(n for n, _ in known)
    return f"{number(sum(n * v for n, v in known) / total)} (n = {total:.0f})" if total else MISSING


def _pair(pair: dict[str, Any], folder: Folder) -> dict[str, Any]:
    chosen, rejected = plain(pair.get("chosen")), plain(pair.get("rejected"))
    made = mapping(pair.get("made"))
    notes = [plain(pair.get("kind"))] if pair.get("kind") != pair.get("origin") else []
    if "edit" in made:
        notes.append(f"{plain(made['edit'])}: {plain(made.get('from'))} → {plain(made.get('to'))}")
    if "mean_logp" in made:
        notes.append(f"{number(made['mean_logp'])} nats per token when sampled")
    if "step" in made:
        notes.append(f"sampled at step {plain(made['step'])}")
    left, right = marked(chosen[:_LONGEST], rejected[:_LONGEST])
    return {
        "id": plain(pair.get("id")),
        "picture": picture_uri(pair["image"], folder.path) if isinstance(pair.get("image"), str) else None,
        "strip": strip_uri(pair["video"], folder.path) if isinstance(pair.get("video"), str) else None,
        "rejected_picture": _rejected_picture(pair.get("rejected_image"), folder),
        "chosen": left,
        "rejected": right,
        "origin": plain(pair.get("origin")),
        "chosen_origin": plain(pair.get("chosen_origin")),
        "note": shortened(", ".join(n for n in notes if n), 200),
    }


def _rejected_picture(image: Any, folder: Folder) -> str | None:
    """The image of an image-side negative, with its edit; ``None`` for other negatives."""
    row = mapping(image)
    path = row.get("path")
    try:
        edit = ImageEdit(**row["edit"]) if isinstance(row.get("edit"), dict) else None
    except (TypeError, ValueError):  # a damaged row
        return None
    return picture_uri(path, folder.path, edit) if isinstance(path, str) else None


def marked(chosen: str, rejected: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts as pieces with a flag; True marks the part between their common beginning and common end.

    >>> marked("a red dog runs", "a blue dog runs")
    ([('a ', False), ('red', True), (' dog runs', False)], [('a ', False), ('blue', True), (' dog runs', False)])
    """
    a, b = _WORD.findall(chosen), _WORD.findall(rejected)
    shortest = min(len(a), len(b))
    start = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    end = 0
    while end < shortest - start and a[-1 - end] == b[-1 - end]:
        end += 1

    def pieces(words: list[str]) -> list[tuple[str, bool]]:
        cut = len(words) - end
        parts = [
            ("".join(words[:start]), False),
            ("".join(words[start:cut]), True),
            ("".join(words[cut:]), False),
        ]
        return [(text, differs) for text, differs in parts if text]

    return pieces(a), pieces(b)
