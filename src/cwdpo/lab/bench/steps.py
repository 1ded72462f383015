"""The two training steps that are compared: this project's trainer and TRL's, on one model and one batch."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample, EncodedPrompt
from cwdpo.errors import MissingPackageError
from cwdpo.lab.bench.setting import Setting, build_model, processor, rows
from cwdpo.models.shared_attention import use_scoring
from cwdpo.models.vision_cache import keep_vision_features
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.scoring.pairs import reference_pass

BETA = 0.1
Step = Callable[[], float]


@dataclass
class Bench:
    """A model and the training steps to run on it, by name. A step computes the gradients and returns the loss.

    ``cwdpo``: this project's step, including metrics and guard. ``trl``: TRL's step as it runs on this device.
    ``trl_completions``: TRL's step with logits of completion tokens only, as TRL does where Triton is available.
    ``trl_cached``: also with given reference values, which TRL does not support for vision data.
    """

    setting: Setting
    model: Any
    steps: dict[str, Step]

    def run(self, name: str) -> float:
        """Clear the gradients and run one step; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.steps[name]()
        if self.setting.device != "cpu":
            torch.cuda.synchronize()
        return loss

    def gradients(self, name: str) -> dict[str, Tensor]:
        """Copies of the parameter gradients of a step."""
        self.run(name)
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def build(setting: Setting, *, trl: bool = True) -> Bench:
    """Build model, batch and steps.

    Raises:
        MissingPackageError: TRL is not installed.
    """
    made = processor()
    model = build_model(setting, made.tokenizer)
    reference = model if setting.tune == "lora" else moved_copy(model)
    data = rows(setting, made.tokenizer)
    encoded = encoded_example(setting, made)
    steps: dict[str, Step] = {}
    if trl:
        steps |= trl_steps(setting, model, reference, made, data)
    use_scoring(model, "shared_prefix")
    if reference is not model:
        use_scoring(reference, "shared_prefix")
    keep_vision_features(model, 64.0 if setting.vision_cache else 0.0)
    steps["cwdpo"] = own_step(setting, model, reference, [encoded])
    return Bench(setting, model, steps)


def moved_copy(model: Any) -> Any:
    """A reference for full fine-tuning that differs from the policy, so that the gradients depend on its values."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator(device=model.device).manual_seed(9)
    for parameter in copied.parameters():
        noise = torch.empty_like(parameter).normal_(0, 1e-3, generator=generator)
        parameter.add_(noise)
    return copied


def encoded_example(setting: Setting, made: Any) -> EncodedExample:
    """The example of a setting, encoded by its processor; its images lie on the device."""
    data = rows(setting, made.tokenizer)
    inputs = made(text=[data[0]["prompt"]], images=data[0]["images"], return_tensors="pt")
    images = {n: inputs[n].to(setting.device) for n in ("pixel_values", "image_grid_thw")}
    images["pixel_values"] = images["pixel_values"].to(getattr(torch, setting.dtype))
    prompt = EncodedPrompt(
        tuple(inputs["input_ids"][0].tolist()),
        {"mm_token_type_ids": tuple(inputs["mm_token_type_ids"][0].tolist())},
        lambda: images,
        "bench",
    )

    def completion(text: str) -> EncodedCompletion:
        ids = tuple(made.tokenizer(text, add_special_tokens=False)["input_ids"])
        return EncodedCompletion(ids, span=(0, len(ids)))

    example = EncodedExample(
        "bench", prompt, completion(data[0]["chosen"]), tuple(completion(r["rejected"]) for r in data)
    )
    lengths = (len(example.prompt.input_ids), len(example.chosen.ids))
    assert lengths == (setting.prompt_tokens, setting.completion_tokens), lengths
    return example


@contextlib.contextmanager
def _adapter_off(setting: Setting, model: Any) -> Iterator[None]:
    with model.disable_adapter() if setting.tune == "lora" else contextlib.nullcontext():
        yield


def own_step(setting: Setting, model: Any, reference: Any, examples: Sequence[EncodedExample]) -> Step:
    """The step of ``cwdpo train`` for one micro-batch: counts, scoring, objective, metrics, backward pass, guard."""
    from transformers import TrainingArguments

    from cwdpo.trainer.trainer import PreferenceTrainer

    def referenced() -> list[EncodedExample]:
        with _adapter_off(setting, model):
            scored: list[EncodedExample] = reference_pass(reference, examples)
        return scored

    known = referenced()
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="cwdpo-bench-"),
        per_device_train_batch_size=len(examples),
        report_to="none",
        use_cpu=setting.device == "cpu",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    objective = OBJECTIVES.build({"name": "dpo", "beta": BETA})
    trainer = PreferenceTrainer(model, args, objective, known)

    def step() -> float:
        now = referenced() if setting.reference == "live" else known
        inputs = {"batch": collate(now)}
        totals = trainer.prepare_step([inputs])
        return float(trainer.training_step(model, inputs, totals))

    return step


def trl_steps(
    setting: Setting, model: Any, reference: Any, made: Any, data: list[dict[str, Any]]
) -> dict[str, Step]:
    """TRL's steps on one batch of the rows, see :class:`Bench`.

    Args:
        setting: the benchmark setting; ``negatives`` is the number of rows.
        model: the policy.
        reference: the reference model with full fine-tuning; with LoRA it is not used.
        made: the processor.
        data: rows with TRL's columns.

    Raises:
        MissingPackageError: TRL is not installed.
    """
    try:
        import trl.trainer.utils as trl_utils
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise MissingPackageError("cwdpo bench compares with TRL: pip install 'trl>=1.16,<1.17'") from None
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="cwdpo-bench-"), per_device_train_batch_size=setting.negatives, beta=BETA,
        max_length=None, report_to="none", use_cpu=setting.device == "cpu", bf16=False, disable_tqdm=True,
        gradient_checkpointing=setting.grad_checkpointing, dataloader_pin_memory=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            model=model,
            ref_model=None if setting.tune == "lora" else reference,
            args=args,
            train_dataset=Dataset.from_list(data),
            processing_class=made,
        )
    batch = {k: v.to(setting.device) for k, v in trainer.data_collator([dict(r) for r in data]).items()}
    batch["pixel_values"] = batch["pixel_values"].to(getattr(torch, setting.dtype))
    trainer.current_gradient_accumulation_steps = 1  # train() sets it
    if setting.tune == "lora" and "ref" in model.peft_config:
        model.delete_adapter(
            "ref"
        )  # TRL's copy of our adapter; without it the base model is the reference, as in our step
    natural = trl_utils._use_triton

    def step(inputs: dict[str, Any], completions_only: bool, cached: bool) -> float:
        trl_utils._use_triton = (lambda device: True) if completions_only else natural
        trainer.precompute_ref_logps = cached
        return float(trainer.training_step(model, dict(inputs)))

    with torch.no_grad():
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    known = {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return {
        "trl": lambda: step(batch, False, False),
        "trl_completions": lambda: step(batch, True, False),
        "trl_cached": lambda: step(known, True, True),
    }


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[float, float]:
    """``(largest difference of the two gradients, largest gradient)`` over all parameters."""
    assert first.keys() == second.keys()
    scale = max(float(g.abs().max()) for g in first.values())
    return max(float((first[n] - second[n]).abs().max()) for n in first), scale
