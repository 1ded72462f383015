"""Captions that a policy writes of the embedded world's test pictures, judged exactly, under several decodings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import Encoder
from cwdpo.lab.spec import Decodings
from cwdpo.lab.worlds import MAX_NEW_TOKENS
from cwdpo.models.sample import sample
from cwdpo.records import Completion, Example
from cwdpo.scoring.score import score
from cwdpo.worlds.judged import judge_captions, summary
from cwdpo.worlds.shapes import Judgement

SAMPLES = 2
"""Captions of every test picture at a temperature; greedy ones are written once."""
SEED = 1000
"""Of the first of those captions; one more for each further."""
BATCH = 100
ENTROPY_PICTURES = 200
"""Test pictures whose captions the entropy at a temperature is measured on, while one is searched."""
ENTROPY_TOLERANCE = 0.002
"""Nats per token; the search for a temperature ends within it."""
COLDEST, HOTTEST = 0.25, 4.0
SEARCH_STEPS = 14


class Written(NamedTuple):
    """Judged captions: shares over all of them, and the mean of every picture (for intervals over pictures)."""

    score: float
    correct: float
    ill_formed: float
    score_by_picture: list[float]
    correct_by_picture: list[float]


def draw(
    model: Any, encoder: Encoder, examples: Sequence[Example], temperature: float = 1.0, seed: int = 0
) -> list[str]:
    """One response to each example; temperature 0 is greedy."""
    made = sample(
        model, encoder, examples, temperature=temperature, max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH, seed=seed,
    )  # fmt: skip
    return [s.text for s in made]


def judged(model: Any, encoder: Encoder, test: Sequence[Example]) -> dict[str, float]:
    """A caption of every test picture at temperature 1, judged exactly: ``score``, ``all_correct``, ``ill_formed``."""
    return summary(judge_captions(test, draw(model, encoder, test, seed=SEED)))


def captions(
    model: Any,
    encoder: Encoder,
    test: Sequence[Example],
    decodings: Decodings | None = None,
    entropy: float | None = None,
) -> dict[str, Any]:
    """Figures of the captions of every test picture: greedy, at temperature 1, and under further decodings.

    Args:
        decodings: further temperatures. The figures of temperature 0.85 end in ``@0.85``.
        entropy: nats per token. The policy is also sampled at the temperature at which its samples have this
            entropy; these figures end in ``@entropy``, and ``temperature@entropy`` is that temperature.

    Returns:
        Shares and mean scores; ``scores`` [P][samples] by picture at temperature 1; ``greedy``, the greedy captions;
        ``pictures``, the mean of every picture by figure.
    """
    texts = draw(model, encoder, test, temperature=0.0)
    greedy = _written([judge_captions(test, texts)])
    plain = [judge_captions(test, draw(model, encoder, test, seed=SEED + k)) for k in range(SAMPLES)]
    sampled = _written(plain)
    figures: dict[str, Any] = {
        "greedy_correct": greedy.correct,
        "sampled_correct": sampled.correct,
        "ill_formed": sampled.ill_formed,
        "judge_score": sampled.score,
        "scores": [[round(one[i].score, 4) for one in plain] for i in range(len(test))],
        "greedy": texts,
        "pictures": {
            "greedy_correct": greedy.correct_by_picture,
            "sampled_correct": sampled.correct_by_picture,
            "judge_score": sampled.score_by_picture,
        },
    }
    if decodings is None:
        return figures
    figures |= {"greedy_score": greedy.score}
    figures["pictures"] |= {"greedy_score": greedy.score_by_picture}
    further = {f"{t:g}": t for t in decodings.temperatures}
    if entropy is not None:
        further["entropy"] = temperature_at(entropy, lambda t: sampled_entropy(model, encoder, test, t))
        figures["temperature@entropy"] = further["entropy"]
    for name, temperature in further.items():
        one = _written(
            [judge_captions(test, draw(model, encoder, test, temperature, SEED + k)) for k in range(SAMPLES)]
        )
        figures |= {
            f"judge_score@{name}": one.score,
            f"sampled_correct@{name}": one.correct,
            f"ill_formed@{name}": one.ill_formed,
        }
        figures["pictures"] |= {
            f"judge_score@{name}": one.score_by_picture,
            f"sampled_correct@{name}": one.correct_by_picture,
        }
    return figures


def _written(samples: Sequence[Sequence[Judgement]]) -> Written:
    """Captions judged [samples][pictures]."""
    everything = summary([j for one in samples for j in one])
    by_picture = list(zip(*samples, strict=True))
    return Written(
        everything["score"],
        everything["all_correct"],
        everything["ill_formed"],
        [round(sum(j.score for j in own) / len(own), 4) for own in by_picture],
        [sum(j.all_correct for j in own) / len(own) for own in by_picture],
    )


@torch.no_grad()
def sampled_entropy(
    model: Any, encoder: Encoder, test: Sequence[Example], temperature: float, seed: int = SEED
) -> float:
    """Entropy (nats per token) of the distributions that the policy's samples at a temperature are drawn from.

    The mean is over the tokens of one sample of each of the first :data:`ENTROPY_PICTURES` pictures, end of turn
    included. A sample without text is left out.
    """
    part = test[:ENTROPY_PICTURES]
    texts = draw(model, encoder, part, temperature, seed)
    own = [
        replace(example, chosen=Completion(text), rejected=(), gentle=())
        for example, text in zip(part, texts, strict=True)
        if text
    ]
    encoded = encoder.encode_all(own, "rejected", require_negative=False)[0]
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(encoded), BATCH):
        scores = score(model, collate(encoded[start : start + BATCH]), stats=[tempered_entropy(temperature)])
        total += float(scores.stats["tempered"][scores.mask].sum())
        tokens += int(scores.mask.sum())
    model.train(was_training)
    return total / tokens if tokens else 0.0


def tempered_entropy(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A token statistic: [M] entropy in nats of ``softmax(logp / temperature)``, logp [M, V]."""

    def tempered(logp: Tensor, token: Tensor) -> Tensor:
        # Log-probabilities are logits up to a constant, so dividing them is what sampling at this temperature does.
        cooled = (logp.detach() / temperature).log_softmax(-1)
        return -(cooled.exp() * cooled).sum(-1)

    return tempered


def temperature_at(entropy: float, measure: Callable[[float], float]) -> float:
    """The temperature at which samples have an entropy (nats per token), by bisection on its logarithm.

    ``measure`` draws with the same seed at every temperature, so that it hardly jumps between two near ones. It ends
    within :data:`ENTROPY_TOLERANCE`, after :data:`SEARCH_STEPS`, or at the end of the range that is searched.
    """
    cold, hot = COLDEST, HOTTEST
    middle = 1.0
    for _ in range(SEARCH_STEPS):
        found = measure(middle)
        if abs(found - entropy) <= ENTROPY_TOLERANCE:
            break
        cold, hot = (middle, hot) if found < entropy else (cold, middle)
        middle = (cold * hot) ** 0.5
    return middle
