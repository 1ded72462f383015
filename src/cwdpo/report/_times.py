"""Where the time of a run went, for its page."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from cwdpo.report._page import Folder, mapping
from cwdpo.report._text import finite, number, plain

_COLUMNS = {"start": "before", "stage1": "stage 1", "stage2": "stage 2", "end": "after"}


def times(folder: Folder) -> dict[str, Any]:
    """A table of seconds: parts by stage, the largest first, with their share of the run. Empty if none is recorded.

    A run that was resumed has the time of all its starts, also that of steps which were done again.
    """
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in folder.rows("timings.jsonl"):
        column = _COLUMNS.get(plain(row.get("stage")))
        for name, value in mapping(row.get("parts")).items():
            seconds = finite(value)
            if column is not None and seconds is not None:
                spent[plain(name)][column] += seconds
    columns = [c for c in _COLUMNS.values() if any(c in by for by in spent.values())]
    total = sum(sum(by.values()) for by in spent.values())
    if not total:
        return {}
    largest = sorted(spent, key=lambda name: -sum(spent[name].values()))
    return {
        "columns": columns,
        "rows": [
            {
                "name": name,
                "cells": [number(spent[name][c], 1) if c in spent[name] else "" for c in columns],
                "share": f"{100 * sum(spent[name].values()) / total:.1f}%",
            }
            for name in largest
        ],
        "total": number(total, 1),
    }
