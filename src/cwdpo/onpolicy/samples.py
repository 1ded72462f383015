"""Samples of a policy, and which of them become negatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cwdpo.data.texts import placeholder_in
from cwdpo.negatives.base import known_true, normalised
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.records import Completion, Example, Sample

_REPEATS = 4
"""A text that repeats the same words this often in a row is degenerate."""
_LONGEST_REPEAT = 6
KIND = "on_policy"


@dataclass(frozen=True)
class PromptSamples:
    """All samples of one example in one round, and the optimizer step of the policy that generated them."""

    id: str
    round: int
    step: int
    samples: tuple[Sample, ...]
    made: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The samples as a row of the pool."""
        return {**asdict(self), "made": dict(self.made)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> PromptSamples:
        """The samples from a row of :meth:`to_json`; other keys are ignored."""
        samples = tuple(Sample(**s) for s in row["samples"])
        return cls(row["id"], row["round"], row["step"], samples, row["made"])


@dataclass(frozen=True)
class Sorted:
    """The samples of one example: negatives, right responses, and the number of dropped samples by reason."""

    negatives: tuple[Completion, ...] = ()
    right: tuple[Completion, ...] = ()
    dropped: Counter[str] = field(default_factory=Counter)


def degenerate(text: str) -> bool:
    """Whether a phrase of up to six words is repeated at least four times in a row."""
    words = text.lower().split()
    for size in range(1, _LONGEST_REPEAT + 1):
        agree = 0  # number of consecutive words that equal the word `size` places before
        for place in range(size, len(words)):
            agree = agree + 1 if words[place] == words[place - size] else 0
            if agree >= (_REPEATS - 1) * size:
                return True
    return False


def sort_samples(example: Example, drawn: PromptSamples, settings: NegativeSettings) -> Sorted:
    """Sort an example's samples into negatives and right responses; count the dropped ones by reason.

    Reasons: ``empty``; ``cut`` (did not end); ``degenerate`` (repeats itself); ``equal`` (to chosen or a reference,
    ignoring case and white space); ``double`` (equal to an earlier sample);
    ``placeholder`` (holds what a model reads as a picture); ``right`` (according to the judge);
    ``easy`` and ``hard`` (mean_logp outside ``easy_cut`` and ``hard_cut``).
    """
    true, seen = known_true(example), set[str]()
    dropped: Counter[str] = Counter()
    negatives, right = [], []
    for k, sample in enumerate(drawn.samples):
        reason = useless(sample, settings, true, seen)
        made = {**drawn.made, "step": drawn.step, "round": drawn.round, "sample": k}
        if sample.mean_logp is not None:
            made["mean_logp"] = sample.mean_logp
        completion = Completion(sample.text, "on_policy", KIND, made)
        if reason is None and sample.right:
            reason = "right"
            right.append(completion)
        reason = reason or outside(sample.mean_logp, settings)
        if reason is None:
            negatives.append(completion)
        else:
            dropped[reason] += 1
        seen.add(normalised(sample.text))
    return Sorted(tuple(negatives), tuple(right), dropped)


def useless(sample: Sample, settings: NegativeSettings, true: frozenset[str], seen: set[str]) -> str | None:
    """Why a sample cannot be a response of a pair, whatever a judge says; ``None`` if it can.

    Args:
        sample: the sample.
        settings: whether a sample may be cut.
        true: normalised texts that are known to be right.
        seen: normalised texts of the earlier samples.
    """
    text = normalised(sample.text)
    if not text:
        return "empty"
    if not sample.ended and not settings.sampler.keep_cut:
        return "cut"
    if placeholder_in(sample.text) is not None:
        return "placeholder"
    if degenerate(sample.text):
        return "degenerate"
    if text in true:
        return "equal"
    return "double" if text in seen else None


def outside(mean_logp: float | None, settings: NegativeSettings) -> str | None:
    """``easy`` or ``hard`` if a mean_logp (nats per token) is outside the cuts, else ``None``."""
    if mean_logp is None:
        return None
    if settings.easy_cut is not None and mean_logp < settings.easy_cut:
        return "easy"
    return "hard" if settings.hard_cut is not None and mean_logp > settings.hard_cut else None


def texts_to_judge(rows: Sequence[PromptSamples]) -> list[tuple[int, int]]:
    """The index pairs (row, sample) of all samples that are not empty; these are given to the judge."""
    return [(i, k) for i, row in enumerate(rows) for k, s in enumerate(row.samples) if s.text.strip()]
