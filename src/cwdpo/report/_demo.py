"""What the page of a demo (a comparison of methods over seeds) shows; its input is described in ``render``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cwdpo.report._page import Folder, Legend, Panel, Panels, keys, mapping, points, records
from cwdpo.report._text import finite, number, picture_uri, plain
from cwdpo.report.figures import Line, reliability_chart, slope_chart

SLOT_OF = {"cw_dpo": 0, "dpo": 1, "sft": 2, "dpo_sft": 3}
"""Colours of the methods that every demo has; others take what is left, in order of name."""
CURVES = (
    ("chosen_shift", "Chosen shift", "nats per completion"),
    ("rejected_shift", "Rejected shift", "nats per completion"),
    ("margin", "Margin", "nats per completion"),
    ("entropy", "Entropy", "nats per token"),
    ("grad_norm", "Gradient norm", "training, before clipping"),
)
SLOPES = ("sampled_correct", "greedy_correct", "ill_formed")
Method = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One number of a table: ``text`` and exact ``value``, its interval, and whether it is the column's best."""

    text: str
    value: str = ""
    interval: str = ""
    note: str = ""
    best: bool = False


def _verdicts(found: Any) -> dict[str, Any] | None:
    """Rivals as columns, figures as rows; each cell a word and the paired difference behind it."""
    rows = records(found)
    if not rows:
        return None
    rivals = [plain(a.get("rival")) for a in records(rows[0].get("against"))]
    return {
        "rivals": rivals,
        "lines": [(plain(r.get("label")), list(map(_verdict, records(r.get("against"))))) for r in rows],
    }


def _verdict(against: dict[str, Any]) -> tuple[str, str]:
    low, mean, high = (number(against.get(k)) for k in ("low", "mean", "high"))
    interval = f"{mean} [{low}, {high}]" if finite(against.get("low")) is not None else ""
    return plain(against.get("word")), interval


def demo_page(folder: Folder, summary: dict[str, Any]) -> dict[str, Any]:
    """The template's values."""
    methods, figures = records(summary.get("methods")), records(summary.get("figures"))
    hot = mapping(summary.get("hot"))
    hot_methods = records(hot.get("methods"))
    slots = method_slots([*methods, *hot_methods])
    names = keys()
    notes = summary.get("note", [])
    base = mapping(mapping(summary.get("base")).get("figures"))
    return {
        "title": plain(summary.get("title") or folder.path.resolve().name),
        "notes": [plain(n) for n in (notes if isinstance(notes, list) else [notes])],
        "figures": figures,
        "legend": _legend(methods, slots),
        "table": _table(methods, figures, slots),
        "base": [_cell(mapping(base.get(_key(f))), f, None) for f in figures] if base else [],
        "verdicts": _verdicts(summary.get("verdicts")),
        "runs": _runs(methods, slots, summary.get("seeds")),
        "per_seed": _per_seed(methods, figures),
        **_curves(methods, slots, names),
        "reliability": _reliability(methods, slots, names),
        "hot": {
            "factor": plain(hot.get("factor")),
            "legend": _legend(hot_methods, slots),
            "table": _table(hot_methods, figures, slots),
            "verdicts": _verdicts(hot.get("verdicts")),
            "runs": _runs(hot_methods, slots, summary.get("seeds")),
            "slopes": _slopes(methods, hot_methods, figures, slots, names),
        }
        if hot_methods
        else None,
        "gallery": _gallery(folder, records(summary.get("gallery")), methods, slots),
        "settings": _settings(methods, slots),
        "provenance": [
            (plain(k), v if isinstance(v, str) else json.dumps(v, indent=1, ensure_ascii=False))
            for k, v in mapping(summary.get("provenance")).items()
        ],
    }


def method_slots(methods: Sequence[Method]) -> dict[str, int]:
    """A colour slot for each method's name; it does not depend on the order of the methods."""
    names = {_name(m) for m in methods}
    slots = {name: SLOT_OF[name] for name in sorted(names) if name in SLOT_OF}
    return slots | {name: len(SLOT_OF) + i for i, name in enumerate(sorted(names - set(SLOT_OF)))}


def _name(method: Method) -> str:
    return plain(method.get("name"))


def _label(method: Method) -> str:
    return plain(method.get("label") or method.get("name"))


def _key(figure: dict[str, Any]) -> str:
    return plain(figure.get("key"))


def _figure(method: Method, key: str) -> dict[str, Any]:
    return mapping(mapping(method.get("figures")).get(key))


def _entry(method: Method, slots: dict[str, int]) -> Legend:
    return Legend(_label(method), slots[_name(method)])


def _legend(methods: Sequence[Method], slots: dict[str, int]) -> list[Legend]:
    """One entry per method; one without a finished run has no line in the charts, and says so."""
    notes = ["no finished run" if asked and not done else "" for done, asked in map(_done, methods)]
    return [Legend(_label(m), slots[_name(m)], note) for m, note in zip(methods, notes, strict=True)]


def _done(method: Method) -> tuple[int, int]:
    cells = records(method.get("cells"))
    return sum(c.get("status") == "done" for c in cells), len(cells)


def _table(methods: Sequence[Method], figures: Sequence[dict[str, Any]], slots: dict[str, int]) -> list[Any]:
    """One row per method; a method without a single finished run keeps its row."""
    best = [best_method(methods, f) for f in figures]
    rows = []
    for i, method in enumerate(methods):
        done, asked = _done(method)
        cells = [_cell(_figure(method, _key(f)), f, done, best[c] == i) for c, f in enumerate(figures)]
        rows.append({"method": _entry(method, slots), "done": done, "asked": asked, "cells": cells})
    return rows


def _cell(found: dict[str, Any], figure: dict[str, Any], done: int | None, best: bool = False) -> Cell:
    """``done``: finished runs of the method, or ``None`` where runs do not matter (the base model)."""
    mean, low, high = (finite(found.get(k)) for k in ("mean", "low", "high"))
    if mean is None:
        return Cell("failed" if done == 0 else "–")
    stated = finite(figure.get("digits"))
    digits = 3 if stated is None else int(stated)
    interval = "" if low is None or high is None else f"[{number(low, digits)}, {number(high, digits)}]"
    n = found.get("n")
    note = f"n = {plain(n)}" if done is not None and n is not None and n != done else ""
    return Cell(number(mean, digits), repr(found["mean"]), interval, note, best)


def best_method(methods: Sequence[Method], figure: dict[str, Any]) -> int | None:
    """The index of the best method, if its interval overlaps no other method's; else ``None``.

    A method without an interval cannot be told apart from the others, so nothing is marked then.
    """
    sign = {"higher": 1, "lower": -1}.get(plain(figure.get("better")), 0)
    found = [(i, _figure(m, _key(figure))) for i, m in enumerate(methods)]
    bounds = [
        (finite(f.get("mean")), i, finite(f.get("low")), finite(f.get("high")))
        for i, f in found
        if finite(f.get("mean")) is not None
    ]
    if not sign or len(bounds) < 2 or any(low is None or high is None for _, _, low, high in bounds):
        return None
    _, top, low, high = max(bounds, key=lambda b: sign * (b[0] or 0.0))
    apart = [o_low > high or o_high < low for _, i, o_low, o_high in bounds if i != top]  # type: ignore[operator]
    return top if all(apart) else None


def _runs(methods: Sequence[Method], slots: dict[str, int], seeds: Any) -> dict[str, Any]:
    """Every run by method and seed: how long it took, or why it failed."""
    asked = list(seeds) if isinstance(seeds, list) else []
    asked += [s for m in methods for c in records(m.get("cells")) if (s := c.get("seed")) not in asked]
    unique = list(dict.fromkeys(asked))
    rows = []
    failed = 0
    for method in methods:
        by_seed = {c.get("seed"): c for c in records(method.get("cells"))}
        cells = [by_seed.get(seed, {}) for seed in unique]
        failed += sum(c.get("status") == "failed" for c in cells)
        rows.append({"method": _entry(method, slots), "cells": [_run(c) for c in cells]})
    return {"seeds": [plain(s) for s in unique], "rows": rows, "failed": failed}


def _run(cell: dict[str, Any]) -> dict[str, str]:
    seconds = finite(cell.get("seconds"))
    took = "" if seconds is None else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    status = plain(cell["status"]) if cell.get("status") else "not run"
    return {"status": status, "took": took, "error": plain(cell["error"]) if cell.get("error") else ""}


def _per_seed(methods: Sequence[Method], figures: Sequence[dict[str, Any]]) -> list[Any]:
    """(method, values of each figure as text), for readers who want more than means."""
    rows = []
    for method in methods:
        lists = [_figure(method, _key(f)).get("per_seed") for f in figures]
        texts = [
            ", ".join("–" if finite(v) is None else number(v, None) for v in values)
            if isinstance(values, list)
            else ""
            for values in lists
        ]
        rows.append((_label(method), [t or "–" for t in texts]))
    return rows


def _curves(methods: Sequence[Method], slots: dict[str, int], names: Iterator[str]) -> dict[str, Any]:
    """The panels that matter, and in ``more`` every other reading."""
    panels, more = Panels(names), Panels(names)
    read: set[str] = set()

    def curve(method: Method, key: str, label: str, slot: int) -> Line:
        rows = records(mapping(method.get("curves")).get(key))
        return points(rows, label, slot, "mean", "low", "high")

    def add(to: Panels, key: str, title: str, unit: str) -> None:
        read.add(key)
        to.add(title, unit, [curve(m, key, _label(m), slots[_name(m)]) for m in methods], legend=False)

    recorded = sorted({k for m in methods for k in mapping(m.get("curves"))})
    kinds = [k for k in recorded if k.startswith("delta_logp/")]
    for key, title, unit in CURVES[:3]:
        add(panels, key, title, unit)
    for key in sorted(kinds, key=lambda k: (k != "delta_logp/chosen", k)):
        add(panels, key, f"Δ log p: {key.removeprefix('delta_logp/')}", "nats per token, since the start")
    weights = [k for k in recorded if k.startswith("cooling/weight/")]
    read.update(weights)
    for method in methods:
        lines = [curve(method, k, k.removeprefix("cooling/weight/"), i) for i, k in enumerate(weights)]
        if any(len(line.x) for line in lines):
            panels.add(f"Cooling weight by kind of negative: {_label(method)}", "0 to 1", lines, whole=True)
    for key, title, unit in CURVES[3:]:
        add(panels, key, title, unit)
    for key in recorded:
        if key not in read:
            add(more, key, key, "")
    return {"panels": panels.found, "absent": panels.absent, "more": more.found}


def _reliability(methods: Sequence[Method], slots: dict[str, int], names: Iterator[str]) -> list[Panel]:
    lines, gaps, legend = [], [], []
    for method in methods:
        bins = [
            (c, a, finite(r.get("n")) or 0.0)
            for r in records(method.get("reliability"))
            if (c := finite(r.get("confidence"))) is not None and (a := finite(r.get("accuracy"))) is not None
        ]
        if not bins:
            continue
        slot = slots[_name(method)]
        total = sum(n for _, _, n in bins)
        ece = finite(_figure(method, "ece").get("mean"))
        if ece is None and total:
            ece = sum(n * abs(a - c) for c, a, n in bins) / total
        confidence = [c for c, _, _ in bins]
        lines.append(Line(_label(method), slot, confidence, [a for _, a, _ in bins]))
        gaps.append(Line(_label(method), slot, confidence, [a - c for c, a, _ in bins]))
        legend.append(Legend(_label(method), slot, f"ECE {number(ece)}, n = {total:.0f} tokens"))
    if not lines:
        return []
    entries = tuple(legend)
    return [
        Panel("Reliability", "share of top tokens that were correct",
              Markup(reliability_chart(next(names), lines, gap=False)), entries),
        Panel("Gap", "share correct minus confidence: below 0 the model is too sure",
              Markup(reliability_chart(next(names), gaps, gap=True)), entries),
    ]  # fmt: skip


def _slopes(
    methods: Sequence[Method], hot: Sequence[Method], figures: Sequence[dict[str, Any]],
    slots: dict[str, int], names: Iterator[str],
) -> list[Panel]:  # fmt: skip
    """Per figure, each method from its swept learning rate to the hot one; failed ends are left out."""
    hot_of = {_name(m): m for m in hot}
    panels = []
    for figure in figures:
        lines = []
        for method in methods:
            ends = [_figure(m, _key(figure)) for m in (method, hot_of.get(_name(method), {}))]
            y = [v for e in ends if (v := finite(e.get("mean"))) is not None]
            low = [v for e in ends if (v := finite(e.get("low"))) is not None]
            high = [v for e in ends if (v := finite(e.get("high"))) is not None]
            if len(y) == 2:
                band = len(low) == len(high) == 2
                lines.append(
                    Line(
                        _label(method),
                        slots[_name(method)],
                        (0, 1),
                        y,
                        low if band else (),
                        high if band else (),
                    )
                )
        if lines and _key(figure) in SLOPES:
            svg = Markup(slope_chart(next(names), lines, ("swept", "too hot")))
            better = {"higher": "higher is better", "lower": "lower is better"}.get(
                plain(figure.get("better")), ""
            )
            panels.append(Panel(plain(figure.get("label") or _key(figure)), better, svg))
    return panels


def _gallery(
    folder: Folder, rows: Sequence[dict[str, Any]], methods: Sequence[Method], slots: dict[str, int]
) -> list[Any]:
    slot_of = {_label(m): slots[_name(m)] for m in methods}
    shown = []
    for row in rows:
        image = row.get("image")
        captions = [
            {
                "method": plain(c.get("method")),
                "entry": Legend(plain(c.get("method")), slot_of[plain(c.get("method"))])
                if plain(c.get("method")) in slot_of
                else None,
                "text": plain(c.get("text")),
                "right": c.get("all_correct") is True,
                "mark": mark(c),
            }
            for c in records(row.get("captions"))
        ]
        picture = picture_uri(image, folder.path) if isinstance(image, str) else None
        shown.append({"picture": picture, "truth": plain(row.get("truth")), "captions": captions})
    return shown


def mark(caption: dict[str, Any]) -> str:
    """The judge's verdict in words.

    >>> mark({"all_correct": False, "wrong": 1, "hallucinated": 0, "omitted": 2, "ill_formed": False})
    '1 wrong, 2 omitted'
    """
    if caption.get("all_correct") is True:
        return "all correct"
    if caption.get("ill_formed") is True:
        return "ill-formed"
    kinds = ("wrong", "hallucinated", "omitted")
    parts = [f"{plain(caption[kind])} {kind}" for kind in kinds if caption.get(kind)]
    return ", ".join(parts) or "not judged"


def _settings(methods: Sequence[Method], slots: dict[str, int]) -> dict[str, Any]:
    names = list(dict.fromkeys(k for m in methods for k in mapping(m.get("settings"))))
    rows = [
        {"method": _entry(m, slots), "cells": [plain(mapping(m.get("settings")).get(k)) for k in names]}
        for m in methods
    ]
    return {"names": names, "rows": rows}
