"""A study's table in markdown and CSV. What differs from run to run (times, paths) stays out of both."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from cwdpo.lab.table import name_of, number

COLUMNS = (
    "variant", "label", "figure", "better", "n", "failed", "mean", "low", "high",
    "against", "difference", "difference_low", "difference_high", "p", "p_corrected", "verdict",
)  # fmt: skip


def markdown(summary: Mapping[str, Any]) -> str:
    """Means with half of their 95% interval, paired differences, and a panel of scores where variants have places."""
    figures, rows = summary["figures"], summary["variants"]
    labels = [_arrow(f) for f in figures]
    named = {r["name"]: r["label"] for r in rows}
    compared_rows = [r for r in rows if r["rival"]]
    lines = [f"## {summary['title']}", ""]
    if summary["question"]:
        lines += [summary["question"], ""]
    n = len(summary["seeds"])
    lines += [f"Mean over {n} seeds ± half of the 95% interval (win rate: by prompt).", ""]
    lines += _head(["variant", *labels])
    for row in rows:
        cells = [number(row["figures"][f["key"]], f["digits"]) for f in figures]
        lines.append(_line([name_of(row), *cells]))
    lines += [
        "",
        f"Difference to {named[summary['full']]} or to what is named, paired by seed, with its 95% interval and the "
        f"p-value corrected (Holm) for {len(compared_rows)} comparisons; * marks p < 0.05.",
        "",
    ]
    compared = [f for f in figures if f["key"] != "win_rate"]
    lines += _head(["variant", *(_arrow(f) for f in compared)])
    for row in compared_rows:
        other = "" if row["rival"] == summary["full"] else f" minus {named[row['rival']]}"
        cells = [_difference(row["against"][f["key"]], f) for f in compared]
        lines.append(_line([row["label"] + other, *cells]))
    if summary["panel"]:
        lines += [
            "",
            "Score, mean ± half of the 95% interval:",
            "",
            *_head(["", *summary["panel"]["columns"]]),
        ]
        for row in summary["panel"]["rows"]:
            lines.append(_line([row["label"], *("-" if v is None else number(v, 3) for v in row["values"])]))
    failed = [c for row in rows for c in row["cells"] if c["status"] == "failed"]
    if failed:
        lines += ["", f"**{len(failed)} cells failed:**", ""]
        lines += [
            f"- {row['label']}, seed {c['seed']}: {str(c['error']).splitlines()[0]}"
            for row in rows
            for c in row["cells"]
            if c["status"] == "failed"
        ]
    return "\n".join(lines) + "\n"


def to_csv(summary: Mapping[str, Any]) -> str:
    """One line per variant and figure, in full precision; an empty field is a missing value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in summary["variants"]:
        failed = sum(c["status"] == "failed" for c in row["cells"])
        for figure in summary["figures"]:
            value, against = row["figures"][figure["key"]], row["against"].get(figure["key"], {})
            writer.writerow(
                {
                    "variant": row["name"], "label": row["label"], "figure": figure["key"], "better": figure["better"],
                    "n": value["n"], "failed": failed, **{k: value[k] for k in ("mean", "low", "high")},
                    "against": row["rival"],
                    "difference": against.get("mean"), "difference_low": against.get("low"),
                    "difference_high": against.get("high"), "p": against.get("p"),
                    "p_corrected": against.get("p_corrected"), "verdict": against.get("word"),
                }
            )  # fmt: skip
    return text.getvalue()


def _arrow(figure: Mapping[str, Any]) -> str:
    return str(figure["label"]) + {"higher": " ↑", "lower": " ↓"}.get(figure["better"], "")


def _difference(against: Mapping[str, Any], figure: Mapping[str, Any]) -> str:
    if against["mean"] is None:
        return "-"
    digits = figure["digits"]
    text = f"{against['mean']:+.{digits}f}"
    if against["low"] is not None:
        text += f" [{against['low']:+.{digits}f}, {against['high']:+.{digits}f}]"
    p = against["p_corrected"]
    return text if p is None else f"{text} p={p:.3f}" + ("\\*" if p < 0.05 else "")


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
