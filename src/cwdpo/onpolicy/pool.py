"""The pool of a run: what its policies said, an append-only ``pool.jsonl`` that a resumed run goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import ServerError
from cwdpo.judging.base import Judge
from cwdpo.models.sample import Decoding, by_length, sample_batch
from cwdpo.negatives.settings import SamplerSettings
from cwdpo.onpolicy.samples import Drawn, DrawnFor, texts_to_judge
from cwdpo.records import Example
from cwdpo.remote import Ask, Client
from cwdpo.rundir import RunDir, read_jsonl

FILE = "pool.jsonl"
ANSWERS = "answers.jsonl"
_TELLING = 4
"""Prompts whose samples are all alike before a server is thought to be greedy."""
_NOT_SAMPLING = ("name", "evaluation", "probes")


class Sampler(Protocol):
    """Draws the samples of one batch of prompts."""

    @property
    def together(self) -> bool:
        """Whether every process draws a share; else the first draws all."""

    def __call__(self, examples: Sequence[Example], seed: int, round_: int) -> list[tuple[Drawn, ...]]:
        """Samples of each example; what is drawn depends on the seed, the round and the example alone."""


class LocalSampler:
    """Samples of a model in this process."""

    together = True

    def __init__(self, model: nn.Module, encoder: Encoder, settings: SamplerSettings) -> None:
        self.model, self.encoder, self.settings = model, encoder, settings

    def __call__(self, examples: Sequence[Example], seed: int, round_: int) -> list[tuple[Drawn, ...]]:
        """Draw; one prefill per prompt."""
        s = self.settings
        decoding = Decoding(s.temperature, s.top_p, s.max_new_tokens)
        keys = [f"round {round_}\0{e.id}" for e in examples]
        drawn = sample_batch(self.model, self.encoder, examples, s.samples, decoding, seed, keys)
        return [
            # Rounded as it is stored: a resumed run reads the same number.
            tuple(Drawn(d.text, d.ended, d.n_tokens, round(d.mean_logp or 0.0, 6)) for d in own)
            for own in drawn
        ]


class ServerSampler:
    """Samples of whatever model a server holds; they tell no mean_logp.

    Log-probabilities of other engines differ from those that train (vllm#12699), so none is asked for.
    """

    together = False

    def __init__(self, settings: SamplerSettings, store: Path, model: str | None = None) -> None:
        assert settings.server is not None
        server = settings.server if model is None else settings.server.model_copy(update={"model": model})
        self.client, self.settings = Client(server, store), settings

    def __call__(self, examples: Sequence[Example], seed: int, round_: int) -> list[tuple[Drawn, ...]]:
        """Ask; every sample is a request of its own, with a seed of its own where the server heeds it."""
        n = self.settings.samples
        answers = self.client.ask([self._ask(e, seed, round_, k) for e in examples for k in range(n)])
        drawn = [Drawn(a.text, a.ended) for a in answers]
        found = [tuple(drawn[start : start + n]) for start in range(0, len(drawn), n)]
        if n > 1 and len(found) >= _TELLING and all(len({d.text for d in own}) == 1 for own in found):
            raise ServerError(
                f"{self.client.settings.base_url}: all {n} samples of each of {len(found)} prompts are alike: the "
                f"server ignores temperature = {self.settings.temperature:g}. transformers serve samples only with "
                """sampler.server.extra_body: {generation_config: '{"do_sample": true, "top_k": 0}'}"""
            )
        return found

    def _ask(self, example: Example, seed: int, round_: int, k: int) -> Ask:
        s = self.settings
        text = f"{seed}\0{round_}\0{example.id}\0{k}"
        own = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
        return Ask(example.prompt, example.images, s.temperature, s.top_p, s.max_new_tokens, k, own)


class Pool:
    """Samples by round and example, stored batch by batch.

    Rows of other settings, another round's or another prompt's never match: the key covers the recipe (without
    what is measured after or beside training), the round, the id and the prompt's tokens and pictures.

    Args:
        run: whose ``pool.jsonl`` it is; nothing is written where ``run.writes`` is not set.
        recipe: of the run.
    """

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        self.run, self.seed, self.settings = run, recipe.seed, recipe.negatives
        tree = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in _NOT_SAMPLING}
        self._mark = yaml.safe_dump(tree)
        # One process writes while others might read: all take what the first one read.
        stored = {row["key"]: row for row in read_jsonl(run.path / FILE)} if run.writes else {}
        self._stored: dict[str, dict[str, Any]] = broadcast_object_list([stored])[0]

    def fill(
        self,
        examples: Sequence[Example],
        sampler: Sampler,
        encoder: Encoder,
        judge: Judge | None,
        round_: int,
        step: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, DrawnFor]:
        """Samples for each example: those that are stored, and new ones for the rest.

        A batch that is stored in part is drawn again as a whole, because a row's last bits depend on the rows that
        it was padded with. All processes call this together; each draws its share of the batches.

        Args:
            examples: with different ids.
            sampler: the policy as it stands.
            encoder: orders the prompts by length.
            judge: says which samples are right.
            round_: the round.
            step: the policy's step.
            progress: called with completions done and in all.
        """
        state, found = PartialState(), dict[str, DrawnFor]()
        keys = {e.id: self._key(encoder, e, round_) for e in examples}
        size, n = self.settings.sampler.batch_size, self.settings.sampler.samples
        batches = [[examples[i] for i in index] for index in by_length(encoder, examples, size)]
        stripe = state.num_processes if sampler.together else 1
        for first in range(0, len(batches), stripe):
            these = batches[first : first + stripe]
            own = (
                these[state.process_index : state.process_index + 1]
                if sampler.together or state.is_main_process
                else []
            )
            drawn = [row for batch in own for row in self._drawn(batch, keys, sampler, round_, step)]
            if state.num_processes > 1:
                drawn = gather_object(drawn)
            if state.is_main_process:
                drawn = self._store(these, drawn, keys, judge)
            rows: list[DrawnFor] = broadcast_object_list([drawn])[0]
            found |= {row.id: row for row in rows}
            progress(len(found) * n, len(examples) * n)
        return found

    def _drawn(
        self, batch: Sequence[Example], keys: dict[str, str], sampler: Sampler, round_: int, step: int
    ) -> list[DrawnFor]:
        if all(keys[e.id] in self._stored for e in batch):
            return [DrawnFor.from_json(self._stored[keys[e.id]]) for e in batch]
        s = self.settings.sampler
        made = {"temperature": s.temperature, "top_p": s.top_p, "seed": self.seed}
        samples = sampler(batch, self.seed, round_)
        return [DrawnFor(e.id, round_, step, own, made) for e, own in zip(batch, samples, strict=True)]

    def _store(
        self,
        batches: Sequence[Sequence[Example]],
        rows: list[DrawnFor],
        keys: dict[str, str],
        judge: Judge | None,
    ) -> list[DrawnFor]:
        """Judge what is new, append it, whole lines at once."""
        by_id = {e.id: e for batch in batches for e in batch}
        new = [row for row in rows if keys[row.id] not in self._stored]
        # Of a batch that was stored in part, what is stored counts: it has been judged already.
        rows = [DrawnFor.from_json(self._stored.get(keys[row.id], row.to_json())) for row in rows]
        if judge is not None and new:
            judged = judge_rows(judge, [by_id[row.id] for row in new], new, self.run.path)
            fresh = {row.id: row for row in judged}
            rows = [fresh.get(row.id, row) for row in rows]
            new = judged
        self.run.append(FILE, ({"key": keys[row.id], **row.to_json()} for row in new))
        return rows

    def _key(self, encoder: Encoder, example: Example, round_: int) -> str:
        prompt = encoder.prompt(example)
        parts = [self._mark, round_, example.id, prompt.input_ids, prompt.image_digest]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def judge_rows(
    judge: Judge, examples: Sequence[Example], rows: Sequence[DrawnFor], store: Path | None = None
) -> list[DrawnFor]:
    """The rows, their samples marked right or wrong by the judge; ``store``: folder of its answers."""
    places = texts_to_judge(rows)
    asked = [examples[i] for i, _ in places]
    right = judge.right(asked, [rows[i].samples[k].text for i, k in places], store=store)
    known = dict(zip(places, right, strict=True))
    return [
        replace(row, samples=tuple(replace(s, right=known.get((i, k))) for k, s in enumerate(row.samples)))
        for i, row in enumerate(rows)
    ]
