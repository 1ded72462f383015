"""Parts of all pages: a tolerant reader of a folder, legends, panels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cwdpo.errors import FileError
from cwdpo.files.reading import parse_json, read_bytes, read_jsonl
from cwdpo.files.yamlfile import parse_yaml
from cwdpo.report._text import finite
from cwdpo.report.figures import Line, colour, dash, line_chart


class Folder:
    """Reads the files of a run. A missing file is empty; an unreadable file is empty and listed in ``troubles``.

    A report is often the last step of a long run, so one bad file must not make it fail.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.troubles: list[str] = []

    def text(self, name: str) -> str:
        """The text of a file."""
        path = self.path / name
        try:
            return read_bytes(path).decode(errors="replace") if path.is_file() else ""
        except FileError as error:
            self._note(name, error)
            return ""

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file."""
        text = self.text(name)
        try:
            return mapping(parse_json(text, name)) if text.strip() else {}
        except FileError as error:
            self._note(name, error)
            return {}

    def yaml(self, name: str) -> dict[str, Any]:
        """The YAML mapping in a file."""
        try:
            return mapping(parse_yaml(self.text(name), name))
        except FileError as error:
            self._note(name, error)
            return {}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSONL file."""
        try:
            return read_jsonl(self.path / name)
        except FileError as error:
            self._note(name, error)
            return []

    def _note(self, name: str, error: FileError) -> None:
        self.troubles.append(f"{name} could not be read ({error}); its content is missing below.")


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list; empty if the value is not a list."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


@dataclass(frozen=True)
class Legend:
    """An entry of a legend: a line as in the chart, a name and a note."""

    label: str
    slot: int
    note: str = ""

    @property
    def colour(self) -> str:
        """CSS colour."""
        return colour(self.slot)

    @property
    def dash(self) -> str:
        """SVG dash pattern."""
        return dash(self.slot)


@dataclass(frozen=True)
class Panel:
    """One chart with its title, unit and legend (empty if several charts share a legend)."""

    title: str
    unit: str
    svg: Markup
    legend: tuple[Legend, ...] = ()


@dataclass
class Panels:
    """Collects the panels of a section, and the titles of those that have no data."""

    keys: Iterator[str]
    found: list[Panel] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def add(
        self,
        title: str,
        unit: str,
        lines: Sequence[Line],
        *,
        legend: bool = True,
        whole: bool = False,
        limit: float | None = None,
    ) -> None:
        """Add a chart of lines over steps; lines without a point are left out.

        Args:
            title, unit: shown above the chart.
            lines: the lines.
            legend: whether the panel has its own legend.
            whole: whether the axis goes from 0 to 1.
            limit: a value to mark with a horizontal line.
        """
        drawn = [line for line in lines if len(line.x)]
        if not drawn:
            self.absent.append(title)
            return
        entries = tuple(Legend(line.label, line.slot) for line in drawn) if legend else ()
        self.found.append(
            Panel(title, unit, Markup(line_chart(next(self.keys), drawn, whole=whole, limit=limit)), entries)
        )


def keys() -> Iterator[str]:
    """Names for the charts of one page."""
    number = 0
    while True:
        number += 1
        yield f"chart{number}"


def points(
    rows: Sequence[Mapping[str, Any]], label: str, slot: int, y: str, low: str = "", high: str = ""
) -> Line:
    """A line over ``step`` from rows; rows without a finite value are left out.

    Args:
        rows: each with ``step`` and the named keys.
        label, slot: of the line.
        y, low, high: keys; there is a band only if all rows have ``low`` and ``high``.
    """
    kept = [(float(r["step"]), finite(r.get(y)), r) for r in rows if finite(r.get("step")) is not None]
    full = sorted(((x, v, r) for x, v, r in kept if v is not None), key=lambda point: point[0])
    lows = [v for _, _, r in full if (v := finite(r.get(low))) is not None]
    highs = [v for _, _, r in full if (v := finite(r.get(high))) is not None]
    band = len(lows) == len(highs) == len(full)
    return Line(
        label, slot, [x for x, _, _ in full], [v for _, v, _ in full],
        lows if band else (), highs if band else (),
    )  # fmt: skip
