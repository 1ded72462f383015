"""A thin ``transformers.Trainer``: batch -> scoring -> objective -> loss, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from cwdpo.data.collate import Collator, PromptBatch
from cwdpo.data.encode import EncodedExample
from cwdpo.errors import NonFiniteError
from cwdpo.models.load import load_weights
from cwdpo.objectives.base import Objective, StepTotals
from cwdpo.scoring import plain
from cwdpo.scoring.pairs import scored_pairs
from cwdpo.training.metrics import StepMetrics


class PreferenceTrainer(Trainer):  # type: ignore[misc]
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
    ) -> None:
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=Collator(),
            processing_class=processing_class,
            callbacks=list(callbacks),
        )
        self.objective = objective
        self.loss_is_scaled_for_ga = True
        self._sums = StepMetrics()
        self._on_log = on_log

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> StepTotals | None:
        """Counts of the whole optimizer step, over micro-batches and processes."""
        batches: list[PromptBatch] = [inputs["batch"] for inputs in batch_samples]
        if not batches:
            return None
        self._sums.begin_step()
        counts = [
            float(
                sum(b.n_paired_prompts if self.objective.needs_negatives else len(b.prompts) for b in batches)
            ),
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
        return StepTotals(prompts, chosen, rejected, nll[0] / max(rejected, 1.0) if nll else None)

    @torch.no_grad()
    def _negative_nll_sum(self, batches: Sequence[PromptBatch]) -> float:
        """NLL of all negatives of a split step: its penalty switches on the mean over the whole step."""
        total = 0.0
        for batch in batches:
            if len(batch.rejected):
                pairs = scored_pairs(batch, plain.score(self.model, batch))
                total -= float(pairs.rejected.sum_logp.sum())
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss."""
        batch: PromptBatch = inputs["batch"]
        tokens = plain.score(model, batch, smoothing=self.objective.needs_uniform)
        pairs = scored_pairs(batch, tokens, num_items_in_batch)
        output = self.objective(pairs)
        self._check_finite(output.loss, batch)
        self._sums.add(batch, pairs, output)
        # DDP averages gradients over processes; the loss is already divided by the global count.
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a full checkpoint by its family's own naming.

        transformers' Trainer loads the file's names with ``strict=False``; LLaVA and its kin are saved under
        other names, so that nothing would be loaded and the run would go on from the wrong weights.
        """
        wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(self.model, "peft_config")
        if wrapped or model is not None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model, Path(resume_from_checkpoint))

    def _check_finite(self, loss: Tensor, batch: PromptBatch) -> None:
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss is {float(loss.detach())} on examples "
                f"{', '.join(batch.example_ids)}; nothing was updated. Lower the learning rate, or look at "
                "these rows with `cwdpo validate`"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics, reduced over processes, to what the Trainer logs."""
        if "loss" in logs:
            logs |= self._sums.flush(self.accelerator)
        super().log(logs, start_time)
        if self._on_log is not None and self.is_world_process_zero():
            self._on_log({"step": self.state.global_step, **logs})
