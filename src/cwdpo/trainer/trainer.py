"""A small subclass of ``transformers.Trainer``: batch -> scoring -> objective -> loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from cwdpo.arguments import Optimizer
from cwdpo.clock import current, spent_on
from cwdpo.data.encode.collate import Collator, PromptBatch
from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.encode.reading import read_ahead
from cwdpo.errors import RecipeError
from cwdpo.models.sharding import check_sharding, is_sharded
from cwdpo.models.shared_attention import shares_prefix
from cwdpo.models.vision_cache import forget_vision_features, needs_images
from cwdpo.objectives.base import InForce, Objective, ScoredPairs, StepTotals
from cwdpo.scoring.pairs import scored_pairs
from cwdpo.scoring.score import row_tokens, score
from cwdpo.trainer.batching import LengthGrouped, TokenBatches, all_row_lengths, row_lengths
from cwdpo.trainer.guard import Guard, MicroBatch
from cwdpo.trainer.memory import StepMemory
from cwdpo.trainer.metrics import StepMetrics
from cwdpo.trainer.processes import Unsharded, applies_old_gradients, together
from cwdpo.trainer.rounding import LostUpdates, check_optimizer, optimizer_class
from cwdpo.trainer.sharded import ShardedTraining

_COLLATES_HERE = {
    "dataloader_num_workers": 0, "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None,
}  # fmt: skip
"""For transformers' loader: the workers that read images are the encoder's, and the rest of a batch is ready."""


@dataclass(frozen=True)
class TrainerOptions:
    """Options of the trainer that ``TrainingArguments`` does not have; by default none of them is used.

    Attributes:
        group_by_length: whether an optimizer step has examples of similar length; else of random lengths.
        max_tokens_per_batch: size of a micro-batch in tokens including padding, instead of
            ``per_device_train_batch_size`` examples.
        by_origin: also log share, mean_logp and cooling weight of the negatives by their origin.
        guard: stops before non-finite updates; the default has no spike rule.
        on_log: called with every row of metrics, on the main process.
        select: filters each micro-batch before tokens are counted (for a curriculum); default: identity.
        eval_dataset: data for transformers' evaluation during training (``eval_strategy``).
        optimizers: an optimizer and its schedule, instead of those that ``args`` describe.
        workers: data workers of the encoder; with any, the images of the next optimizer step are read during a step.
        optimizer: ``adamw``, or one that is made for trained bf16 weights, see :func:`optimizer_class`.
        before_checkpoint, add_to_checkpoint: see :class:`cwdpo.trainer.checkpoints.CompleteCheckpoints`.
    """

    group_by_length: bool = True
    max_tokens_per_batch: int | None = None
    by_origin: bool = False
    guard: Guard | None = None
    on_log: Callable[[Mapping[str, Any]], None] = field(default=lambda row: None)
    select: Callable[[PromptBatch], PromptBatch] = field(default=lambda batch: batch)
    eval_dataset: Any = None
    optimizers: tuple[Any, Any] = (None, None)
    workers: int = 0
    optimizer: Optimizer = "adamw"
    before_checkpoint: Callable[[], None] = field(default=lambda: None)
    add_to_checkpoint: Callable[[Path], None] = field(default=lambda folder: None)


class OptimizerTime(TrainerCallback):  # type: ignore[misc]
    """Counts the update of the weights as a part of a step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the part."""
        if (clock := current()) is not None:
            clock.begin("step")
            clock.begin("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End it."""
        if (clock := current()) is not None:
            clock.end()
            clock.end()


class PreferenceTrainer(ShardedTraining):
    """Trains a policy with an objective on encoded examples.

    The loss of an optimizer step is a sum over its micro-batches, divided once by the counts of the step. So it does
    not depend on micro-batch size, gradient accumulation or number of processes.

    Args:
        model: the policy; it trains in training mode, with dropout if its config has any.
        args: transformers' arguments; ``remove_unused_columns`` is set to ``False``.
        objective: the objective, or an :class:`InForce` that others share.
        train_dataset: encoded examples, with reference values if the objective needs them.
        processing_class: the processor, saved with every checkpoint.
        callbacks: transformers' callbacks, called after the guard.
        options: see :class:`TrainerOptions`.

    Raises:
        RecipeError: a spike rule under DeepSpeed, where no update can be skipped; an optimizer for bf16 weights where
            none is trained; a sharded model with quantized weights.
        DataError: a single example has more than ``max_tokens_per_batch`` tokens.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        objective: Objective | InForce,
        train_dataset: Sequence[EncodedExample],
        *,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        options: TrainerOptions | None = None,
    ) -> None:
        self.options = options or TrainerOptions()
        self.in_force = objective if isinstance(objective, InForce) else InForce(objective)
        args.remove_unused_columns = False
        if args.n_gpu > 1:
            # Several GPUs without a launcher: nn.DataParallel would split the index tensors of a batch over the GPUs.
            args._n_gpu = 1
        if args.ddp_find_unused_parameters is None:
            # A batch without an image does not use the vision tower. transformers would switch this off with gradient
            # checkpointing, but that is needed for reentrant checkpointing only.
            args.ddp_find_unused_parameters = True
        self.guard = self.options.guard or Guard(Path(args.output_dir))
        self.memory = StepMemory()
        self.lost = LostUpdates()
        check_optimizer(self.options.optimizer, model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self.options.eval_dataset,
            optimizers=self.options.optimizers,
            optimizer_cls_and_kwargs=optimizer_class(self.options.optimizer, args),
            data_collator=Collator(),
            processing_class=processing_class,
            callbacks=[
                self.guard,
                self.memory,
                self.lost,
                OptimizerTime(),
                *callbacks,
            ],  # the guard checks before other callbacks measure
        )
        self.before_checkpoint = self.options.before_checkpoint
        self.add_to_checkpoint = self.options.add_to_checkpoint
        self.guard.accelerator = self.accelerator
        if self.is_fsdp_enabled:
            check_sharding(self.accelerator, model)
        self._unsharded = Unsharded(model) if self._sharded and not is_sharded(model) else None
        if self._sharded:
            forget_vision_features(model)
        if self.is_deepspeed_enabled and self.guard.spike_factor is not None:
            raise RecipeError(
                "train.spike_factor: DeepSpeed updates inside its backward pass, so no update can be skipped; set it "
                "to null, or use DDP or FSDP2"
            )
        self.loss_is_scaled_for_ga = True
        self._sums = StepMetrics(self.options.by_origin)
        self._stream: tuple[Any, Iterator[dict[str, Any]]] = (None, iter(()))
        self._last_batch = False

    @property
    def objective(self) -> Objective:
        """The current objective."""
        return self.in_force.objective

    def _row_tokens(self, index: int) -> int:
        return row_lengths(self.train_dataset[index], shared=shares_prefix(self.model))[1]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Examples grouped by length within an optimizer step, so micro-batch size does not change the groups."""
        if not self.options.group_by_length:
            return super()._get_train_sampler(train_dataset)
        step, length = self.get_total_train_batch_size(self.args), self._row_tokens
        if isinstance(self.train_dataset, EncodedRows):  # it never changes
            length = self.train_dataset.row_sizes(shared=shares_prefix(self.model))[1].__getitem__
        return LengthGrouped(length, len(self.train_dataset), step, self._data_seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of a number of examples, or of a number of tokens."""
        if self.options.max_tokens_per_batch is None:
            args, self.args = self.args, copy.copy(self.args)
            vars(self.args).update(_COLLATES_HERE)
            try:
                loader: DataLoader[Any] = super().get_train_dataloader()
            finally:
                self.args = args
            return loader
        shared = shares_prefix(self.model)
        lengths = all_row_lengths(self.train_dataset, shared=shared)
        processes = self.accelerator.num_processes
        batches = TokenBatches(lengths, self.options.max_tokens_per_batch, self._data_seed, processes)
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

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> Any:
        """The micro-batches of the next optimizer step; the images of the step after it are read from now on."""
        if self._stream[0] is not epoch_iterator:
            # Of several processes, accelerate does not find the sampler behind the batches that a resumed epoch skips:
            # they would go on in the order of the first epoch. The loader without the skipped batches finds it.
            self.callback_handler.train_dataloader.set_epoch(int(self.state.epoch or 0))
            self._stream = epoch_iterator, self._read_ahead(epoch_iterator)
        with spent_on("step", "batches"):
            return super().get_batch_samples(self._stream[1], num_batches, device)

    def _read_ahead(self, epoch_iterator: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        processes = self.accelerator.num_processes
        window = self.args.gradient_accumulation_steps if self.options.workers else 0

        def pulled() -> Iterator[tuple[PromptBatch, bool]]:
            for inputs in epoch_iterator:  # accelerate knows whether it is the last one only now
                yield inputs["batch"], self.accelerator.gradient_state.end_of_dataloader

        def begin(pulled: tuple[PromptBatch, bool]) -> tuple[PromptBatch, bool]:
            batch, last = pulled
            # Several processes load all images of a step, to agree on it.
            wanted = partial(needs_images, self.model) if processes == 1 else lambda prompt: True
            return batch.ahead(wanted), last

        for batch, self._last_batch in read_ahead(pulled(), begin, lambda one: len(one[0].prompts), window):
            yield {"batch": batch}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> StepTotals | None:
        """Called by transformers once before each optimizer step, with all of its micro-batches."""
        return self.prepare_step(batch_samples) if batch_samples else None

    def prepare_step(self, inputs: Sequence[dict[str, Any]]) -> StepTotals:
        """Prepare the micro-batches of an optimizer step, in place, and count the step over all processes.

        The order matters: first the curriculum leaves out negatives, then the processes agree on micro-batches that all
        can run, then the step is counted, and then an objective that looks ahead gets its values.
        """
        for one in inputs:
            one["batch"] = self.options.select(one["batch"])
        batches: list[PromptBatch] = [one["batch"] for one in inputs]
        if self.accelerator.num_processes > 1:
            batches = self._together(batches)
            for one, batch in zip(inputs, batches, strict=True):
                one["batch"] = batch
        self._sums.begin_step()
        counts = [
            float(sum(b.n_paired_prompts for b in batches)),
            float(sum(b.n_chosen_tokens for b in batches)),
            float(sum(b.n_rejected_tokens for b in batches)),
        ]
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            counts = self.accelerator.reduce(
                torch.tensor(counts, dtype=torch.float64, device=device), "sum"
            ).tolist()
        prompts, chosen, rejected = counts
        totals = StepTotals(prompts, chosen, rejected, memory=self.memory.values)
        split = len(batches) > 1 or self.accelerator.num_processes > 1
        return self._look_ahead(batches, totals) if self.objective.looks_ahead and split else totals

    def _look_ahead(self, batches: Sequence[PromptBatch], totals: StepTotals) -> StepTotals:
        """Add the objective's ``ahead`` values of all micro-batches and processes to the totals.

        Only for steps of several micro-batches: with one, the objective computes them from its own forward pass.
        """
        values = [value for pairs in self._scored_ahead(batches) for value in self.objective.ahead(pairs)]
        shards = [values] if self.accelerator.num_processes == 1 else gather_object([values])
        joined = tuple(value for shard in shards for value in shard)
        self.memory.values = self.objective.remember(totals.memory, joined)
        return replace(totals, ahead=joined)

    @property
    def _sharded(self) -> bool:
        """Whether every forward pass needs all processes; then ``self.model`` is the wrapped model."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @cached_property
    def _has_images(self) -> bool:
        return any(e.prompt.image_digest for e in self.train_dataset)

    def _together(self, batches: Sequence[PromptBatch]) -> list[PromptBatch]:
        """The micro-batches of the step with images loaded and without repeated examples, see :func:`together`."""
        # accelerate fills the last batch of an epoch with examples from its start; `left` of them are real ones.
        *whole, last = batches
        size, rank = self.args.per_device_train_batch_size, self.accelerator.process_index
        left = len(self.train_dataset) % (size * self.accelerator.num_processes)
        repeats = left and not (self.args.dataloader_drop_last or self.accelerator.split_batches)
        repeats = repeats and self.options.max_tokens_per_batch is None  # token batches are even already
        if repeats and self._last_batch:
            last = last.first_examples(min(max(left - rank * size, 0), size))
        return together(
            self.accelerator,
            [*whole, last],
            sharded=self._sharded,
            pictured=applies_old_gradients(self.accelerator) and self._has_images,
            examples=self.train_dataset,
        )

    def trained_model(self) -> torch.nn.Module:
        """The trained model: whole on every process, or sharded if it was so before training.

        All processes call this together.
        """
        model: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return model if self._unsharded is None else self._unsharded.filled(model)

    def finished_model(self) -> torch.nn.Module:
        """:meth:`trained_model` after the last step; nothing can be trained afterwards.

        All processes call this together. DeepSpeed's buffers (2 GB and more) would otherwise stay until the process
        ends.
        """
        model = self.trained_model()
        if self.is_deepspeed_enabled:
            self.model_wrapped.destroy()
        return model

    @spent_on("forward")
    @torch.no_grad()
    def _scored_ahead(self, batches: Sequence[PromptBatch]) -> list[ScoredPairs]:
        """The scored pairs of the step's micro-batches, without gradient."""
        # In evaluation mode, because dropout would use the random generator before a resumed run has restored it.
        training = self.model.training
        self.model.eval()
        scored = [
            scored_pairs(batch, score(self.model, batch))
            for batch in batches
            if len(batch.rejected) or self._sharded
        ]
        self.model.train(training)
        return scored

    @spent_on("forward")
    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss."""
        batch: PromptBatch = inputs["batch"]
        tokens = score(model, batch, stats=self.objective.token_stats)
        pairs = scored_pairs(batch, tokens, num_items_in_batch)
        output = self.objective(pairs)
        if self.objective.looks_ahead and num_items_in_batch is not None and num_items_in_batch.ahead is None:
            with torch.no_grad():
                ahead = tuple(self.objective.ahead(pairs))
            self.memory.values = self.objective.remember(num_items_in_batch.memory, ahead)
        self.guard.check_loss(model, MicroBatch(batch, pairs, output), self.state.global_step + 1)
        self._sums.add(batch, tokens, pairs, output)
        self._sums.add_tokens(*row_tokens(batch, shared=shares_prefix(model)))
        # DDP averages gradients over processes, but the loss is already divided by the counts of all processes.
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward pass of one micro-batch; checks the gradient after the last one of a step."""
        with spent_on("step", "backward"):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.guard.check_gradient(model, self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics, averaged over processes, to the values that the Trainer logs."""
        if "loss" in logs:
            logs |= self._sums.flush(self.accelerator) | self.lost.flush(self.accelerator)
            if self.guard.spike_factor is not None:
                logs["spikes/skipped"] = float(self.guard.skipped)
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self.options.on_log({"step": self.state.global_step, **logs})
