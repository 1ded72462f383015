"""The page of a study: its tables, and curves, reliability diagrams and captions of some variants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from cwdpo.report._answers import head_table, study_levels
from cwdpo.report._page import Folder, Legend, Panel, Panels, keys
from cwdpo.report._tables import Charts, Entry, Page, Table, difference_entry, mean_entry
from cwdpo.report._text import number, picture_uri, plain
from cwdpo.report.figures import Line, reliability_chart, slope_chart
from cwdpo.report.summary import Bin, Caption, CellState, Figure, Mean, Point, Row, Summary
from cwdpo.report.summary import Panel as Places

CURVES = (
    ("chosen_shift", "Chosen shift", "nats per completion"),
    ("rejected_shift", "Rejected shift", "nats per completion"),
    ("margin", "Margin", "nats per completion"),
    ("entropy", "Entropy", "nats per token"),
    ("grad_norm", "Gradient norm", "training, before clipping"),
)
DELTA, WEIGHT = "delta_logp/", "cooling/weight/"
LOOK = 2
"""Number of images whose captions are at the top of the page."""
SLOPES = ("sampled_correct", "greedy_correct", "ill_formed")
"""Figures with a chart that connects the first and the second column of a panel."""


def study_page(folder: Folder, summary: Summary, status: str = "") -> Page:
    """The values for the template; with a status, of a study that runs: charts are drawn at its end."""
    names = keys()
    legend = [_entry(summary.row(name), place) for place, name in enumerate(summary.shown)]
    charts = [
        *_slopes(summary, names),
        *_curves(summary, legend, names),
        *_reliability(summary, legend, names),
    ] if not status else []  # fmt: skip
    cards = _gallery(folder, summary)
    n = len(summary.seeds)
    return Page(
        kind="study",
        title=summary.title,
        notes=[summary.question] if summary.question else [],
        status=status,
        levels=study_levels(summary),
        head=head_table(summary),
        against=f"against {summary.row(summary.full).label}, paired over {n} seed{'s' * (n != 1)}"
        + (f"; {n}/{n}: in every seed" if n > 1 else ""),
        look=cards[:LOOK],
        looked=summary.pictures,
        tables=_tables(summary),
        settings=[(v.label, _settings(v)) for v in summary.variants],
        provenance=summary.provenance,
        failures=summary.failures,
        charts=charts,
        gallery=cards[LOOK:],
    )


# --- tables ---------------------------------------------------------------------------------------------


def _tables(summary: Summary) -> list[Table]:
    heads = [(f.head.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓"), f.help) for f in summary.figures]
    differing = [head for head, f in zip(heads, summary.figures, strict=True) if f in summary.differing]
    base = [
        ("starting model", "before training", [_mean(summary.base.get(f.key), f) for f in summary.figures])
    ]
    means = [
        (v.label, _ran(v), [_mean(v.figures[f.key], f) for f in summary.figures]) for v in summary.variants
    ]
    tables = [
        Table(
            "means", "Means over seeds",
            "Mean with its 95% interval over seeds (a win rate: over prompts). ↑ higher is better, ↓ lower is better.",
            heads, [*(base if summary.base else ()), *means],
        ),
        Table(
            "differences", f"Difference to {summary.row(summary.full).label}",
            f"Variant minus full, or minus the named variant, paired by seed, with its 95% interval. p-values "
            f"(paired t test) are corrected (Holm) for the {len(summary.compared)} comparisons of a column; better or "
            "worse is stated only if the corrected p is below 0.05.",
            differing, [(v.label, summary.minus(v), _differences(summary, v)) for v in summary.compared],
        ),
        Table(
            "seeds", "Values of each seed", "In the order of the seeds; – means no value.", heads,
            [(v.label, "", [_per_seed(v.figures[f.key]) for f in summary.figures]) for v in summary.variants],
            folded=True,
        ),
        Table(
            "cells", "Runs", "Time in seconds, of one process.", [(f"seed {s}", "") for s in summary.seeds],
            [(v.label, "", [_cell(v, seed) for seed in summary.seeds]) for v in summary.variants], folded=True,
        ),
    ]  # fmt: skip
    if summary.panel:
        score = next((f for f in summary.figures if f.key == "score"), None)
        if score is not None:
            tables.insert(0, _scores(summary, summary.panel, score))
        if summary.panel.slopes:
            tables.insert(1, _slopes_of_scores(summary.panel))
    return tables


def _scores(summary: Summary, places: Places, score: Figure) -> Table:
    def entry(name: str | None) -> Entry:
        return Entry("–") if name is None else _mean(summary.row(name).figures.get("score"), score)

    rows = [(label, "", [entry(name) for name in names]) for label, names in places.rows.items()]
    return Table("panel", "Scores", score.help, [(column, "") for column in places.columns], rows)


def _slopes_of_scores(places: Places) -> Table:
    """The slope of each row's score over the columns, and its difference to the row of the full variant."""
    rows = []
    for label, slope in places.slopes.items():
        entries = [mean_entry(slope.mean, slope.low, slope.high, 3)]
        d = places.slope_differences.get(label)
        entries.append(
            Entry("–") if d is None else difference_entry(d.mean, d.low, d.high, d.p_corrected, d.word, 3)
        )
        rows.append((label, "", entries))
    reference = next(label for label in places.slopes if label not in places.slope_differences)
    note = "Least squares over the columns, fitted seed by seed, with 95% intervals over seeds."
    return Table("slopes-of-scores", "Slopes", note, [("slope", ""), (f"minus {reference}", "")], rows)


def _mean(value: Mean | None, figure: Figure) -> Entry:
    if value is None:
        return Entry("–")
    return mean_entry(value.mean, value.low, value.high, figure.digits)


def _differences(summary: Summary, variant: Row) -> list[Entry]:
    pairs = [(f, variant.against[f.key]) for f in summary.differing]
    return [difference_entry(d.mean, d.low, d.high, d.p_corrected, d.word, f.digits) for f, d in pairs]


def _per_seed(value: Mean) -> Entry:
    return Entry(", ".join("–" if v is None else number(v, None) for v in value.per_seed))


def _cell(variant: Row, seed: int) -> Entry:
    def shown(cell: CellState) -> Entry:
        if cell.status == "failed":
            return Entry("failed", (cell.reason,), "bad")
        if cell.status == "waiting":
            return Entry("…")
        return Entry("done", (f"{cell.seconds:.0f} s",))

    return next((shown(c) for c in variant.cells if c.seed == seed), Entry("–"))


def _ran(variant: Row) -> str:
    n, failed = len(variant.cells), len(variant.failed)
    return f"{failed} of {n} failed" if failed else f"{n} seed{'s' * (n != 1)}"


def _settings(variant: Row) -> str:
    calibrated = "; ".join(f"{name} {plain(values)}" for name, values in variant.calibration.items())
    return " ".join(variant.overrides) + (f" (calibrated by seed: {calibrated})" if calibrated else "")


# --- charts ---------------------------------------------------------------------------------------------


def _entry(variant: Row, place: int) -> Legend:
    """A variant in a legend; without a finished run it has no line in the charts, which a note says."""
    return Legend(variant.label, place, "" if len(variant.failed) < len(variant.cells) else "no finished run")


def _slopes(summary: Summary, names: Iterator[str]) -> list[Charts]:
    """Charts with a line from the first to the second column for each row of a panel."""
    if summary.panel is None or len(summary.panel.columns) != 2:
        return []
    first, second = summary.panel.columns
    rows = [(label, [summary.row(n) for n in ends if n]) for label, ends in summary.panel.rows.items()]
    slots = {v.label: summary.shown.index(v.name) for v in summary.variants if v.name in summary.shown}
    legend = [Legend(label, slots.get(label, place)) for place, (label, _) in enumerate(rows)]
    panels = []
    for figure in (f for f in summary.figures if f.key in SLOPES):
        lines = []
        for entry, (_, ends) in zip(legend, rows, strict=True):
            points = [
                Point(i, m.mean, m.low, m.high)
                for i, v in enumerate(ends)
                if (m := v.figures[figure.key]).mean is not None
            ]
            if len(points) == 2:
                lines.append(_line(entry, points))
        if lines:
            better = f"{figure.better} is better"
            panels.append(
                Panel(figure.label, better, Markup(slope_chart(next(names), lines, (first, second))))
            )
    note = f"Mean with its 95% interval over seeds, {first} and {second}."
    return [Charts("slopes", f"From {first} to {second}", note, legend, panels)] if panels else []


def _curves(summary: Summary, legend: Sequence[Legend], names: Iterator[str]) -> list[Charts]:
    """The most important curves, and in ``more`` all other readings."""
    shown = [(summary.row(name), entry) for name, entry in zip(summary.shown, legend, strict=True)]
    recorded = sorted({name for variant, _ in shown for name in variant.curves})
    panels, more = Panels(names), Panels(names)

    def add(to: Panels, key: str, title: str, unit: str) -> None:
        lines = [_line(entry, v.curves[key]) for v, entry in shown if key in v.curves]
        to.add(title, unit, lines, legend=False)

    for key, title, unit in CURVES[:3]:
        add(panels, key, title, unit)
    changes = [k for k in recorded if k.startswith(DELTA)]
    for key in sorted(changes, key=lambda k: (k != f"{DELTA}chosen", k)):
        add(panels, key, f"Δ log p: {key.removeprefix(DELTA)}", "nats per token, since the start")
    weights = [k for k in recorded if k.startswith(WEIGHT)]
    for variant, _ in shown:
        lines = [
            _line(Legend(k.removeprefix(WEIGHT), i), variant.curves[k])
            for i, k in enumerate(weights)
            if k in variant.curves
        ]
        if lines:
            panels.add(f"Cooling weight by kind of negative: {variant.label}", "0 to 1", lines, whole=True)
    for key, title, unit in CURVES[3:]:
        add(panels, key, title, unit)
    for key in recorded:
        if key not in {name for name, *_ in CURVES} and not key.startswith((DELTA, WEIGHT)):
            add(more, key, key, "")
    note = "Held-out readings of stage 2 unless a panel names another; mean over seeds; the band is its 95% interval."
    return (
        [Charts("curves", "Learning curves", note, legend, panels.found, more.found)] if panels.found else []
    )


def _line(entry: Legend, points: Sequence[Point]) -> Line:
    low = [p.low for p in points if p.low is not None]
    high = [p.high for p in points if p.high is not None]
    band = len(low) == len(high) == len(points)
    return Line(
        entry.label, entry.slot, [float(p.step) for p in points], [p.mean for p in points],
        low if band else (), high if band else (),
    )  # fmt: skip


def _reliability(summary: Summary, legend: Sequence[Legend], names: Iterator[str]) -> list[Charts]:
    """The reliability diagrams of the shown variants, and their distance from the diagonal."""
    shown = [(entry, summary.row(name)) for name, entry in zip(summary.shown, legend, strict=True)]
    known = [(entry, v.figures["ece"].mean, v.reliability) for entry, v in shown if v.reliability]
    if not known:
        return []

    def lines(gap: bool) -> list[Line]:
        def height(b: Bin) -> float:
            return b.accuracy - b.confidence if gap else b.accuracy

        return [
            Line(e.label, e.slot, [b.confidence for b in bins], [height(b) for b in bins])
            for e, _, bins in known
        ]

    counted = [
        Legend(e.label, e.slot, f"ECE {number(ece)}, n = {sum(b.n for b in bins)} tokens")
        for e, ece, bins in known
    ]
    texts = (
        ("Reliability", "share of top tokens that were correct"),
        ("Gap", "share correct minus confidence: below 0 the model is overconfident"),
    )
    panels = [
        Panel(title, unit, Markup(reliability_chart(next(names), lines(gap), gap=gap)))
        for gap, (title, unit) in zip((False, True), texts, strict=True)
    ]
    note = (
        "Confidence and correctness of tokens on held-out chosen captions. On the diagonal the model is calibrated; "
        "below it, the model is overconfident."
    )
    return [Charts("reliability", "Reliability", note, counted, panels)]


# --- captions -------------------------------------------------------------------------------------------


def _gallery(folder: Folder, summary: Summary) -> list[dict[str, Any]]:
    slots = _slots(summary)
    return [
        {
            "picture": picture_uri(picture.image, folder.path),
            "truth": picture.truth,
            "captions": [
                (Legend(c.label, slots[c.name]) if c.name in slots else None, c, mark(c))
                for c in picture.captions
            ],
        }
        for picture in summary.gallery
    ]


def _slots(summary: Summary) -> dict[str, int]:
    """The colours of variants: of the shown ones, and of others in the same row of the panel."""
    slots = {name: place for place, name in enumerate(summary.shown)}
    for names in summary.panel.rows.values() if summary.panel else ():
        own = next((slots[n] for n in names if n in slots), None)
        slots |= {n: own for n in names if n is not None and n not in slots and own is not None}
    return slots


def mark(caption: Caption) -> str:
    """The judge's result as a text.

    >>> mark(Caption("x", "a dog", all_correct=False, wrong=1, hallucinated=0, omitted=2, ill_formed=False))
    '1 wrong, 2 omitted'
    """
    if caption.all_correct is None:
        return ""
    if caption.all_correct or caption.ill_formed:
        return "all correct" if caption.all_correct else "ill-formed"
    counts = {"wrong": caption.wrong, "hallucinated": caption.hallucinated, "omitted": caption.omitted}
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n)
