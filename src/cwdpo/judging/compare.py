"""Verdicts on pairs of responses, win rates with intervals, and Bradley-Terry strengths of several methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cwdpo.errors import optional_package
from cwdpo.judging.base import WORTH, Judge, Verdict, label_of, verdict_of
from cwdpo.judging.win_rate import win_rate
from cwdpo.records import Example
from cwdpo.worlds.judged import is_judgeable

STRENGTH_RESAMPLES = 300


def verdicts(
    judge: Judge,
    examples: Sequence[Example],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    store: Path | None = None,
) -> list[Verdict]:
    """For each example, the verdict on our response against theirs.

    Args:
        judge: scores the responses.
        examples: B prompts.
        ours, theirs: one response to each prompt.
        store: folder for transcripts and for answers that can be reused.
    """
    pairs = judge.scores(examples, list(zip(ours, theirs, strict=True)), store=store)
    return [verdict_of(*pair) for pair in pairs]


def kind_of(example: Example) -> str:
    """The kind of an example's prompt: its column ``kind`` or ``category``, or in the world caption or question."""
    for key in ("kind", "category"):
        value = example.extra.get(key)
        if isinstance(value, str) and value:
            return value
    if is_judgeable(example):
        return "caption" if example.prompt_text.startswith("describe") else "question"
    return "all"


def wins(examples: Sequence[Example], said: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Win rates with bootstrap intervals over prompts: for ``all`` prompts and, if there are several, for each kind.

    Args:
        examples: examples with the same id are samples of one prompt.
        said: one verdict per example.
    """
    kinds = [kind_of(e) for e in examples]
    groups = {"all": list(range(len(examples)))}
    if len(set(kinds)) > 1:
        groups |= {k: [i for i, own in enumerate(kinds) if own == k] for k in sorted(set(kinds))}
    found = {}
    for name, index in groups.items():
        by_prompt: dict[str, list[float]] = {}
        for i in index:
            by_prompt.setdefault(examples[i].id, []).append(WORTH[said[i]])
        rows = _rectangle(list(by_prompt.values()))
        rate = win_rate(rows, [[0.5] * len(r) for r in rows])
        bad = sum(said[i] == "bad" for i in index)
        found[name] = {**asdict(rate), "bad_answers": bad}
    return found


def _rectangle(rows: list[list[float]]) -> list[list[float]]:
    """Make all rows equally long without changing their means: repeat their values, or replace them by their mean."""
    longest = max(map(len, rows))
    if all(longest % len(r) == 0 for r in rows):
        return [r * (longest // len(r)) for r in rows]
    return [[sum(r) / len(r)] for r in rows]


def strengths(
    names: Sequence[str], worth: Mapping[tuple[str, str], Sequence[float]], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Bradley-Terry log-strengths (choix), mean 0, with bootstrap intervals over prompts.

    Args:
        names: the methods.
        worth: for each pair of methods, the points of the first one for each prompt: 1 win, 0.5 tie, 0 loss. All pairs
            have the same prompts in the same order.
        seed: of the bootstrap.

    Returns:
        ``name``, ``value``, ``low`` and ``high`` for each method, best first.
    """
    choix = optional_package("choix", "Bradley-Terry over several runs", "pip install 'cwdpo[judge]'")
    n = len(next(iter(worth.values())))

    def fit(index: Any) -> Any:
        table = np.zeros((len(names), len(names)))
        for (a, b), values in worth.items():
            won = float(np.asarray(values)[index].sum())
            i, j = names.index(a), names.index(b)
            table[i, j] += won
            table[j, i] += len(index) - won
        # A small prior, because a method that never loses would have infinite strength.
        return choix.ilsr_pairwise_dense(table, alpha=0.01)

    rng = np.random.default_rng(seed)
    value = fit(np.arange(n))
    drawn = np.array([fit(rng.integers(0, n, n)) for _ in range(STRENGTH_RESAMPLES)]) if n > 1 else None
    rows = []
    for i, name in enumerate(names):
        low, high = (None, None) if drawn is None else map(float, np.percentile(drawn[:, i], [2.5, 97.5]))
        rows.append({"name": name, "value": float(value[i]), "low": low, "high": high})
    return sorted(rows, key=lambda row: -float(row["value"]))


def tournament(
    names: Sequence[str],
    judge: Judge,
    examples: Sequence[Example],
    texts: Mapping[str, Sequence[str]],
    *,
    store: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare every pair of methods on the same prompts: win rates, and with three or more methods their strengths.

    Args:
        names: the methods.
        judge: scores the responses.
        examples: the prompts.
        texts: for each method, one response per example.
        store: folder for transcripts and for answers that can be reused.
        tell: called with an estimate of the judge's cost before it starts.
    """
    pairs = list(combinations(names, 2))
    for a, b in pairs:
        cost = judge.estimate(examples, list(zip(texts[a], texts[b], strict=True)), store=store)
        if cost:
            tell(f"{a} against {b}: {cost}")
    rows, worth = [], {}
    for a, b in pairs:
        said = verdicts(judge, examples, texts[a], texts[b], store=store)
        worth[a, b] = [WORTH[v] for v in said]
        for kind, rate in wins(examples, said).items():
            rows.append({"ours": a, "theirs": b, "kind": kind, "judge": label_of(judge), **rate})
    return rows, strengths(names, worth) if len(names) > 2 else []
