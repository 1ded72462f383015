"""Whether a round's samples are on-policy: their log-probabilities by the engine that drew them, and in training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from torch import nn

from cwdpo.models.turns import in_turns
from cwdpo.monitor.instruments import at_once
from cwdpo.monitor.probe_set import as_chosen
from cwdpo.onpolicy.samples import PromptSamples
from cwdpo.records import Example, Reading, Sample
from cwdpo.scoring.pairs import reference_pass
from cwdpo.stage.stage import Stage
from cwdpo.waiting import from_first

GAP = "engine_gap"
"""Name of the reading: median over samples of abs(difference of the mean log-probabilities), nats per token."""
APART = "engine_apart"
"""Name of the reading: share of samples that are not the same tokens, as far as one can see (:data:`FAR`)."""
FAR = 0.5
"""Difference, in nats per token, above which a sample's text must have been divided into other tokens in training."""
PROMPTS = 64
"""Number of prompts of a round of which one sample is compared."""


class Told(NamedTuple):
    """What the engine says of a sample: number of tokens, the end token included, and mean log-probability."""

    n_tokens: int
    mean_logp: float


def measure_agreement(
    stage: Stage, model: nn.Module, drawn: Sequence[PromptSamples], examples: Mapping[str, Example], step: int
) -> None:
    """Compare the engine's log-probabilities of a round's samples with the policy's, and store two readings.

    Nothing is measured if the samples have no log-probabilities. All processes call this together.

    Args:
        stage: stage 2.
        model: the policy that was sampled, with the same weights.
        drawn: the samples of each prompt.
        examples: the prompts by id.
        step: the optimizer step at which the round begins.
    """
    measured = any(row["name"] == GAP and row["step"] == step for row in stage.run.readings())
    if from_first(measured, "reading what was measured"):
        return  # by the run that is resumed here
    found = ((examples[row.id], compared) for row in drawn if (compared := _compared(row)) is not None)
    asked = list(islice(found, PROMPTS))
    prompts, texts = [example for example, _ in asked], [text for _, (text, _) in asked]
    rows = as_chosen(stage.encoder, prompts, texts, "on_policy")
    if not rows or len(rows) < len(asked):
        return
    with in_turns(model):  # the policy stands in for the reference
        scored = [row.chosen for row in reference_pass(model, rows, batch_size=at_once(stage))]
    trained = [Told(len(c.ids), c.reference_mean_logp or 0.0) for c in scored]
    pairs = list(zip((told for _, (_, told) in asked), trained, strict=True))
    stage.run.append_readings(stage.name, agreement(pairs, step))


def agreement(pairs: Sequence[tuple[Told, Told]], step: int) -> list[Reading]:
    """The two readings of samples as the engine and as training see them.

    Training encodes a sample's text again. The result may be other tokens than those that were drawn, because a
    tokenizer has many ways to write a text and encodes it in one of them; such a sample is far from what was drawn. The
    median is not moved by a few of them.
    """
    gaps = [abs(a.mean_logp - b.mean_logp) for a, b in pairs]
    apart = [a.n_tokens != b.n_tokens or gap > FAR for (a, b), gap in zip(pairs, gaps, strict=True)]
    return [
        Reading(GAP, statistics.median(gaps), len(pairs), "nats/token", step, "train"),
        Reading(APART, sum(apart) / len(apart), len(pairs), "", step, "train"),
    ]


def _compared(row: PromptSamples) -> tuple[str, Told] | None:
    """A prompt's first sample that has ended and whose log-probability is known; ``None`` if it has none."""
    whole = (sample for sample in row.samples if sample.ended and sample.text.strip())
    return next(((sample.text, told) for sample in whole if (told := _told(sample)) is not None), None)


def _told(sample: Sample) -> Told | None:
    if sample.engine_tokens is not None and sample.engine_mean_logp is not None:
        return Told(sample.engine_tokens, sample.engine_mean_logp)
    if sample.n_tokens is not None and sample.mean_logp is not None:
        return Told(sample.n_tokens, sample.mean_logp)
    return None
