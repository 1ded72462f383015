"""The recipe: a typed schema, YAML plus ``section.key=value`` overrides. No torch is imported here.

Unknown keys are refused with the nearest known name; a recipe is data and is loaded safely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cwdpo import shipped
from cwdpo.dynamics.rules import DEFAULT_STOP, parse_rule
from cwdpo.dynamics.settings import CurriculumSpec, ProbeSettings
from cwdpo.errors import CwdpoError, FileError, RecipeError, nearest
from cwdpo.files.yamlfile import dump_yaml, read_yaml
from cwdpo.hints import belongs
from cwdpo.models.settings import ModelSettings
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.objectives.base import OBJECTIVES, Objective
from cwdpo.overrides import apply_override
from cwdpo.records import NEW_TOKENS
from cwdpo.registry import Settings, explain, shortened
from cwdpo.worlds.shapes import ShapesSettings

Spec = dict[str, Any]
"""A component in a recipe: ``name`` plus its settings."""


TRACKERS = ("clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""What ``train.report_to`` may name; each is also the name of the package that it needs."""
# Those of transformers that need no settings of their own.
SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
)  # fmt: skip


_Section = TypeVar("_Section", bound=Settings)


class DataSettings(Settings):
    """Where the examples come from and how they are split."""

    path: str | None = Field(None, description="a .jsonl/.json/.parquet file, a folder, or a hub id")
    world: ShapesSettings | None = Field(None, description="write this embedded world to the run and read it")
    format: str | Spec = Field(
        "auto",
        description="auto, a name, file.py:ClassName, or a mapping with name and the format's settings",
    )
    ignore_columns: tuple[str, ...] = Field((), description="columns that count as absent, whatever they say")
    image_root: str | None = Field(
        None, description="where image paths start and must stay; default: the data's folder"
    )
    validation_path: str | None = None
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="by image, when no validation_path")
    stage1_fraction: float = Field(0.75, ge=0, le=1, description="share of training images in stage 1")
    captions_per_image: int = Field(1, gt=0, description="examples made of one captioned picture")
    default_prompt: str = Field("Describe the image.", description="for data without prompts")
    max_length: int | None = Field(None, gt=0, description="most tokens of prompt + completion")
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    cache_gb: float = Field(1.0, ge=0, description="memory for decoded image tensors")
    limit: int | None = Field(None, gt=0, description="read this many examples only")

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.path is None) == (self.world is None):
            raise ValueError("exactly one of 'path' and 'world' must be given")
        if self.world is not None and not (self.world.train and self.world.validation):
            raise ValueError("world.train and world.validation must be at least 1")
        return self


class StageSettings(Settings):
    """One stage: its objective and how long and fast it runs."""

    enabled: bool = True
    objective: Spec
    learning_rate: float = Field(gt=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; wins over epochs")
    epochs: float = Field(1.0, gt=0)

    @field_validator("objective", mode="before")
    @classmethod
    def _spec(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def build(self) -> Objective:
        """The objective itself."""
        return OBJECTIVES.build(self.objective)


def _stage(objective: str, learning_rate: float) -> StageSettings:
    return StageSettings(objective={"name": objective}, learning_rate=learning_rate)


class TrainSettings(Settings):
    """What both stages share; names as in transformers' TrainingArguments."""

    batch_size: int = Field(16, gt=0, description="prompts per device and micro-batch")
    gradient_accumulation_steps: int = Field(1, gt=0)
    warmup_steps: float = Field(10, ge=0, description="steps, or a share of all steps when below 1")
    lr_scheduler_type: str = "constant_with_warmup"
    weight_decay: float = Field(0.0, ge=0)
    adam_beta2: float = Field(0.98, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "adamw_kahan"] = Field(
        "adamw",
        description="adamw_kahan: for trained bf16 weights, keeps what rounding leaves out (torch-optimi)",
    )
    spike_factor: float | None = Field(
        None, gt=1, description="a gradient norm this many times its running median skips the update"
    )
    spike_window: int = Field(50, ge=2, description="steps of that median; the rule acts once they are full")
    logging_steps: int = Field(10, gt=0)
    save_steps: int | None = Field(None, gt=0, description="default: no checkpoint within a stage")
    save_total_limit: int = Field(2, gt=0)
    gradient_checkpointing: bool = False
    bf16: bool = False
    report_to: tuple[str, ...] = ()
    max_tokens_per_batch: int | None = Field(
        None,
        gt=0,
        description="most tokens of a micro-batch, padding included; takes the place of batch_size",
    )
    group_by_length: bool = Field(True, description="micro-batches of rows of like length, in random order")
    reference_cache: str | None = Field(
        None, description="folder of the reference's values, shared between runs; default: in the run folder"
    )

    @field_validator("lr_scheduler_type", "report_to")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        """Asked at once: transformers would find out when data and model are loaded already."""
        known = TRACKERS if info.field_name == "report_to" else SCHEDULES
        for name in [value] if isinstance(value, str) else value:
            if name not in known:
                raise ValueError(f"unknown name {name!r}{nearest(name, known)}; allowed: {', '.join(known)}")
        return value


class EvaluationSettings(Settings):
    """What is generated and measured on held-out prompts after the last stage."""

    prompts: int = Field(64, ge=0, description="0 leaves generation out")
    samples: int = Field(1, ge=0, description="samples at temperature 1 per prompt, besides greedy")
    max_new_tokens: int = Field(NEW_TOKENS, gt=0)
    batch_size: int = Field(64, gt=0)


class CalibrationSettings(Settings):
    """How floor and tau are found when they are ``auto``."""

    samples: int = Field(200, ge=2, description="samples of the reference policy")
    max_new_tokens: int = Field(NEW_TOKENS, gt=0)


class Recipe(Settings):
    """A whole two-stage run."""

    name: str = "run"
    seed: int = Field(0, ge=0)
    model: ModelSettings = ModelSettings()
    data: DataSettings
    negatives: NegativeSettings = NegativeSettings()
    stage1: StageSettings = Field(default_factory=lambda: _stage("sft_constrained", 1e-5))
    stage2: StageSettings = Field(default_factory=lambda: _stage("cw_dpo", 1e-5))
    train: TrainSettings = TrainSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    probes: ProbeSettings = ProbeSettings()
    stop: tuple[str, ...] = Field(
        DEFAULT_STOP, description="rules over readings; one that holds ends stage 2 and takes it back"
    )
    curriculum: CurriculumSpec = Field(default_factory=lambda: {"name": "steady"})
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="before")
    @classmethod
    def _partial_stages(cls, tree: Any) -> Any:
        """A stage that is given in part keeps the defaults of the rest."""
        if not isinstance(tree, dict):
            return tree
        defaults = {
            name: cls.model_fields[name].get_default(call_default_factory=True)
            for name in ("stage1", "stage2")
        }
        partial = {
            name: {"objective": d.objective, "learning_rate": d.learning_rate, **tree[name]}
            for name, d in defaults.items()
            if isinstance(tree.get(name), dict)
        }
        return {**tree, **partial}

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        """It names the run's folder, and a recipe may come from anyone."""
        if not name.strip(".").strip() or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError("allowed: one or more characters without slashes, the name of the run's folder")
        return name

    @field_validator("stop")
    @classmethod
    def _rules(cls, stop: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Checked at once: a rule whose reading nobody writes would never hold."""
        probes = info.data.get("probes")
        return tuple(parse_rule(text, probes.extra if probes else ()).text for text in stop)

    @model_validator(mode="after")
    def _something_to_do(self) -> Recipe:
        if not (self.stage1.enabled or self.stage2.enabled):
            raise ValueError("stage1 and stage2 are both disabled: nothing would be trained")
        if self.train.max_tokens_per_batch is not None and self.negatives.on_policy_fraction is not None:
            raise ValueError(
                "train.max_tokens_per_batch: the rows of a round are not known before it, so their batches cannot be "
                "counted; leave it out with negatives.on_policy_fraction, and set train.batch_size"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out; it parses back to the same recipe."""
        return dump_yaml(self.model_dump(mode="json"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``section.key=value`` overrides (:mod:`cwdpo.overrides`).

    Where there is no such file, the path may be the name of a recipe of the package (``cwdpo recipe list``).

    A recipe that a run stored comes with the run's folder, perhaps from somebody else: it never loads code of its own.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (the nearest is named) or a wrong value; or a stored recipe
            that names ``file.py:ClassName``, unless an override names it too.
    """
    path = shipped.resolve(path)
    tree = read_tree(path)
    if is_stored(path):
        _refuse_code(tree, path, overrides)
    return parse_recipe(tree, overrides, where=str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """What a recipe's file holds, unchecked; nothing is imported.

    Raises:
        RecipeError: no such file, not YAML, or no mapping.
    """
    try:
        tree = read_yaml(path)
    except FileError as error:
        shown = shipped.nearest_name(path) if not path.exists() else ""
        raise RecipeError(f"{error}{shown}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    return tree


def stored_model(path: Path) -> ModelSettings:
    """The section ``model`` of a run's recipe. Nothing else of it is looked at, so that no name is imported.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    return _stored(path, "model", ModelSettings)


def stored_data(path: Path) -> DataSettings:
    """The section ``data`` of a run's recipe, as :func:`stored_model`; its format is a name, not loaded."""
    return _stored(path, "data", DataSettings)


def _stored(path: Path, name: str, section: type[_Section]) -> _Section:
    try:
        return section.model_validate(read_tree(path).get(name, {}))
    except ValidationError as error:
        raise RecipeError(explain(error, f"{path}: {name}", section.model_fields)) from None


def is_stored(path: Path) -> bool:
    """Whether a recipe lies in a run's folder."""
    return any((path.parent / name).exists() for name in ("environment.json", ".lock"))


def code_names(tree: Any, key: str = "") -> dict[str, str]:
    """Every ``file.py:ClassName`` in a recipe's tree: dotted key -> name. A mix has them as keys."""
    if isinstance(tree, Mapping):
        found = {f"{key}.{name}".lstrip("."): str(name) for name in tree if ".py:" in str(name)}
        for name, value in tree.items():
            found |= code_names(value, f"{key}.{name}".lstrip("."))
        return found
    if isinstance(tree, list | tuple):
        return {k: v for i, value in enumerate(tree) for k, v in code_names(value, f"{key}[{i}]").items()}
    return {key: str(tree)} if ".py:" in str(tree) else {}


def _refuse_code(tree: Any, path: Path, overrides: Sequence[str]) -> None:
    asked = [override.partition("=")[2] for override in overrides]
    for key, name in code_names(tree).items():
        if not any(name in text for text in asked):
            raise RecipeError(
                f"{path}: {key} names code, {shortened(name)}, and a recipe in a run's folder loads none: read that "
                "file first; if it is yours, give your own recipe instead, or name it on the command line, e.g. "
                f"stage2.objective.name={shortened(name)}"
            )


def parse_recipe(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Check a recipe tree; see :func:`load_recipe`."""
    merged: dict[str, Any] = deepcopy(dict(tree))
    for override in overrides:
        apply_override(merged, override, _takes_text)
    section = ""
    try:
        recipe = Recipe.model_validate(merged)
        for section in ("stage1", "stage2"):
            getattr(recipe, section).build()
    except ValidationError as error:
        raise RecipeError(_explained(error, where)) from None
    except CwdpoError as error:
        raise RecipeError(f"{where}: {section + ': ' if section else ''}{error}") from None
    return recipe


def _takes_text(path: Sequence[str]) -> bool:
    field = _fields_at(Recipe, path[:-1]).get(path[-1])
    return field is not None and set(_candidates(field.annotation)) <= {str, type(None)}


def _explained(error: ValidationError, where: str) -> str:
    """As :func:`cwdpo.registry.explain`, with the known keys of the section in question."""
    lines = []
    for item in error.errors():
        known = _fields_at(Recipe, [str(p) for p in item["loc"][:-1]])
        key = str(item["loc"][-1]) if item["loc"] else ""
        hint = belongs(key, _places(Recipe)) or belongs(key, _settings_of_objectives())
        if item["type"] == "extra_forbidden" and hint:
            # Of two hints the place of the very same name is the better one.
            lines.append(f"{where}: unknown key {'.'.join(map(str, item['loc']))!r}{hint}")
            continue
        single = ValidationError.from_exception_data("recipe", [_line(item)])
        lines.append(explain(single, where, known))
    return "\n".join(lines)


def _line(item: Any) -> Any:
    if item["type"] == "value_error":
        return {"type": "value_error", "loc": item["loc"], "input": item["input"], "ctx": item["ctx"]}
    return {k: item[k] for k in ("type", "loc", "input", "ctx") if k in item}


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> dict[str, Any]:
    for part in path:
        field = model.model_fields.get(part)
        inner = [a for a in _candidates(field.annotation if field else None) if issubclass(a, BaseModel)]
        if not inner:
            return {}
        model = inner[0]
    return dict(model.model_fields)


def _places(model: type[BaseModel], section: str = "") -> list[str]:
    """Every dotted key of a recipe, sections first."""
    places = []
    for name, field in model.model_fields.items():
        places.append(f"{section}{name}")
        for inner in _candidates(field.annotation):
            if issubclass(inner, BaseModel):
                places += _places(inner, f"{section}{name}.")
    return places


def _settings_of_objectives() -> list[str]:
    """Dotted keys of every objective's settings, under the stage where it is used most."""
    names = {key for name in OBJECTIVES.names() for key in OBJECTIVES.get(name).model_fields}
    return [f"stage2.objective.{name}" for name in sorted(names)]


def _candidates(annotation: Any) -> list[type]:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [a for a in options if isinstance(a, type)]
