"""Results of studies that are kept with a project's pages: small files of figures per seed, and tables made from them.

A page names its tables in comments::

    <!-- table is_it_cooling differences score judge_score -->
    (the table)
    <!-- end -->

The second word is the study, the third the kind of the table (see :class:`cwdpo.lab.tables.Table`), the rest are the
figures to show; without any, all of them.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from cwdpo.errors import RunDirError, nearest
from cwdpo.files.reading import read_text
from cwdpo.files.writing import write_text
from cwdpo.lab.tables import tables, to_markdown
from cwdpo.report.summary import FILE, Summary, read_summary

_TABLE = re.compile(r"(<!-- table (?P<words>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def publish(study: Path, folder: Path) -> list[Path]:
    """Copy what a study found into ``folder/<study>/``: ``summary.json`` and ``table.csv``.

    Curves, reliability and captions are left out. What a sweep chose is in the overrides of the summary.

    Raises:
        RunDirError: the study's folder has no summary.
    """
    summary = read_summary(study)
    out = folder / summary.provenance["study"]
    rows = tuple(replace(row, curves={}, reliability=()) for row in summary.variants)
    replace(summary, variants=rows, gallery=(), shown=()).write(out)
    shutil.copyfile(study / "table.csv", out / "table.csv")
    return [out / FILE, out / "table.csv"]


def filled(text: str, page: Path, folder: Path) -> str:
    """A page's text with each of its tables made anew from the published summaries.

    Raises:
        RunDirError: a comment names a study, a kind of table or a figure that does not exist.
    """

    def made(found: re.Match[str]) -> str:
        start, words, end = found.group(1), found["words"].split(), found.group(3)
        try:
            return f"{start}{_table(folder, words)}\n{end}"
        except RunDirError as error:
            raise RunDirError(f"{page}: <!-- table {' '.join(words)} -->: {error}") from None

    return _TABLE.sub(made, text)


def fill(page: Path, folder: Path) -> bool:
    """Write the tables of a page anew; whether the page changed.

    Raises:
        FileError: the page cannot be read, or see :func:`filled`.
    """
    before = read_text(page)
    after = filled(before, page, folder)
    if after != before:
        write_text(page, after)
    return after != before


def _table(folder: Path, words: list[str]) -> str:
    if len(words) < 2:
        raise RunDirError("a table is named by its study and its kind, then figures")
    study, kind, *keys = words
    known = sorted(path.parent.name for path in folder.glob(f"*/{FILE}"))
    if study not in known:
        raise RunDirError(f"no study {study!r}{nearest(study, known)} in {folder}; known: {', '.join(known)}")
    summary = _of_figures(read_summary(folder / study), keys)
    made = {table.kind: table for table in tables(summary)}
    if kind not in made:
        raise RunDirError(f"no table {kind!r}{nearest(kind, made)}; this study has: {', '.join(made)}")
    return to_markdown(made[kind])


def _of_figures(summary: Summary, keys: list[str]) -> Summary:
    """The summary with these figures, in this order."""
    if not keys:
        return summary
    named = {figure.key: figure for figure in summary.figures}
    for key in keys:
        if key not in named:
            raise RunDirError(f"no figure {key!r}{nearest(key, named)}; known: {', '.join(named)}")
    return replace(summary, figures=tuple(named[key] for key in keys))


def stale(pages: list[Path], folder: Path) -> list[Path]:
    """Pages whose tables are not those of the published summaries.

    Raises:
        FileError: see :func:`fill`.
    """
    texts = ((page, read_text(page)) for page in pages)
    return [page for page, text in texts if filled(text, page, folder) != text]
