"""What a judge is: it scores the responses to a prompt. All uses of a judge derive from its scores.

Wins, ties and losses of two models (:mod:`cwdpo.judging.compare`) and right or wrong of on-policy samples
(:meth:`Judge.right`) go through :func:`verdict_of`. No torch is imported here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from cwdpo.errors import UnknownComponentError
from cwdpo.judging.win_rate import TIE
from cwdpo.records import Example
from cwdpo.registry import Component, Registry
from cwdpo.worlds.judged import all_judgeable

Verdict = Literal["win", "tie", "loss", "bad"]
"""Of the first response against the second; ``bad``: at least one has no score, which counts as a tie."""
WORTH: dict[Verdict, float] = {"win": 1.0, "tie": 0.5, "bad": 0.5, "loss": 0.0}
"""What a verdict is worth to the first response."""
_RIGHT: dict[Verdict, bool | None] = {"win": True, "tie": True, "bad": None, "loss": False}


def verdict_of(first: float | None, second: float | None) -> Verdict:
    """Compare the scores of two responses to one prompt; scores within 1e-9 are a tie.

    >>> verdict_of(1.0, 0.5), verdict_of(0.5, 0.5), verdict_of(0.5, None)
    ('win', 'tie', 'bad')
    """
    if first is None or second is None:
        return "bad"
    return "win" if first > second + TIE else "loss" if second > first + TIE else "tie"


class Judge(Component):
    """Scores the responses to a prompt.

    A subclass implements :meth:`scores` and then serves both comparisons and on-policy negatives. One that scores
    each response by itself is shorter as a :class:`ScoringJudge`.
    """

    @property
    def needs_whole_set(self) -> bool:
        """Whether a score depends on the other examples of the call, so that samples cannot be judged in batches."""
        return False

    def check(self, examples: Sequence[Example]) -> None:
        """Refuse examples that cannot be judged, before anything is generated or paid for.

        Raises:
            DataError: an example lacks what the judge compares with.
            MissingPackageError: an optional package is not installed.
        """

    @abstractmethod
    def scores(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> list[list[float | None]]:
        """Score the candidate responses to each prompt.

        Args:
            examples: B prompts.
            candidates: [B][n] responses; n may differ between prompts.
            store: folder for transcripts and for answers that need not be asked for again.

        Returns:
            [B][n] scores; higher is better. Scores of one prompt compare with one another, those of different
            prompts need not. ``None``: there is no score, for instance because an answer could not be read.
        """

    def right(
        self, examples: Sequence[Example], texts: Sequence[str], *, store: Path | None = None
    ) -> list[bool | None]:
        """Whether each response is right; ``None``: not known. By default: it is not worse than the chosen response.

        Args:
            examples: B prompts.
            texts: one response to each.
            store: as in :meth:`scores`.
        """
        pairs = [(text, e.chosen.text) for e, text in zip(examples, texts, strict=True)]
        return [_RIGHT[verdict_of(*pair)] for pair in self.scores(examples, pairs, store=store)]

    def estimate(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> str:
        """What :meth:`scores` will cost, in words; empty where it costs nothing."""
        return ""


class ScoringJudge(Judge):
    """A judge that scores each response by itself.

    Args:
        threshold: score from which a response is right; ``None``: from the score of the chosen response.
    """

    threshold: float | None = Field(
        None, description="score from which a response is right; null: not worse than the chosen response"
    )

    @abstractmethod
    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> Sequence[float | None]:
        """One score per response, higher is better; an example occurs once for each of its responses."""

    def scores(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> list[list[float | None]]:
        """[B][n] scores.

        Raises:
            ValueError: :meth:`score` returned another number of scores than it was given responses.
        """
        # One call for all prompts, so that a model can run in full batches.
        rows = [(e, text) for e, own in zip(examples, candidates, strict=True) for text in own]
        values = list(self.score([e for e, _ in rows], [text for _, text in rows])) if rows else []
        if len(values) != len(rows):
            raise ValueError(f"judge {label_of(self)}: {len(values)} scores for {len(rows)} responses")
        left = iter(values)
        return [[next(left) for _ in own] for own in candidates]

    def right(
        self, examples: Sequence[Example], texts: Sequence[str], *, store: Path | None = None
    ) -> list[bool | None]:
        """Whether the score reaches the threshold, or that of the chosen response where there is no threshold."""
        if self.threshold is None:
            return super().right(examples, texts, store=store)
        scores = self.scores(examples, [(text,) for text in texts])
        return [None if score is None else score >= self.threshold for (score,) in scores]


JUDGES: Registry[Judge] = Registry(
    "judge", "cwdpo.judging.judges", Judge, renamed={"exact": "world", "llm": "vlm"}
)
AUTO, NONE = "auto", "none"


def label_of(judge: Judge) -> str:
    """A judge's name in tables: that of its file in the package, or of its class in a file of one's own."""
    module = type(judge).__module__
    return module.rpartition(".")[2] if module.startswith(f"{JUDGES.package}.") else type(judge).__name__


def _with_name(spec: Any) -> Any:
    return {"name": spec} if isinstance(spec, str) else spec


def _known(spec: dict[str, Any]) -> dict[str, Any]:
    name = spec.get("name")
    if name in (AUTO, NONE):
        extra = sorted(spec.keys() - {"name"})
        if extra:
            raise ValueError(
                f"judge {name} takes no settings, got {', '.join(extra)}: name the judge they belong to"
            )
        return spec
    try:
        JUDGES.build(spec)
    except UnknownComponentError as error:
        raise ValueError(f"{error} ({AUTO} and {NONE} are allowed too)") from None
    return spec


JudgeSpec = Annotated[dict[str, Any], BeforeValidator(_with_name), AfterValidator(_known)]
"""``name`` and settings of a judge, checked by the registry; ``auto`` and ``none`` are names without settings."""


def judge_for(spec: Mapping[str, Any], examples: Sequence[Example]) -> Judge | None:
    """The judge that a recipe or a command names; ``None`` for none.

    Args:
        spec: ``name`` and settings. ``auto``: the world's judge where all examples are the world's, else none.
        examples: those that will be judged.

    Raises:
        UnknownComponentError: no judge has this name.
        RecipeError: a setting is unknown or out of range.
        DataError: an example lacks what the judge needs.
    """
    if spec.get("name") == AUTO:
        spec = {"name": "world" if all_judgeable(examples) else NONE}
    if spec.get("name") == NONE:
        return None
    judge = JUDGES.build(spec)
    judge.check(examples)
    return judge
