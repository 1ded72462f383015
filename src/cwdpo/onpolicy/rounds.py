"""Stage 2 in rounds: one Trainer over all of them, whose data changes at each boundary.

A round is an epoch of a data set of fixed length. Before it begins, the current policy is sampled for the round's
prompts, negatives are blended, and the new ones get their reference values. Nothing of a round is decided earlier:
the loader reads its first batch after the boundary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError
from cwdpo.judging.base import judge_for
from cwdpo.models.write import save_weights
from cwdpo.monitor.window import added_share
from cwdpo.negatives.mix import seeded
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.blend import BlendCounts, blend
from cwdpo.onpolicy.plan import RoundPlan
from cwdpo.onpolicy.pool import Pool
from cwdpo.onpolicy.record import FILE, negatives_by_origin, shown_pairs
from cwdpo.onpolicy.sampler import ANSWERS, Sampler, build_sampler
from cwdpo.onpolicy.samples import PromptSamples, outside, sort_samples
from cwdpo.records import Example
from cwdpo.stage.prepare import (
    calibrate,
    calibration_row,
    encode,
    keep_negatives,
    with_reference_values,
)
from cwdpo.stage.stage import Stage
from cwdpo.trainer.weights import Weights


class RoundData(Dataset[EncodedExample]):
    """The examples of the current round; its length never changes."""

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


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Prepares each round at its boundary; on resume, prepares the current round again.

    Making it encodes the stage's examples and calibrates its objective: the policy is the reference then.

    Args:
        stage: stage 2 of a recipe with ``negatives.on_policy_fraction``, before it trains.

    Attributes:
        data: what the trainer trains on.
        dataset_rows: the stage's examples with the negatives that the data has. Those of the rounds do not exist yet
            when probes and curriculum are set up.
        plan: steps and prompts by round.

    Raises:
        DataError: too many examples cannot be used, none is left, or two have the same id.
    """

    def __init__(self, stage: Stage) -> None:
        if not stage.examples:
            raise DataError("no example is left for stage 2; look at data.stage1_fraction")
        self.stage, self.settings = stage, stage.recipe.negatives
        self.dataset_rows = encode(stage, stage.examples, need_negative=False)
        usable = {row.id for row in self.dataset_rows}
        examples = [e for e in stage.examples if e.id in usable]
        self.examples = {e.id: e for e in examples}
        if len(self.examples) < len(examples):
            raise DataError(
                "stage 2 has two rows with the same id; rounds find samples by id: make them differ"
            )
        self._auto = stage.objective.needs_calibration
        calibrate(stage, examples)
        self.plan = RoundPlan.of(stage.steps(examples), self.settings.rounds, stage.prompts_per_step)
        self.data = RoundData(self.plan.per_round * self.plan.batch)
        self._judge = judge_for(self.settings.judge, examples)
        self._pool: Pool | None = None
        # Needed even for one round: on resume the policy is no longer the reference.
        self._start = Weights.of(stage.policy.model) if stage.objective.needs_reference else None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch is a round."""
        self.begin(state.global_step // self.plan.per_round)

    def begin(self, round_: int) -> None:
        """Sample, blend, score, and put the round's examples into :attr:`data`.

        Raises:
            DataError: no usable negative is left.
        """
        seed, step = self.stage.recipe.seed, round_ * self.plan.per_round
        order = self.plan.prompts(list(self.examples), round_, seed)
        examples = [self.examples[i] for i in dict.fromkeys(order)]
        settings = self._settings_of(round_, step)
        drawn = self._sample(examples, settings, round_, step)
        sampled = {e.id: sort_samples(e, drawn[e.id], settings) for e in examples if e.id in drawn}
        need = self.stage.objective.needs_negatives
        blended, counts = blend(examples, sampled, settings, seed, round_, need=need)
        if not blended:
            raise DataError(
                f"round {round_} of stage 2: no negative for any of {len(examples)} prompts; samples were dropped as "
                f"{dict(counts.dropped)}: raise negatives.sampler.max_new_tokens or samples, or take a lower "
                "negatives.on_policy_fraction with another source in negatives.mix"
            )
        self._calibrate_again(drawn, round_)
        by_id = {row.id: row for row in self._prepared(blended, round_)}
        rows = [by_id[i] for i in order if i in by_id]
        self.data.fill(rows)
        self._record(round_, order, blended, rows, counts)

    def _settings_of(self, round_: int, step: int) -> NegativeSettings:
        """The recipe's, with the share of on-policy negatives that the curriculum makes of the round's."""
        share = self.settings.fraction(round_) + added_share(self.stage.run, step)
        return self.settings.model_copy(update={"on_policy_fraction": min(max(share, 0.0), 1.0)})

    def _sample(
        self, examples: Sequence[Example], settings: NegativeSettings, round_: int, step: int
    ) -> dict[str, PromptSamples]:
        if settings.fraction(round_) == 0 and not settings.on_policy_chosen:
            return {}
        stage = self.stage
        self._pool = self._pool or Pool(stage.run, stage.recipe, stage.encoder, self._judge)
        model = stage.whole_model()
        with stage.autocast(model):
            return self._pool.fill(
                examples, self._sampler(model, round_), round_, step,
                lambda done, total: stage.listener.sampled(round_, done, total),
            )  # fmt: skip

    def _sampler(self, model: Any, round_: int) -> Sampler:
        run, served = self.stage.run, None
        if self.settings.sampler.serve_folder:
            folder = (run.path / f"round{round_}").resolve()
            served = str(folder)
            if run.writes and not folder.is_dir():
                save_weights(model, folder)
                self.stage.policy.processor.save_pretrained(folder)
        return build_sampler(self.settings.sampler, model, self.stage.encoder, run.path / ANSWERS, served)

    def _calibrate_again(self, drawn: dict[str, PromptSamples], round_: int) -> None:
        """Calibrate the objective on the round's own samples; in the first round those are the reference's."""
        if not (self.settings.recalibrate and self._auto and round_):
            return
        mean_logps = [s.mean_logp for row in drawn.values() for s in row.samples if s.mean_logp is not None]
        if len(mean_logps) > 1:
            objective = self.stage.settings.build().calibrated(mean_logps)
            self.stage.in_force.objective = objective
            row = calibration_row(objective, mean_logps)
            self.stage.run.write_json(f"calibration-round{round_}.json", row)

    def _prepared(self, blended: Sequence[Example], round_: int) -> list[EncodedExample]:
        """The round's rows; the reference is the policy with the weights of the stage's start."""
        encoded = encode(self.stage, blended, f"/round{round_}")
        model = self.stage.whole_model()
        start = contextlib.nullcontext() if self._start is None else self._start.in_force(model)
        with start:
            rows = with_reference_values(self.stage, encoded, model)
        return self._within_cuts(keep_negatives(self.stage.objective, rows))

    def _within_cuts(self, encoded: Sequence[EncodedExample]) -> list[EncodedExample]:
        """Without negatives outside the cuts by the reference; the sampler's own were cut when they were drawn."""
        local, need = self.settings.sampler.server is None, self.stage.objective.needs_negatives
        kept = []
        for example in encoded:
            negatives = tuple(
                c
                for c in example.negatives
                if (local and c.origin == "on_policy")
                or outside(c.reference_mean_logp, self.settings) is None
            )
            if negatives or not need:
                kept.append(replace(example, negatives=negatives))
        if not kept:
            raise DataError("negatives.easy_cut and hard_cut leave no negative: widen them")
        return kept

    def _record(
        self,
        round_: int,
        order: Sequence[str],
        blended: Sequence[Example],
        rows: Sequence[EncodedExample],
        counts: BlendCounts,
    ) -> None:
        """Put a row for the round into ``rounds.jsonl``, in place of one that a killed run left."""
        stage, run, step = f"stage2/round{round_}", self.stage.run, round_ * self.plan.per_round
        rng = seeded(self.stage.recipe.seed, "shown", round_)
        row = {
            "stage": stage, "round": round_, "step": step, "end": min(step + self.plan.per_round, self.plan.steps),
            "prompts": len(set(order)), "filled_up": len(order) - len(rows), **counts.to_json(),
            "by_origin": negatives_by_origin(rows), "judged": self._judge is not None,
            "pairs": shown_pairs(blended, rng, run.path),
        }  # fmt: skip
        run.drop_stages(FILE, {stage})
        run.append(FILE, [row])
