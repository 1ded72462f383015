"""The pool of a run: all samples of its policies, in an append-only ``pool.jsonl`` that a resumed run uses again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.reading import read_ahead
from cwdpo.judging.base import Judge
from cwdpo.models.sample import by_length
from cwdpo.onpolicy.sampler import BatchSampler, Sampler
from cwdpo.onpolicy.samples import PromptSamples, texts_to_judge
from cwdpo.records import Example, Sample
from cwdpo.rundir import RunDir
from cwdpo.waiting import from_first, of_all

FILE = "pool.jsonl"
_NOT_SAMPLING = ("name", "evaluation", "probes")


class Pool:
    """Samples by round and example, stored batch by batch.

    A stored row is used only for the same recipe (except its name, evaluation and probes), round, example id, prompt
    tokens and images: its key is a digest of all of these.

    Args:
        run: the run with ``pool.jsonl``; only a process with ``run.writes`` writes it.
        recipe: the run's recipe.
        encoder: gives the prompts' lengths, so that prompts of similar length are sampled together.
        judge: decides which samples are right; ``None`` for no judge.
    """

    def __init__(self, run: RunDir, recipe: Recipe, encoder: Encoder, judge: Judge | None) -> None:
        self.run, self.seed, self.settings = run, recipe.seed, recipe.negatives
        self.encoder, self.judge = encoder, judge
        tree = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in _NOT_SAMPLING}
        del tree["train"]["dataloader_workers"]  # the samples do not depend on it
        server = recipe.negatives.sampler.server
        if server is not None:  # nor on how it is asked, nor on which of several servers answers
            known = ("model", "extra_body", *(("base_url",) if isinstance(server.base_url, str) else ()))
            tree["negatives"]["sampler"]["server"] = {key: getattr(server, key) for key in known}
        self._mark = yaml.safe_dump(tree)
        # The first process reads the file and sends its rows to the others, which must not read while it writes.
        stored = {row["key"]: row for row in run.rows(FILE)} if run.writes else {}
        self._stored: dict[str, dict[str, Any]] = from_first(stored, "reading stored samples")

    def fill(
        self,
        examples: Sequence[Example],
        sampler: Sampler,
        round_: int,
        step: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, PromptSamples]:
        """Samples for each example, by id: the stored ones, and new ones for the other examples.

        A batch that is stored only in part is sampled again completely, because the last bits of a row depend on the
        other rows of its batch. All processes call this together; each samples a part of the batches.

        Args:
            examples: examples with different ids.
            sampler: samples the current policy.
            round_: number of the round.
            step: optimizer step of the policy.
            progress: called with (completions done, completions in all).
        """
        state, found = PartialState(), dict[str, PromptSamples]()
        keys = {e.id: self._key(e, round_) for e in examples}
        n, batches = self.settings.sampler.samples, self._batches(examples)
        stripe = state.num_processes if sampler.together else 1
        groups = [batches[first : first + stripe] for first in range(0, len(batches), stripe)]
        mine = state.process_index if sampler.together else 0 if state.is_main_process else stripe
        own = [batch for group in groups for batch in group[mine : mine + 1]]

        def begun(batch: list[Example]) -> list[Example]:
            if not self._has(batch, keys):
                sampler.begin(batch, self.seed, round_)
            return batch

        coming = read_ahead(own, begun, len)
        for these in groups:
            with sampler.at_work():
                drawn = [
                    row
                    for batch in islice(coming, len(these[mine : mine + 1]))
                    for row in self._drawn(batch, keys, sampler, round_, step)
                ]
            drawn = of_all(drawn, "sampling")
            if state.is_main_process:
                drawn = self._store(these, drawn, keys)
            rows = from_first(drawn, "judging samples")
            found |= {row.id: row for row in rows}
            progress(len(found) * n, len(examples) * n)
        return found

    def fill_by(
        self,
        examples: Sequence[Example],
        sampler: BatchSampler,
        round_: int,
        step: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, PromptSamples]:
        """The same samples as :meth:`fill`, by a sampler that works on many batches and finishes them in any order.

        A batch is judged and stored when it arrives. Only one process calls this.

        Args:
            examples, round_, step, progress: see :meth:`fill`.
            sampler: gets the batches that are not stored.
        """
        keys = {e.id: self._key(e, round_) for e in examples}
        batches = self._batches(examples)
        stored = [e for batch in batches if self._has(batch, keys) for e in batch]
        found = {e.id: PromptSamples.from_json(self._stored[keys[e.id]]) for e in stored}
        missing = [batch for batch in batches if not self._has(batch, keys)]
        n = self.settings.sampler.samples
        progress(len(found) * n, len(examples) * n)
        # Closed at once if judging fails, so that the sampler's processes end before the error is shown.
        with closing(sampler.drawn(missing, self.seed, round_)) as arriving:
            for number, samples in arriving:
                batch = missing[number]
                rows = self._store([batch], self._rows(batch, samples, round_, step), keys)
                found |= {row.id: row for row in rows}
                progress(len(found) * n, len(examples) * n)
        return found

    def _batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        size = self.settings.sampler.batch_size
        return [[examples[i] for i in index] for index in by_length(self.encoder, examples, size)]

    def _has(self, batch: Sequence[Example], keys: Mapping[str, str]) -> bool:
        """Whether all samples of a batch are stored."""
        return all(keys[e.id] in self._stored for e in batch)

    def _drawn(
        self, batch: Sequence[Example], keys: dict[str, str], sampler: Sampler, round_: int, step: int
    ) -> list[PromptSamples]:
        if self._has(batch, keys):
            return [PromptSamples.from_json(self._stored[keys[e.id]]) for e in batch]
        return self._rows(batch, sampler(batch, self.seed, round_), round_, step)

    def _rows(
        self, batch: Sequence[Example], samples: Sequence[tuple[Sample, ...]], round_: int, step: int
    ) -> list[PromptSamples]:
        s = self.settings.sampler
        made = {"temperature": s.temperature, "top_p": s.top_p, "seed": self.seed}
        return [PromptSamples(e.id, round_, step, own, made) for e, own in zip(batch, samples, strict=True)]

    def _store(
        self,
        batches: Sequence[Sequence[Example]],
        rows: list[PromptSamples],
        keys: dict[str, str],
    ) -> list[PromptSamples]:
        """Judge the new rows and append them to the file; return all rows with their judgements."""
        by_id = {e.id: e for batch in batches for e in batch}
        new = [row for row in rows if keys[row.id] not in self._stored]
        # If a batch was stored in part, use its stored rows: they have been judged already.
        rows = [PromptSamples.from_json(self._stored.get(keys[row.id], row.to_json())) for row in rows]
        if self.judge is not None and new:
            judged = judge_rows(self.judge, [by_id[row.id] for row in new], new, self.run.path)
            fresh = {row.id: row for row in judged}
            rows = [fresh.get(row.id, row) for row in rows]
            new = judged
        self.run.append(FILE, ({"key": keys[row.id], **row.to_json()} for row in new))
        self.run.record()
        return rows

    def _key(self, example: Example, round_: int) -> str:
        prompt = self.encoder.prompt(example)
        parts = [self._mark, round_, example.id, prompt.input_ids, prompt.image_digest]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def judge_rows(
    judge: Judge, examples: Sequence[Example], rows: Sequence[PromptSamples], store: Path | None = None
) -> list[PromptSamples]:
    """The rows with each sample marked right or wrong by the judge; ``store`` is the folder for the judge's answers."""
    places = texts_to_judge(rows)
    asked = [examples[i] for i, _ in places]
    right = judge.right(asked, [rows[i].samples[k].text for i, k in places], store=store)
    known = dict(zip(places, right, strict=True))
    return [
        replace(row, samples=tuple(replace(s, right=known.get((i, k))) for k, s in enumerate(row.samples)))
        for i, row in enumerate(rows)
    ]
