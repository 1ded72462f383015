"""A preference set in which chosen is only better, not right: the best of n samples according to a noisy judge.

Real preference data is like this: nobody wrote the right answer; several answers of a policy were compared, and some
comparisons were wrong. Rows have TRL's columns and those of this project, and the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.files.writing import clear_unfinished, write_json
from cwdpo.lab.rows import said, store_rows
from cwdpo.lab.spec import BestOf
from cwdpo.lab.worlds import MAX_NEW_TOKENS
from cwdpo.models.load import Policy
from cwdpo.models.sample import sample
from cwdpo.records import Completion, Example
from cwdpo.worlds.judged import judge_captions, scene_of
from cwdpo.worlds.shapes import Judgement, hard

SHARES = {"other_prompt": 0.31, "sample": 0.31, "perturbed": 0.38}
"""Shares of the kinds of rejected responses: another image's caption, a worse sample, one wrong word."""
_TRIES = 20


class _Pair(NamedTuple):
    """A new row, and the true judgements of its chosen and rejected responses."""

    row: dict[str, Any]
    chosen: Judgement
    rejected: Judgement


def write_best_of(
    policy: Policy, encoder: Encoder, source: Path, out: Path, settings: BestOf, *, seed: int
) -> dict[str, Any]:
    """Sample responses to every prompt, choose the best with a noisy judge, and write ``out/train.jsonl``.

    Rows for which no response worse than chosen is found are left out.

    Args:
        policy: the model to sample, at temperature 1.
        encoder: of the policy.
        source: a JSONL file of the embedded world; its images are copied next to the new rows.
        out: folder to write to.
        settings: number of samples, the judge's noise, and how a rejected response is found to be worse.
        seed: of samples, noise and choice of negatives.

    Returns:
        ``rows``, ``left_out``; ``chosen_right`` and ``chosen_score``: share of right chosen responses and their mean
        score; ``wrong_labels``: share of pairs whose rejected response is truly better than chosen.

    Raises:
        DataError: the rows are not from the embedded world.
    """
    rows = read_jsonl(source)
    examples = read_examples(source).examples
    if len(rows) != len(examples):
        raise DataError(
            f"{source}: only {len(examples)} of {len(rows)} rows can be used; see `cwdpo validate {source}`"
        )
    n = settings.n
    repeated = [e for e in examples for _ in range(n)]
    texts = [
        s.text for s in sample(policy.model, encoder, repeated, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    ]
    judged = judge_captions(repeated, texts)
    pairs = []
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        own = list(zip(texts[i * n : (i + 1) * n], judged[i * n : (i + 1) * n], strict=True))
        rng = random.Random(f"best_of/{seed}/{example.id}")
        others = [examples[rng.randrange(len(examples))].chosen.text for _ in range(_TRIES)]
        pairs.append(_pair(row, example, own, others, settings, rng))
    made = [pair for pair in pairs if pair is not None]
    if not made:
        raise DataError(
            f"{source}: for no prompt is a response worse than the chosen one: there is no pair to write"
        )
    how = {**settings.model_dump(), "seed": seed}
    store_rows(source.parent, out, [{**p.row, "best_of": {**how, **p.row["best_of"]}} for p in made])
    counts = {
        "rows": len(made),
        "left_out": len(rows) - len(made),
        "chosen_right": sum(p.chosen.all_correct for p in made) / len(made),
        "chosen_score": sum(p.chosen.score for p in made) / len(made),
        "wrong_labels": sum(p.rejected.score > p.chosen.score for p in made) / len(made),
    }
    clear_unfinished(out / "best_of.json")
    write_json(out / "best_of.json", {**counts, "source": source.name, **how})
    return counts


def _pair(
    row: Mapping[str, Any],
    example: Example,
    own: Sequence[tuple[str, Judgement]],
    others: Sequence[str],
    settings: BestOf,
    rng: random.Random,
) -> _Pair | None:
    """The row whose chosen response is the sample that the noisy judge prefers; ``None`` if no response is worse."""

    def noisy(mark: Judgement) -> float:
        return rng.random() if rng.random() < settings.noise else mark.score

    seen = [noisy(mark) for _, mark in own]
    best = max(range(len(own)), key=lambda k: (seen[k], -k))
    text, mark = own[best]
    if not text:
        return None
    if settings.worse == "truth":
        found = _worse(example, text, own, others, rng, lambda text, j: j.score < mark.score)
    else:
        # A sample keeps the noisy score that it already has; other responses are scored now, by the same noisy judge.
        known = {text: score for (text, _), score in zip(own, seen, strict=True)}
        found = _worse(example, text, own, others, rng, lambda t, j: known.get(t, noisy(j)) < seen[best])
    if found is None:
        return None
    negative, against = found
    how = {
        "score": round(mark.score, 4),
        "seen": round(seen[best], 4),
        "rejected_score": round(against.score, 4),
    }
    return _Pair(_row(row, text, negative, _gentle(example, text, rng), how), mark, against)


def _worse(
    example: Example,
    chosen: str,
    own: Sequence[tuple[str, Judgement]],
    others: Sequence[str],
    rng: random.Random,
    is_worse: Callable[[str, Judgement], bool],
) -> tuple[Completion, Judgement] | None:
    """A response that is worse than chosen, and its judgement; the kind to try first is drawn by the shares."""
    kinds = list(SHARES)
    drawn = rng.choices(kinds, list(SHARES.values()))[0]
    for kind in (drawn, *(k for k in kinds if k != drawn)):
        found = _candidates(kind, example, chosen, [text for text, _ in own], others, rng)
        distinct = [c for c in found if c.text.strip() and c.text != chosen]
        marks = judge_captions([example] * len(distinct), [c.text for c in distinct])
        for candidate, mark in zip(distinct, marks, strict=True):
            if is_worse(candidate.text, mark):
                return candidate, mark
    return None


def _candidates(
    kind: str, example: Example, chosen: str, own: Sequence[str], others: Sequence[str], rng: random.Random
) -> list[Completion]:
    if kind == "other_prompt":
        return [Completion(t, "dataset", "easy") for t in others]
    if kind == "sample":
        return [Completion(t, "on_policy", "sample") for t in rng.sample(list(own), len(own))]
    return _edits(example, chosen, rng)


def _edits(example: Example, chosen: str, rng: random.Random) -> list[Completion]:
    scene = scene_of(example)
    try:
        made = [hard(scene, chosen, rng) for _ in range(_TRIES)]
    except DataError:  # chosen is not a sentence of the world, so no word of it can be exchanged
        return []
    return [Completion(c.text, "perturbed", "hard", c.made) for c in made]


def _gentle(example: Example, chosen: str, rng: random.Random) -> Completion | None:
    return next(iter(_edits(example, chosen, rng)), None)


def _row(
    row: Mapping[str, Any],
    chosen: str,
    negative: Completion,
    gentle: Completion | None,
    how: Mapping[str, Any],
) -> dict[str, Any]:
    def written(c: Completion) -> dict[str, Any]:
        return {"text": c.text, "kind": c.kind, "origin": c.origin, "made": dict(c.made)}

    return {
        **row,
        "chosen": said(chosen),
        "rejected": said(negative.text),
        "negatives": [written(negative)],
        "gentle": [] if gentle is None else [written(gentle)],
        "best_of": dict(how),
    }
