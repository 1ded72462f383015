"""``CWDPOTrainer``: the stage-2 trainer with TRL's argument names, for TRL's vision-preference data sets.

docs/from_trl.md compares a TRL script with the same script for this trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from accelerate import PartialState
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import speed_metrics

from cwdpo.arguments import TrainSettings
from cwdpo.config import CalibrationSettings, Recipe, StageSettings
from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data_settings import DataSettings
from cwdpo.errors import DataError, RecipeError
from cwdpo.models.adapter import idle_adapters_off
from cwdpo.models.load import Policy, adopt, load_policy, load_processor
from cwdpo.models.settings import ModelSettings
from cwdpo.models.shared_attention import Scoring
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.pipeline.trl_data import EvalRows, Rows, evaluation_rows, examples_of, is_stream, training_rows
from cwdpo.pipeline.trl_names import (
    model_settings,
    refuse_arguments,
    refuse_unused,
    takes_trl_names,
)
from cwdpo.rundir import RunDir
from cwdpo.stage.environment import check_environment
from cwdpo.stage.model import encoder_of
from cwdpo.stage.prepare import encode, prepare, with_reference_values
from cwdpo.stage.scoring_check import check_scoring, spread
from cwdpo.stage.stage import Stage
from cwdpo.trainer.held_out import held_out_loss
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions

FOLDER = "_cwdpo"
"""Folder in ``output_dir`` for the files of the preparation. Names with an underscore are not pushed to the hub."""


@takes_trl_names
@dataclass
class CWDPOConfig(TrainingArguments):  # type: ignore[misc]
    """transformers' arguments and those of the objective, with TRL's names if TRL has them.

    ``learning_rate`` and ``logging_steps`` have TRL's defaults. An argument of TRL's DPOConfig that this class does not
    have is an error that names the replacement; an argument of transformers that would be ignored is an error, too.

    Args:
        model_init_kwargs: as in TRL, for a model given by its name: ``revision``, ``dtype``, ``attn_implementation``,
            ``trust_remote_code``.
        trust_remote_code: whether to run code from the checkpoint.
        beta: inverse temperature, per nat.
        max_length: largest number of tokens of prompt plus completion; longer examples are left out, not truncated.
        objective: name of an objective, or ``file.py:ClassName``.
        objective_settings: its further settings, e.g. ``{"floor": -0.5, "tau": 0.3, "sft_weight": 1.0}``.
        disable_dropout: as in TRL.
        max_bad_fraction: share of rows that may be unusable.
        calibration_samples: largest number of samples of the reference for ``floor: auto`` and ``tau: auto``.
        calibration_error: when to draw no more, see ``calibration.error`` of recipes; ``None``: draw all.
        calibration_max_new_tokens: largest number of tokens in these samples.
        scoring: ``auto``, ``shared_prefix`` or ``plain``, see :func:`cwdpo.models.shared_attention.use_scoring`.
        vision_cache_gb: memory for the image features of a frozen vision tower, in GB.
        max_tokens_per_batch: size of a micro-batch in tokens, instead of in examples.
    """

    learning_rate: float = field(default=1e-6)
    logging_steps: float = field(default=10)
    model_init_kwargs: dict[str, Any] | None = field(default=None)
    trust_remote_code: bool = field(default=False)
    beta: float = field(default=0.1)
    max_length: int | None = field(default=None)
    objective: str = field(default="cw_dpo")
    objective_settings: dict[str, Any] = field(default_factory=dict)
    disable_dropout: bool = field(default=True)
    max_bad_fraction: float = field(default=0.01)
    calibration_samples: int = field(default=200)
    calibration_error: float | None = field(default=0.5)
    calibration_max_new_tokens: int = field(default=128)
    scoring: Scoring = field(default="auto")
    vision_cache_gb: float = field(default=1.0)
    max_tokens_per_batch: int | None = field(default=None)

    def __post_init__(self) -> None:
        """Raise an error for arguments that would be ignored.

        Raises:
            RecipeError: an argument that is not supported.
        """
        refuse_unused(self)
        super().__post_init__()

    def objective_spec(self) -> dict[str, Any]:
        """The objective as in a recipe; with ``beta`` if the objective has one."""
        has_beta = "beta" in OBJECTIVES.get(self.objective).model_fields
        beta = {"beta": self.beta} if has_beta else {}
        return {"name": self.objective, **beta, **self.objective_settings}

    def as_recipe(self, path: str | None, *, lora: bool) -> Recipe:
        """The arguments as a recipe, as far as the preparation of a stage needs them.

        Args:
            path: of the model; ``None`` if it is loaded already.
            lora: whether adapters are trained, so that the base model keeps its dtype.
        """
        model = ModelSettings(
            path=path or "embedded",
            tune="lora" if lora else "full",
            device="cpu" if self.use_cpu else "auto",
            scoring=self.scoring,
            vision_cache_gb=self.vision_cache_gb,
            trust_remote_code=self.trust_remote_code,
        )
        return Recipe(
            seed=self.seed,
            model=model_settings(model, self.model_init_kwargs),
            data=DataSettings(
                path="train_dataset", max_length=self.max_length, max_bad_fraction=self.max_bad_fraction
            ),
            stage2=StageSettings(objective=self.objective_spec(), learning_rate=self.learning_rate or 1.0),
            train=TrainSettings(
                batch_size=self.per_device_train_batch_size,
                bf16=self.bf16,
                dataloader_workers=self.dataloader_num_workers,
                max_tokens_per_batch=self.max_tokens_per_batch,
            ),
            calibration=CalibrationSettings(
                samples=self.calibration_samples,
                error=self.calibration_error,
                max_new_tokens=self.calibration_max_new_tokens,
            ),
        )


class TrlArguments(TypedDict, total=False):
    """Further arguments of the trainer, with TRL's names."""

    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    callbacks: Sequence[TrainerCallback] | None
    optimizers: tuple[Any, Any]
    peft_config: Any


class CWDPOTrainer(PreferenceTrainer):
    """Replacement for ``trl.DPOTrainer`` on vision-preference data; with TRL's arguments, in the same order.

    The reference is the given model (or ``ref_model``). Its log-probabilities are computed once in the constructor,
    also for ``eval_dataset``, and floor and tau are calibrated with its samples. Problems of the data, the calibration
    and the reference values are written to ``_cwdpo`` in ``args.output_dir``.

    Args:
        model: a model (also a PeftModel), or the path or hub id of one.
        ref_model: another reference model; default: the model itself, before training.
        args: the configuration.
        data_collator: not supported: the trainer makes its batches itself.
        train_dataset: rows in TRL's vision-preference format: a ``datasets.Dataset``, a DatasetDict with ``train``, a
            list of dicts, or a stream (``IterableDataset``), of which only the rows that ``args.max_steps`` needs are
            read.
        eval_dataset: the same, or a dict of sets. Metrics are ``eval_loss``, ``eval_rewards/margins``, ...; for a
            dict ``eval_NAME_loss``, ...
        processing_class: the processor; default: that of the model's name.
        more: ``compute_metrics`` gets an ``EvalPrediction`` with ``predictions``, the implicit rewards [P, 2] of chosen
            and rejected of each pair, and ``label_ids``, 0 for each pair (the index of chosen); ``callbacks``;
            ``optimizers``; ``peft_config``, to add an adapter to the model.

    Raises:
        DataError: too many rows are unusable, or none is left.
        ModelError: the model cannot be loaded, wrapped or scored.
        RecipeError: an argument that is not supported.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: CWDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Rows | Mapping[str, Rows] | None = None,
        eval_dataset: EvalRows | None = None,
        processing_class: Any = None,
        **more: Unpack[TrlArguments],
    ) -> None:
        args = args or CWDPOConfig()
        unknown = {k: v for k, v in more.items() if k not in TrlArguments.__annotations__}
        refuse_arguments({**unknown, **({} if data_collator is None else {"data_collator": data_collator})})
        check_environment(args.bf16, "bf16")
        if ref_model is not None and ref_model is model:
            raise RecipeError("CWDPOTrainer: ref_model is the trained model itself: leave it out")
        held_out = evaluation_rows(eval_dataset)
        rows = training_rows(train_dataset, has_eval=bool(held_out))
        peft_config = more.get("peft_config")
        recipe = args.as_recipe(model if isinstance(model, str) else None, lora=peft_config is not None)
        policy = _policy(model, processing_class, recipe.model, args, peft_config)
        stage = _stage(
            args,
            recipe,
            policy,
            examples_of(rows, "train_dataset", args.max_bad_fraction, _limit(rows, args)),
        )
        if ref_model is not None:
            stage.reference_model = adopt(
                Policy(ref_model, policy.processor, "ref_model"),
                recipe.model.model_copy(update={"tune": "full"}),
            ).model
        with stage.autocast():
            check_scoring(policy.model, stage.encoder, spread(stage.examples), args.scoring)
        self._stage, self._compute_metrics = stage, more.get("compute_metrics")
        with idle_adapters_off(policy.model):
            train = prepare(stage)
            evaluated = {name: self._encoded(one, name) for name, one in held_out.items()}
        super().__init__(
            policy.model,
            args,
            stage.in_force,
            train,
            processing_class=policy.processor,
            callbacks=more.get("callbacks") or (),
            options=TrainerOptions(
                max_tokens_per_batch=args.max_tokens_per_batch,
                workers=args.dataloader_num_workers,
                eval_dataset=evaluated.get("", evaluated or None),
                optimizers=more.get("optimizers") or (None, None),
            ),
        )
        stage.trainer = self

    def _encoded(self, rows: Rows, name: str) -> Sequence[EncodedExample]:
        """Encode rows to evaluate on, with reference values."""
        stage, args = self._stage, self._stage.recipe.data
        where = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        examples = examples_of(rows, where, args.max_bad_fraction)
        return with_reference_values(stage, encode(stage, examples, f"/{where}"))

    def evaluate(
        self,
        eval_dataset: EvalRows | str | Sequence[EncodedExample] | None = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics on held-out rows, logged and returned under ``eval_*``.

        Args:
            eval_dataset: rows, a dict of sets, or the name of a set that was given to the constructor; default: all
                sets that were given to the constructor.
            ignore_keys: has no effect: no logits are kept.
            metric_key_prefix: prefix of each name.

        Raises:
            RecipeError: new rows after training: the reference does not exist any more.
            DataError: there are no rows to evaluate on.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {}
            if rows not in sets:
                raise DataError(f"eval_dataset: no set {rows!r}; known: {', '.join(sets) or 'none'}")
            return self._evaluated(sets[rows], f"{metric_key_prefix}_{rows}")
        if rows is None:
            raise DataError("CWDPOTrainer.evaluate: pass eval_dataset, here or to CWDPOTrainer")
        if isinstance(rows, Mapping):
            metrics: dict[str, float] = {}
            for name, one in rows.items():
                metrics |= self._evaluated(one, f"{metric_key_prefix}_{name}")
            return metrics
        return self._evaluated(rows, metric_key_prefix)

    def _evaluated(self, rows: Any, prefix: str) -> dict[str, float]:
        started = time.time()
        encoded = isinstance(rows, list | EncodedRows) and rows and isinstance(rows[0], EncodedExample)
        if not encoded:
            trained = self.state.global_step > 0 and self._stage.reference_model is None
            if trained and self.objective.needs_reference:
                raise RecipeError(
                    "CWDPOTrainer.evaluate: the reference was the policy before training and does not exist any more: "
                    "pass these rows as eval_dataset to CWDPOTrainer, or pass a ref_model"
                )
            rows = self._encoded(rows, prefix)
        held_out = held_out_loss(self, rows, self.args.per_device_eval_batch_size)
        metrics = {"loss": held_out.loss, **held_out.metrics}
        if self._compute_metrics is not None:
            labels = held_out.rewards[:, 0].astype("int64") * 0
            metrics |= self._compute_metrics(EvalPrediction(predictions=held_out.rewards, label_ids=labels))
        named = {k if k.startswith(f"{prefix}_") else f"{prefix}_{k}": float(v) for k, v in metrics.items()}
        named |= speed_metrics(prefix, started, num_samples=held_out.n)
        self.log(dict(named))
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, named
        )
        return named

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported.

        Raises:
            RecipeError: always; the message names the replacements.
        """
        del args, kwargs
        raise RecipeError(
            "CWDPOTrainer.predict is not supported: use evaluate() to score pairs, and `cwdpo evaluate MODEL --data "
            "DATA` to generate responses"
        )


def _limit(rows: Rows, args: CWDPOConfig) -> int | None:
    """How many examples to read from a stream; ``None`` for rows that are not a stream."""
    if not is_stream(rows):
        return None
    if args.max_steps <= 0:
        raise DataError("train_dataset is a stream of unknown length: set max_steps")
    return int(args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _stage(args: CWDPOConfig, recipe: Recipe, policy: Policy, examples: Sequence[Any]) -> Stage:
    run = RunDir(Path(args.output_dir) / FOLDER, writes=PartialState().is_main_process)
    if run.writes:
        run.path.mkdir(parents=True, exist_ok=True)
    return Stage("stage2", recipe, policy, encoder_of(policy, recipe), run, examples)


def _policy(
    model: str | PreTrainedModel, processor: Any, settings: ModelSettings, args: CWDPOConfig, peft_config: Any
) -> Policy:
    """Load the policy, or adopt a loaded one, with the given processor or the model's own."""
    dropout = not args.disable_dropout
    if isinstance(model, str):
        if peft_config is not None and (Path(model) / "adapter_config.json").is_file():
            raise RecipeError(
                f"peft_config: {model} is an adapter already, which is trained further: leave peft_config out, or pass "
                "its base as model"
            )
        policy = load_policy(settings, peft_config=peft_config, dropout=dropout)
        return policy if processor is None else replace(policy, processor=processor)
    if args.model_init_kwargs:
        raise RecipeError(
            "model_init_kwargs: the model is loaded already: leave them out, or pass its name as model"
        )
    if peft_config is not None and hasattr(model, "peft_config"):
        raise RecipeError("peft_config: the model has an adapter already: leave peft_config out")
    if processor is None:
        name = str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or "")
        if not name:
            raise DataError(
                "CWDPOTrainer: processing_class is missing, and the model has no name to load it by: pass the "
                "model's processor"
            )
        processor = load_processor(name, settings.model_copy(update={"path": name}))
    return adopt(Policy(model, processor, "model"), settings, peft_config=peft_config, dropout=dropout)
