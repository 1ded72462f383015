"""A model's responses to a data set with the values that metrics need; generated, stored and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedExample, Encoder
from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.files.writing import clear_unfinished, write_text
from cwdpo.metrics.base import Answer
from cwdpo.metrics.multiple_choice import spelled
from cwdpo.models.load import Policy
from cwdpo.models.sample import sample
from cwdpo.records import Completion, Example
from cwdpo.scoring.ahead import batches_ahead
from cwdpo.scoring.score import score

FILE = "responses.jsonl"


def collect(
    policy: Policy,
    encoder: Encoder,
    examples: Sequence[Example],
    needs: Iterable[str],
    *,
    temperature: float = 0.0,
    samples: int = 1,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> list[Answer]:
    """Generate and score what the metrics need; returns ``samples`` answers per example, in the order of the examples.

    Args:
        policy: the model.
        encoder: of the model.
        examples: the examples to answer.
        needs: the values to compute, see ``needs`` of :class:`cwdpo.metrics.base.Metric`.
        temperature: of the responses; 0 is greedy.
        samples: responses per example.
        max_new_tokens: largest number of tokens in a response.
        batch_size: prompts per forward pass.
        seed: of the sampler.
        progress: called with (part, done, total).

    Raises:
        DataError: an example cannot be encoded, or has no options although they are needed.
    """
    needs = frozenset(needs)
    policy.model.eval()
    answers = [Answer(e) for e in examples for _ in range(samples)]
    if "text" in needs:
        repeated = [a.example for a in answers]
        done = 0

        def tick(n: int) -> None:
            nonlocal done
            done += n
            progress("responses", done, len(repeated))

        drawn = sample(
            policy.model, encoder, repeated, temperature=temperature, max_new_tokens=max_new_tokens,
            batch_size=batch_size, seed=seed, progress=tick,
        )  # fmt: skip
        answers = [replace(a, text=s.text) for a, s in zip(answers, drawn, strict=True)]
    if "options" in needs:
        found = _options(policy, encoder, examples, batch_size, progress)
        answers = [
            replace(a, option_logps=found[i // samples][0], option_tokens=found[i // samples][1])
            for i, a in enumerate(answers)
        ]
    if "tokens" in needs:
        details = _tokens(policy, encoder, examples, batch_size, progress)
        answers = [
            replace(a, top1=details[i // samples][0], correct=details[i // samples][1])
            for i, a in enumerate(answers)
        ]
    return answers


@torch.no_grad()
def _options(
    policy: Policy,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> list[tuple[tuple[float, ...], tuple[int, ...]]]:
    """For each example, sum_logp (nats) and number of tokens of every option."""
    found = []
    encoded = ([_as_options(encoder, e) for e in part] for part in _parts(examples, batch_size))
    for batch in batches_ahead(policy.model, map(collate, encoded)):
        tokens = score(policy.model, batch)
        sums, lengths = iter(tokens.logp.double().sum(1).tolist()), iter(tokens.mask.sum(1).tolist())
        for row in range(len(batch.example_ids)):
            n = 1 + int((batch.pair_prompt == row).sum())
            found.append((tuple(next(sums) for _ in range(n)), tuple(next(lengths) for _ in range(n))))
        progress("options", len(found), len(examples))
    return found


def _parts(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))


def _as_options(encoder: Encoder, example: Example) -> EncodedExample:
    first, *rest = spelled(Answer(example))
    one = replace(example, chosen=Completion(first), rejected=tuple(map(Completion, rest)))
    encoded = encoder.encode(one, "rejected")
    if len(encoded.negatives) != len(rest):
        raise DataError(f"{example.where or example.id}: options: two of them have the same text")
    return encoded


@torch.no_grad()
def _tokens(
    policy: Policy,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> list[tuple[tuple[float, ...], tuple[bool, ...]]]:
    """For each example, the top-1 probability and correctness on each token of the chosen response."""
    found = []
    encoded = ([encoder.encode(e, "none") for e in part] for part in _parts(examples, batch_size))
    for batch in batches_ahead(policy.model, map(collate, encoded)):
        tokens = score(policy.model, batch, stats=("top1", "correct"))
        for row in range(len(batch.example_ids)):
            inside = tokens.mask[row]
            top1 = tokens.stats["top1"][row][inside].tolist()
            right = tokens.stats["correct"][row][inside].bool().tolist()
            found.append((tuple(top1), tuple(right)))
        progress("tokens", len(found), len(examples))
    return found


def store(folder: Path, answers: Sequence[Answer]) -> None:
    """Write ``responses.jsonl``."""
    rows = (
        {
            "id": a.example.id, "prompt": a.example.prompt_text, "text": a.text, "option_logps": a.option_logps,
            "option_tokens": a.option_tokens, "top1": [round(t, 6) for t in a.top1], "correct": a.correct,
        }
        for a in answers
    )  # fmt: skip
    clear_unfinished(folder / FILE)
    write_text(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_back(folder: Path, examples: Mapping[str, Example]) -> list[Answer]:
    """Read the answers that :func:`store` wrote to a folder.

    Args:
        folder: with ``responses.jsonl``.
        examples: the examples of the data set by id.

    Raises:
        DataError: the folder has no answers, or they belong to another data set.
    """
    rows: list[dict[str, Any]] = read_jsonl(folder / FILE)
    if not rows:
        raise DataError(
            f"{folder}: no responses here; write them with `cwdpo evaluate MODEL --data DATA --out {folder}`"
        )
    unknown = next((r["id"] for r in rows if r["id"] not in examples), None)
    if unknown is not None:
        raise DataError(f"{folder / FILE}: contains an answer to {unknown!r}, which is not in the data set")
    return [
        Answer(
            examples[r["id"]], r["text"], tuple(r["option_logps"]), tuple(r["option_tokens"]), tuple(r["top1"]),
            tuple(r["correct"]),
        )
        for r in rows
    ]  # fmt: skip
