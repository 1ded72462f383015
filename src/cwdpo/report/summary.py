"""The summary of a study: ``summary.json``, written by the laboratory, used for its page, tables and the terminal.

Every number keeps its values per seed, so that variants can be compared on the same images. Does not import torch.
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
    """A column of the tables; only ``main`` figures are printed in the terminal, where space is limited."""

    key: str
    label: str
    better: Literal["higher", "lower", "none"]
    digits: int = 3
    help: str = ""
    main: bool = False

    @property
    def head(self) -> str:
        """The label with an arrow that shows the better direction."""
        return self.label + {"higher": " ↑", "lower": " ↓"}.get(self.better, "")


@dataclass(frozen=True)
class Mean:
    """Mean and 95% interval over ``n`` seeds (of a win rate: over prompts); ``None`` if there are no values."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    per_seed: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A variant minus its rival, paired by seed: t interval, paired t test, and ``word``, the conclusion.

    ``two_way``: the interval over seeds and test images, for figures that are means over images.
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
    """One seed of a variant: whether it is done or waits (on the page of a study that runs), and its seconds."""

    seed: int
    status: Literal["done", "failed", "waiting"]
    error: str | None
    seconds: float

    @property
    def reason(self) -> str:
        """The first line of the error."""
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
    """A bin of a reliability diagram: ``n`` tokens, their mean confidence and the share of correct ones."""

    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Row:
    """A variant. ``rival``: the variant it is compared with. Only shown variants have the last two fields."""

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
        """The seeds without figures."""
        return tuple(c for c in self.cells if c.status == "failed")

    @property
    def named(self) -> str:
        """The label, with the number of failed cells."""
        return self.label + (
            f" ({len(self.failed)} of {len(self.cells)} cells FAILED)" if self.failed else ""
        )


@dataclass(frozen=True)
class Panel:
    """The names of variants in rows and columns; ``None`` for a place without a variant.

    If the columns are at least three numbers, ``slopes`` are each row's least-squares slopes of the score over the
    columns, fitted for each seed, and ``slope_differences`` their differences to the row of the variant ``full``.
    """

    columns: tuple[str, ...]
    rows: dict[str, tuple[str | None, ...]]
    slopes: dict[str, Mean] = field(default_factory=dict)
    slope_differences: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Caption:
    """The caption of an image by one variant, and the world judge's result; for other data there is none.

    ``parts``: the text in pieces; ``True`` marks those in which it differs from the true caption that is most like it.
    ``name``: the variant; empty for the starting model.
    """

    label: str
    text: str
    all_correct: bool | None = None
    wrong: int = 0
    hallucinated: int = 0
    omitted: int = 0
    ill_formed: bool = False
    parts: tuple[tuple[str, bool], ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Picture:
    """A held-out image (path relative to the summary's folder), its true caption and the variants' captions."""

    image: str
    truth: str
    captions: tuple[Caption, ...]


@dataclass(frozen=True)
class Summary:
    """A study.

    Attributes:
        full: the variant that others are compared with, unless they name another one.
        shared: failed cells that several variants need, with their errors.
        base: figures of the starting model, if the study measures it.
        shown: variants with curves and reliability diagrams; the position decides the colour.
        head: keys of the figures that the top of the page compares; none: those that a sweep chooses by.
        pictures: how the images and captions of ``gallery`` were chosen.
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
    head: tuple[str, ...] = ()
    pictures: str = ""
    kind: Literal["study"] = "study"

    def row(self, name: str) -> Row:
        """A variant by its name."""
        return next(v for v in self.variants if v.name == name)

    def minus(self, row: Row) -> str:
        """``minus ...`` with the variant that a variant is compared with; empty if that is the full one."""
        return "" if row.rival in (None, self.full) else f"minus {self.row(str(row.rival)).label}"

    @property
    def failures(self) -> list[str]:
        """One line per failed cell."""
        cells = [f"{v.label}, seed {c.seed}: {c.reason}" for v in self.variants for c in v.failed]
        return cells + [f"{key}: {error.partition(chr(10))[0]}" for key, error in self.shared.items()]

    @property
    def compared(self) -> tuple[Row, ...]:
        """The variants with a rival; their number is the number of comparisons of a figure."""
        return tuple(v for v in self.variants if v.rival)

    @property
    def differing(self) -> tuple[Figure, ...]:
        """The figures that are compared; a win rate is already a comparison."""
        return tuple(f for f in self.figures if f.key != "win_rate")

    def write(self, folder: Path) -> None:
        """Write ``folder/summary.json``."""
        write_json(folder / FILE, asdict(self))


def read_summary(folder: Path) -> Summary:
    """Read the summary of a study.

    Raises:
        RunDirError: the file is not a summary of this version; the message names the key.
    """
    try:
        return TypeAdapter(Summary).validate_python(read_object(folder / FILE))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RunDirError(
            f"{folder / FILE}: {key}: {first['msg']}; another version wrote it: run the same command (cwdpo ablate or "
            "cwdpo demo) again, finished cells are reused"
        ) from None
