"""TRL's arguments that have another name here, or nothing to do: each is refused with what takes its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

from cwdpo.errors import RecipeError
from cwdpo.models.settings import ModelSettings

C = TypeVar("C")
_LOSSES = {
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "robust": "robust_dpo", "sft": "sft",
}  # fmt: skip
_OWN = "write it as an objective of your own: objective='file.py:ClassName'"
_NOTHING = "it has nothing to do here: remove it"

CONFIG: dict[str, tuple[tuple[Any, ...], str]] = {
    "loss_type": ((), ""),  # told by its value
    "loss_weights": ((None,), "objective='mpo' has MPO's three weights in objective_settings"),
    "rpo_alpha": ((None,), "objective='dpo' with objective_settings={'sft_weight': ALPHA}"),
    "label_smoothing": (
        (0, None),
        "objective='robust_dpo' (or 'cdpo') with objective_settings={'label_smoothing': S}",
    ),
    "use_weighting": ((False, None), "objective='wpo'"),
    "reference_free": ((False, None), "objective='simpo', which has no reference"),
    "ld_alpha": ((None,), _OWN),
    "f_divergence_type": (("reverse_kl", None), _OWN),
    "f_alpha_divergence_coef": ((0.5, None), _OWN),
    "discopop_tau": ((0.05, None), _OWN),
    "sync_ref_model": (
        (False, None),
        "the reference stays that of the first step: run again from the trained model",
    ),
    "ref_model_mixup_alpha": ((0.6, None), "the reference stays that of the first step"),
    "ref_model_sync_steps": ((512, None), "the reference stays that of the first step"),
    "precompute_ref_log_probs": ((), "the reference is always computed once, before training: remove it"),
    "precompute_ref_batch_size": ((None,), "per_device_train_batch_size is that of the reference pass too"),
    "max_prompt_length": (
        (None,),
        "max_length, of prompt plus completion: longer rows are left out, nothing is cut",
    ),
    "max_completion_length": ((None,), "max_length, of prompt plus completion: longer rows are left out"),
    "truncation_mode": ((), "max_length: longer rows are left out and counted, nothing is cut"),
    "dataset_num_proc": ((None,), "rows are read in one process: remove it"),
    "padding_free": (
        (False, None),
        "padding is kept small by rows of like length (max_tokens_per_batch): remove it",
    ),
    "pad_to_multiple_of": (("auto", None), _NOTHING),
    "padding_value": ((None,), _NOTHING),
    "label_pad_token_id": ((None, -100), _NOTHING),
    "pad_token": ((None,), "set processing_class.tokenizer.pad_token"),
    "activation_offloading": ((False, None), "gradient_checkpointing=True saves memory instead"),
    "router_aux_loss_coef": ((None, 0, 0.0), "the auxiliary loss of a mixture of experts is not added"),
    "ref_model_init_kwargs": ((None,), "load the reference and give it as ref_model"),
    "force_use_ref_model": ((False, None), "give another reference as ref_model"),
    "model_adapter_name": ((None,), "the active adapter is trained"),
    "ref_adapter_name": ((None,), "load the reference and give it as ref_model"),
    "generate_during_eval": ((False, None), "cwdpo evaluate, on the trained model"),
    "is_encoder_decoder": ((False, None), "encoder-decoder models are not trained"),
    "dataset_kwargs": ((None,), _NOTHING),
    "use_logits_to_keep": ((None, False, True), _NOTHING),
}
"""Argument of DPOConfig (this and earlier releases) -> values that ask for nothing, and what takes its place."""

TRAINER: dict[str, str] = {
    "tokenizer": "processing_class",
    "data_collator": "nothing: batches are made here",
    "quantization_config": "load the quantized model yourself and give it as model",
    "preprocess_logits_for_metrics": "nothing: compute_metrics gets rewards of pairs, no logits",
    "model_init_kwargs": "args: CWDPOConfig(model_init_kwargs=...)",
}
"""Argument of DPOTrainer (this and earlier releases) -> what takes its place."""

UNUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False,), "the reference is computed in float32 or bfloat16: use bf16=True"),
    "bf16_full_eval": ((False,), "evaluation runs in the precision of training"),
    "fp16_full_eval": ((False,), "evaluation runs in the precision of training"),
    "label_smoothing_factor": ((0.0,), "objective='robust_dpo' (or 'cdpo') has label_smoothing"),
    "torch_compile": ((False,), "compiled models are not scored"),
    "use_liger_kernel": ((False,), "only the tokens of completions reach the output head already"),
    "neftune_noise_alpha": ((None,), "noise in training only would part the policy from its reference"),
    "auto_find_batch_size": ((False,), "set max_tokens_per_batch, or a smaller batch"),
    "batch_eval_metrics": ((False,), "compute_metrics gets all pairs at once"),
    "parallelism_config": ((None,), "tensor and context parallelism are not used"),
    "optim_target_modules": ((None,), "choose what is trained by a peft_config"),
}
"""Argument of transformers' TrainingArguments -> values that are honoured, and why others are not."""


def takes_trl_names(cls: type[C]) -> type[C]:
    """A configuration whose ``__init__`` knows TRL's names too.

    One that asks for nothing (``padding_free=False``) is dropped; any other is refused by a RecipeError that says what
    takes its place.
    """
    generated = cls.__init__
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]

    @wraps(generated)
    def init(self: C, *args: Any, **given: Any) -> None:
        for name, value in given.items():
            if name in known or name not in CONFIG or value in CONFIG[name][0]:
                continue
            instead = _config(name, value)
            raise RecipeError(f"CWDPOConfig: {name}={value!r} is TRL's; in its place: {instead}")
        generated(self, *args, **{k: v for k, v in given.items() if k in known or k not in CONFIG})

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


def refuse_unused(args: Any) -> None:
    """Refuse arguments of transformers that nothing here would honour.

    Raises:
        RecipeError: the argument, its value, and why.
    """
    for name, (honoured, why) in UNUSED.items():
        value = getattr(args, name, honoured[0])
        if value not in honoured:
            raise RecipeError(f"CWDPOConfig: {name}={value!r} cannot be honoured: {why}")


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of TRL's trainer that have another name here.

    Raises:
        RecipeError: one of TRL's, with what takes its place.
        TypeError: one that nobody knows.
    """
    for name, value in given.items():
        if name in TRAINER:
            if value is not None:
                raise RecipeError(f"CWDPOTrainer: {name} is TRL's; in its place: {TRAINER[name]}")
        elif name in CONFIG:
            raise RecipeError(
                f"CWDPOTrainer: {name} belongs to TRL's configuration; in its place: {_config(name, value)}"
            )
        else:
            raise TypeError(f"CWDPOTrainer got an unexpected keyword argument {name!r}")


def _config(name: str, value: Any) -> str:
    return _losses(value) if name == "loss_type" else CONFIG[name][1]


def _losses(value: Any) -> str:
    """The objective that has the loss of a ``loss_type``."""
    losses = [value] if isinstance(value, str) else list(value or ())
    if len(losses) == 1 and losses[0] in _LOSSES:
        return f"objective={_LOSSES[losses[0]]!r}"
    if set(losses) == {"sigmoid", "bco_pair", "sft"}:
        return "objective='mpo'"
    if set(losses) == {"sigmoid", "sft"}:
        return "objective='dpo' with objective_settings={'sft_weight': W}"
    known = ", ".join(f"{loss} is objective={name!r}" for loss, name in _LOSSES.items())
    return f"objective ({known}; sigmoid, bco_pair and sft together are 'mpo'); else {_OWN}"


_MODEL_KEYS = {
    "revision": "revision", "trust_remote_code": "trust_remote_code", "attn_implementation": "attention",
    "dtype": "dtype", "torch_dtype": "dtype",
}  # fmt: skip


def model_settings(settings: ModelSettings, given: Mapping[str, Any] | None) -> ModelSettings:
    """The settings with what TRL's ``model_init_kwargs`` ask of loading the model.

    Raises:
        RecipeError: a key that is not honoured.
    """
    changes: dict[str, Any] = {}
    for key, value in (given or {}).items():
        if key == "device_map" and value is None:
            continue
        if key not in _MODEL_KEYS:
            raise RecipeError(
                f"model_init_kwargs: {key!r} is not honoured; allowed: {', '.join(_MODEL_KEYS)}; or load the model "
                "yourself and give it as model"
            )
        changes[_MODEL_KEYS[key]] = (
            str(value).removeprefix("torch.") if _MODEL_KEYS[key] == "dtype" else value
        )
    return ModelSettings(**{**settings.model_dump(), **changes})
