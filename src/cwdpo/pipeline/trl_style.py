"""``CWDPOTrainer``: the stage-2 trainer with TRL's argument names, for TRL's vision-preference data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from cwdpo.config import CalibrationSettings, DataSettings, Recipe, StageSettings, TrainSettings
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.errors import DataError
from cwdpo.models.load import Policy, adopt, load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.models.shared_attention import Scoring
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.rundir import RunDir
from cwdpo.stage.prepare import check_scoring, prepare
from cwdpo.stage.stage import Stage
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions

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

    def objective_spec(self) -> dict[str, Any]:
        """The objective as a recipe names it; ``beta`` is passed if it has one."""
        has_beta = "beta" in OBJECTIVES.get(self.objective).model_fields
        beta = {"beta": self.beta} if has_beta else {}
        return {"name": self.objective, **beta, **self.objective_settings}

    def as_recipe(self, path: str | None, *, lora: bool) -> Recipe:
        """What of these arguments the preparation of a stage reads, as a recipe.

        Args:
            path: of the model; ``None`` for one that is loaded already.
            lora: whether adapters are trained, so that the base keeps its own dtype.
        """
        return Recipe(
            seed=self.seed,
            model=ModelSettings(
                path=path or "embedded",
                tune="lora" if lora else "full",
                device="cpu" if self.use_cpu else "auto",
                scoring=self.scoring,
                vision_cache_gb=self.vision_cache_gb,
            ),
            data=DataSettings(
                path="train_dataset", max_length=self.max_length, max_bad_fraction=self.max_bad_fraction
            ),
            stage2=StageSettings(objective=self.objective_spec(), learning_rate=self.learning_rate or 1.0),
            train=TrainSettings(
                batch_size=self.per_device_train_batch_size,
                bf16=self.bf16,
                max_tokens_per_batch=self.max_tokens_per_batch,
            ),
            calibration=CalibrationSettings(
                samples=self.calibration_samples, max_new_tokens=self.calibration_max_new_tokens
            ),
        )


class CWDPOTrainer(PreferenceTrainer):
    """Drop-in for ``trl.DPOTrainer`` on vision-preference data.

    The reference is the model as it is handed over (or ``ref_model``): its log-probabilities are computed once here,
    and floor and tau are calibrated from its own samples. What could not be used, the calibration and the reference's
    values are written to ``args.output_dir``.

    Args:
        model: a model, or the path or hub id of one.
        ref_model: another reference; default: the model itself, before it trains.
        args: the configuration.
        train_dataset: rows in TRL's vision-preference format (a ``datasets.Dataset`` or a list of dicts).
        processing_class: the processor; loaded from ``model`` if that is a path.
        peft_config: a configuration of peft to wrap the model with.
        callbacks: further callbacks.

    Raises:
        DataError: too many rows are unusable, or none is left.
        ModelError: the model cannot be loaded, wrapped or scored.
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
        recipe = args.as_recipe(model if isinstance(model, str) else None, lora=peft_config is not None)
        policy = _policy(model, processing_class, recipe.model, args, peft_config)
        source = rows_source(train_dataset, "train_dataset")
        examples = read_examples(source, max_bad_fraction=args.max_bad_fraction).examples
        run = RunDir(args.output_dir, writes=PartialState().is_main_process)
        encoder = Encoder(policy.processor, args.max_length)
        stage = Stage("stage2", recipe, policy, encoder, run, examples)
        if ref_model is not None:
            stage.reference_model = adopt(
                Policy(ref_model, policy.processor, "ref_model"),
                recipe.model.model_copy(update={"tune": "full"}),
            ).model
        with stage.autocast():
            check_scoring(policy.model, encoder, examples, args.scoring)
        super().__init__(
            policy.model,
            args,
            stage.in_force,
            prepare(stage),
            processing_class=policy.processor,
            callbacks=callbacks,
            options=TrainerOptions(max_tokens_per_batch=args.max_tokens_per_batch),
        )
        stage.trainer = self


def _policy(
    model: str | PreTrainedModel, processor: Any, settings: ModelSettings, args: CWDPOConfig, peft_config: Any
) -> Policy:
    """The policy through the one loader, with the processor that was given or that belongs to it."""
    dropout = not args.disable_dropout
    if isinstance(model, str):
        policy = load_policy(settings, peft_config=peft_config, dropout=dropout)
        return policy if processor is None else replace(policy, processor=processor)
    if processor is None:
        raise DataError("CWDPOTrainer: processing_class is missing: give the model's processor")
    return adopt(Policy(model, processor, "model"), settings, peft_config=peft_config, dropout=dropout)
