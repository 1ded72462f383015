"""The recipe: a typed schema, YAML plus ``section.key=value`` overrides. No torch is imported here.

Unknown keys are refused with the nearest known name; a recipe is data and is loaded safely.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cwdpo.dynamics.rules import DEFAULT_STOP, parse_rule
from cwdpo.dynamics.settings import CurriculumSpec, ProbeSettings
from cwdpo.errors import CwdpoError, RecipeError, nearest
from cwdpo.hints import belongs
from cwdpo.judging.base import AUTO, JUDGES, NONE
from cwdpo.models.settings import ModelSettings
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.objectives.base import OBJECTIVES, Objective
from cwdpo.registry import Registry, Settings, explain
from cwdpo.worlds.shapes import ShapesSettings

Spec = dict[str, Any]
"""A component in a recipe: ``name`` plus its settings."""


# PyYAML lets out what Python's own parsers say of odd dates, numbers and tags, and of brackets without end.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
_MOST_VALUES, _DEEPEST = 10_000, 30
TRACKERS = ("clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""What ``train.report_to`` may name; each is also the name of the package that it needs."""
# Those of transformers that need no settings of their own.
SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
)  # fmt: skip


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
    max_new_tokens: int = Field(48, gt=0)
    batch_size: int = Field(64, gt=0)


class CalibrationSettings(Settings):
    """How floor and tau are found when they are ``auto``."""

    samples: int = Field(200, ge=2, description="samples of the reference policy")
    max_new_tokens: int = Field(48, gt=0)


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
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``section.key=value`` overrides (values are YAML too).

    Raises:
        RecipeError: no such file, not YAML, an unknown key (the nearest is named) or a wrong value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        tree = yaml.safe_load(text)
    except _YAML_ERRORS as error:
        raise RecipeError(f"{path}: not valid YAML: {_said(error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    return parse_recipe(tree, overrides, where=str(path))


def parse_recipe(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Check a recipe tree; see :func:`load_recipe`."""
    merged: dict[str, Any] = _copied(tree, where)
    for override in overrides:
        _apply(merged, override)
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


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"


def _copied(tree: Any, where: str) -> Any:
    """A deep copy. YAML's aliases can go in circles, or make a page of text into gigabytes: that is refused."""
    left = _MOST_VALUES

    def copy(node: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise RecipeError(
                f"{where}: nested deeper than {_DEEPEST}, or more than {_MOST_VALUES} values; aliases (*name) that go "
                "in circles or multiply do that: write the values out"
            )
        if isinstance(node, Mapping):
            return {key: copy(value, depth + 1) for key, value in node.items()}
        return [copy(value, depth + 1) for value in node] if isinstance(node, list) else node

    return copy(tree, 0)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: write section.key=value, e.g. stage2.learning_rate=1e-5")
    try:
        value = _copied(yaml.safe_load(text), f"override {key!r}")
    except _YAML_ERRORS as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {_said(error)}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        with contextlib.suppress(ValueError):
            value = float(value) if value.strip()[:1] in set("0123456789.-+") else value
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if isinstance(child, str) and part in ("objective", "judge"):
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {part!r} holds a value, not a section")
        node[part] = child
        node = child
    # A data source given on the command line replaces the recipe's.
    if parts in (["data", "path"], ["data", "world"]) and value is not None:
        node.pop("world" if parts[1] == "path" else "path", None)
    node[parts[-1]] = value


def _explained(error: ValidationError, where: str) -> str:
    """As :func:`cwdpo.registry.explain`, with the known keys of the section in question."""
    lines = []
    for item in error.errors():
        known = _fields_at(Recipe, [str(p) for p in item["loc"][:-1]])
        key = str(item["loc"][-1]) if item["loc"] else ""
        if item["type"] == "extra_forbidden" and (hint := belongs(key, _places(Recipe))):
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


def _candidates(annotation: Any) -> list[type]:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [a for a in options if isinstance(a, type)]


def _component_schema(
    registry: Registry[Any], defs: dict[str, Any], bare: Sequence[str] = ()
) -> dict[str, Any]:
    """A component in a recipe: its name, or a mapping with its settings.

    Args:
        registry: the components of one kind.
        defs: the schema's ``$defs``; sections inside the components are added.
        bare: further names, without settings.
    """
    branches = []
    for name in registry.names():
        cls = registry.get(name)
        branch = cls.model_json_schema()
        defs |= branch.pop("$defs", {})
        branch["properties"] = {"name": {"const": name}, **branch.get("properties", {})}
        branch["required"] = ["name", *branch.get("required", ())]
        branch["description"] = (cls.__doc__ or "").strip()
        branches.append(branch)
    for name in bare:
        only = {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]}
        branches.append({**only, "additionalProperties": False})
    own = {"type": "object", "properties": {"name": {"pattern": r"\.py:"}}, "required": ["name"]}
    return {"anyOf": [{"enum": [*bare, *registry.names()]}, *branches, own]}


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, objectives, judges and their settings included, for editors."""
    schema = Recipe.model_json_schema()
    defs = schema["$defs"]
    defs["Objective"] = _component_schema(OBJECTIVES, defs)
    defs["StageSettings"]["properties"]["objective"] = {"$ref": "#/$defs/Objective"}
    defs["Judge"] = _component_schema(JUDGES, defs, (AUTO, NONE))
    judge = defs["NegativeSettings"]["properties"]["judge"]
    defs["NegativeSettings"]["properties"]["judge"] = {
        "$ref": "#/$defs/Judge", "description": judge["description"], "default": {"name": AUTO},
    }  # fmt: skip
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "cwdpo recipe"
    return schema
