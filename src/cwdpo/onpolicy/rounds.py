"""Stage 2 in rounds: one Trainer over all of them, whose data changes at each boundary.

A round is an epoch of a data set of fixed length. Before it begins, the policy as it stands is sampled for the
round's prompts, negatives are blended, and the new ones get their reference values. Nothing of a round is
decided earlier: the loader reads its first batch behind the boundary.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import EncodedExample, Encoder
from cwdpo.errors import DataError, RecipeError
from cwdpo.judging.base import judge_for
from cwdpo.models.load import Policy
from cwdpo.monitor.window import added_share
from cwdpo.negatives.mix import seeded
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.objectives.base import Objective
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.onpolicy.blend import BlendCounts, blend
from cwdpo.onpolicy.pool import ANSWERS, LocalSampler, Pool, Sampler, ServerSampler
from cwdpo.onpolicy.samples import DrawnFor, outside, sort_samples
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.prepare import autocast, encode_usable, wants_calibration
from cwdpo.trainer.trainer import PreferenceTrainer

FILE = "rounds.jsonl"
_SHOWN = 12
"""Pairs of a round that its row keeps for the report."""

ReferenceValues = Callable[[Policy, Sequence[EncodedExample], Objective], list[EncodedExample]]


class RoundData(Dataset[EncodedExample]):
    """The examples of the round that runs; its length never changes."""

    def __init__(self, length: int) -> None:
        self._length, self._rows = length, list[EncodedExample]()

    def fill(self, rows: Sequence[EncodedExample]) -> None:
        """Take a round's examples, again from the first where there are fewer than the length."""
        self._rows = [rows[i % len(rows)] for i in range(self._length)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> EncodedExample:
        return self._rows[index]

    def __iter__(self) -> Iterator[EncodedExample]:
        return iter(self._rows)


class StartWeights:
    """The reference of all rounds: the trained parameters as they were when the stage began.

    One copy of them on the CPU (with LoRA that is the adapter), and of one parameter more while they are
    exchanged. Exchanged back, the policy has its own values to the last bit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = {
            n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad
        }

    @contextlib.contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """``model`` with the stage's first weights."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self._kept:
                now = parameter.detach().to("cpu", copy=True)
                parameter.copy_(self._kept[name])
                self._kept[name] = now


@dataclass(frozen=True)
class Plan:
    """Steps and prompts by round.

    ``steps``: optimizer steps of the stage; ``per_round``: of every round but the last, which may be shorter;
    ``batch``: prompts of one optimizer step over all processes.
    """

    steps: int
    per_round: int
    batch: int

    @classmethod
    def of(cls, recipe: Recipe, n_examples: int, processes: int) -> Plan:
        """The recipe's steps, or its epochs, in ``negatives.rounds`` rounds."""
        batch = recipe.train.batch_size * recipe.train.gradient_accumulation_steps * processes
        steps = recipe.stage2.steps or math.ceil(recipe.stage2.epochs * math.ceil(n_examples / batch))
        rounds = recipe.negatives.rounds
        per_round = math.ceil(steps / rounds)
        if (rounds - 1) * per_round >= steps:
            raise RecipeError(
                f"negatives.rounds: {rounds} rounds of {per_round} steps do not fit into {steps} steps of stage 2; "
                "take fewer rounds or more steps"
            )
        return cls(steps, per_round, batch)

    def prompts(self, ids: Sequence[str], round_: int, seed: int) -> list[str]:
        """The ids that a round trains on: a stretch of an endless, reshuffled list of all ids."""
        first, n = round_ * self.per_round * self.batch, self.per_round * self.batch
        epochs = range(first // len(ids), (first + n - 1) // len(ids) + 1)
        order: list[str] = []
        for epoch in epochs:
            rng: random.Random = seeded(seed, "order", epoch)
            order += rng.sample(sorted(ids), len(ids))
        start = first - epochs[0] * len(ids)
        return order[start : start + n]


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Prepares each round at its boundary, and a round that was begun again when a run resumes.

    Args:
        recipe: of the run; ``negatives.on_policy_fraction`` is set.
        policy: as it stands at the start of stage 2: the reference of every round.
        encoder: the checkpoint's encoder.
        examples: of stage 2, their ``rejected`` as the data has them.
        run: where pool, counts and calibrations go.
        objective: of stage 2, calibrated.
        reference_values: the reference pass, with the negatives that the objective filters left out.
        on_sample: called with (round, completions done, in all).

    Attributes:
        data: what the trainer trains on.
        objective: with the floor and tau of the round that runs.
        trainer: whose policy is sampled and whose objective is cooled again; see :meth:`steer`.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        encoder: Encoder,
        examples: Sequence[Example],
        run: RunDir,
        objective: Objective,
        reference_values: ReferenceValues,
        on_sample: Callable[[int, int, int], None] = lambda round_, done, total: None,
    ) -> None:
        if not examples:
            raise DataError("no example is left for stage 2; look at data.stage1_fraction")
        self.recipe, self.settings, self.policy, self.encoder = recipe, recipe.negatives, policy, encoder
        self.examples = {e.id: e for e in examples}
        if len(self.examples) < len(examples):
            raise DataError(
                "stage 2 has two rows with the same id; rounds find samples by id: make them differ"
            )
        self.run, self.objective, self._reference_values = run, objective, reference_values
        self.on_sample = on_sample
        self.plan = Plan.of(recipe, len(examples), PartialState().num_processes)
        self.data = RoundData(self.plan.per_round * self.plan.batch)
        self.trainer: PreferenceTrainer | None = None
        self._auto = wants_calibration(recipe.stage2.build())
        self._judge = judge_for(self.settings.judge, examples)
        self._pool: Pool | None = None
        # With one round, too: a run that resumes in it prepares it with a policy that has moved.
        self._start = StartWeights(policy.model) if objective.needs_reference else None

    def steer(self, trainer: PreferenceTrainer) -> None:
        """Take part in a training: its epochs are rounds, and it ends after the last one's last step."""
        self.trainer = trainer
        trainer.args.max_steps = self.plan.steps
        trainer.add_callback(self)

    def _model_now(self) -> nn.Module:
        """The policy as it stands, with all of its weights; all processes call this together."""
        return self.policy.model if self.trainer is None else self.trainer.whole_model()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A round begins, or a resumed one goes on."""
        self.begin(state.global_step // self.plan.per_round)

    def begin(self, round_: int) -> None:
        """Sample, blend, score, and put the round's examples into :attr:`data`.

        Raises:
            DataError: no usable negative is left.
        """
        step = round_ * self.plan.per_round
        order = self.plan.prompts(list(self.examples), round_, self.recipe.seed)
        examples = self._readable(order)
        settings = self._settings_of(round_, step)
        drawn = self._sample(examples, settings, round_, step)
        sampled = {e.id: sort_samples(e, drawn[e.id], settings) for e in examples if e.id in drawn}
        need = self.objective.needs_negatives
        ready, counts = blend(examples, sampled, settings, self.recipe.seed, round_, need=need)
        if not ready:
            raise DataError(
                f"round {round_} of stage 2: no negative for any of {len(examples)} prompts; samples were dropped as "
                f"{dict(counts.dropped)}: raise negatives.sampler.max_new_tokens or samples, or take a lower "
                "negatives.on_policy_fraction with another source in negatives.mix"
            )
        self._cool_again(drawn, round_)
        encoded = self._scored(ready, round_)
        by_id = {e.id: e for e in encoded}
        rows = [by_id[i] for i in order if i in by_id]
        self.data.fill(rows)
        self._record(round_, step, order, ready, rows, counts)

    def _readable(self, order: Sequence[str]) -> list[Example]:
        wanted = [self.examples[i] for i in dict.fromkeys(order)]
        return self.encoder.readable(wanted, len(wanted))

    def _settings_of(self, round_: int, step: int) -> NegativeSettings:
        """The recipe's, with the share of on-policy negatives that the curriculum makes of the round's."""
        share = self.settings.fraction(round_) + added_share(self.run, step)
        return self.settings.model_copy(update={"on_policy_fraction": min(max(share, 0.0), 1.0)})

    def _sample(
        self, examples: Sequence[Example], settings: NegativeSettings, round_: int, step: int
    ) -> dict[str, DrawnFor]:
        if settings.fraction(round_) == 0 and not settings.on_policy_chosen:
            return {}
        self._pool = self._pool or Pool(self.run, self.recipe)
        model = self._model_now()
        with autocast(model, self.recipe.train.bf16):
            return self._pool.fill(
                examples, self._sampler(model, round_), self.encoder, self._judge, round_, step,
                lambda done, total: self.on_sample(round_, done, total),
            )  # fmt: skip

    def _sampler(self, model: nn.Module, round_: int) -> Sampler:
        s = self.settings.sampler
        if s.server is None:
            return LocalSampler(model, self.encoder, s)
        folder = None
        if s.serve_folder:
            folder = (self.run.path / f"round{round_}").resolve()
            if self.run.writes and not folder.is_dir():
                model.save_pretrained(folder)  # type: ignore[operator]
                self.policy.processor.save_pretrained(folder)
        return ServerSampler(s, self.run.path / ANSWERS, None if folder is None else str(folder))

    def _cool_again(self, drawn: dict[str, DrawnFor], round_: int) -> None:
        """Floor and tau from the round's own samples; those of the first round are the reference's."""
        if not (self.settings.recalibrate and self._auto and round_):
            return
        own = [s.mean_logp for row in drawn.values() for s in row.samples if s.mean_logp is not None]
        if isinstance(self.objective, CwDpo) and len(own) > 1:
            found = self.recipe.stage2.build()
            assert isinstance(found, CwDpo)
            self.objective = found.calibrated(own)
            values = {"floor": self.objective.floor, "tau": self.objective.tau, "n": len(own)}
            self.run.write_json(f"calibration-round{round_}.json", values)
            if self.trainer is not None:
                self.trainer.objective = self.objective

    def _scored(self, ready: Sequence[Example], round_: int) -> list[EncodedExample]:
        stage = f"stage2/round{round_}"
        encoded, problems = encode_usable(
            self.encoder, ready, self.objective, "rejected", self.recipe.data.max_bad_fraction
        )
        self.run.drop_stages("problems.jsonl", {stage})
        self.run.append("problems.jsonl", ({"stage": stage, "problem": text} for text in problems))
        if not self.objective.needs_reference:
            return encoded
        model = self._model_now()
        swap = self._start.inside(model) if self._start is not None else contextlib.nullcontext()
        with swap:
            encoded = self._reference_values(replace(self.policy, model=model), encoded, self.objective)
        return self._within_cuts(encoded)

    def _within_cuts(self, encoded: Sequence[EncodedExample]) -> list[EncodedExample]:
        """Without negatives outside the cuts by the reference; the sampler's own were cut when they were drawn."""
        local = self.settings.sampler.server is None
        kept = []
        for example in encoded:
            negatives = tuple(
                c
                for c in example.negatives
                if (local and c.origin == "on_policy")
                or c.reference_sum_logp is None
                or outside(c.reference_sum_logp / len(c.ids), self.settings) is None
            )
            if negatives or not self.objective.needs_negatives:
                kept.append(replace(example, negatives=negatives))
        if not kept:
            raise DataError("negatives.easy_cut and hard_cut leave no negative: widen them")
        return kept

    def _record(
        self,
        round_: int,
        step: int,
        order: Sequence[str],
        ready: Sequence[Example],
        rows: Sequence[EncodedExample],
        counts: BlendCounts,
    ) -> None:
        """One row of ``rounds.jsonl``: what was asked, what came of it, and some pairs to look at."""
        stage, end = f"stage2/round{round_}", min(step + self.plan.per_round, self.plan.steps)
        found: dict[str, list[float | None]] = defaultdict(list)
        for example in {e.id: e for e in rows}.values():
            for c in example.negatives:
                found[c.origin].append(c.reference_sum_logp and c.reference_sum_logp / len(c.ids))
        n = sum(map(len, found.values()))
        by_origin = {}
        for origin, values in sorted(found.items()):
            known = [v for v in values if v is not None]
            mean = sum(known) / len(known) if known else None
            by_origin[origin] = {"n": len(values), "share": len(values) / n, "reference_mean_logp": mean}
        row = {
            "stage": stage, "round": round_, "step": step, "end": end, "prompts": len(set(order)),
            "filled_up": len(order) - len(rows), **counts.to_json(), "by_origin": by_origin,
            "judged": self._judge is not None,
            "pairs": _pairs(ready, seeded(self.recipe.seed, "shown", round_), self.run.path),
        }  # fmt: skip
        self.run.drop_stages(FILE, {stage})
        self.run.append(FILE, [row])


def _pairs(examples: Sequence[Example], rng: random.Random, home: Path) -> list[dict[str, Any]]:
    """Some pairs, as many of each origin as there are."""
    by_origin: dict[str, list[tuple[Example, int]]] = defaultdict(list)
    for example in examples:
        for k, c in enumerate(example.rejected):
            by_origin[c.origin].append((example, k))
    shown: list[tuple[Example, int]] = []
    for origin in sorted(by_origin):
        found = by_origin[origin]
        shown += rng.sample(found, min(len(found), _SHOWN // len(by_origin)))
    return [
        {
            "id": e.id,
            "image": _place(e, home),
            "chosen": e.chosen.text,
            "chosen_origin": e.chosen.origin,
            "rejected": e.rejected[k].text,
            "origin": e.rejected[k].origin,
            "kind": e.rejected[k].kind,
            "made": {key: v for key, v in e.rejected[k].made.items() if isinstance(v, str | int | float)},
        }
        for e, k in shown
    ]


def _place(example: Example, home: Path) -> str | None:
    """Path of the first picture; within the run's folder from there, so that the folder can be moved."""
    path = example.images[0].path if example.images else None
    if path is None:
        return None
    return str(path.relative_to(home) if path.is_relative_to(home) else path)
