"""A preference set whose chosen responses are only better, not right: the best of n samples by a judge that errs.

What real preference data is like: nobody wrote the right answer, several answers of a policy were compared, and
the comparison was sometimes wrong. Rows are written in TRL's columns with this project's own, the seed recorded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.files.writing import write_json
from cwdpo.lab.rows import store_rows
from cwdpo.lab.worlds import MAX_NEW_TOKENS
from cwdpo.models.load import Policy
from cwdpo.models.sample import sample
from cwdpo.records import Completion, Example
from cwdpo.worlds.judged import judge_captions, scene_of
from cwdpo.worlds.shapes import Judgement, hard

SHARES = {"other_prompt": 0.31, "sample": 0.31, "perturbed": 0.38}
"""What stands against chosen: another picture's caption, a worse sample, one wrong word (of the design study)."""
_TRIES = 20


def write_best_of(
    policy: Policy, encoder: Encoder, source: Path, out: Path, *, seed: int, n: int = 8, noise: float = 0.3
) -> dict[str, Any]:
    """Sample ``n`` responses to every prompt, choose by a noisy judge, and write ``out/train.jsonl``.

    Every rejected response is truly worse than chosen by the exact judge. Rows for which none is found are left out.

    Args:
        policy: what is sampled, at temperature 1.
        source: a JSONL file of the embedded world; its pictures are copied next to the new rows.
        out: folder to write.
        seed: of samples, noise and choice of negatives.
        n: samples per prompt.
        noise: share of samples whose score is drawn at random.

    Returns:
        ``rows``, ``left_out``, and of the chosen responses ``chosen_right`` (share) and ``chosen_score`` (mean).

    Raises:
        DataError: the rows are not the embedded world's.
    """
    rows = read_jsonl(source)
    examples = read_examples(source).examples
    if len(rows) != len(examples):
        raise DataError(
            f"{source}: {len(examples)} of {len(rows)} rows can be used; look at `cwdpo validate {source}`"
        )
    repeated = [e for e in examples for _ in range(n)]
    texts = [
        s.text for s in sample(policy.model, encoder, repeated, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    ]
    judged = judge_captions(repeated, texts)
    made: list[dict[str, Any]] = []
    marks = []
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        own = list(zip(texts[i * n : (i + 1) * n], judged[i * n : (i + 1) * n], strict=True))
        rng = random.Random(f"best_of/{seed}/{example.id}")
        others = [examples[rng.randrange(len(examples))].chosen.text for _ in range(_TRIES)]
        found = _chosen(row, example, own, others, noise, rng)
        if found is not None:
            new, mark = found
            made.append({**new, "best_of": {"n": n, "noise": noise, "seed": seed, **new["best_of"]}})
            marks.append(mark)
    if not made:
        raise DataError(
            f"{source}: no sampled response is better than any other: nothing can be learned from them"
        )
    store_rows(source.parent, out, made)
    counts = {
        "rows": len(made),
        "left_out": len(rows) - len(made),
        "chosen_right": sum(j.all_correct for j in marks) / len(marks),
        "chosen_score": sum(j.score for j in marks) / len(marks),
    }
    write_json(out / "best_of.json", {**counts, "source": source.name, "n": n, "noise": noise, "seed": seed})
    return counts


def _chosen(
    row: Mapping[str, Any],
    example: Example,
    own: Sequence[tuple[str, Judgement]],
    others: Sequence[str],
    noise: float,
    rng: random.Random,
) -> tuple[dict[str, Any], Judgement] | None:
    """The row with what the noisy judge prefers as chosen, and its true judgement; ``None`` where nothing is worse."""
    seen = [rng.random() if rng.random() < noise else mark.score for _, mark in own]
    best = max(range(len(own)), key=lambda k: (seen[k], -k))
    text, mark = own[best]
    negative = _worse(example, text, mark.score, [t for t, _ in own], others, rng) if text else None
    if negative is None:
        return None
    how = {"score": round(mark.score, 4), "seen": round(seen[best], 4)}
    return _row(row, text, negative, _gentle(example, text, rng), how), mark


def _worse(
    example: Example, chosen: str, score: float, own: Sequence[str], others: Sequence[str], rng: random.Random
) -> Completion | None:
    """A response that the exact judge finds worse than chosen; kinds are tried in an order drawn by their shares."""
    kinds = list(SHARES)
    drawn = rng.choices(kinds, list(SHARES.values()))[0]
    for kind in (drawn, *(k for k in kinds if k != drawn)):
        found = _candidates(kind, example, chosen, own, others, rng)
        distinct = [c for c in found if c.text.strip() and c.text != chosen]
        marks = judge_captions([example] * len(distinct), [c.text for c in distinct])
        worse = [c for c, j in zip(distinct, marks, strict=True) if j.score < score]
        if worse:
            return worse[0]
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
    except DataError:  # chosen is no sentence, so no word of it can be exchanged
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
    def said(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

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
