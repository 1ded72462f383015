"""The format of a study file: a question, its variants as recipe overrides, and what is compared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cwdpo.errors import CwdpoError, FileError, RecipeError, nearest
from cwdpo.files.yamlfile import read_yaml
from cwdpo.judging.base import AUTO, JudgeSpec
from cwdpo.lab.worlds import HELD_OUT_SEED, Rejected, Validation
from cwdpo.metrics.base import METRICS
from cwdpo.registry import Settings, explain

RECIPE = Path(__file__).parent / "recipe.yaml"
"""The recipe that the shipped studies change: the embedded world at the size of the demo."""
SHIPPED = Path(__file__).parent / "studies"
"""The folder of the shipped studies."""
_PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"


class BestOf(Settings):
    """Chosen responses that are only better, not right: the best of ``n`` samples according to a noisy judge.

    ``noise`` is the share of samples that get a random score. ``worse`` is the judge that must find a rejected response
    worse than chosen: ``truth``, the world's judge, so that no label is wrong; or ``judge``, the same noisy judge, so
    that some labels are wrong.
    """

    n: int = Field(8, ge=2)
    noise: float = Field(0.3, ge=0, le=1)
    worse: Literal["truth", "judge"] = "truth"


class Decodings(Settings):
    """Temperatures for the answers to the test prompts, in addition to greedy and temperature 1.

    ``same_entropy``: also use the temperature at which a variant's samples have the same entropy per token as the
    reference's samples at temperature 1.
    """

    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = ()
    same_entropy: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The endings, after ``@``, of the names of each decoding's figures."""
        return (*(f"{t:g}" for t in self.temperatures), *(["entropy"] if self.same_entropy else []))


class Variant(Settings):
    """One row of the table.

    Attributes:
        label: name in tables.
        set: overrides (``section.key=value``) of the recipe.
        times: factors by key, applied last to numbers that an override has set (``stage2.learning_rate: 4``).
        grid: values by key; a sweep tries all combinations.
        tuned_as: the variant of a sweep whose chosen settings this variant uses (default: its own name).
        against: the variant that this one is compared with, instead of the study's ``full``.
        margins_from: the variant whose trained policy is used to estimate reward margins (for madpo).
        cell: row and column in a panel of scores.
        more_seeds: number of seeds in addition to the requested ones.
        rejected: how each rejected caption of the embedded world is replaced, see :data:`cwdpo.lab.worlds.REWRITES`.
        flipped: share of the training pairs whose chosen and rejected responses are exchanged.
        provokes: findings of the diagnosis, one of which the run must raise; empty for a healthy run.
    """

    label: str = ""
    set: tuple[str, ...] = ()
    times: Mapping[str, float] = {}
    grid: Mapping[str, tuple[Any, ...]] = {}
    tuned_as: str | None = None
    against: str | None = None
    margins_from: str | None = None
    cell: tuple[str, str] | None = None
    more_seeds: int = Field(0, ge=0)
    rejected: Rejected | None = None
    flipped: float = Field(0.0, ge=0, le=1)
    provokes: tuple[str, ...] = ()

    def settings(self) -> list[tuple[str, ...]]:
        """All points of the grid, as overrides."""
        keys = list(self.grid)
        return [
            tuple(f"{key}={_yaml(value)}" for key, value in zip(keys, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]


class Study(Settings):
    """A study file.

    Two more keys are resolved when the file is read: ``variants_of`` uses the variants of another study (variants of
    the file are added to them or replace them), and ``grid`` is a grid for all variants.

    Attributes:
        full: the variant that all others are compared with.
        wins_against: the variant that win rates are computed against (default: ``full``).
        common: overrides for all variants.
        swept: if no tuned settings are given, use those that were chosen for the demo (``lab/swept.yaml``).
        panel: make a variant, named ``<variant>-<values>``, of every point of every grid.
        base: also measure the starting model.
        shown: variants whose curves and reliability diagrams are shown on the page, in this order.
        pictured: variants whose captions are shown on the page, beside those of the starting model; default: ``shown``.
        head: figures that the top of the page compares (default: those of ``score``).
        data: use a preference set of sampled responses that a noisy judge compared.
        validation: the held-out images for the probes: ``shared`` by all seeds, or each seed's ``own``.
        test: test set for data that is not from the embedded world.
        held_out_seed: seed of the embedded world's test and validation images.
        first_seed: the first seed.
        decodings: further temperatures for the answers to the test prompts.
        score: weights of figures; a sweep chooses by their weighted sum, which is also a figure of the tables.
        metrics, judge: metrics (names, or ``{name: ..., setting: ...}``) and judge for data that is not from the
            embedded world; with a judge there are win rates.
        analysis: judge the policy at every measurement, and analyse these trajectories: the findings of the diagnosis
            (``findings``) or the effect of early stopping (``stopping``).
    """

    name: str
    title: str = ""
    question: str = ""
    full: str
    wins_against: str | None = None
    common: tuple[str, ...] = ()
    swept: bool = False
    panel: bool = False
    base: bool = False
    shown: tuple[str, ...] = ()
    pictured: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    data: BestOf | None = None
    validation: Validation = "shared"
    test: str | None = None
    held_out_seed: int = HELD_OUT_SEED
    first_seed: int = Field(0, ge=0)
    decodings: Decodings | None = None
    variants: Mapping[str, Variant]
    score: Annotated[Mapping[str, float], Field(min_length=1)] = {
        "sampled_correct": 1.0,
        "greedy_correct": 1.0,
        "ill_formed": -1.0,
    }
    metrics: tuple[str | dict[str, Any], ...] = ("cider", "bleu4", "length", "diversity")
    judge: JudgeSpec = Field(default_factory=lambda: {"name": AUTO})
    analysis: Literal["findings", "stopping"] | None = None

    @field_validator("metrics")
    @classmethod
    def _buildable(cls, metrics: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        for spec in metrics:
            try:
                METRICS.build(spec)
            except CwdpoError as error:  # said with the file and the key
                raise ValueError(str(error)) from None
        return metrics

    @field_validator("variants")
    @classmethod
    def _plain_names(cls, variants: Mapping[str, Variant]) -> Mapping[str, Variant]:
        for name in variants:
            if not name or set(name) - set(_PLAIN):
                raise ValueError(
                    f"the variant {name!r} names a folder: only letters, digits, '_', '.' and '-' are allowed"
                )
        return variants

    @model_validator(mode="after")
    def _known_names(self) -> Study:
        named = [n for v in self.variants.values() for n in (v.margins_from, v.against) if n]
        named += [] if self.panel else [self.full, self.reference, *self.shown, *self.pictured]
        for name in named:
            if name not in self.variants:
                raise ValueError(
                    f"no variant {name!r}{nearest(name, self.variants)}; known: {', '.join(self.variants)}"
                )
        cells = [v.cell for v in self.variants.values() if v.cell]
        for name, variant in self.variants.items():
            if variant.against and (self.panel or variant.against == name):
                raise ValueError(
                    f"variant {name!r}: against: must be another variant, and is not allowed in a panel"
                )
            if variant.cell and cells.count(variant.cell) > 1:
                raise ValueError(f"variant {name!r}: another variant has the same cell {list(variant.cell)}")
        return self

    def expanded(self, chosen: Mapping[str, Sequence[str]]) -> Study:
        """A panel with one variant per point, each with the tuned settings of its method; other studies unchanged."""
        if not self.panel:
            return self
        points = {}
        for name, variant in self.variants.items():
            for values, settings in zip(
                itertools.product(*variant.grid.values()), variant.settings(), strict=True
            ):
                shown = "-".join(_yaml(v) for v in values)
                named = f"{name}-{''.join(c if c in _PLAIN else '_' for c in shown)}"
                point = variant.model_copy(
                    update={
                        "label": f"{self.label(name)}, {shown}",
                        "set": (*variant.set, *chosen.get(self.tuned_by(name), ()), *settings),
                        "grid": {},
                        "cell": (self.label(name), shown),
                    }
                )
                points[named] = point
        teachers = {v.margins_from for v in self.variants.values() if v.margins_from}
        for name in teachers - set(points):
            own = self.variants[name]
            points[name] = own.model_copy(
                update={"set": (*own.set, *chosen.get(self.tuned_by(name), ())), "grid": {}}
            )
        if self.full not in points:
            raise RecipeError(
                f"study {self.name}: full: {self.full!r} is not a point of the panel{nearest(self.full, points)}; "
                f"known: {', '.join(points)}"
            )
        return self.model_copy(update={"panel": False, "variants": points})

    def only(self, names: Sequence[str]) -> Study:
        """The study with only some of its variants, and the variants that these need.

        Raises:
            RecipeError: the study has no variant of this name.
        """
        for name in names:
            if name not in self.variants:
                raise RecipeError(
                    f"--only: no variant {name!r}{nearest(name, self.variants)}; known: {', '.join(self.variants)}"
                )
        full = {n for n in self.variants if self.full == n or (self.panel and self.full.startswith(f"{n}-"))}
        needed = full | set(names) | ({self.reference} & set(self.variants))
        while more := {n for v in needed for n in self._read_by(v)} - needed:
            needed |= more
        kept = {name: v for name, v in self.variants.items() if name in needed}
        lists = {key: tuple(n for n in getattr(self, key) if n in kept) for key in ("shown", "pictured")}
        return self.model_copy(update={"variants": kept, **lists})

    def _read_by(self, name: str) -> set[str]:
        own = self.variants[name]
        return {n for n in (own.margins_from, own.against) if n}

    @property
    def reference(self) -> str:
        """The variant that win rates are computed against."""
        return self.wins_against or self.full

    def seeds(self, name: str, asked: Sequence[int]) -> list[int]:
        """The seeds of a variant: the requested ones, and ``more_seeds`` after them."""
        return [*asked, *range(max(asked) + 1, max(asked) + 1 + self.variants[name].more_seeds)]

    def label(self, name: str) -> str:
        """The name of a variant in tables."""
        return self.variants[name].label or name

    def rival(self, name: str) -> str | None:
        """The variant that a variant is compared with; ``None`` for ``full``, unless it sets ``against``."""
        return self.variants[name].against or (self.full if name != self.full else None)

    def scored(self, figures: Mapping[str, Any]) -> float | None:
        """The score from a cell's figures; ``None`` if one of them is missing."""
        if any(figures.get(key) is None for key in self.score):
            return None
        return sum(weight * float(figures[key]) for key, weight in self.score.items())

    def tuned_by(self, name: str) -> str:
        """The name under which a sweep chose the variant's settings."""
        return self.variants[name].tuned_as or name


def shipped() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_study(source: str | Path) -> Study:
    """Load a study from a file, or a shipped study by its name.

    Raises:
        RecipeError: there is no such study, or the file is not a valid study.
    """
    tree, where = _tree(source)
    if isinstance(other := tree.pop("variants_of", None), str):
        shared = _tree(other)[0].get("variants")
        if not isinstance(shared, dict):
            raise RecipeError(f"{where}: variants_of: the study {other} does not list variants itself")
        tree["variants"] = {**shared, **tree.get("variants", {})}
    if grid := tree.pop("grid", None):
        tree["variants"] = {name: {**(v or {}), "grid": grid} for name, v in tree.get("variants", {}).items()}
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(explain(error, where, Study.model_fields)) from None


def _tree(source: str | Path) -> tuple[dict[str, Any], str]:
    """The content of a study file, and its name for messages."""
    shipped_file = SHIPPED / f"{source}.yaml"
    path, where = (
        (shipped_file, f"study {source}") if str(source) in shipped() else (Path(source), str(source))
    )
    if not path.is_file():
        raise RecipeError(
            f"no study {str(source)!r}{nearest(str(source), shipped())}: name a file, or one of {', '.join(shipped())}"
        )
    try:
        tree = read_yaml(path)
    except FileError as error:
        raise RecipeError(str(error)) from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: a study must be a mapping, got {type(tree).__name__}")
    return tree, where


def settings_for(study: Study, tuned: Path | None) -> dict[str, tuple[str, ...]]:
    """The settings that a sweep chose: of a file if given, else the demo's if the study uses them, else none."""
    path = tuned or (SHIPPED.parent / "swept.yaml" if study.swept else None)
    return load_chosen(path) if path else {}


def load_chosen(path: Path) -> dict[str, tuple[str, ...]]:
    """Read the settings that a sweep chose: overrides by variant.

    Raises:
        RecipeError: the file was not written by ``cwdpo sweep``.
    """
    try:
        tree = read_yaml(path)
        return {str(name): _listed(chosen) for name, chosen in tree["chosen"].items()}
    except (FileError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{path}: not the chosen.yaml of a sweep ({type(error).__name__}: {error})"
        ) from None


def _listed(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("each name must have a list of overrides")
    return tuple(map(str, value))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


def overrides_of(study: Study, name: str, chosen: Mapping[str, Sequence[str]]) -> list[str]:
    """All overrides of a variant, in order: the study's, its own, those that a sweep chose, and its factors.

    Raises:
        RecipeError: a factor for a key that no override sets.
    """
    variant = study.variants[name]
    overrides = [*study.common, *variant.set, *chosen.get(study.tuned_by(name), ())]
    for key, factor in variant.times.items():
        given = [value for k, _, value in (text.partition("=") for text in overrides) if k.strip() == key]
        if not given:
            raise RecipeError(
                f"study {study.name}, variant {name}: times: no override sets {key!r}: give it in 'set', or --tuned"
            )
        try:
            overrides.append(f"{key}={_yaml(factor * float(yaml.safe_load(given[-1])))}")
        except (TypeError, ValueError):
            raise RecipeError(
                f"study {study.name}, variant {name}: times: {key}={given[-1]} is not a number"
            ) from None
    return overrides
