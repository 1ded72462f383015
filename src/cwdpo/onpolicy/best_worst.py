"""Preference pairs of a policy's own samples: the best one by a judge is chosen, the worst one rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cwdpo.judging.base import Judge, verdict_of
from cwdpo.negatives.base import normalised
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.blend import BlendCounts
from cwdpo.onpolicy.samples import KIND, PromptSamples, useless
from cwdpo.records import Completion, Example, Sample


def best_and_worst(
    examples: Sequence[Example],
    drawn: Mapping[str, PromptSamples],
    judge: Judge,
    settings: NegativeSettings,
    store: Path | None = None,
) -> tuple[list[Example], BlendCounts]:
    """Pairs whose chosen is the sample with the highest score, and rejected the one with the lowest.

    The data's own chosen response is not used, except by judges that compare with it. Samples that cannot be judged or
    trained on are dropped first, for the reasons of :func:`cwdpo.onpolicy.samples.sort_samples` that do not need a
    right response (``empty``, ``cut``, ``degenerate``, ``double``, ``placeholder``). An example is left out if fewer
    than two samples have a score, or if all scores are equal.

    Args:
        examples: examples with different ids.
        drawn: the samples of each example, by id.
        judge: gives the scores, all in one call.
        settings: whether a response may be cut.
        store: the judge's folder for transcripts and answers.

    Returns:
        The pairs, with the two scores in ``rejected[0].made`` (``score``, ``chosen_score``), and the counts.
    """
    counts = BlendCounts(1.0, examples=len(examples))
    usable = [_usable(drawn[e.id].samples, settings, counts) for e in examples]
    scores = judge.scores(examples, [[s.text for s in own] for own in usable], store=store)
    pairs = []
    for example, own, judged in zip(examples, usable, scores, strict=True):
        known = [(score, k) for k, score in enumerate(judged) if score is not None]
        counts.dropped["no score"] += len(own) - len(known)
        best, worst = max(known, default=(0.0, 0)), min(known, default=(0.0, 0))
        if verdict_of(best[0], worst[0]) != "win":
            counts.left_out += 1
            counts.dropped["no worse sample"] += len(known)
            continue
        counts.by_origin["on_policy"] += 1
        counts.dropped["between"] += len(known) - 2
        made = {**drawn[example.id].made, "score": worst[0], "chosen_score": best[0]}
        if (logp := own[worst[1]].mean_logp) is not None:
            made["mean_logp"] = logp
        rejected = Completion(own[worst[1]].text, "on_policy", KIND, made)
        chosen = Completion(own[best[1]].text)
        pairs.append(replace(example, chosen=chosen, rejected=(rejected,), gentle=()))
    counts.dropped = +counts.dropped  # reasons without a sample are not shown
    return pairs, counts


def _usable(samples: Sequence[Sample], settings: NegativeSettings, counts: BlendCounts) -> list[Sample]:
    seen: set[str] = set()
    kept = []
    for sample in samples:
        reason = useless(sample, settings, frozenset(), seen)
        if reason is None:
            kept.append(sample)
        else:
            counts.dropped[reason] += 1
        seen.add(normalised(sample.text))
    counts.samples += len(samples)
    return kept
