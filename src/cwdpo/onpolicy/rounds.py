"""Stage 2 in rounds: one Trainer for all rounds, with new training data in each.

A round is an epoch over a data set of fixed length. Before a round starts, the current policy is sampled for the
round's prompts, negatives are chosen from samples and other sources, and the reference model scores them. All of this
happens at the start of the round: the data loader reads its first batch afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback

from cwdpo.clock import spent_on
from cwdpo.data.encode.encoded_rows import reference_means
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError, RecipeError
from cwdpo.judging.base import judge_for
from cwdpo.monitor.window import added_share
from cwdpo.negatives.image_side import with_image_negatives
from cwdpo.negatives.mix import seeded
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.agreement import measure_agreement
from cwdpo.onpolicy.blend import BlendCounts, blend
from cwdpo.onpolicy.plan import RoundPlan
from cwdpo.onpolicy.pool import Pool
from cwdpo.onpolicy.record import FILE, negatives_by_origin, shown_pairs
from cwdpo.onpolicy.sampler import ANSWERS, Sampler, build_sampler
from cwdpo.onpolicy.samples import PromptSamples, outside, sort_samples
from cwdpo.onpolicy.served import adapter_of
from cwdpo.records import Example
from cwdpo.remote import Adapter
from cwdpo.stage.calibration import calibrate, calibration_row, negative_mean_logps
from cwdpo.stage.model import save_model
from cwdpo.stage.prepare import encode, keep_negatives, with_reference_values
from cwdpo.stage.stage import Stage
from cwdpo.trainer.weights import Weights
from cwdpo.waiting import from_first


class RoundData(Dataset[EncodedExample]):
    """The examples of the current round or window; its length never changes.

    Before the first is filled in, iterating gives nothing.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._rows: Sequence[EncodedExample] = ()

    def fill(self, rows: Sequence[EncodedExample]) -> None:
        """Replace the examples; they are repeated if there are fewer than the length."""
        self._rows = rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> EncodedExample:
        return self._rows[index % len(self._rows)]

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[i] for i in range(self._length if self._rows else 0))


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Prepares each round when it starts; on resume, prepares the current round again.

    The constructor encodes the stage's examples and calibrates its objective, while the policy is still the reference.

    Args:
        stage: stage 2 of a recipe with ``negatives.on_policy_fraction``, before training.

    Attributes:
        data: the training data of the trainer.
        dataset_rows: the encoded examples with the negatives of the data, for probes and curriculum, which are set up
            before the first round has its negatives.
        plan: steps and prompts of the rounds.

    Raises:
        DataError: too many examples cannot be used, none is left, or two have the same id.
    """

    def __init__(self, stage: Stage) -> None:
        if not stage.examples:
            raise DataError("no example is left for stage 2; check data.stage1_fraction")
        self.stage, self.settings = stage, stage.recipe.negatives
        self.dataset_rows = encode(stage, stage.examples, need_negative=False)
        usable = {row.id for row in self.dataset_rows}
        examples = [e for e in stage.examples if e.id in usable]
        self.examples = {e.id: e for e in examples}
        if len(self.examples) < len(examples):
            raise DataError(
                "stage 2 has two rows with the same id, but rounds store samples by id: give each row its own id"
            )
        self._auto = stage.objective.needs_calibration
        self._on_negatives = stage.objective.calibrates_on_negatives
        self._calibrate(examples)
        self.plan = RoundPlan.of(stage.steps(examples), self.settings.rounds, stage.prompts_per_step)
        self.data = RoundData(self.plan.per_round * self.plan.batch)
        self._judge = judge_for(self.settings.judge, examples)
        self._pool: Pool | None = None
        # Needed even for one round: on resume the policy is no longer the reference.
        self._start = Weights.of(stage.policy.model) if stage.objective.needs_reference else None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prepare the round of this epoch."""
        round_, inside = divmod(state.global_step, self.plan.per_round)
        self.begin(round_, fresh=not inside)

    def begin(self, round_: int, *, fresh: bool = True) -> None:
        """Sample, choose negatives, score them with the reference, and put the examples into :attr:`data`.

        Args:
            round_: the round, from 0.
            fresh: whether the policy is the one of the round's start; not so in a run that is resumed within the round.

        Raises:
            DataError: no usable negative is left.
        """
        seed, step = self.stage.recipe.seed, round_ * self.plan.per_round
        order = self.plan.prompts(list(self.examples), round_, seed)
        examples = [self.examples[i] for i in dict.fromkeys(order)]
        settings = self._settings_of(round_, step)
        drawn = self._sample(examples, settings, round_, step, fresh)
        sampled = {e.id: sort_samples(e, drawn[e.id], settings) for e in examples if e.id in drawn}
        need = self.stage.objective.needs_negatives
        mixed, counts = blend(examples, sampled, settings, seed, round_, need=need)
        if not mixed:
            raise DataError(
                f"round {round_} of stage 2: none of {len(examples)} prompts has a negative; samples were dropped as "
                f"{dict(counts.dropped)}: raise negatives.sampler.max_new_tokens or samples, or set a lower "
                "negatives.on_policy_fraction with another source in negatives.mix"
            )
        blended = with_image_negatives(mixed, settings, seeded(seed, "images", round_).getrandbits(62))
        self._calibrate_again(drawn, round_)
        by_id = {row.id: row for row in self._prepared(blended, round_)}
        self._calibrate_on_negatives(list(by_id.values()), round_)
        rows = [by_id[i] for i in order if i in by_id]
        self.data.fill(rows)
        self._record(round_, order, blended, rows, counts)

    def _settings_of(self, round_: int, step: int) -> NegativeSettings:
        """The recipe's settings, with the round's share of on-policy negatives changed by the curriculum."""
        share = self.settings.fraction(round_) + added_share(self.stage.run, step)
        return self.settings.model_copy(update={"on_policy_fraction": min(max(share, 0.0), 1.0)})

    def _sample(
        self, examples: Sequence[Example], settings: NegativeSettings, round_: int, step: int, fresh: bool
    ) -> dict[str, PromptSamples]:
        if settings.fraction(round_) == 0 and not settings.on_policy_chosen:
            return {}
        stage = self.stage
        self._pool = self._pool or Pool(stage.run, stage.recipe, stage.encoder, self._judge)
        model = stage.current_model()
        sampler = self._sampler(model, round_)
        with spent_on("sampling"), stage.autocast(model):
            drawn = self._pool.fill(
                examples, sampler, round_, step,
                lambda done, total: stage.listener.sampled(round_, done, total),
            )  # fmt: skip
            sampler.close()
            if fresh:
                measure_agreement(stage, model, [drawn[e.id] for e in examples], self.examples, step)
        return drawn

    def _sampler(self, model: Any, round_: int) -> Sampler:
        run, settings = self.stage.run, self.settings.sampler
        served: str | Adapter | None = None
        if settings.follows:
            folder = (run.path / f"round{round_}").resolve()
            if not from_first(folder.is_dir(), "writing the round's model"):
                save_model(replace(self.stage.policy, model=model), folder, run)
            served = adapter_of(folder) if settings.serve_adapter else str(folder)
        return build_sampler(settings, model, self.stage.encoder, run.path / ANSWERS, served)

    def _calibrate(self, examples: Sequence[Example]) -> None:
        """Calibrate the objective before the first round.

        Its negatives do not exist yet. An objective that calibrates on negatives takes those of the data and its own
        samples until :meth:`_calibrate_on_negatives`; probes and curriculum need a floor before.

        Raises:
            RecipeError: it would have to be calibrated on negatives again in every round.
        """
        if self._on_negatives and self.settings.recalibrate:
            raise RecipeError(
                "negatives.recalibrate: the objective sets its floor by the negatives of the first round "
                "(target_weight): leave out one of the two"
            )
        own = self.dataset_rows.select([i for i, row in enumerate(self.dataset_rows) if row.negatives])
        self._mean_logps = calibrate(
            self.stage,
            examples,
            lambda: with_reference_values(self.stage, own) if own else [],
            sampled_share=self.settings.fraction(0),
        )

    def _calibrate_on_negatives(self, rows: Sequence[EncodedExample], round_: int) -> None:
        """Calibrate again on the negatives that the first round has; later rounds keep this."""
        if not self._on_negatives:
            return
        self._on_negatives = False
        run, name = self.stage.run, "calibration-round0.json"
        negatives = run.json(name)["negatives"] if round_ else negative_mean_logps(reference_means(rows)[1])
        objective = self.stage.settings.build().calibrated(self._mean_logps, negatives)
        self.stage.in_force.objective, self.stage.in_force.known = objective, {}
        if not round_:
            run.write_json(name, {**calibration_row(objective, self._mean_logps), "negatives": negatives})

    def _calibrate_again(self, drawn: dict[str, PromptSamples], round_: int) -> None:
        """Calibrate the objective with the round's samples, except in round 0, whose samples are the reference's."""
        if not (self.settings.recalibrate and self._auto and round_):
            return
        mean_logps = [s.mean_logp for row in drawn.values() for s in row.samples if s.mean_logp is not None]
        if len(mean_logps) > 1:
            objective = self.stage.settings.build().calibrated(mean_logps)
            self.stage.in_force.objective, self.stage.in_force.known = objective, {}
            row = calibration_row(objective, mean_logps)
            self.stage.run.write_json(f"calibration-round{round_}.json", row)

    def _prepared(self, blended: Sequence[Example], round_: int) -> list[EncodedExample]:
        """Encode the round's examples and score them with the reference: the policy with the weights of the start."""
        encoded = encode(self.stage, blended, f"/round{round_}")
        model = self.stage.current_model()
        start = contextlib.nullcontext() if self._start is None else self._start.in_force(model)
        with start:
            rows = with_reference_values(self.stage, encoded, model)
        return self._within_cuts(keep_negatives(self.stage.objective, rows))

    def _within_cuts(self, encoded: Sequence[EncodedExample]) -> list[EncodedExample]:
        """Leave out negatives whose mean_logp under the reference is outside ``easy_cut`` and ``hard_cut``.

        Samples of the local policy are kept: :func:`sort_samples` has already compared their mean_logp with the cuts.
        """
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
            raise DataError("negatives.easy_cut and hard_cut leave no negative: move them apart")
        return kept

    def _record(
        self,
        round_: int,
        order: Sequence[str],
        blended: Sequence[Example],
        rows: Sequence[EncodedExample],
        counts: BlendCounts,
    ) -> None:
        """Write the round's row to ``rounds.jsonl``; it replaces the row of a killed run."""
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
