"""The demo's table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = (
    "sampled_correct", "greedy_correct", "ill_formed", "judge_score", "win_rate", "ece", "kl",
    "delta_logp/chosen", "grad_norm_cv", "steps_to_95",
)  # fmt: skip


def print_tables(summary: Mapping[str, Any]) -> None:
    """Print the comparison, and every method again at the too-hot learning rate."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    factor = summary["hot"]["factor"]
    parts = (
        ("every method at its own swept settings", summary["methods"]),
        (f"the same at {factor} times the learning rate", summary["hot"]["methods"]),
    )
    labels = {f["key"]: (f["label"], f["digits"]) for f in summary["figures"]}
    for title, methods in parts:
        table = Table(title=title)
        table.add_column("method")
        for key in SHOWN:
            table.add_column(labels[key][0], justify="right")
        for m in methods:
            table.add_row(name_of(m), *(number(m["figures"][key], labels[key][1]) for key in SHOWN))
        console.print(table)
    for line in summary["note"]:
        console.print(line, markup=False)
    if "probes" in summary.get("provenance", {}):
        console.print(f"Held-out probes took {summary['provenance']['probes']}.", markup=False)
    verdicts = (
        ("swept", summary["verdicts"]),
        (f"{factor} times the learning rate", summary["hot"]["verdicts"]),
    )
    for title, rows in verdicts:
        if rows:
            table = Table(title=f"CW-DPO, {title}: ours minus theirs, paired by seed, with 95% interval")
            for name in ("figure", *(a["rival"] for a in rows[0]["against"])):
                table.add_column(name)
            for row in rows:
                table.add_row(row["label"], *(said_of(a) for a in row["against"]))
            console.print(table)


def name_of(method: Mapping[str, Any]) -> str:
    """The label, with failed cells counted."""
    failed = sum(cell["status"] == "failed" for cell in method["cells"])
    return str(method["label"]) + (f" ({failed} of {len(method['cells'])} cells FAILED)" if failed else "")


def number(figure: Mapping[str, Any], digits: int) -> str:
    """Mean and half-width of the interval."""
    if figure["mean"] is None:
        return "-"
    if figure["low"] is None:
        return f"{figure['mean']:.{digits}f}"
    return f"{figure['mean']:.{digits}f} ±{(figure['high'] - figure['low']) / 2:.{digits}f}"


def said_of(against: Mapping[str, Any]) -> str:
    """A verdict with its paired difference and interval."""
    if against["low"] is None:
        return str(against["word"])
    low, mean, high = (f"{against[k]:+.3f}" for k in ("low", "mean", "high"))
    return f"{against['word']}: {mean} \\[{low}, {high}]"


def markdown(summary: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> str:
    """The same table in markdown, for the README."""
    labels = {f["key"]: (f["label"], f["digits"]) for f in summary["figures"]}
    lines = ["| method | " + " | ".join(labels[k][0] for k in SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for m in methods:
        cells = (number(m["figures"][k], labels[k][1]) for k in SHOWN)
        lines.append(f"| {name_of(m)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
