"""The recipe: its typed schema, and loading from YAML with ``section.key=value`` overrides. Does not import torch.

Unknown keys are refused, and the message names the most similar known key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cwdpo import shipped
from cwdpo.arguments import TrainSettings
from cwdpo.data_settings import DataSettings, Spec
from cwdpo.dynamics.rules import DEFAULT_STOP, parse_rule
from cwdpo.dynamics.settings import CurriculumSpec, ProbeSettings
from cwdpo.errors import CwdpoError, FileError, RecipeError
from cwdpo.files.yamlfile import dump_yaml, read_yaml
from cwdpo.hints import belongs
from cwdpo.models.settings import ModelSettings
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.objectives.base import OBJECTIVES, Objective
from cwdpo.overrides import apply_override, flat
from cwdpo.records import NEW_TOKENS
from cwdpo.registry import Settings, explain, shortened

_Section = TypeVar("_Section", bound=Settings)


class StageSettings(Settings):
    """One stage: its objective, learning rate and length."""

    enabled: bool = True
    objective: Spec
    learning_rate: float = Field(gt=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; if set, epochs is not used")
    epochs: float = Field(1.0, gt=0)

    @field_validator("objective", mode="before")
    @classmethod
    def _spec(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def build(self) -> Objective:
        """The stage's objective."""
        return OBJECTIVES.build(self.objective)


def _stage(objective: str, learning_rate: float) -> StageSettings:
    return StageSettings(objective={"name": objective}, learning_rate=learning_rate)


class EvaluationSettings(Settings):
    """Generation and measurement on held-out prompts after the last stage."""

    prompts: int = Field(64, ge=0, description="0: no generation")
    samples: int = Field(1, ge=0, description="samples per prompt at temperature 1, in addition to greedy")
    max_new_tokens: int = Field(NEW_TOKENS, gt=0)
    batch_size: int = Field(
        64, gt=0, description="prompts of a forward pass without gradient; also of calibration and probes"
    )


class CalibrationSettings(Settings):
    """How floor and tau are estimated if they are ``auto``."""

    samples: int = Field(200, ge=2, description="largest number of samples of the reference model")
    error: float | None = Field(
        0.5,
        gt=0,
        description="draw no more when the 95% intervals of floor and tau reach at most this far, in units of tau; "
        "null: always draw all samples",
    )
    round: int = Field(64, ge=2, description="samples to draw before the intervals are looked at again")
    per_prompt: int = Field(
        4, gt=0, description="samples of a prompt, which is processed once for all of them"
    )
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
        DEFAULT_STOP, description="rules over readings; a true rule ends stage 2 and restores a checkpoint"
    )
    curriculum: CurriculumSpec = Field(default_factory=lambda: {"name": "steady"})
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="before")
    @classmethod
    def _partial_stages(cls, tree: Any) -> Any:
        """A stage with some keys only gets the stage's defaults for the others."""
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
        """The name becomes the run's folder, and a recipe may come from anyone: no paths."""
        if not name.strip(".").strip() or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError("allowed: one or more characters without slashes, the name of the run's folder")
        return name

    @field_validator("stop")
    @classmethod
    def _rules(cls, stop: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Check that the readings of the rules exist: a rule over an unknown reading would never be true."""
        probes = info.data.get("probes")
        rules = [parse_rule(text, probes.extra if probes else ()) for text in stop]
        data: DataSettings | None = info.data.get("data")
        sources = [source.title for source in data.sources] if data else []
        for rule in rules if data else ():
            kind, _, rest = rule.reading.partition("/")
            if kind == "source" and (name := rest.partition("/")[0]) not in sources:
                known = f"data.sources has {', '.join(sources)}" if sources else "there are no data.sources"
                raise ValueError(f"{rule.text!r}: no source is called {name!r}; {known}")
        return tuple(rule.text for rule in rules)

    @model_validator(mode="after")
    def _something_to_do(self) -> Recipe:
        if not (self.stage1.enabled or self.stage2.enabled):
            raise ValueError("stage1 and stage2 are both disabled: nothing would be trained")
        if self.train.optimizer == "adamw_kahan" and self.model.load_dtype in ("float32", "float16"):
            raise ValueError(
                f"train.optimizer: adamw_kahan is for trained weights in bf16, not in {self.model.load_dtype}: set "
                "model.dtype to bfloat16, or leave train.optimizer out"
            )
        if self.train.max_tokens_per_batch is not None and self.negatives.on_policy_fraction is not None:
            raise ValueError(
                "train.max_tokens_per_batch: the rows of a round are not known before the round, so its batches cannot "
                "be counted; with negatives.on_policy_fraction leave it out, and set train.batch_size"
            )
        if self.negatives.sampler.serve_adapter:
            self._has_an_adapter_to_serve()
        return self

    def _has_an_adapter_to_serve(self) -> None:
        model, key = self.model, "negatives.sampler.serve_adapter"
        if model.tune != "lora":
            raise ValueError(f"{key}: the policy has no adapter: set model.tune to lora, or leave it out")
        for name, value in (
            ("modules_to_save", model.lora.modules_to_save),
            ("use_dora", model.lora.use_dora),
        ):
            if value:
                raise ValueError(
                    f"{key}: vLLM loads adapters without model.lora.{name}: leave out one of the two"
                )

    @model_validator(mode="after")
    def _can_be_streamed(self) -> Recipe:
        if self.data.streaming is None:
            return self
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if stage.enabled and stage.steps is None:
                raise ValueError(
                    f"{name}.steps: with data.streaming the number of rows is not known, so epochs cannot be counted: "
                    f"set {name}.steps"
                )
        if self.train.max_tokens_per_batch is not None:
            raise ValueError(
                "train.max_tokens_per_batch: with data.streaming the rows of a window are not known before it begins, "
                "so its batches cannot be counted: leave it out, and set train.batch_size"
            )
        if self.negatives.on_policy_fraction is not None:
            raise ValueError(
                "negatives.on_policy_fraction: rounds choose their prompts among all rows, which are not known with "
                "data.streaming: leave out one of the two"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, with all defaults; it can be loaded again to the same recipe."""
        return dump_yaml(self.model_dump(mode="json"))

    def flat(self) -> dict[str, Any]:
        """The resolved recipe by dotted keys."""
        return flat(self.model_dump(mode="json"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``section.key=value`` overrides (:mod:`cwdpo.overrides`).

    If there is no such file, the path may be the name of a recipe of the package (``cwdpo recipe list``). A recipe
    stored in a run folder may come from somebody else, so it must not load code.

    Raises:
        RecipeError: the file does not exist or is not YAML, a key is unknown (the most similar one is named) or a value
            is wrong; or a stored recipe names ``file.py:ClassName`` and no override names it too.
    """
    path = shipped.resolve(path)
    tree = read_tree(path)
    if is_stored(path):
        _refuse_code(tree, path, overrides)
    return parse_recipe(tree, overrides, where=str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """The content of a recipe's file, not validated; nothing is imported.

    Raises:
        RecipeError: the file does not exist, is not YAML, or is not a mapping.
    """
    try:
        tree = read_yaml(path)
    except FileError as error:
        shown = shipped.nearest_name(path) if not path.exists() else ""
        raise RecipeError(f"{error}{shown}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    return tree


def stored_model(path: Path, code: Sequence[str] = ()) -> ModelSettings:
    """The section ``model`` of a run's recipe. Other sections are not read, so no ``file.py`` is imported.

    Args:
        path: the recipe.
        code: what the user lets run of :func:`model_code`.

    Raises:
        RecipeError: see :func:`load_recipe`; or the model needs code that the user did not name.
    """
    tree = read_tree(path)
    for key, name in model_code(tree).items():
        if name not in code:
            _refuse(path, key, name, f"name it on the command line: --code {shortened(name)}")
    return _stored(tree, path, "model", ModelSettings)


def stored_data(path: Path) -> DataSettings:
    """The section ``data`` of a run's recipe, like :func:`stored_model`; its format is not loaded."""
    return _stored(read_tree(path), path, "data", DataSettings)


def _stored(tree: Mapping[str, Any], path: Path, name: str, section: type[_Section]) -> _Section:
    try:
        return section.model_validate(tree.get(name, {}))
    except ValidationError as error:
        raise RecipeError(explain(error, f"{path}: {name}", section.model_fields)) from None


def is_stored(path: Path) -> bool:
    """Whether a recipe is in a run's folder."""
    return any((path.parent / name).exists() for name in ("environment.json", ".lock"))


def code_names(tree: Any, key: str = "") -> dict[str, str]:
    """Every ``file.py:ClassName`` in a recipe's tree: dotted key -> name. In a mix, the names are keys."""
    if isinstance(tree, Mapping):
        found = {f"{key}.{name}".lstrip("."): str(name) for name in tree if ".py:" in str(name)}
        for name, value in tree.items():
            found |= code_names(value, f"{key}.{name}".lstrip("."))
        return found
    if isinstance(tree, list | tuple):
        return {k: v for i, value in enumerate(tree) for k, v in code_names(value, f"{key}[{i}]").items()}
    return {key: str(tree)} if ".py:" in str(tree) else {}


def model_code(tree: Mapping[str, Any]) -> dict[str, str]:
    """The code that a recipe's section ``model`` runs: dotted key -> a file, or ``remote`` for the checkpoint's own."""
    model = tree.get("model")
    if not isinstance(model, Mapping):
        return {}
    code, remote = model.get("code"), model.get("trust_remote_code")
    found = {} if code is None else {"model.code": str(code)}
    return found | ({"model.trust_remote_code": "remote"} if remote not in (None, False) else {})


def _refuse_code(tree: Any, path: Path, overrides: Sequence[str]) -> None:
    own = "give your own recipe instead, or name it on the command line"
    given = [override.partition("=") for override in overrides]
    for key, name in code_names(tree).items():
        if not any(name in text for _, _, text in given):
            _refuse(path, key, name, f"{own}, e.g. stage2.objective.name={shortened(name)}")
    for key, name in model_code(tree).items():
        if not any(changed == key for changed, _, _ in given):
            _refuse(path, key, name, f"{own}: {key}={'true' if name == 'remote' else shortened(name)}")


def _refuse(path: Path, key: str, name: str, remedy: str) -> NoReturn:
    what = "the checkpoint's own" if name == "remote" else shortened(name)
    raise RecipeError(
        f"{path}: {key} names code, {what}, and a recipe in a run's folder loads no code: read that code first; if you "
        f"trust it, {remedy}"
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
    """Like :func:`cwdpo.registry.explain`, with the known keys of the error's section."""
    lines = []
    for item in error.errors():
        known = _fields_at(Recipe, [str(p) for p in item["loc"][:-1]])
        key = str(item["loc"][-1]) if item["loc"] else ""
        hint = belongs(key, _places(Recipe)) or belongs(key, _settings_of_objectives())
        if item["type"] == "extra_forbidden" and hint:
            # If the same key exists in another section, that hint is better than a similar name.
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
        if part.isdigit():  # an entry of a list
            continue
        field = model.model_fields.get(part)
        inner = [a for a in _candidates(field.annotation if field else None) if issubclass(a, BaseModel)]
        if not inner:
            return {}
        model = inner[0]
    return dict(model.model_fields)


def _places(model: type[BaseModel], section: str = "") -> list[str]:
    """Every dotted key of a recipe, sections first; not those of a list's entries."""
    places = []
    for name, field in model.model_fields.items():
        places.append(f"{section}{name}")
        if get_origin(field.annotation) is tuple:
            continue
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
