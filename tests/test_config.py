"""Recipes: what is read, what is refused, and how the refusal is worded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import paths
from cwdpo.config import Recipe, load_recipe, parse_recipe
from cwdpo.data_settings import DataSettings
from cwdpo.errors import RecipeError
from cwdpo.judging.base import JUDGES
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.objectives.sft_constrained import SftConstrained
from cwdpo.schema import recipe_schema

EXAMPLES = sorted((paths.ROOT / "examples").glob("*/*.yaml"))
STUDIES = [path for path in EXAMPLES if "variants" in yaml.safe_load(path.read_text(encoding="utf-8"))]
RECIPES = [
    *sorted(paths.RECIPES.glob("**/*.yaml")),
    *(path for path in EXAMPLES if path not in STUDIES),
    paths.ROOT / "src/cwdpo/lab/recipe.yaml",
]
STAGE = {"objective": "dpo", "learning_rate": 1e-5}


def tree(**sections: Any) -> dict[str, Any]:
    return {"data": {"path": "data.jsonl"}, **sections}


def refusal(recipe: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe, overrides, where="my.yaml")
    return str(caught.value)


# --- parsing --------------------------------------------------------------------------------------------


def test_defaults_are_the_method() -> None:
    recipe = parse_recipe(tree())
    assert recipe.stage1.build() == SftConstrained()
    assert recipe.stage2.build() == CwDpo()
    assert (recipe.model.path, recipe.data.path, recipe.data.world) == ("embedded", "data.jsonl", None)
    assert recipe.stage1.enabled
    assert recipe.stage2.enabled
    assert recipe.negatives.mix == {"dataset": 1.0}


def test_the_written_value_wins_over_the_default() -> None:
    recipe = parse_recipe(
        tree(
            seed=3,
            stage2={"objective": {"name": "dpo", "beta": 0.7}, "learning_rate": "1e-5", "steps": 9},
            negatives={"mix": {"dataset": 1, "shuffled": 0.5}},
            model={"tune": "lora", "lora": {"target_modules": ["q_proj", "v_proj"]}, "freeze": ["vision"]},
        )
    )
    assert recipe.seed == 3
    assert recipe.stage2.build().model_dump() == {"beta": 0.7, "sft_weight": 0.0, "negative_mask": "none"}
    assert recipe.stage2.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as a string
    assert recipe.negatives.mix == {"dataset": 1.0, "shuffled": 0.5}
    assert recipe.model.lora.target_modules == ("q_proj", "v_proj")


def test_the_given_tree_is_not_changed() -> None:
    given_tree = tree(stage2={"objective": {"name": "dpo"}, "learning_rate": 1e-5})
    before = json.dumps(given_tree)
    parse_recipe(given_tree, ["stage2.objective.beta=0.5", "data.limit=3", "data.world={}"])
    assert json.dumps(given_tree) == before


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(tree()).seed = 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_studies_of_the_examples_fit_their_recipe(path: Path) -> None:
    """The recipe lies beside the study, and is named in its first lines."""
    from cwdpo.lab.spec import load_study

    study = load_study(str(path))
    named = path.read_text(encoding="utf-8").partition("cwdpo ablate ")[2].split()[0]
    for variant in study.variants.values():
        parse_recipe(yaml.safe_load((path.parent / named).read_text(encoding="utf-8")), variant.set)


def test_there_are_shipped_recipes() -> None:
    assert RECIPES


# --- overrides ------------------------------------------------------------------------------------------


def test_overrides_reach_nested_keys_and_make_missing_sections() -> None:
    recipe = parse_recipe(
        tree(), ["seed=7", "model.lora.r=4", "negatives.mix={dataset: 1, shuffled: 2}", "name=a=b"]
    )
    assert (recipe.seed, recipe.model.lora.r, recipe.name) == (7, 4, "a=b")
    assert recipe.negatives.mix == {"dataset": 1.0, "shuffled": 2.0}
    assert recipe.model.lora.alpha == 32


def test_the_last_override_wins() -> None:
    assert parse_recipe(tree(), ["seed=1", "seed=2"]).seed == 2


def test_an_objective_given_as_a_string_takes_overridden_settings() -> None:
    recipe = parse_recipe(
        tree(stage2={"objective": "cw_dpo", "learning_rate": 1e-5}),
        ["stage2.objective.beta=0.5", "stage2.objective.floor=-1.5"],
    )
    assert recipe.stage2.build() == CwDpo(beta=0.5, floor=-1.5)
    swapped = parse_recipe(
        tree(stage2={"objective": {"name": "cw_dpo", "floor": -1}, "learning_rate": 1e-5}),
        ["stage2.objective=dpo", "stage2.objective.beta=0.2"],
    )
    assert swapped.stage2.objective == {"name": "dpo", "beta": 0.2}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-4", 1e-4), ("2.5e-6", 2.5e-6), ("+3e-3", 3e-3), ("0.1", 0.1)]
)
def test_numbers_with_an_exponent_are_floats(text: str, value: float) -> None:
    recipe = parse_recipe(
        tree(stage2=STAGE), [f"stage2.learning_rate={text}", f"stage2.objective.beta={text}"]
    )
    assert recipe.stage2.learning_rate == value
    assert recipe.stage2.objective["beta"] == value


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.path=/a #1/t.jsonl", "data.path", "/a #1/t.jsonl"),
        ("data.path=a: b/t.jsonl", "data.path", "a: b/t.jsonl"),
        ("data.path= 12 ", "data.path", "12"),
        ("name=010", "name", "010"),
        ("name=yes", "name", "yes"),
        ("model.revision=12e4567", "model.revision", "12e4567"),
        ("model.revision=0123456", "model.revision", "0123456"),
        ("model.revision=null", "model.revision", None),
        ("model.revision='null'", "model.revision", "null"),
        ("seed=010", "seed", 10),
        ("seed=1e3", "seed", 1000),
        ("stage2.steps=5e2", "stage2.steps", 500),
        ("model.processor_options={max_pixels: 5e5}", "model.processor_options", {"max_pixels": 500000}),
        ("model.processor_options.max_pixels=5e5", "model.processor_options", {"max_pixels": 500000}),
        (
            "model.processor_options={size: {height: 1e2}}",
            "model.processor_options",
            {"size": {"height": 100}},
        ),
        ("train.bf16=yes", "train.bf16", True),
        ("data.limit=", "data.limit", None),
    ],
)
def test_an_override_is_what_it_says(override: str, key: str, value: Any) -> None:
    found: Any = parse_recipe(tree(stage2=STAGE), [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


def test_numbers_in_a_file_are_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "seed: 010\ndata: {path: x, limit: 1e3}\nmodel: {revision: 12e4567, processor_options: {max_pixels: 5e5}}\n"
        "stage2: {objective: {name: dpo, beta: 1e-1}, learning_rate: 1e-5}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.seed, recipe.data.limit, recipe.model.revision) == (10, 1000, "12e4567")
    assert recipe.model.processor_options == {"max_pixels": 500000}
    assert recipe.stage2.build().model_dump()["beta"] == 0.1
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("data: {path: x}\ntrain: {batch_size: 2}\nseed: 1\ntrain: {bf16: true}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: the key 'train' is given twice, in lines 2 and 4"):
        load_recipe(path)


def test_a_data_source_on_the_command_line_replaces_the_other() -> None:
    world = parse_recipe(tree(), ["data.world={train: 8}"])
    assert world.data.path is None
    assert world.data.world is not None
    assert world.data.world.train == 8
    back = parse_recipe({"data": {"world": {}}}, ["data.path=x.jsonl"])
    assert (back.data.path, back.data.world) == ("x.jsonl", None)


@pytest.mark.parametrize("override", ["seed", "=3", "stage2..steps=3", ".seed=1", "seed.=1", ""])
def test_overrides_of_a_wrong_form(override: str) -> None:
    message = refusal(tree(), override)
    assert f"override {override!r}: write section.key=value" in message


def test_other_bad_overrides() -> None:
    assert "'seed' is a value, not a section" in refusal(tree(seed=1), "seed.deep=3")
    assert "override 'seed=[1': not valid YAML" in refusal(tree(), "seed=[1")
    assert "unknown key 'stage2.stepz'; did you mean 'steps'?" in refusal(
        tree(stage2=STAGE), "stage2.stepz=3"
    )


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "key", "hint"),
    [
        (tree(sed=1), "sed", "seed"),
        (tree(stage_2={}), "stage_2", "stage2"),
        (tree(model={"paht": "x"}), "model.paht", "path"),
        (tree(model={"lora": {"rnk": 3, "alfa": 4}}), "model.lora.alfa", "alpha"),
        (tree(model={"init": {"widht": 3}}), "model.init.widht", "width"),
        ({"data": {"world": {"trian": 3}}}, "data.world.trian", "train"),
        (tree(train={"batchsize": 3}), "train.batchsize", "batch_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_key_names_its_path_and_the_nearest(recipe: dict[str, Any], key: str, hint: str) -> None:
    message = refusal(recipe)
    assert message.startswith("my.yaml: ")
    assert f"unknown key {key!r}" in message
    assert f"did you mean {hint!r}?" in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stage2.floor=-1", "did you mean stage2.objective.floor?"),
        ("tau=0.2", "did you mean stage2.objective.tau?"),
        ("train.learning_rate=1e-5", "did you mean stage1.learning_rate or stage2.learning_rate?"),
        ("train.num_train_epochs=2", "stage1.epochs and stage2.epochs"),
        ("model.r=8", "did you mean model.lora.r?"),
        ("model.lora.rank=8", "model.lora.r"),
        ("train.gradient_clipping=1", "train.max_grad_norm"),
        ("train.wandb=x", "train.report_to (wandb)"),
    ],
)
def test_a_misplaced_key_is_told_its_place(override: str, hint: str) -> None:
    assert hint in refusal(tree(stage2=STAGE), override)


def test_every_problem_is_named_at_once() -> None:
    lines = refusal(tree(sed=1, train={"batch_size": 0}, probes={"every": "often"})).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("my.yaml: ") for line in lines)


@pytest.mark.parametrize(
    ("recipe", "key", "got"),
    [
        (tree(seed="three"), "seed", "'three'"),
        (tree(train={"batch_size": 1.5}), "train.batch_size", "1.5"),
        (tree(train={"batch_size": 0}), "train.batch_size", "0"),
        (tree(model=[1]), "model", "[1]"),
        (tree(model={"tune": "some"}), "model.tune", "'some'"),
        (tree(model={"lora": {"dropout": 1.0}}), "model.lora.dropout", "1.0"),
        (tree(stage2={"objective": 3, "learning_rate": 1e-5}), "stage2.objective", "3"),
        (tree(negatives={"mix": {"dataset": "much"}}), "negatives.mix.dataset", "'much'"),
        (tree(negatives={"mix": {"dataset": -1}}), "negatives.mix", "{'dataset': -1}"),
        (tree(negatives={"mix": {}}), "negatives.mix", "{}"),
        ({"data": {"world": {"train": "many"}}}, "data.world.train", "'many'"),
        ({}, "data", "{}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_names_its_path(recipe: dict[str, Any], key: str, got: str) -> None:
    message = refusal(recipe)
    assert message.startswith(f"my.yaml: {key}: ")
    assert f"got {got}" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), "nan", "inf"])
@pytest.mark.parametrize(
    "key", ["stage2.learning_rate", "train.max_grad_norm", "train.weight_decay", "negatives.mix.dataset"]
)
def test_numbers_must_be_finite(key: str, value: Any) -> None:
    recipe: Any = tree(stage2=dict(STAGE))
    section, *inner = key.split(".")
    node = recipe.setdefault(section, {})
    for part in inner[:-1]:
        node = node.setdefault(part, {})
    node[inner[-1]] = value
    assert refusal(recipe).startswith(f"my.yaml: {key}: ")


@pytest.mark.parametrize("value", [".nan", ".inf", "nan", "-.inf"])
def test_finite_numbers_in_overrides_and_objectives(value: str) -> None:
    assert "learning_rate" in refusal(tree(stage2=STAGE), f"stage2.learning_rate={value}")
    assert "dpo: beta" in refusal(tree(stage2=STAGE), f"stage2.objective.beta={value}")


@pytest.mark.parametrize("data", [{}, {"path": "x", "world": {}}, {"limit": 3}, {"path": None}])
def test_exactly_one_data_source(data: dict[str, Any]) -> None:
    assert refusal({"data": data}).startswith("my.yaml: data: exactly one of 'path', 'sources' and 'world'")


def test_something_must_be_trained() -> None:
    off = {"enabled": False, "objective": "sft", "learning_rate": 1e-5}
    assert "both disabled" in refusal(tree(stage1=off, stage2=off))


def test_components_are_checked_at_once() -> None:
    message = refusal(tree(stage2={"objective": "cwdpo", "learning_rate": 1e-5}))
    assert "unknown objective 'cwdpo'; did you mean 'cw_dpo'?" in message
    message = refusal(tree(stage2={"objective": {"name": "dpo", "bta": 1}, "learning_rate": 1e-5}))
    assert "objective dpo: unknown key 'bta'; did you mean 'beta'?" in message
    message = refusal(tree(stage2={"objective": {"beta": 1}, "learning_rate": 1e-5}))
    assert "'name' is missing" in message
    message = refusal(tree(negatives={"mix": {"shufled": 1}}))
    assert "unknown negative source 'shufled'; did you mean 'shuffled'?" in message


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    def message_of(name: str, content: bytes | None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        return str(caught.value)

    assert "absent.yaml: cannot be read (No such file" in message_of("absent.yaml", None)
    assert "broken.yaml: not valid YAML" in message_of("broken.yaml", b"a: [1\n")
    assert "list.yaml: a recipe is a mapping of sections, got list" in message_of("list.yaml", b"- 1\n")
    assert "empty.yaml: a recipe is a mapping of sections, got NoneType" in message_of("empty.yaml", b"")
    assert "unsafe.yaml: not valid YAML" in message_of("unsafe.yaml", b"name: !!python/name:os.system\n")
    assert "typo.yaml: unknown key 'sed'" in message_of("typo.yaml", b"sed: 1\ndata: {path: x}\n")


def test_a_recipe_that_is_not_utf_8(tmp_path: Path) -> None:
    # DEFECT: UnicodeDecodeError escapes from load_recipe.
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9\ndata: {path: x}\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml"):
        load_recipe(tmp_path / "latin.yaml")


# --- round trip and schema ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        tree(),
        {"data": {"world": {"train": 5}}, "name": "Prüfung: #1 – 'x'"},
        tree(
            stage1={"objective": {"name": "sft_smoothed", "weight": 0.1}, "learning_rate": 1e-7},
            stage2={"objective": {"name": "cw_dpo", "filter_below": -3}, "learning_rate": 3e-5, "steps": 4},
            model={"lora": {"target_modules": ["a", "b"]}, "processor_options": {"max_pixels": 1003520}},
            train={"report_to": ["tensorboard"], "save_steps": 5},
        ),
    ],
    ids=["plain", "world", "much"],
)
def test_to_yaml_parses_back_to_the_same_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    parsed = parse_recipe(recipe)
    (tmp_path / "recipe.yaml").write_text(parsed.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == parsed
    resolved = yaml.safe_load(parsed.to_yaml())
    assert list(resolved) == list(Recipe.model_fields)
    assert resolved["train"]["adam_beta2"] == 0.98, "defaults are spelled out"


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for value in node.values() for ref in references(value)]
    return [ref for value in node for ref in references(value)] if isinstance(node, list) else []


def test_schema_is_sound() -> None:
    schema = json.loads(json.dumps(recipe_schema(), allow_nan=False))
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["required"] == ["data"]
    found = references(schema)
    assert "#/$defs/Objective" in found
    for reference in found:
        prefix, _, name = reference.rpartition("/")
        assert (prefix, name in schema["$defs"]) == ("#/$defs", True), reference


def test_schema_lists_every_objective_with_its_settings() -> None:
    schema = recipe_schema()
    assert schema["$defs"]["StageSettings"]["properties"]["objective"] == {"$ref": "#/$defs/Objective"}
    branches = schema["$defs"]["Objective"]["anyOf"]
    assert {"enum": OBJECTIVES.names()} in branches
    by_name = {b["properties"]["name"].get("const"): b for b in branches if "properties" in b}
    assert set(by_name) - {None} == set(OBJECTIVES.names())
    for name in OBJECTIVES.names():
        branch = by_name[name]
        assert set(branch["properties"]) == {"name", *OBJECTIVES.get(name).model_fields}
        assert branch["additionalProperties"] is False
        assert branch["required"] == ["name"]
        assert branch["description"]
    assert by_name["dpo"]["properties"]["beta"]["exclusiveMinimum"] == 0


def test_schema_lists_every_judge_with_its_settings() -> None:
    schema = recipe_schema()
    field = schema["$defs"]["NegativeSettings"]["properties"]["judge"]
    assert (field["$ref"], field["default"]) == ("#/$defs/Judge", {"name": "auto"})
    names, *branches, own = schema["$defs"]["Judge"]["anyOf"]
    assert names == {"enum": ["auto", "none", *JUDGES.names()]}
    assert own["properties"]["name"]["pattern"] == r"\.py:"
    by_name = {b["properties"]["name"]["const"]: b for b in branches}
    assert set(by_name) == {"auto", "none", *JUDGES.names()}
    for name in JUDGES.names():
        assert set(by_name[name]["properties"]) == {"name", *JUDGES.get(name).model_fields}
        assert by_name[name]["additionalProperties"] is False
    assert by_name["vlm"]["required"] == ["name", "server"]
    assert set(by_name["none"]["properties"]) == {"name"}


# --- anything at all ------------------------------------------------------------------------------------


def inner_model(annotation: Any) -> type[BaseModel] | None:
    parts = (annotation, *getattr(annotation, "__args__", ()))
    return next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)


def keys_of(model: type[BaseModel]) -> set[str]:
    """Every key of a settings class and of those inside it."""
    inner = (inner_model(field.annotation) for field in model.model_fields.values())
    return set(model.model_fields).union(*(keys_of(m) for m in inner if m is not None))


KEYS = st.sampled_from([*sorted(keys_of(Recipe)), "name", "beta", "floor"]) | st.text(max_size=4)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [10**400, -(10**400), "nan", "dpo", "cw_dpo", "auto", "dataset", "a.py:B", ".py:", "\0"]
    )
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=3)
    | st.dates()
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS | st.integers(), inner, max_size=4),
    max_leaves=12,
)


def section(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Any of the section's own keys with anything in them, or something else altogether."""
    optional: dict[Any, st.SearchStrategy[Any]] = {}
    for key, field in model.model_fields.items():
        inner = inner_model(field.annotation)
        sane = st.just(field.get_default(call_default_factory=True)) if not field.is_required() else TREES
        optional[key] = section(inner) if inner else sane | TREES
    return st.fixed_dictionaries({}, optional=optional) | TREES


SECTIONS = {key: inner_model(field.annotation) for key, field in Recipe.model_fields.items()}
RECIPE_TREES = st.fixed_dictionaries(
    {"data": st.just({"path": "x"}) | section(DataSettings)},
    optional={
        key: TREES if model is None else section(model) for key, model in SECTIONS.items() if key != "data"
    },
)
OVERRIDES = st.builds("{}={}".format, st.lists(KEYS, min_size=1, max_size=3).map(".".join), LEAVES)


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    recipe=RECIPE_TREES | st.dictionaries(KEYS, TREES, max_size=4),
    overrides=st.lists(OVERRIDES | st.text(max_size=12), max_size=2),
)
def test_anything_is_parsed_or_refused_with_a_recipe_error(recipe: Any, overrides: list[str]) -> None:
    try:
        parsed = parse_recipe(recipe, overrides)
    except RecipeError:
        return
    assert parse_recipe(yaml.safe_load(parsed.to_yaml())) == parsed


def test_a_stage_given_in_part_keeps_the_other_defaults() -> None:
    recipe = parse_recipe({"data": {"path": "data.jsonl"}, "stage2": {"steps": 3}})
    whole = parse_recipe({"data": {"path": "data.jsonl"}})
    assert recipe.stage2.steps == 3
    assert recipe.stage2.objective == whole.stage2.objective
    assert recipe.stage2.learning_rate == whole.stage2.learning_rate
    assert parse_recipe({"data": {"path": "d"}, "stage2": {"objective": "dpo"}}).stage2.objective == {
        "name": "dpo"
    }


def test_settings_of_negative_sources_are_checked() -> None:
    good = {
        "data": {"path": "d"},
        "negatives": {"mix": {"perturb": 1}, "settings": {"perturb": {"kinds": ["colour"]}}},
    }
    assert parse_recipe(good).negatives.build_sources()["perturb"].kinds == ("colour",)
    good["negatives"]["settings"] = {"perturb": {"kindz": ["colour"]}}
    with pytest.raises(RecipeError, match="kinds"):
        parse_recipe(good)


def test_a_world_needs_training_and_validation_pictures() -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        parse_recipe({"data": {"world": {"validation": 0}}})


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.learning_rate=1e-5", "did you mean stage1.learning_rate or stage2.learning_rate?"),
        ("learning_rate=1e-5", "did you mean stage1.learning_rate or stage2.learning_rate?"),
        ("stage2.max_length=3", "did you mean data.max_length?"),
        ("data.lora=3", "did you mean model.lora?"),
        ("train.num_train_epochs=1", "here it is replaced by stage1.epochs and stage2.epochs"),
        ("train.per_device_train_batch_size=1", "here it is replaced by train.batch_size"),
        ("stage2.loss_type=ipo", "here it is replaced by stage2.objective"),
        ("model.lora_rank=8", "here it is replaced by model.lora.r"),
        (
            "model.max_pixels=8",
            "here it is replaced by model.processor_options.max_pixels (of images) and data.video.max_pixels "
            "(of videos)",
        ),
        ("data.video_fps=2", "here it is replaced by data.video.fps"),
        ("train.logging_step=1", "did you mean 'logging_steps'?"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_its_own(override: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"data": {"path": "x"}}, [override])
    assert str(caught.value) == f"recipe: unknown key {override.partition('=')[0]!r}; {hint}"


def test_every_place_that_a_hint_names_is_a_key() -> None:
    import re

    from cwdpo.hints import FROM_OTHER_TOOLS

    schema = recipe_schema()
    sections = {"stage1": "StageSettings", "stage2": "StageSettings"}
    known = set(schema["properties"])
    for name, part in schema["properties"].items():
        kind = sections.get(name) or str(part.get("$ref", part)).rpartition("/")[2].rstrip("'}")
        known |= {f"{name}.{key}" for key in schema["$defs"].get(kind, {}).get("properties", {})}
    named = {
        word for text in FROM_OTHER_TOOLS.values() for word in re.findall(r"\b[a-z0-9_]+\.[a-z0-9_]+", text)
    }
    assert len(named) > 15
    assert not {word for word in named if word not in known | {"dataset_info.json"}}


def test_one_name_is_a_list_of_one() -> None:
    overrides = [
        "train.report_to=wandb",
        "model.freeze=vision",
        "stop=kl > 0.04",
        "data.ignore_columns=label",
    ]
    parsed = parse_recipe({"data": {"path": "x"}}, overrides)
    assert parsed.train.report_to == ("wandb",)
    assert parsed.model.freeze == ("vision",)
    assert parsed.stop == ("kl > 0.04",)
    assert parsed.data.ignore_columns == ("label",)
    assert parse_recipe(
        {"data": {"path": "x"}}, ["model.lora.target_modules=all-linear"]
    ).model.lora.target_modules == ("all-linear")
    with pytest.raises(RecipeError, match="unknown name 'wandbs'; did you mean 'wandb'"):
        parse_recipe({"data": {"path": "x"}}, ["train.report_to=wandbs"])
    with pytest.raises(RecipeError, match="trackers: unknown name 'wandbs'; did you mean 'wandb'"):
        parse_recipe({"data": {"path": "x"}, "train": {"trackers": {"wandbs": {"entity": "me"}}}})
    with pytest.raises(
        RecipeError, match="trackers: wandb is not in report_to: add it there, or leave it out"
    ):
        parse_recipe({"data": {"path": "x"}, "train": {"trackers": {"wandb": {"entity": "me"}}}})
