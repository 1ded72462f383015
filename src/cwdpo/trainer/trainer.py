"""A thin ``transformers.Trainer``: batch -> scoring -> objective -> loss, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainingArguments

from cwdpo.data.encode.collate import Collator, PromptBatch
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import RecipeError
from cwdpo.models.load import load_weights
from cwdpo.models.shared_attention import shares_prefix
from cwdpo.models.vision_cache import forget_vision_features
from cwdpo.objectives.base import Objective, ScoredPairs, StepTotals
from cwdpo.scoring.pairs import scored_pairs
from cwdpo.scoring.score import row_tokens, score
from cwdpo.trainer.batching import LengthGrouped, TokenBatches, row_lengths
from cwdpo.trainer.checkpoints import CompleteCheckpoints
from cwdpo.trainer.guard import Guard, Seen
from cwdpo.trainer.margins import MarginHistory
from cwdpo.trainer.metrics import StepMetrics
from cwdpo.trainer.processes import Unsharded, check_sharding, first_rows, together


class PreferenceTrainer(CompleteCheckpoints):
    """Trains a policy with an objective on encoded examples.

    The loss of an optimizer step is a sum over its micro-batches divided once by the step's counts, so
    micro-batch size, accumulation and number of processes do not change it.

    Args:
        model: the policy, in training mode dropout included (switch dropout off in the config).
        args: transformers' arguments; ``remove_unused_columns`` is forced off.
        objective: what to minimise.
        train_dataset: encoded examples, with reference values where the objective needs them.
        processing_class: the processor, saved with every checkpoint.
        on_log: called with every row of metrics.
        guard: stops before non-finite updates; the default has no spike rule.
        group_by_length: steps of rows of like length, in random order; else rows in random order.
        max_tokens_per_batch: micro-batches of as many rows as fit this many tokens, padding included, instead of
            ``args.per_device_train_batch_size``.
        by_origin: also log share, mean_logp and cooling weight of the negatives by where they came from.

    Attributes:
        select: what of a micro-batch takes part, asked before its step is counted (a curriculum); all of it.

    Raises:
        RecipeError: a spike rule under DeepSpeed, whose update cannot be left out.
        DataError: a row alone has more than ``max_tokens_per_batch`` tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        objective: Objective,
        train_dataset: Sequence[EncodedExample],
        *,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        on_log: Callable[[Mapping[str, Any]], None] | None = None,
        guard: Guard | None = None,
        by_origin: bool = False,
        group_by_length: bool = True,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        self.group_by_length, self.max_tokens_per_batch = group_by_length, max_tokens_per_batch
        args.remove_unused_columns = False
        if args.n_gpu > 1:
            # Several GPUs without a launcher: nn.DataParallel would scatter one batch's indices over replicas.
            args._n_gpu = 1
        if args.ddp_find_unused_parameters is None:
            # A batch without an image leaves the vision tower unused. transformers would switch this off under
            # gradient checkpointing, which matters for the reentrant kind only.
            args.ddp_find_unused_parameters = True
        self.guard = guard or Guard(Path(args.output_dir))
        self.margins = MarginHistory()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=Collator(),
            processing_class=processing_class,
            callbacks=[
                self.guard,
                self.margins,
                *callbacks,
            ],  # the guard first: it stops before anything is measured
        )
        self.guard.accelerator = self.accelerator
        if self.is_fsdp_enabled:
            check_sharding(self.accelerator, model)
        self._unsharded = Unsharded(model) if self._sharded else None
        if self._sharded:
            forget_vision_features(model)
        if self.is_deepspeed_enabled and self.guard.spike_factor is not None:
            raise RecipeError(
                "train.spike_factor: DeepSpeed updates inside its backward pass, so no update can be left out; set it "
                "to null, or use DDP or FSDP2"
            )
        self.objective = objective
        self.loss_is_scaled_for_ga = True
        self._sums = StepMetrics(by_origin)
        self._on_log = on_log
        self.select: Callable[[PromptBatch], PromptBatch] = lambda batch: batch

    def _row_tokens(self, index: int) -> int:
        return row_lengths(self.train_dataset[index], shared=shares_prefix(self.model))[1]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows by length: those of an optimizer step together, however it is split."""
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        step = self.get_total_train_batch_size(self.args)
        return LengthGrouped(self._row_tokens, len(self.train_dataset), step, self._data_seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of a number of rows, or of a number of tokens."""
        if self.max_tokens_per_batch is None:
            loader: DataLoader[Any] = super().get_train_dataloader()
            return loader
        shared = shares_prefix(self.model)
        lengths = [row_lengths(example, shared=shared) for example in self.train_dataset]
        processes = self.accelerator.num_processes
        batches = TokenBatches(lengths, self.max_tokens_per_batch, self._data_seed, processes)
        made = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(made)
        return prepared

    @property
    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> StepTotals | None:
        """Counts of the whole optimizer step, over micro-batches and processes."""
        batches: list[PromptBatch] = [inputs["batch"] for inputs in batch_samples]
        if not batches:
            return None
        for inputs in batch_samples:
            inputs["batch"] = self.select(inputs["batch"])
        batches = [inputs["batch"] for inputs in batch_samples]
        if self.accelerator.num_processes > 1:
            batches = self._together(batches)
            for inputs, batch in zip(batch_samples, batches, strict=True):
                inputs["batch"] = batch
        self._sums.begin_step()
        counts = [
            float(sum(b.n_paired_prompts for b in batches)),
            float(sum(b.n_chosen_tokens for b in batches)),
            float(sum(b.n_rejected_tokens for b in batches)),
        ]
        split = len(batches) > 1 or self.accelerator.num_processes > 1
        needs_nll = self.objective.needs_step_negative_nll and split
        if needs_nll:
            counts.append(self._negative_nll_sum(batches))
        if self.accelerator.num_processes > 1:
            summed = self.accelerator.reduce(torch.tensor(counts, dtype=torch.float64, device=device), "sum")
            counts = summed.tolist()
        prompts, chosen, rejected, *nll = counts
        totals = StepTotals(prompts, chosen, rejected, nll[0] / max(rejected, 1.0) if nll else None)
        if not self.objective.needs_step_margins:
            return totals
        margins, usual = self.margins.of_step(self.accelerator, self._step_margins(batches))
        return replace(totals, margins=margins, usual_margin=usual)

    @property
    def _sharded(self) -> bool:
        """Whether every forward needs all processes: then ``self.model`` is the wrapped model."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _together(self, batches: Sequence[PromptBatch]) -> list[PromptBatch]:
        """The step's micro-batches as all processes can run them: images read, no row counted twice."""
        *whole, last = batches
        size, rank = self.args.per_device_train_batch_size, self.accelerator.process_index
        left = len(self.train_dataset) % (size * self.accelerator.num_processes)
        repeats = left and not (self.args.dataloader_drop_last or self.accelerator.split_batches)
        repeats = repeats and self.max_tokens_per_batch is None  # those batches come out even
        if repeats and self.accelerator.gradient_state.end_of_dataloader:
            last = first_rows(last, min(max(left - rank * size, 0), size))
        return together(self.accelerator, [*whole, last], sharded=self._sharded, examples=self.train_dataset)

    def whole_model(self) -> torch.nn.Module:
        """The trained model with all of its weights on every process; all processes call this together."""
        model: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return model if self._unsharded is None else self._unsharded.filled(model)

    def _negative_nll_sum(self, batches: Sequence[PromptBatch]) -> float:
        """NLL of all negatives of a split step: its penalty switches on the mean over the whole step."""
        return -sum(float(pairs.rejected.sum_logp.sum()) for pairs in self._scored_ahead(batches))

    def _step_margins(self, batches: Sequence[PromptBatch]) -> list[float]:
        """``chosen_shift - rejected_shift`` of this process's pairs of the step, in nats."""
        scored = self._scored_ahead(batches)
        return [m for pairs in scored for m in (pairs.chosen_shift - pairs.rejected.shift).tolist()]

    @torch.no_grad()
    def _scored_ahead(self, batches: Sequence[PromptBatch]) -> list[ScoredPairs]:
        """The step's pairs before its first update, without gradient: what depends on all of them is known then."""
        # Without dropout: it would draw from the generator before a resumed run has restored it.
        training = self.model.training
        self.model.eval()
        scored = [
            scored_pairs(batch, score(self.model, batch))
            for batch in batches
            if len(batch.rejected) or self._sharded
        ]
        self.model.train(training)
        return scored

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss."""
        batch: PromptBatch = inputs["batch"]
        tokens = score(
            model,
            batch,
            smoothing=self.objective.needs_uniform,
            collision=self.objective.needs_collision,
        )
        pairs = scored_pairs(batch, tokens, num_items_in_batch)
        output = self.objective(pairs)
        self.guard.saw(model, Seen(batch, pairs, output), self.state.global_step + 1)
        self._sums.add(batch, tokens, pairs, output)
        self._sums.add_tokens(*row_tokens(batch, shared=shares_prefix(model)))
        # DDP averages gradients over processes; the loss is already divided by the global count.
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; behind the step's last one its gradient is whole."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.guard.check_gradient(model, self.state.global_step + 1)
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a full checkpoint by its family's own naming.

        transformers' Trainer loads the file's names with ``strict=False``; LLaVA and its kin are saved under
        other names, so that nothing would be loaded and the run would go on from the wrong weights.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or model is not None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model, Path(resume_from_checkpoint))

    def report(self, readings: Mapping[str, float]) -> None:
        """Hand held-out readings to the trackers of ``report_to``, and to nothing else."""
        control: TrainerControl = self.control
        due = control.should_log
        self.callback_handler.on_log(self.args, self.state, control, dict(readings))
        control.should_log = due  # the step's own metrics are logged whatever was told in between

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics, reduced over processes, to what the Trainer logs."""
        if "loss" in logs:
            logs |= self._sums.flush(self.accelerator)
            if self.guard.spike_factor is not None:
                logs["spikes/skipped"] = float(self.guard.skipped)
        super().log(logs, start_time)
        if self._on_log is not None and self.is_world_process_zero():
            self._on_log({"step": self.state.global_step, **logs})
