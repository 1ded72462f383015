"""Arguments of TRL and transformers that CWDPOTrainer does not have: errors that name the replacement."""

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
_OWN = "write your own objective: objective='file.py:ClassName'"
_NOTHING = "it has no effect: remove it"

CONFIG: dict[str, tuple[tuple[Any, ...], str]] = {
    "loss_type": ((), ""),  # the replacement depends on its value, see _losses
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
        "the reference is fixed: train again from the trained model",
    ),
    "ref_model_mixup_alpha": ((0.6, None), "the reference is fixed"),
    "ref_model_sync_steps": ((512, None), "the reference is fixed"),
    "precompute_ref_log_probs": ((), "reference values are always computed once, before training: remove it"),
    "precompute_ref_batch_size": (
        (None,),
        "per_device_train_batch_size, which the reference pass uses, too",
    ),
    "max_prompt_length": (
        (None,),
        "max_length of prompt plus completion: longer rows are left out, nothing is truncated",
    ),
    "max_completion_length": ((None,), "max_length of prompt plus completion: longer rows are left out"),
    "truncation_mode": ((), "max_length: longer rows are left out and counted, nothing is truncated"),
    "dataset_num_proc": ((None,), "rows are read in one process: remove it"),
    "padding_free": (
        (False, None),
        "there is little padding because batches have rows of similar length (max_tokens_per_batch): remove it",
    ),
    "pad_to_multiple_of": (("auto", None), _NOTHING),
    "padding_value": ((None,), _NOTHING),
    "label_pad_token_id": ((None, -100), _NOTHING),
    "pad_token": ((None,), "set processing_class.tokenizer.pad_token"),
    "activation_offloading": ((False, None), "gradient_checkpointing=True saves memory instead"),
    "router_aux_loss_coef": ((None, 0, 0.0), "the auxiliary loss of a mixture of experts is not supported"),
    "ref_model_init_kwargs": ((None,), "load the reference and pass it as ref_model"),
    "force_use_ref_model": ((False, None), "pass another reference as ref_model"),
    "model_adapter_name": ((None,), "the active adapter is trained"),
    "ref_adapter_name": ((None,), "load the reference and pass it as ref_model"),
    "generate_during_eval": ((False, None), "cwdpo evaluate, on the trained model"),
    "is_encoder_decoder": ((False, None), "encoder-decoder models are not supported"),
    "dataset_kwargs": ((None,), _NOTHING),
    "use_logits_to_keep": ((None, False, True), _NOTHING),
}
"""Argument of TRL's DPOConfig (this and earlier releases) -> values without an effect, and the replacement."""

TRAINER: dict[str, str] = {
    "tokenizer": "processing_class",
    "data_collator": "not supported: the trainer makes its batches itself",
    "quantization_config": "load the quantized model yourself and pass it as model",
    "preprocess_logits_for_metrics": "not supported: compute_metrics gets the rewards of pairs, not logits",
    "model_init_kwargs": "args: CWDPOConfig(model_init_kwargs=...)",
}
"""Argument of TRL's DPOTrainer (this and earlier releases) -> the replacement."""

UNUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False,), "the reference is scored in float32 or bfloat16: use bf16=True"),
    "bf16_full_eval": ((False,), "evaluation uses the precision of training"),
    "fp16_full_eval": ((False,), "evaluation uses the precision of training"),
    "label_smoothing_factor": ((0.0,), "objective='robust_dpo' (or 'cdpo') has label_smoothing"),
    "torch_compile": ((False,), "compiled models cannot be scored"),
    "use_liger_kernel": ((False,), "logits are already computed for completion tokens only"),
    "neftune_noise_alpha": (
        (None,),
        "noise in training only would make the policy differ from its reference",
    ),
    "auto_find_batch_size": ((False,), "set max_tokens_per_batch, or a smaller batch"),
    "batch_eval_metrics": ((False,), "compute_metrics gets all pairs at once"),
    "parallelism_config": ((None,), "tensor and context parallelism are not supported"),
    "optim_target_modules": ((None,), "choose the trained weights with a peft_config"),
}
"""Argument of transformers' TrainingArguments -> the supported values, and why others are not supported."""


def takes_trl_names(cls: type[C]) -> type[C]:
    """Make the ``__init__`` of a configuration accept TRL's names.

    An argument with a value that has no effect (``padding_free=False``) is ignored. Any other value is a RecipeError
    that names the replacement.
    """
    generated = cls.__init__
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]

    @wraps(generated)
    def init(self: C, *args: Any, **given: Any) -> None:
        for name, value in given.items():
            if name in known or name not in CONFIG or value in CONFIG[name][0]:
                continue
            instead = _config(name, value)
            raise RecipeError(f"CWDPOConfig: {name}={value!r} is TRL's; here: {instead}")
        generated(self, *args, **{k: v for k, v in given.items() if k in known or k not in CONFIG})

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


def refuse_unused(args: Any) -> None:
    """Raise an error for arguments of transformers that would be ignored.

    Raises:
        RecipeError: names the argument, its value, and the reason.
    """
    for name, (honoured, why) in UNUSED.items():
        value = getattr(args, name, honoured[0])
        if value not in honoured:
            raise RecipeError(f"CWDPOConfig: {name}={value!r} is not supported: {why}")


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Raise an error for arguments that the trainer does not have.

    Raises:
        RecipeError: an argument of TRL; the message names the replacement.
        TypeError: an unknown argument.
    """
    for name, value in given.items():
        if name in TRAINER:
            if value is not None:
                raise RecipeError(f"CWDPOTrainer: {name} is TRL's; here: {TRAINER[name]}")
        elif name in CONFIG:
            raise RecipeError(
                f"CWDPOTrainer: {name} is an argument of TRL's DPOConfig; here: {_config(name, value)}"
            )
        else:
            raise TypeError(f"CWDPOTrainer got an unexpected keyword argument {name!r}")


def _config(name: str, value: Any) -> str:
    return _losses(value) if name == "loss_type" else CONFIG[name][1]


def _losses(value: Any) -> str:
    """The objective with the loss of a ``loss_type``."""
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
    """The settings, changed by TRL's ``model_init_kwargs``.

    Raises:
        RecipeError: a key that is not supported.
    """
    changes: dict[str, Any] = {}
    for key, value in (given or {}).items():
        if key == "device_map" and value is None:
            continue
        if key not in _MODEL_KEYS:
            raise RecipeError(
                f"model_init_kwargs: {key!r} is not supported; allowed: {', '.join(_MODEL_KEYS)}; or load the model "
                "yourself and pass it as model"
            )
        changes[_MODEL_KEYS[key]] = (
            str(value).removeprefix("torch.") if _MODEL_KEYS[key] == "dtype" else value
        )
    return ModelSettings(**{**settings.model_dump(), **changes})
