"""The recipe's section ``train``, and which of transformers' TrainingArguments it passes on.

A test compares these names with those of the installed transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cwdpo.errors import MissingPackageError, nearest
from cwdpo.files.yamlfile import as_number
from cwdpo.registry import Settings

Optimizer = Literal["adamw", "adamw_kahan"]
"""``train.optimizer``: transformers' AdamW, or the one whose rounding errors are compensated."""

TRACKERS = ("clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Allowed names in ``train.report_to``; each is also the name of the package that it needs."""
# The schedules of transformers that need no further settings.
SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
)  # fmt: skip

PASSED = frozenset(
    (
        "optim", "optim_args", "adam_beta1", "adam_epsilon", "lr_scheduler_kwargs", "tf32", "torch_empty_cache_steps",
        "data_seed", "full_determinism", "debug", "skip_memory_metrics", "log_level", "log_level_replica",
        "log_on_each_node",
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
        "ddp_timeout",
    )
)  # fmt: skip
"""Passed to the trainers of both stages."""

OWNED: Mapping[str, str] = {
    "output_dir": "the option --out",
    "resume_from_checkpoint": "the option --resume",
    "run_name": "name",
    "seed": "seed",
    "use_cpu": "model.device",
    "learning_rate": "stage1.learning_rate and stage2.learning_rate",
    "max_steps": "stage1.steps and stage2.steps",
    "num_train_epochs": "stage1.epochs and stage2.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "weight_decay": "train.weight_decay",
    "adam_beta2": "train.adam_beta2",
    "max_grad_norm": "train.max_grad_norm",
    "logging_steps": "train.logging_steps",
    "logging_strategy": "train.logging_steps",
    "save_steps": "train.save_steps",
    "save_strategy": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "activation_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "bf16": "train.bf16",
    "fp16": "train.bf16",
    "report_to": "train.report_to",
    "project": "train.project",
    "trackio_space_id": "train.trackers",
    "trackio_bucket_id": "train.trackers",
    "train_sampling_strategy": "train.group_by_length",
    "dataloader_num_workers": "train.dataloader_workers",
    "dataloader_persistent_workers": "train.dataloader_workers",
    "dataloader_prefetch_factor": "train.dataloader_workers",
    "dataloader_multiprocessing_context": "train.dataloader_workers",
    "dataloader_in_order": "train.dataloader_workers",
    "eval_steps": "probes.every",
    "eval_strategy": "probes.every",
}
"""Argument -> where the recipe, or the command, sets it."""

_HUB = "a run uploads nothing: upload its folder, or what cwdpo export writes"
_EVAL = "held-out rows are measured by probes (section probes)"
_BEST = "stop rules restore the last weights before a limit (stop)"
_COMPILED = "compiled models cannot be scored"
_LIGER = "the reference is scored before such kernels are put in, and logits are computed for completion tokens only"
_LOADER = "images that data workers read (train.dataloader_workers) are pinned if a GPU is used"
_LAUNCHED = "give it to accelerate launch (docs/distributed.md)"
_RESUMED = "a resumed run must take the steps of the uninterrupted one"
_TRAINED = "the run writes and reads what it needs"
_FIXED = "it is set by the run"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LIGER),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "accelerator_config", "local_rank"), _LAUNCHED),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
    **dict.fromkeys(
        (
            "eval_delay", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
            "eval_accumulation_steps", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics",
            "bf16_full_eval", "fp16_full_eval", "label_names",
        ),
        _EVAL,
    ),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), _RESUMED),
    **dict.fromkeys(
        ("save_only_model", "save_on_each_node", "enable_jit_checkpoint", "do_train", "do_eval", "do_predict"), _TRAINED
    ),
    **dict.fromkeys(
        (
            "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "logging_first_step",
            "logging_nan_inf_filter", "disable_tqdm", "remove_unused_columns", "length_column_name", "use_cache",
        ),
        _FIXED,
    ),
    "dataloader_pin_memory": _LOADER,
    "dataloader_drop_last": "every row of an epoch is trained on",
    "include_num_input_tokens_seen": "metrics.jsonl counts tokens",
    "average_tokens_across_devices": "a step's loss is always divided by the counts of all processes",
    "label_smoothing_factor": "the objectives robust_dpo and cdpo have label_smoothing",
    "neftune_noise_alpha": "noise in training only would make the policy differ from its reference",
    "auto_find_batch_size": "set train.max_tokens_per_batch, or a smaller train.batch_size",
    "trackio_static_space_id": "name the space in train.trackers: {trackio: {space_id: ...}}",
    "parallelism_config": "tensor and context parallelism are not supported",
    "optim_target_modules": "choose the trained weights by model.freeze and model.lora",
}  # fmt: skip
"""Argument -> why a recipe cannot set it."""


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers whose package is not installed, before anything is read.

    Raises:
        MissingPackageError: with the line that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(
                f"train.report_to: the tracker {name!r} is not installed: pip install {name}, or leave it out"
            )


def objection(setting: str, value: Any) -> str | None:
    """What is wrong with the first unusable name in a setting of the section ``train``; ``None`` if there is none.

    Args:
        setting: ``lr_scheduler_type``, ``report_to``, ``trackers`` or ``arguments``.
        value: its name, names, or mapping by name.
    """
    if setting == "arguments":
        return next((problem for name in value if (problem := _argument(str(name))) is not None), None)
    known = SCHEDULES if setting == "lr_scheduler_type" else TRACKERS
    unknown = next(
        (name for name in ([value] if isinstance(value, str) else value) if name not in known), None
    )
    if unknown is None:
        return None
    return f"unknown name {unknown!r}{nearest(unknown, known)}; allowed: {', '.join(known)}"


def _argument(name: str) -> str | None:
    if name in PASSED:
        return None
    if name in OWNED:
        return f"{name}: the recipe sets it by {OWNED[name]}"
    if name in REFUSED:
        return f"{name}: {REFUSED[name]}"
    known = nearest(name, (*PASSED, *OWNED, *REFUSED))
    return f"{name}: transformers' TrainingArguments have no such argument{known}"


class TrainSettings(Settings):
    """Settings of both stages; names as in transformers' TrainingArguments."""

    batch_size: int = Field(16, gt=0, description="prompts per device and micro-batch")
    gradient_accumulation_steps: int = Field(1, gt=0)
    warmup_steps: float = Field(10, ge=0, description="steps, or a share of all steps if below 1")
    lr_scheduler_type: str = "constant_with_warmup"
    weight_decay: float = Field(0.0, ge=0)
    adam_beta2: float = Field(0.98, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: Optimizer = Field(
        "adamw",
        description="adamw_kahan: for trained bf16 weights, compensates their rounding errors (torch-optimi)",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="skip an update if the gradient norm exceeds its running median by this factor",
    )
    spike_window: int = Field(50, ge=2, description="steps of that median; no update is skipped before them")
    logging_steps: int = Field(10, gt=0)
    save_steps: int | None = Field(None, gt=0, description="default: no checkpoint within a stage")
    save_total_limit: int = Field(2, gt=0)
    gradient_checkpointing: bool = False
    bf16: bool = False
    report_to: tuple[str, ...] = Field((), description="experiment trackers")
    project: str = Field("cwdpo", description="project or experiment of the trackers")
    trackers: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="by tracker: further arguments of its start, e.g. wandb: {entity: ...}",
    )
    max_tokens_per_batch: int | None = Field(
        None,
        gt=0,
        description="largest number of tokens in a micro-batch, with padding; used instead of batch_size",
    )
    group_by_length: bool = Field(
        True, description="micro-batches of rows of similar length, in random order"
    )
    dataloader_workers: int | None = Field(
        None,
        ge=0,
        description="processes that read images ahead and encode rows; default: 4 with an accelerator, 0 on a CPU",
    )
    reference_cache: str | None = Field(
        None, description="folder for reference log-probabilities of several runs; default: in the run folder"
    )

    arguments: dict[str, Any] = Field(
        default_factory=dict, description="further ones of TrainingArguments, e.g. optim"
    )

    @model_validator(mode="after")
    def _one_optimizer(self) -> TrainSettings:
        if "optim" in self.arguments and self.optimizer != "adamw":
            raise ValueError(
                f"arguments.optim and optimizer: {self.optimizer} are two optimizers: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_used_trackers(self) -> TrainSettings:
        for name in self.trackers:
            if name not in self.report_to:
                raise ValueError(f"trackers: {name} is not in report_to: add it there, or leave it out")
        return self

    @field_validator("lr_scheduler_type", "report_to", "trackers", "arguments")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        """Check names when the recipe is read; transformers would check them after data and model are loaded."""
        if (problem := objection(str(info.field_name), value)) is not None:
            raise ValueError(problem)
        if info.field_name == "arguments":
            return {k: as_number(v) for k, v in value.items()}
        return value
