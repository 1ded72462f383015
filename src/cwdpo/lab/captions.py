"""Captions of the embedded world's test images by a policy, with several decodings, scored by the world's judge."""

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
"""Captions per test image at each temperature; there is one greedy caption."""
SEED = 1000
"""Seed of the first sampled captions; the k-th further ones use this seed + k."""
BATCH = 100
ENTROPY_PICTURES = 200
"""Number of test images whose captions are used to measure the entropy at a temperature."""
ENTROPY_TOLERANCE = 0.002
"""The search for a temperature ends when the entropy is this close, in nats per token."""
COLDEST, HOTTEST = 0.25, 4.0
SEARCH_STEPS = 14


class Drawing(NamedTuple):
    """Length, in tokens, and batch size of the samples."""

    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = BATCH


WORLD = Drawing()


class Written(NamedTuple):
    """Results of judged captions: over all captions, and the mean for each image (for intervals over images)."""

    score: float
    correct: float
    ill_formed: float
    score_by_picture: list[float]
    correct_by_picture: list[float]


def draw(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    temperature: float = 1.0,
    seed: int = 0,
    how: Drawing = WORLD,
) -> list[str]:
    """One response to each example; temperature 0 is greedy."""
    made = sample(model, encoder, examples, temperature=temperature, seed=seed, **how._asdict())
    return [s.text for s in made]


def judged(model: Any, encoder: Encoder, test: Sequence[Example]) -> dict[str, float]:
    """``score``, ``all_correct`` and ``ill_formed`` of one caption per test image at temperature 1."""
    return summary(judge_captions(test, draw(model, encoder, test, seed=SEED)))


def captions(
    model: Any,
    encoder: Encoder,
    test: Sequence[Example],
    decodings: Decodings | None = None,
    entropy: float | None = None,
) -> dict[str, Any]:
    """Figures of the captions of all test images: greedy, at temperature 1, and with further decodings.

    Args:
        model: the policy.
        encoder: of the policy.
        test: P examples of the embedded world.
        decodings: further temperatures. The names of the figures at temperature 0.85 end in ``@0.85``.
        entropy: in nats per token; if given, the policy is also sampled at the temperature at which its samples have
            this entropy. The names of these figures end in ``@entropy``; ``temperature@entropy`` is the temperature.

    Returns:
        Shares and mean scores; ``scores`` [P][samples] at temperature 1; ``greedy``, ``sampled``: the greedy and the
        first sampled captions; ``pictures``: for each figure, its value for each image.
    """
    texts = draw(model, encoder, test, temperature=0.0)
    greedy = _written([judge_captions(test, texts)])
    drawn = [draw(model, encoder, test, seed=SEED + k) for k in range(SAMPLES)]
    sampled = _written(plain := [judge_captions(test, one) for one in drawn])
    figures: dict[str, Any] = {
        "greedy_correct": greedy.correct,
        "sampled_correct": sampled.correct,
        "ill_formed": sampled.ill_formed,
        "judge_score": sampled.score,
        "scores": [[round(one[i].score, 4) for one in plain] for i in range(len(test))],
        "greedy": texts,
        "sampled": drawn[0],
        "pictures": {
            "greedy_correct": greedy.correct_by_picture,
            "sampled_correct": sampled.correct_by_picture,
            "judge_score": sampled.score_by_picture,
        },
    }
    if decodings is None:
        return figures
    figures["greedy_score"] = greedy.score
    figures["pictures"] |= {"greedy_score": greedy.score_by_picture}
    further = {f"{t:g}": t for t in decodings.temperatures}
    if entropy is not None:
        further["entropy"] = temperature_at(entropy, lambda t: sampled_entropy(model, encoder, test, t))
        figures["temperature@entropy"] = further["entropy"]
    for name, temperature in further.items():
        one = _written(
            [judge_captions(test, draw(model, encoder, test, temperature, SEED + k)) for k in range(SAMPLES)]
        )
        figures |= {f"judge_score@{name}": one.score, f"sampled_correct@{name}": one.correct}
        figures[f"ill_formed@{name}"] = one.ill_formed
        figures["pictures"] |= {
            f"judge_score@{name}": one.score_by_picture,
            f"sampled_correct@{name}": one.correct_by_picture,
        }
    return figures


def _written(samples: Sequence[Sequence[Judgement]]) -> Written:
    """The results of judgements [samples][images]."""
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
    model: Any,
    encoder: Encoder,
    test: Sequence[Example],
    temperature: float,
    seed: int = SEED,
    how: Drawing = WORLD,
) -> float:
    """Entropy (nats per token) of the distributions from which the policy's samples are drawn at a temperature.

    The mean is over the tokens, including the end token, of one sample for each of the first
    :data:`ENTROPY_PICTURES` images. Samples without text are left out.
    """
    part = test[:ENTROPY_PICTURES]
    texts = draw(model, encoder, part, temperature, seed, how)
    own = [
        replace(example, chosen=Completion(text), rejected=(), gentle=())
        for example, text in zip(part, texts, strict=True)
        if text
    ]
    encoded = encoder.encode_all(own, "rejected", require_negative=False)[0]
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(encoded), how.batch_size):
        scores = score(
            model, collate(encoded[start : start + how.batch_size]), stats=[tempered_entropy(temperature)]
        )
        total += float(scores.stats["tempered"][scores.mask].sum())
        tokens += int(scores.mask.sum())
    model.train(was_training)
    return total / tokens if tokens else 0.0


def tempered_entropy(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A token statistic: [M] the entropy of ``softmax(logp / temperature)``, in nats, with logp [M, V]."""

    def tempered(logp: Tensor, token: Tensor) -> Tensor:
        # Log-probabilities are logits up to a constant, so dividing them by the temperature gives the distribution
        # that is sampled.
        cooled = (logp.detach() / temperature).log_softmax(-1)
        return -(cooled.exp() * cooled).sum(-1)

    return tempered


def temperature_at(entropy: float, measure: Callable[[float], float]) -> float:
    """The temperature at which samples have a given entropy, by bisection on its logarithm.

    The search ends when the entropy is within :data:`ENTROPY_TOLERANCE`, or after :data:`SEARCH_STEPS` steps.

    Args:
        entropy: the wanted entropy, in nats per token.
        measure: the entropy at a temperature. It should use the same seed each time, so that it is almost continuous.
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
