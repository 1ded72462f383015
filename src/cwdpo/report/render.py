"""A run folder -> one self-contained HTML file: no script, no network, every text escaped. No torch.

Several kinds of folder are read. A single run is described in :mod:`cwdpo.rundir`. A demo is a folder whose
``summary.json`` has this shape; whatever is missing is said to be missing::

    {"kind": "demo", "title": str, "note": [paragraph, ...], "seeds": [0, 1, 2],
     "figures": [{"key": "sampled_correct", "label": str, "better": "higher" | "lower" | "none",
                  "digits": 3, "help": str}, ...],
     "methods": [{"name": "cw_dpo", "label": "CW-DPO", "settings": {"learning_rate": ..., ...},
        "figures": {key: {"mean": float | null, "low": float | null, "high": float | null,
                          "n": int, "per_seed": [float | null, ...]}},
        "cells": [{"seed": 0, "status": "done" | "failed", "error": str | null, "seconds": float}],
        "curves": {reading: [{"step": int, "mean": float, "low": float, "high": float}]},
        "reliability": [{"confidence": float, "accuracy": float, "n": int}]}],
     "hot": {"factor": 4, "methods": [same shape]},
     "base": {"figures": {...}},
     "gallery": [{"image": path relative to the folder, "truth": str, "captions": [
        {"method": label, "text": str, "all_correct": bool, "wrong": int, "hallucinated": int,
         "omitted": int, "ill_formed": bool}]}],
     "provenance": {any key: text}}

Two more kinds are tables with intervals, see :mod:`cwdpo.report._tables`: a study (``"kind": "study"``, written by
``cwdpo ablate``) and a comparison of runs (``"kind": "comparison"``, by ``cwdpo compare``).

``figures["ece"]`` of a method, where present, is the ECE beside its reliability curve; else the ECE of the
pooled bins is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cwdpo.errors import RunDirError
from cwdpo.report._demo import demo_page
from cwdpo.report._page import Folder
from cwdpo.report._run import run_page
from cwdpo.report._tables import comparison_page, study_page
from cwdpo.report._text import MISSING, shortened, visible
from cwdpo.rundir import write_text

_HERE = Path(__file__).parent


def write_report(folder: str | Path) -> Path:
    """Write ``<folder>/report.html`` for a run or a demo.

    Returns:
        The path of the page.

    Raises:
        RunDirError: there is no such folder.
    """
    out = Path(folder) / "report.html"
    write_text(out, render_report(folder))
    return out


def render_report(folder: str | Path, *, refresh: int | None = None) -> str:
    """The page as text.

    Args:
        refresh: seconds after which the page loads itself again; ``None`` for a page that stays.

    Raises:
        RunDirError: there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RunDirError(f"{path}: no such folder; give the folder of a run, e.g. runs/<name>")
    source = Folder(path)
    summary = source.json("summary.json")
    if summary.get("kind") == "demo":
        template, values = "demo.html.jinja", demo_page(source, summary)
    elif summary.get("kind") in ("study", "comparison"):
        tables = study_page if summary["kind"] == "study" else comparison_page
        template, values = "tables.html.jinja", tables(source, summary)
    else:
        template, values = "run.html.jinja", run_page(source)
    troubles = list(dict.fromkeys(source.troubles))
    page = _environment().get_template(template)
    return page.render(**values, troubles=troubles, missing=MISSING, refresh=refresh)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    environment.filters["short"] = shortened
    return environment


def _shown(value: Any) -> Any:
    """Applied by jinja to every printed value, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
