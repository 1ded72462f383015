"""The page of a comparison of runs.

The summary of a comparison (``cwdpo compare``)::

    {"kind": "comparison", "title": str, "note": [str], "runs": [{"name", "path"}],
     "figures": [{"key", "label", "better": "higher" | "lower" | "none", "digits": int, "help"}],
     "values": {run: {key: {"value", "low", "high", "n"}}},
     "differences": [{"ours", "theirs", "figures": {key: {"value", "low", "high", "p", "p_corrected", "word"}}}],
     "wins": [{"ours", "theirs", "kind", "judge", "win", "tie", "loss", "rate", "low", "high", "n_prompts"}],
     "strength": [{"name", "value", "low", "high"}], "provenance": {key: text}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cwdpo.report._answers import comparison_levels
from cwdpo.report._page import Folder, mapping, records
from cwdpo.report._tables import Entry, Page, Table, difference_entry, interval, mean_entry
from cwdpo.report._text import finite, number, plain


def comparison_page(folder: Folder, summary: Mapping[str, Any]) -> Page:
    """The page of a comparison of runs on the same prompts."""
    del folder
    figures, runs = records(summary.get("figures")), records(summary.get("runs"))
    values = mapping(summary.get("values"))
    tables = [
        Table(
            "values", "Each run",
            "Value with its 95% bootstrap interval over prompts. ↑ higher is better, ↓ lower is better.",
            [_head(f) for f in figures],
            [(str(r.get("name")), "", _row(values.get(str(r.get("name"))), figures, _value)) for r in runs],
        ),
        Table(
            "differences", "Paired differences",
            "First minus second on the same prompts, with its 95% bootstrap interval over prompts. p-values are "
            "corrected (Holm) within a column; better or worse is stated only if the corrected p is below 0.05.",
            [_head(f) for f in figures],
            [
                (f"{d.get('ours')} − {d.get('theirs')}", "", _row(d.get("figures"), figures, _difference))
                for d in records(summary.get("differences"))
            ],
        ),
    ]  # fmt: skip
    wins, strength = records(summary.get("wins")), records(summary.get("strength"))
    tables += [_wins(wins)] if wins else []
    tables += [_strength(strength)] if strength else []
    return Page(
        kind="comparison of runs",
        title=str(summary.get("title") or "comparison"),
        levels=comparison_levels(summary),
        against="paired by prompt",
        notes=[str(note) for note in summary.get("note") or () if note],
        tables=tables,
        settings=[(str(r.get("name")), str(r.get("path"))) for r in runs],
        provenance={str(k): plain(v) for k, v in mapping(summary.get("provenance")).items()},
    )


def _wins(wins: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for w in wins:
        cells = [Entry(f"{w['rate']:.3f}", (interval(w.get("low"), w.get("high"), 3),))]
        cells += [Entry(number(w.get(k))) for k in ("win", "tie", "loss")]
        cells += [Entry(plain(w.get("n_prompts"))), Entry(plain(w.get("bad_answers", 0)))]
        label = f"{w.get('ours')} against {w.get('theirs')}"
        rows.append((label, f"{plain(w.get('kind'))}, by {plain(w.get('judge'))}", cells))
    heads = [("win rate", "a tie counts half"), *((name, "") for name in ("win", "tie", "loss", "prompts"))]
    heads.append(("bad answers", "answers of the judge that could not be understood; they count as ties"))
    note = "Prompt by prompt, with the 95% bootstrap interval over prompts; a tie counts half."
    return Table("wins", "Win rates", note, heads, rows)


def _strength(strength: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (str(s.get("name")), "", [Entry(number(s.get("value")), (interval(s.get("low"), s.get("high"), 3),))])
        for s in strength
    ]
    note = (
        "Bradley-Terry log-strengths from all win rates (mean 0); a difference of d means a win probability of "
        "1 / (1 + exp(-d))."
    )
    return Table("strength", "Bradley-Terry", note, [("log-strength", "")], rows)


def _head(figure: Mapping[str, Any]) -> tuple[str, str]:
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓"}.get(str(figure.get("better")), "")
    return f"{figure.get('label') or figure.get('key')}{arrow}", plain(figure.get("help") or "")


def _row(
    values: Any, figures: Sequence[Mapping[str, Any]], entry: Callable[[Mapping[str, Any], int], Entry]
) -> list[Entry]:
    found = mapping(values)
    return [entry(mapping(found.get(str(f.get("key")))), int(f.get("digits") or 0)) for f in figures]


def _value(found: Mapping[str, Any], digits: int) -> Entry:
    notes = () if found.get("n") is None else (f"n = {found['n']}",)
    return mean_entry(found.get("value"), found.get("low"), found.get("high"), digits, notes)


def _difference(found: Mapping[str, Any], digits: int) -> Entry:
    value, low, high, p = (finite(found.get(k)) for k in ("value", "low", "high", "p_corrected"))
    return difference_entry(value, low, high, p, str(found.get("word") or ""), digits)
