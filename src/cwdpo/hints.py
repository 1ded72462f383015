"""Hints for unknown keys of a recipe: the section where a key belongs, and our names for the keys of other tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FROM_OTHER_TOOLS: Mapping[str, str] = {
    # transformers and TRL
    "num_train_epochs": "stage1.epochs and stage2.epochs",
    "max_steps": "stage1.steps and stage2.steps",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "warmup_ratio": "train.warmup_steps (a share of all steps when below 1)",
    "eval_steps": "probes.every",
    "lr": "stage1.learning_rate and stage2.learning_rate",
    "optim": "train.optimizer and train.arguments.optim",
    "gradient_clipping": "train.max_grad_norm",
    "clip_grad": "train.max_grad_norm",
    "wandb": "train.report_to (wandb)",
    "shuffle": "nothing: rows are always drawn in random order, by the seed",
    "rank": "model.lora.r",
    "logging_first_step": "nothing: the first step is always logged",
    "save_strategy": "train.save_steps (null: no checkpoint within a stage)",
    "activation_checkpointing": "train.gradient_checkpointing",
    "fp16": "train.bf16: half precision is bfloat16 here",
    "output_dir": "the option --out",
    "run_name": "name",
    "resume_from_checkpoint": "the option --resume",
    "max_seq_length": "data.max_length",
    "max_prompt_length": "data.max_length, which counts prompt and completion; nothing is cut",
    "max_completion_length": "data.max_length, which counts prompt and completion; nothing is cut",
    "truncation_mode": "data.max_length: longer rows are left out, nothing is cut",
    "loss_type": "stage2.objective",
    "beta": "stage1.objective.beta or stage2.objective.beta",
    "rpo_alpha": "stage2.objective.sft_weight",
    "label_smoothing": "stage2.objective (cdpo, robust_dpo)",
    "precompute_ref_log_probs": "nothing: the reference values are always computed once, before training",
    "ref_model": "nothing: the reference is the policy at the start of the stage",
    "dataset_num_proc": "nothing: rows are read in one process",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "use_peft": "model.tune (lora)",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target": "model.lora.target_modules",
    "lora_target_modules": "model.lora.target_modules",
    # LLaMA-Factory and ms-swift
    "model_name_or_path": "model.path",
    "finetuning_type": "model.tune",
    "train_type": "model.tune",
    "freeze_vision_tower": "model.freeze (vision)",
    "freeze_vit": "model.freeze (vision)",
    "freeze_multi_modal_projector": "model.freeze (projector)",
    "freeze_aligner": "model.freeze (projector)",
    "freeze_llm": "model.freeze (text)",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_config": "data.path (owner/name:configuration)",
    "dataset_train_split": "data.path (owner/name#split)",
    "dataset_test_split": "data.validation_path (owner/name#split)",
    "dataset_dir": "data.path (FOLDER/dataset_info.json:NAME)",
    "cutoff_len": "data.max_length",
    "max_samples": "data.limit",
    "val_size": "data.validation_fraction",
    "split_dataset_ratio": "data.validation_fraction",
    "pref_beta": "stage2.objective.beta",
    "pref_loss": "stage2.objective",
    "rlhf_type": "stage2.objective",
    "image_max_pixels": "model.processor_options.max_pixels",
    "max_pixels": "model.processor_options.max_pixels (of images) and data.video.max_pixels (of videos)",
    "video_fps": "data.video.fps",
    "video_maxlen": "data.video.max_frames",
    "video_max_pixels": "data.video.max_pixels",
    "nframes": "data.video.max_frames",
    "min_pixels": "model.processor_options.min_pixels",
}
"""Keys of other tools -> the recipe's key for the same setting."""


def belongs(key: str, places: Iterable[str]) -> str:
    """A hint for an unknown key: ``"; did you mean SECTION.KEY?"``, or what replaces it; else an empty string.

    Args:
        key: the unknown key, without its section.
        places: all dotted keys of a recipe.

    >>> belongs("learning_rate", ["stage1.learning_rate", "train.batch_size"])
    '; did you mean stage1.learning_rate?'
    """
    if key in FROM_OTHER_TOOLS:
        return f"; here it is replaced by {FROM_OTHER_TOOLS[key]}"
    same = [place for place in places if place.rpartition(".")[2] == key]
    return f"; did you mean {' or '.join(same)}?" if same else ""
