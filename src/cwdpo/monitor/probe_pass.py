"""One scoring pass over a fixed set of held-out responses; the probes compute readings from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample
from cwdpo.data.encode.reading import read_ahead
from cwdpo.models.turns import in_turns
from cwdpo.objectives.base import Scale
from cwdpo.probes.base import HeldOut
from cwdpo.scoring.ahead import begun
from cwdpo.scoring.score import score
from cwdpo.scoring.token_logp import output_head
from cwdpo.scoring.token_stats import DETAILS

MAX_STORED = 1 << 26
"""Largest number of log-probabilities kept for the divergences of a response type (256 MiB of fp32)."""
PADDING = 512
"""A batch may have this many tokens of padding: they cost less than another forward pass."""
MOST_AT_ONCE = 32
"""Prompts of a forward pass, unless fewer are asked for."""
WHOLE = ("chosen", "chosen_initial")
"""Response types whose full vocabulary distributions are kept (for KL, TV and JS)."""


class ProbeSet:
    """A fixed set of held-out completions, with their scores at the start of the stage.

    Args:
        examples: encoded held-out examples; the kind of a negative is its response type.
        model: the policy at the start of the stage.
        batch_size: largest number of prompts in a forward pass.
        extras: further responses by example id; their ``kind`` is the response type.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        model: nn.Module,
        batch_size: int = MOST_AT_ONCE,
        extras: Mapping[str, Sequence[EncodedCompletion]] | None = None,
    ) -> None:
        rows = []
        sources = tuple(example.source for example in examples)
        self._sources = sources if any(sources) else ()
        for index, example in enumerate(examples):
            added = (extras or {}).get(example.id, ())
            own = [_Response("chosen", example.chosen, index)]
            own += [_Response(c.kind or "rejected", c, index, negative=True) for c in example.negatives]
            own += [_Response(c.kind, c, index) for c in added]
            rows.append((with_responses(example, added), own))
        self._keep_whole([r for _, own in rows for r in own], vocabulary_size(model))
        self._batches = [
            _Batch(collate([e for e, _ in part]), [r for _, own in part for r in own])
            for part in _of_like_length(rows, batch_size)
        ]
        responses = [r for part in self._batches for r in part.responses]
        self._order = sorted(
            range(len(responses)), key=lambda i: (responses[i].kind != "chosen", responses[i].prompt)
        )
        self._responses = [responses[i] for i in self._order]
        self._first: HeldOut | None = None  # the first measurement is compared with itself
        self._first = self.measure(model)

    @staticmethod
    def _keep_whole(responses: Sequence[_Response], vocabulary: int) -> None:
        """Mark the first responses of each type in :data:`WHOLE`, as many as :data:`MAX_STORED` allows to keep."""
        for kind in WHOLE:
            tokens = 0
            for response in (r for r in responses if r.kind == kind):
                tokens += len(response.completion.ids)
                if tokens * vocabulary > MAX_STORED:
                    break
                response.whole = True

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int = 0, scale: Scale | None = None) -> HeldOut:
        """Score every response of the set once with the current policy."""
        was_training = model.training
        model.eval()
        batches = read_ahead(self._batches, lambda one: one.begun(model), lambda one: len(one.batch.prompts))
        with in_turns(model):
            found = [one for batch in batches for one in batch.scored(model)]
        model.train(was_training)
        found = [found[i] for i in self._order]
        both = list(zip(self._responses, found, strict=True))
        sum_logp = torch.stack([f.logp.sum() for f in found])
        whole = {kind: [f.whole for r, f in both if r.whole and r.kind == kind] for kind in WHOLE}
        now = {kind: torch.cat(parts) for kind, parts in whole.items() if parts}
        # Distributions now and at the start of the stage: those on chosen tokens become `logp` and `start_logp`, those
        # on sampled tokens become `own`.
        first = self._first
        start = now if first is None else {"chosen": first.logp, **{k: p for k, (p, _) in first.own.items()}}
        pairs = {kind: (logp, start[kind]) for kind, logp in now.items()}
        logp, start_logp = pairs.pop("chosen", (None, None))
        chosen = [f for r, f in both if r.kind == "chosen"]
        return HeldOut(
            kinds=tuple(r.kind for r in self._responses),
            prompt=torch.tensor([r.prompt for r in self._responses]),
            sum_logp=sum_logp,
            start_sum_logp=sum_logp if first is None else first.sum_logp,
            n_tokens=torch.tensor([len(f.logp) for f in found]),
            entropy=torch.cat([f.entropy for f in chosen]),
            top1=torch.cat([f.top1 for f in chosen]),
            correct=torch.cat([f.correct for f in chosen]),
            logp=logp,
            start_logp=start_logp,
            scale=scale or Scale(),
            step=step,
            negative=torch.tensor([r.negative for r in self._responses]),
            origins=tuple(r.completion.origin for r in self._responses),
            sum_p=torch.stack([f.logp.exp().sum() for f in found]),
            own=pairs,
            sources=self._sources,
        )

    def at_start(self, scale: Scale | None = None) -> HeldOut:
        """The measurement from when the set was created."""
        assert self._first is not None
        return replace(self._first, scale=scale or Scale())


@dataclass
class _Response:
    """A response of the set; ``whole``: whether its distributions over the vocabulary are kept."""

    kind: str
    completion: EncodedCompletion
    prompt: int
    negative: bool = False
    whole: bool = False


class _Scored(NamedTuple):
    """Scores of one response of C tokens: each [C], and ``whole`` [C, V] if its distributions are kept."""

    logp: Tensor
    entropy: Tensor
    top1: Tensor
    correct: Tensor
    whole: Tensor


@dataclass(frozen=True)
class _Batch:
    """A batch and its responses, in the order of the batch's completions."""

    batch: PromptBatch
    responses: Sequence[_Response]

    def begun(self, model: nn.Module) -> _Batch:
        """The batch whose images are read from now on."""
        return replace(self, batch=begun(model, self.batch))

    def scored(self, model: nn.Module) -> list[_Scored]:
        """Score every response of the batch in one forward pass."""
        wanted = torch.tensor([r.whole for r in self.responses])
        tokens = score(model, self.batch, stats=DETAILS, whole=wanted)
        lengths = [len(r.completion.ids) for r in self.responses]
        kept = [n if r.whole else 0 for n, r in zip(lengths, self.responses, strict=True)]
        assert tokens.whole is not None
        whole = tokens.whole.cpu().split(kept)
        columns = [tokens.logp.double(), *(tokens.stats[name] for name in DETAILS)]
        logp, entropy, top1, correct = (c.cpu() for c in columns)
        return [
            _Scored(logp[i, :n], entropy[i, :n], top1[i, :n], correct[i, :n], whole[i])
            for i, n in enumerate(lengths)
        ]


_Row = tuple[EncodedExample, list[_Response]]


def _row_length(row: _Row) -> int:
    example, own = row
    return len(example.prompt.input_ids) + sum(len(r.completion.ids) for r in own)


def _of_like_length(rows: Sequence[_Row], most: int) -> Iterator[list[_Row]]:
    """Batches of prompts with all their responses, sorted by length so that there is little padding."""
    part: list[_Row] = []
    tokens = 0
    for row in sorted(rows, key=_row_length):
        length = _row_length(row)
        padding = len(part) * length - tokens
        if len(part) == most or padding > max(PADDING, tokens // 10):
            yield part
            part, tokens = [], 0
        part.append(row)
        tokens += length
    if part:
        yield part


def with_responses(example: EncodedExample, added: Sequence[EncodedCompletion]) -> EncodedExample:
    """The example with further responses appended to its negatives, so that they are scored together."""
    return replace(example, negatives=(*example.negatives, *added))


def vocabulary_size(model: nn.Module) -> int:
    """Number of tokens in the vocabulary of the model's output head."""
    weight = output_head(model).weight
    return int(weight.shape[0])
