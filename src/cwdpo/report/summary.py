"""The summary of a study: ``summary.json``, written by the laboratory, read by its page, its tables and the terminal.

Every number keeps its values per seed, so that variants can be compared on the same pictures. No torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cwdpo.errors import RunDirError
from cwdpo.files.reading import read_object
from cwdpo.files.writing import write_json

FILE = "summary.json"


@dataclass(frozen=True)
class Figure:
    """A column of the tables; ``main`` ones are printed in the terminal too, where there is little room."""

    key: str
    label: str
    better: Literal["higher", "lower", "none"]
    digits: int = 3
    help: str = ""
    main: bool = False

    @property
    def head(self) -> str:
        """The label with an arrow in the better direction."""
        return self.label + {"higher": " ↑", "lower": " ↓"}.get(self.better, "")


@dataclass(frozen=True)
class Mean:
    """Mean and 95% interval over ``n`` seeds (of a win rate: over prompts); ``None`` where there is nothing."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    per_seed: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A variant minus its rival, paired by seed: t interval, paired t test, and what the corrected p allows to say.

    ``two_way``: the interval over seeds and test pictures, for figures that are means over pictures.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    p_corrected: float | None
    word: str
    two_way: tuple[float, float] | None = None


@dataclass(frozen=True)
class CellState:
    """One seed of a variant: whether it ended, and its seconds of one process."""

    seed: int
    status: Literal["done", "failed"]
    error: str | None
    seconds: float

    @property
    def reason(self) -> str:
        """The first line of its error."""
        return str(self.error).partition("\n")[0]


@dataclass(frozen=True)
class Point:
    """A held-out reading, or the gradient norm, at one step: mean and interval over seeds."""

    step: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Bin:
    """A bar of a reliability diagram: ``n`` tokens, their mean confidence and the share that was correct."""

    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Row:
    """A variant. ``rival`` names the one it is compared with; the last two fields are kept of shown variants only."""

    name: str
    label: str
    overrides: tuple[str, ...]
    figures: dict[str, Mean]
    rival: str | None
    against: dict[str, Difference]
    calibration: dict[str, tuple[float, ...]]
    cells: tuple[CellState, ...]
    curves: dict[str, tuple[Point, ...]] = field(default_factory=dict)
    reliability: tuple[Bin, ...] = ()

    @property
    def failed(self) -> tuple[CellState, ...]:
        """Seeds without figures."""
        return tuple(c for c in self.cells if c.status == "failed")

    @property
    def named(self) -> str:
        """The label, with failed cells counted."""
        return self.label + (
            f" ({len(self.failed)} of {len(self.cells)} cells FAILED)" if self.failed else ""
        )


@dataclass(frozen=True)
class Panel:
    """Variants in rows and columns, by name; ``None`` where a method was not run at a setting.

    Where the columns are three numbers or more, ``slopes`` are the least-squares slopes of the score over them by row,
    fitted seed by seed, and ``slope_differences`` their differences to the row of the variant ``full``.
    """

    columns: tuple[str, ...]
    rows: dict[str, tuple[str | None, ...]]
    slopes: dict[str, Mean] = field(default_factory=dict)
    slope_differences: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Caption:
    """What one variant wrote of a picture, and the exact judge's marks."""

    label: str
    text: str
    all_correct: bool
    wrong: int
    hallucinated: int
    omitted: int
    ill_formed: bool


@dataclass(frozen=True)
class Picture:
    """A held-out picture (path relative to the summary's folder), its true caption and the variants' captions."""

    image: str
    truth: str
    captions: tuple[Caption, ...]


@dataclass(frozen=True)
class Summary:
    """A study.

    Attributes:
        full: the variant that others are compared with, unless they name another one.
        shared: cells that failed and that several variants needed, with their errors.
        base: figures of the starting model, where the study asks for them.
        shown: variants whose curves, reliability and captions are kept; their place gives their colour.
    """

    title: str
    question: str
    full: str
    seeds: tuple[int, ...]
    figures: tuple[Figure, ...]
    variants: tuple[Row, ...]
    panel: Panel | None
    shared: dict[str, str]
    base: dict[str, Mean]
    shown: tuple[str, ...]
    gallery: tuple[Picture, ...]
    provenance: dict[str, str]
    kind: Literal["study"] = "study"

    def row(self, name: str) -> Row:
        """A variant by its name."""
        return next(v for v in self.variants if v.name == name)

    def minus(self, row: Row) -> str:
        """Whom a variant is compared with, where that is not the full one: ``minus ...``, or nothing."""
        return "" if row.rival in (None, self.full) else f"minus {self.row(str(row.rival)).label}"

    @property
    def failures(self) -> list[str]:
        """A line for each failed cell."""
        cells = [f"{v.label}, seed {c.seed}: {c.reason}" for v in self.variants for c in v.failed]
        return cells + [f"{key}: {error.partition(chr(10))[0]}" for key, error in self.shared.items()]

    @property
    def compared(self) -> tuple[Row, ...]:
        """Variants with a rival: as many comparisons are made of every figure."""
        return tuple(v for v in self.variants if v.rival)

    @property
    def differing(self) -> tuple[Figure, ...]:
        """Figures that are compared; a win rate is a comparison already."""
        return tuple(f for f in self.figures if f.key != "win_rate")

    def write(self, folder: Path) -> None:
        """Write ``folder/summary.json``."""
        write_json(folder / FILE, asdict(self))


def read_summary(folder: Path) -> Summary:
    """The summary of a study's folder.

    Raises:
        RunDirError: the file is not such a summary; the key is named.
    """
    try:
        return TypeAdapter(Summary).validate_python(read_object(folder / FILE))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RunDirError(
            f"{folder / FILE}: {key}: {first['msg']}; another version wrote it: run the same command (cwdpo ablate or "
            "cwdpo demo) again, finished cells are used again"
        ) from None
