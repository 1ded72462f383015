"""A policy's answers to the test prompts of data that is not from the embedded world, by metrics and a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.data.encode.encoder import Encoder
from cwdpo.judging.base import Judge
from cwdpo.lab.captions import SAMPLES, SEED, WORLD, Drawing, draw, sampled_entropy, temperature_at
from cwdpo.lab.spec import Decodings
from cwdpo.metrics.base import METRICS, Answer, Measured
from cwdpo.records import Example


@dataclass(frozen=True)
class Asked:
    """The test prompts of a study, and how the answers are drawn and measured.

    Attributes:
        encoder: of the policies.
        test: P examples.
        metrics: names of the metrics, or mappings with ``name`` and settings.
        judge: scores the answers; ``None``: there are no scores.
        decodings: temperatures at which the answers are sampled in addition to the greedy ones.
        how: length and batch size of the samples.
    """

    encoder: Encoder
    test: Sequence[Example]
    metrics: tuple[str | dict[str, Any], ...]
    judge: Judge | None = None
    decodings: Decodings | None = None
    how: Drawing = WORLD

    def figures(self, model: Any, entropy: float | None = None) -> dict[str, Any]:
        """The figures of a policy.

        Args:
            model: the policy.
            entropy: in nats per token; if given, the answers are also sampled at the temperature at which they have
                this entropy, and ``temperature@entropy`` is this temperature.

        Returns:
            Each metric's numbers for the greedy answers, under their names; for answers sampled at temperature 0.85
            under the name and ``@0.85`` (mean of two samples of every prompt). With a judge also its mean score:
            ``greedy_score``, ``judge_score`` (temperature 1), ``judge_score@0.85``; ``scores`` [P][samples] at
            temperature 1; ``pictures``: for each mean score, its value for each prompt. ``greedy``: the greedy answers.
            ``better``: the direction of each number.
        """
        greedy = self._drawn(model, 0.0)
        measured = self._measured(greedy[0])
        figures: dict[str, Any] = {m.name: m.value for m in measured}
        figures |= {"greedy": greedy[0], "better": {m.name: m.better for m in measured}, "pictures": {}}
        if self.judge is not None:
            scores = self._score(figures, "judge_score", sampled := self._drawn(model, 1.0))
            figures |= {"scores": scores, "sampled": sampled[0]}
            self._score(figures, "greedy_score", greedy)
        further = {f"{t:g}": t for t in self.decodings.temperatures} if self.decodings else {}
        if entropy is not None:
            further["entropy"] = temperature_at(entropy, lambda t: self.entropy(model, t))
            figures["temperature@entropy"] = further["entropy"]
        for name, temperature in further.items():
            known = self.judge is not None and temperature == 1.0
            drawn = sampled if known else self._drawn(model, temperature)
            each = [self._measured(texts) for texts in drawn]
            figures |= {
                f"{m.name}@{name}": _mean([own[i].value for own in each]) for i, m in enumerate(measured)
            }
            if self.judge is not None and not known:
                self._score(figures, f"judge_score@{name}", drawn)
        return figures

    def entropy(self, model: Any, temperature: float = 1.0) -> float:
        """Entropy of the policy's samples at a temperature, nats per token."""
        found: float = sampled_entropy(model, self.encoder, self.test, temperature, how=self.how)
        return found

    def _drawn(self, model: Any, temperature: float) -> list[list[str]]:
        """[samples][P] answers at a temperature; one sample at temperature 0."""
        return [
            draw(model, self.encoder, self.test, temperature, SEED + k, self.how)
            for k in range(SAMPLES if temperature else 1)
        ]

    def _measured(self, texts: Sequence[str]) -> list[Measured]:
        answers = [Answer(e, text) for e, text in zip(self.test, texts, strict=True)]
        return [m for spec in self.metrics for m in METRICS.build(spec)(answers)]

    def _score(self, figures: dict[str, Any], name: str, drawn: Sequence[Sequence[str]]) -> list[list[float]]:
        """Add the judge's mean score of samples [samples][P], and its mean for each prompt; the scores [P][samples].

        An answer that the judge could not score counts as 0.
        """
        assert self.judge is not None
        by_prompt = self.judge.scores(self.test, list(zip(*drawn, strict=True)))
        scores = [[round(score or 0.0, 4) for score in own] for own in by_prompt]
        figures["pictures"][name] = [sum(own) / len(own) for own in scores]
        figures[name] = sum(figures["pictures"][name]) / len(scores)
        figures["better"][name] = "higher"
        return scores


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
