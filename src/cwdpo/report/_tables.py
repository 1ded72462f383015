"""Pages that are tables of numbers with intervals: a study of variants, a comparison of runs.

A study's ``summary.json``::

    {"kind": "study", "title": str, "question": str, "full": name, "seeds": [0, 1],
     "figures": [{"key", "label", "better": "higher" | "lower" | "none", "digits": int, "help"}],
     "variants": [{"name", "label", "overrides": [str],
        "figures": {key: {"mean", "low", "high", "n", "per_seed"}},
        "rival": name it is compared with, or null,
        "against": {key: {"mean", "low", "high", "n", "p", "p_corrected", "word"}},
        "cells": [{"seed", "status": "done" | "failed", "error", "seconds"}]}],
     "panel": {"columns": [str], "rows": [{"label", "values": [figure of the score or null]}]} or null,
     "shared": [{"key", "error"}], "provenance": {key: text}}

A comparison's::

    {"kind": "comparison", "title": str, "note": [str], "runs": [{"name", "path"}], "figures": as above,
     "values": {run: {key: {"value", "low", "high", "n"}}},
     "differences": [{"ours", "theirs", "figures": {key: {"value", "low", "high", "p", "p_corrected", "word"}}}],
     "wins": [{"ours", "theirs", "kind", "judge", "win", "tie", "loss", "rate", "low", "high", "n_prompts"}],
     "strength": [{"name", "value", "low", "high"}], "provenance": {key: text}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.report._page import Folder, mapping, records
from cwdpo.report._text import MISSING, finite, number, plain

_TONES = {"better": "good", "worse": "bad", "failed": "bad"}


@dataclass(frozen=True)
class Entry:
    """One cell: its text, what stands small below it, and its tone (``good``, ``bad`` or none)."""

    text: str
    below: tuple[str, ...] = ()
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A section of the page: its anchor, title, note, column heads (text, help) and rows."""

    key: str
    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, str, Sequence[Entry]]]


def study_page(folder: Folder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The template's values."""
    del folder
    figures, variants = records(summary.get("figures")), records(summary.get("variants"))
    full = next((v for v in variants if v.get("name") == summary.get("full")), {})
    heads = [_head(f) for f in figures]
    compared = [f for f in figures if f.get("key") != "win_rate"]
    others = [v for v in variants if v.get("against")]
    named = {v.get("name"): plain(v.get("label")) for v in variants if v is not full}
    rivals = [f"minus {named[v.get('rival')]}" if v.get("rival") in named else "" for v in others]
    failed = [(v, c) for v in variants for c in records(v.get("cells")) if c.get("status") == "failed"]
    tables = [
        Table(
            "means", "Means over seeds",
            "Mean with its 95% interval over seeds (a win rate: over prompts). ↑ higher is better, ↓ lower is better.",
            heads,
            [(_named(v), _ran(v), _row(v.get("figures"), figures, _mean)) for v in variants],
        ),
        Table(
            "differences", f"Difference to {plain(full.get('label'))}",
            f"Variant minus full, or minus the one that is named, paired by seed, with its 95% interval. p-values are "
            f"corrected (Holm) for the {len(others)} comparisons of a column; a word is given only where the corrected "
            "p is below 0.05.",
            [_head(f) for f in compared],
            [
                (_named(v), rival, _row(v.get("against"), compared, _difference))
                for v, rival in zip(others, rivals, strict=True)
            ],
        ),
    ]  # fmt: skip
    panel = mapping(summary.get("panel"))
    if panel:
        score = next((f for f in figures if f.get("key") == "score"), {})
        rows = [
            (plain(r.get("label")), "", [_mean(v, score) for v in r.get("values") or ()])
            for r in records(panel.get("rows"))
        ]
        columns = [(plain(c), "") for c in panel.get("columns") or ()]
        tables.insert(0, Table("panel", "Scores", plain(score.get("help")), columns, rows))
    settings = [
        (_named(v), " ".join(map(str, v.get("overrides") or ())) or "the recipe as it is") for v in variants
    ]
    troubles = [f"{_named(v)}, seed {c.get('seed')}: {_first_line(c.get('error'))}" for v, c in failed]
    troubles += [
        f"{plain(s.get('key'))}: {_first_line(s.get('error'))}" for s in records(summary.get("shared"))
    ]
    return _page(summary, "study", [summary.get("question")], tables, settings, troubles)


def comparison_page(folder: Folder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The template's values."""
    del folder
    figures, runs = records(summary.get("figures")), records(summary.get("runs"))
    values = mapping(summary.get("values"))
    tables = [
        Table(
            "values", "Every run by itself",
            "Value with its 95% bootstrap interval over prompts. ↑ higher is better, ↓ lower is better.",
            [_head(f) for f in figures],
            [(str(r.get("name")), "", _row(values.get(str(r.get("name"))), figures, _value)) for r in runs],
        ),
        Table(
            "differences", "Paired differences",
            "First minus second on the same prompts, with its 95% bootstrap interval over prompts. p-values are "
            "corrected (Holm) within a column; a word is given only where the corrected p is below 0.05.",
            [_head(f) for f in figures],
            [
                (f"{d.get('ours')} − {d.get('theirs')}", "", _row(d.get("figures"), figures, _difference))
                for d in records(summary.get("differences"))
            ],
        ),
    ]  # fmt: skip
    wins = records(summary.get("wins"))
    if wins:
        tables.append(_wins(wins))
    strength = records(summary.get("strength"))
    if strength:
        tables.append(_strength(strength))
    settings = [(str(r.get("name")), str(r.get("path"))) for r in runs]
    return _page(summary, "comparison of runs", summary.get("note") or [], tables, settings, [])


def _wins(wins: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for w in wins:
        cells = [Entry(f"{w['rate']:.3f}", (_interval(w, 3),))]
        cells += [Entry(number(w.get(k))) for k in ("win", "tie", "loss")]
        cells += [Entry(plain(w.get("n_prompts"))), Entry(plain(w.get("bad_answers", 0)))]
        rows.append(
            (
                f"{w.get('ours')} against {w.get('theirs')}",
                f"{plain(w.get('kind'))}, by {plain(w.get('judge'))}",
                cells,
            )
        )
    heads = [
        ("win rate", "a tie counts half"),
        ("win", ""),
        ("tie", ""),
        ("loss", ""),
        ("prompts", ""),
        ("bad answers", "answers of the judge that could not be read; they count as ties"),
    ]
    return Table(
        "wins", "Win rates", "Prompt by prompt, with the 95% bootstrap interval over prompts; a tie counts half.",
        heads, rows,
    )  # fmt: skip


def _strength(strength: Sequence[Mapping[str, Any]]) -> Table:
    rows = [(str(s.get("name")), "", [Entry(number(s.get("value")), (_interval(s, 3),))]) for s in strength]
    note = (
        "Bradley-Terry log-strengths from all win rates (mean 0); a difference d is a win chance of "
        "1 / (1 + exp(-d))."
    )
    return Table("strength", "Bradley-Terry", note, [("log-strength", "")], rows)


def _page(
    summary: Mapping[str, Any],
    kind: str,
    notes: Iterable[Any],
    tables: Sequence[Table],
    settings: Sequence[tuple[str, str]],
    failures: Sequence[str],
) -> dict[str, Any]:
    return {
        "title": str(summary.get("title") or "study"),
        "kind": kind,
        "notes": [str(note) for note in notes if note],
        "tables": tables,
        "settings": settings,
        "failures": failures,
        "provenance": [(str(k), plain(v)) for k, v in mapping(summary.get("provenance")).items()],
    }


def _head(figure: Mapping[str, Any]) -> tuple[str, str]:
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓"}.get(str(figure.get("better")), "")
    return f"{figure.get('label') or figure.get('key')}{arrow}", plain(figure.get("help") or "")


def _named(variant: Mapping[str, Any]) -> str:
    return str(variant.get("label") or variant.get("name"))


def _row(
    values: Any, figures: Sequence[Mapping[str, Any]], entry: Callable[[Any, Mapping[str, Any]], Entry]
) -> list[Entry]:
    found = mapping(values)
    return [entry(found.get(str(f.get("key"))), f) for f in figures]


def _first_line(text: Any) -> str:
    return plain(text).partition("\n")[0]


def _ran(variant: Mapping[str, Any]) -> str:
    cells = records(variant.get("cells"))
    failed = sum(c.get("status") == "failed" for c in cells)
    return f"{failed} of {len(cells)} failed" if failed else f"{len(cells)} seeds"


def _mean(value: Any, figure: Mapping[str, Any]) -> Entry:
    found = mapping(value)
    return _shown(found, found.get("mean"), figure)


def _value(value: Any, figure: Mapping[str, Any]) -> Entry:
    found = mapping(value)
    entry = _shown(found, found.get("value"), figure)
    n = found.get("n")
    return Entry(entry.text, (*entry.below, f"n = {n}")) if n is not None else entry


def _shown(found: Mapping[str, Any], value: Any, figure: Mapping[str, Any]) -> Entry:
    digits = int(figure.get("digits") or 0)
    if finite(value) is None:
        return Entry(MISSING)
    return Entry(
        number(value, digits), (_interval(found, digits),) if finite(found.get("low")) is not None else ()
    )


def _difference(value: Any, figure: Mapping[str, Any]) -> Entry:
    found = mapping(value)
    middle = found.get("mean", found.get("value"))
    digits = int(figure.get("digits") or 0)
    known = finite(middle)
    if known is None:
        return Entry(MISSING)
    below = [_interval(found, digits)] if finite(found.get("low")) is not None else []
    p = finite(found.get("p_corrected"))
    if p is not None:
        below.append("p < 0.001" if p < 0.001 else f"p = {p:.3f}")
    word = str(found.get("word") or "")
    tone = _TONES.get(word, "")
    if tone:
        below.append(word)
    text = number(known, digits)
    sign = "+" if known > 0 and text.strip("0.") else ""
    return Entry(sign + text, tuple(below), tone)


def _interval(found: Mapping[str, Any], digits: int) -> str:
    return f"{number(found.get('low'), digits)} to {number(found.get('high'), digits)}"
