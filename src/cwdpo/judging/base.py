"""The interface of a judge: it scores the responses to a prompt.

Comparisons of two models (:mod:`cwdpo.judging.compare`) and the decision whether an on-policy sample is right
(:meth:`Judge.right`) both compare scores with :func:`verdict_of`. Does not import torch.
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
"""The result of the first response against the second; ``bad``: one of them has no score, counted as a tie."""
WORTH: dict[Verdict, float] = {"win": 1.0, "tie": 0.5, "bad": 0.5, "loss": 0.0}
"""The points that the first response gets for a verdict."""
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

    A subclass implements :meth:`scores`; it can then be used for comparisons and for on-policy negatives. A judge that
    scores each response separately should derive from :class:`ScoringJudge`.
    """

    @property
    def needs_whole_set(self) -> bool:
        """Whether a score depends on the other examples of the call, so that samples cannot be judged in batches."""
        return False

    def check(self, examples: Sequence[Example]) -> None:
        """Raise an error if an example cannot be judged; called before any generation or paid request.

        Raises:
            DataError: an example has nothing that the judge can compare with.
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
            store: folder for transcripts and for answers that can be reused.

        Returns:
            [B][n] scores; higher is better. Scores are comparable within a prompt, not necessarily between prompts.
            ``None``: there is no score, for example because the judge's answer could not be understood.
        """

    def right(
        self, examples: Sequence[Example], texts: Sequence[str], *, store: Path | None = None
    ) -> list[bool | None]:
        """Whether each response is right; ``None``: not known. By default a response not worse than chosen is right.

        Args:
            examples: B prompts.
            texts: one response to each prompt.
            store: as in :meth:`scores`.
        """
        pairs = [(text, e.chosen.text) for e, text in zip(examples, texts, strict=True)]
        return [_RIGHT[verdict_of(*pair)] for pair in self.scores(examples, pairs, store=store)]

    def estimate(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> str:
        """An estimate of the cost of :meth:`scores`, as a text for the user; empty if it costs nothing."""
        return ""


class ScoringJudge(Judge):
    """A judge that scores each response separately.

    Args:
        threshold: smallest score of a right response; ``None``: the score of the chosen response.
    """

    threshold: float | None = Field(
        None, description="smallest score of a right response; null: the score of the chosen response"
    )

    @abstractmethod
    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> Sequence[float | None]:
        """One score per response, higher is better; ``examples`` repeats an example for each of its responses."""

    def scores(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> list[list[float | None]]:
        """[B][n] scores.

        Raises:
            ValueError: :meth:`score` returned another number of scores than it was given responses.
        """
        # One call for all prompts, so that a judge model can use full batches.
        rows = [(e, text) for e, own in zip(examples, candidates, strict=True) for text in own]
        values = list(self.score([e for e, _ in rows], [text for _, text in rows])) if rows else []
        if len(values) != len(rows):
            raise ValueError(f"judge {label_of(self)}: {len(values)} scores for {len(rows)} responses")
        left = iter(values)
        return [[next(left) for _ in own] for own in candidates]

    def right(
        self, examples: Sequence[Example], texts: Sequence[str], *, store: Path | None = None
    ) -> list[bool | None]:
        """Whether the score is at least the threshold, or the score of chosen if there is no threshold."""
        if self.threshold is None:
            return super().right(examples, texts, store=store)
        scores = self.scores(examples, [(text,) for text in texts])
        return [None if score is None else score >= self.threshold for (score,) in scores]


JUDGES: Registry[Judge] = Registry(
    "judge", "cwdpo.judging.judges", Judge, renamed={"exact": "world", "llm": "vlm"}
)
AUTO, NONE = "auto", "none"


def label_of(judge: Judge) -> str:
    """A judge's name in tables: the name of its file, or of its class if it is not in the package."""
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
                f"judge {name} takes no settings, got {', '.join(extra)}: name the judge that they belong to"
            )
        return spec
    try:
        JUDGES.build(spec)
    except UnknownComponentError as error:
        raise ValueError(f"{error} ({AUTO} and {NONE} are allowed too)") from None
    return spec


JudgeSpec = Annotated[dict[str, Any], BeforeValidator(_with_name), AfterValidator(_known)]
"""``name`` and settings of a judge, checked by the registry; ``auto`` and ``none`` have no settings."""


def judge_for(spec: Mapping[str, Any], examples: Sequence[Example]) -> Judge | None:
    """Build the judge that a recipe or a command names; ``None`` for ``none``.

    Args:
        spec: ``name`` and settings. ``auto``: judge ``world`` if all examples are from the embedded world, else none.
        examples: the examples that will be judged.

    Raises:
        UnknownComponentError: there is no judge with this name.
        RecipeError: a setting is unknown or out of range.
        DataError: an example has nothing that the judge can compare with.
    """
    if spec.get("name") == AUTO:
        spec = {"name": "world" if all_judgeable(examples) else NONE}
    if spec.get("name") == NONE:
        return None
    judge = JUDGES.build(spec)
    judge.check(examples)
    return judge
