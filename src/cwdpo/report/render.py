"""Renders a run folder as one HTML file, without scripts or network access; all text is escaped.

There are three kinds of folders: a single run (:mod:`cwdpo.rundir`), a study (:mod:`cwdpo.report.summary`, written by
``cwdpo ablate`` and ``cwdpo demo``), and a comparison of runs (:mod:`cwdpo.report._comparison`, written by
``cwdpo compare``). Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cwdpo.errors import RunDirError
from cwdpo.files.writing import write_text
from cwdpo.report._comparison import comparison_page
from cwdpo.report._page import Folder
from cwdpo.report._run import run_page
from cwdpo.report._study import study_page
from cwdpo.report._text import MISSING, shortened, visible
from cwdpo.report.summary import Summary, read_summary

_HERE = Path(__file__).parent


def write_report(folder: str | Path) -> Path:
    """Write ``<folder>/report.html`` for a run, a study or a comparison.

    Returns:
        The path of the page.

    Raises:
        RunDirError: there is no such folder, or another version wrote the summary of the study.
    """
    out = Path(folder) / "report.html"
    write_text(out, render_report(folder))
    return out


def render_report(folder: str | Path, *, refresh: int | None = None) -> str:
    """The page as text.

    Args:
        folder: the folder to render.
        refresh: seconds after which the page reloads itself; ``None``: never.

    Raises:
        RunDirError: there is no such folder, or another version wrote the summary of the study.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RunDirError(f"{path}: no such folder; name the folder of a run, e.g. runs/<name>")
    source = Folder(path)
    summary = source.json("summary.json")
    template = "tables.html.jinja"
    if summary.get("kind") in (
        "study",
        "demo",
    ):  # for "demo", of an older version, read_summary says what to do
        values = vars(study_page(source, read_summary(path)))
    elif summary.get("kind") == "comparison":
        values = vars(comparison_page(source, summary))
    else:
        template, values = "run.html.jinja", run_page(source)
    return _rendered(template, values, source, refresh)


def write_running(folder: Path, summary: Summary, status: str, refresh: int) -> None:
    """Write the page of a study that runs.

    Args:
        folder: of the study.
        summary: what is known so far.
        status: how far it is, as a text.
        refresh: seconds after which the page reloads itself.
    """
    source = Folder(folder)
    values = vars(study_page(source, summary, status))
    write_text(folder / "report.html", _rendered("tables.html.jinja", values, source, refresh))


def _rendered(template: str, values: Mapping[str, Any], source: Folder, refresh: int | None) -> str:
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
    """jinja calls this for every printed value, before it escapes the value."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
