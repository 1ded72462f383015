"""``CWDPOTrainer``: the stage-2 trainer with TRL's argument names, for TRL's vision-preference data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.errors import DataError
from cwdpo.models.load import disable_dropout
from cwdpo.models.shared_attention import Scoring, use_scoring
from cwdpo.models.vision_cache import keep_vision_features
from cwdpo.objectives.base import OBJECTIVES, Objective
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.records import Example
from cwdpo.scoring.pairs import reference_pass
from cwdpo.stage.prepare import (
    autocast,
    check_scoring,
    encode_usable,
    keep_negatives,
    reference_mean_logps,
    wants_calibration,
)
from cwdpo.trainer.trainer import PreferenceTrainer

Rows = Iterable[Mapping[str, Any]]


@dataclass
class CWDPOConfig(TrainingArguments):  # type: ignore[misc]
    """transformers' arguments plus the objective's, by TRL's names where TRL has them.

    Args:
        beta: inverse temperature, per nat.
        max_length: most tokens of prompt plus completion; longer examples are left out, never truncated.
        objective: name of an objective, or ``file.py:ClassName``.
        objective_settings: its further settings, e.g. ``{"floor": -0.5, "tau": 0.3, "sft_weight": 1.0}``.
        disable_dropout: as in TRL.
        max_bad_fraction: share of rows that may be unusable.
        calibration_samples: samples drawn from the reference for ``floor: auto`` and ``tau: auto``.
        calibration_max_new_tokens: longest of those samples.
        scoring: ``auto``, ``shared_prefix`` or ``plain``, see :func:`cwdpo.models.shared_attention.use_scoring`.
        vision_cache_gb: memory for the image features of a frozen vision side.
        max_tokens_per_batch: micro-batches by tokens instead of by rows.
    """

    beta: float = field(default=0.1)
    max_length: int | None = field(default=None)
    objective: str = field(default="cw_dpo")
    objective_settings: dict[str, Any] = field(default_factory=dict)
    disable_dropout: bool = field(default=True)
    max_bad_fraction: float = field(default=0.01)
    calibration_samples: int = field(default=200)
    calibration_max_new_tokens: int = field(default=128)
    scoring: Scoring = field(default="auto")
    vision_cache_gb: float = field(default=1.0)
    max_tokens_per_batch: int | None = field(default=None)

    def build_objective(self) -> Objective:
        """The objective; ``beta`` is passed where it has one."""
        has_beta = "beta" in OBJECTIVES.get(self.objective).model_fields
        beta = {"beta": self.beta} if has_beta else {}
        return OBJECTIVES.build({"name": self.objective, **beta, **self.objective_settings})


class CWDPOTrainer(PreferenceTrainer):
    """Drop-in for ``trl.DPOTrainer`` on vision-preference data.

    The reference is the model as it is handed over (or ``ref_model``): its log-probabilities are computed
    once here, and floor and tau are calibrated from its own samples.

    Args:
        model: a model, or the path or hub id of one.
        ref_model: another reference; by default the model itself, as it stands.
        args: the configuration.
        train_dataset: rows in TRL's vision-preference format (a ``datasets.Dataset`` or a list of dicts).
        processing_class: the processor; loaded from ``model`` when that is a path.
        peft_config: a peft configuration to wrap the model with.
        callbacks: further callbacks.

    Raises:
        DataError: too many rows are unusable, or none is left.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: CWDPOConfig | None = None,
        train_dataset: Rows | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        args = args or CWDPOConfig()
        if train_dataset is None:
            raise DataError("CWDPOTrainer: train_dataset is missing: give rows in TRL's preference format")
        if isinstance(model, str):
            processing_class = processing_class or AutoProcessor.from_pretrained(model)
            dtype = "auto" if peft_config is not None else "float32"  # bf16 weights would lose small updates
            model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, use_safetensors=True)
        if processing_class is None:
            raise DataError("CWDPOTrainer: processing_class is missing: give the model's processor")
        if args.disable_dropout:
            disable_dropout(model)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        model.to(args.device)
        for one in (model, ref_model):
            if one is not None:
                use_scoring(one, args.scoring)
                keep_vision_features(one, args.vision_cache_gb)
        objective = args.build_objective()
        examples = read_examples(
            rows_source(train_dataset, "train_dataset"), max_bad_fraction=args.max_bad_fraction
        ).examples
        encoder = Encoder(processing_class, args.max_length)
        with autocast(model, args.bf16):
            check_scoring(model, encoder, examples, args.scoring)
        encoded, _ = encode_usable(encoder, examples, objective, "rejected", args.max_bad_fraction)
        if objective.needs_reference:
            reference = model if ref_model is None else ref_model.to(args.device)
            with autocast(reference, args.bf16):
                encoded = reference_pass(reference, encoded, batch_size=args.per_device_train_batch_size)
                encoded = keep_negatives(objective, encoded)
                readable = {e.id for e in encoded}
                prompts = [e for e in examples if e.id in readable]
                objective = _calibrated(objective, reference, encoder, prompts, args)
        super().__init__(
            model,
            args,
            objective,
            encoded,
            processing_class=processing_class,
            callbacks=callbacks,
            max_tokens_per_batch=args.max_tokens_per_batch,
        )


def _calibrated(
    objective: Objective,
    reference: PreTrainedModel,
    encoder: Encoder,
    examples: Sequence[Example],
    args: CWDPOConfig,
) -> Objective:
    if not wants_calibration(objective):
        return objective
    assert isinstance(objective, CwDpo)
    n, longest = args.calibration_samples, args.calibration_max_new_tokens
    return objective.calibrated(reference_mean_logps(reference, encoder, examples, n, longest, args.seed))
