"""What `cwdpo init` decides: by hand arithmetic, and by the planner's own numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from cwdpo.config import Recipe, parse_recipe
from cwdpo.errors import RecipeError
from cwdpo.files.yamlfile import parse_yaml
from cwdpo.models.load import load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.pipeline.first_recipe.decide import image_limit, lengths, prompts_of_a_step, stage_rows_of
from cwdpo.pipeline.first_recipe.fitting import MARGIN, Fitted, fitted, ways
from cwdpo.pipeline.first_recipe.rows import Rows, words_in_common
from cwdpo.pipeline.first_recipe.text import Decision, as_tree, recipe_text
from cwdpo.pipeline.planning.costs import HollowRun
from cwdpo.pipeline.planning.gpus import USABLE, Gpu
from cwdpo.pipeline.planning.rows import StageRows
from cwdpo.pipeline.planning.run import Hardware
from cwdpo.records import Completion, Example
from cwdpo.trainer.dry_step import OF_THE_BATCH
from paths import ROOT

# --- rows -----------------------------------------------------------------------------------------------


def example(chosen: str, *rejected: str) -> Example:
    return Example("x", (), (), Completion(chosen), tuple(map(Completion, rejected)))


def test_words_in_common_by_hand() -> None:
    edit = example("a red cup on a table", "a blue cup on a table")  # 5 of 6 words
    other = example("a red cup", "two dogs run")
    assert words_in_common([edit]) == pytest.approx(10 / 12)
    assert words_in_common([other]) == 0
    assert words_in_common([edit, edit, other]) == pytest.approx(10 / 12)
    assert words_in_common([example("a red cup")]) is None
    pictures = dataclasses.replace(other, rejected=(Completion("a red cup", images=()),))
    assert words_in_common([pictures]) is None, "it differs in its images only"


def rows(count: int) -> Rows:
    return Rows("x", "trl", count, 0, count, "others", 0.1, "")


@pytest.mark.parametrize(
    ("count", "gpus", "stages", "prompts"),
    [
        (20, 1, (12, 4), 1),  # 16 to train on
        (1000, 1, (675, 225), 16),
        (200, 1, (135, 45), 4),  # 45 // 8 = 5, and 4 is the power of two
        (1000, 8, (675, 225), 2),
        (20, 4, (12, 4), 1),  # at least one on each
    ],
)
def test_prompts_of_a_step(count: int, gpus: int, stages: tuple[int, int], prompts: int) -> None:
    assert stage_rows_of(rows(count)) == stages
    assert prompts_of_a_step(rows(count), gpus) == prompts


def test_lengths_are_a_tenth_above_the_longest_row() -> None:
    def row(prompt: int, chosen: int, rejected: int) -> Any:
        return SimpleNamespace(
            row_tokens=lambda *, shared: (prompt + chosen, prompt + rejected),
            chosen=SimpleNamespace(ids=[0] * chosen),
        )

    assert lengths([row(100, 20, 30), row(50, 10, 10)]) == (192, 32)  # 1.1 * 130 = 143; 20 tokens
    assert lengths([row(10, 1000, 5)])[1] == 256


def test_images_are_limited_where_the_processor_counts_pixels() -> None:
    def of(longest: int, **more: Any) -> Any:
        images = SimpleNamespace(
            size={"shortest_edge": 3136, "longest_edge": longest},
            **{"merge_size": 2, "patch_size": 14, **more},
        )
        return image_limit(SimpleNamespace(image_processor=images))

    assert of(12_845_056) == {"size": {"shortest_edge": 3136, "longest_edge": 640 * 28 * 28}}
    assert of(400_000) is None, "it is smaller already"
    assert of(12_845_056, merge_size=None) is None
    assert of(12_845_056, patch_size={"height": 14, "width": 14}) is None
    assert image_limit(SimpleNamespace()) is None


# --- the file -------------------------------------------------------------------------------------------


def test_the_text_is_read_as_the_values() -> None:
    decisions = [
        Decision("name", "010", "A reason that is longer than a line " * 6),
        Decision("model.path", "/a: b #1/c, [d] " + "e " * 60),
        Decision("model.freeze", ["vision", "a, b", "null", "{x}"]),
        Decision("data.path", "no"),
        Decision("stage1.learning_rate", 1e-5),
        Decision(
            "stage2.objective", {"name": "cw_dpo", "beta": 0.1, "floor": "auto", "more": [1, True, None]}
        ),
        Decision("stop", []),
    ]
    text = recipe_text(["head: 1", "two"], decisions)
    assert parse_yaml(text, "text") == as_tree(decisions)
    assert text.startswith("# head: 1\n# two\n# A reason that")
    assert max(len(line) for line in text.splitlines() if line.startswith("#")) <= 110


def test_the_recipe_of_the_docs_is_one() -> None:
    page = (ROOT / "docs" / "first_recipe.md").read_text(encoding="utf-8")
    block = page.split("```yaml\n")[1].split("```")[0]
    assert parse_recipe(parse_yaml(block, "docs")).name == "mine"


# --- what fits ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(model_folder: Path, examples: Sequence[Example]) -> list[StageRows]:
    encoder = load_policy(ModelSettings(path=str(model_folder), device="cpu")).encoder()
    encoded, _ = encoder.encode_all(examples[:16], "rejected", require_negative=True)
    return [StageRows("stage2", encoded, 16)]


@pytest.fixture(scope="module")
def recipe(model_folder: Path) -> Recipe:
    return parse_recipe(
        {
            "model": {"path": str(model_folder), "device": "cpu", "freeze": ["vision"]},
            "data": {"path": "x"},
            "train": {"batch_size": 8},
        }
    )


def fit(recipe: Recipe, stages: list[StageRows], usable: float, tune: Any = "lora", gpus: int = 1) -> Fitted:
    """What fits into ``usable`` bytes."""
    config = AutoConfig.from_pretrained(recipe.model.path)
    memory = usable / MARGIN / USABLE / 2**30 * (1 + 1e-9)
    return fitted(config, recipe, stages, Hardware(Gpu("test", memory, 1), gpus), tune)


def test_the_first_way_that_fits_is_taken_with_the_largest_micro_batches(
    recipe: Recipe, stages: list[StageRows]
) -> None:
    best = fit(recipe, stages, 2**40)
    assert (best.way.name, best.recipe.train.batch_size, len(best.tried)) == ("LoRA on bf16 weights", 8, 1)
    again = HollowRun(AutoConfig.from_pretrained(recipe.model.path), 1).peak(best.recipe, stages)
    assert again.total == best.memory.total == best.tried[-1].size

    smaller = fit(recipe, stages, best.memory.total - 1)
    assert smaller.way == best.way
    train = smaller.recipe.train
    assert train.batch_size < 8
    assert train.batch_size * train.gradient_accumulation_steps == 8
    assert smaller.memory.total < best.memory.total

    with pytest.raises(
        RecipeError, match=r"(?s)nothing fits test: of .* before any batch\ntake a GPU"
    ) as caught:
        fit(recipe, stages, 1000)
    assert str(caught.value).count("\n") == 3, "LoRA and nf4, each once"


@pytest.mark.slow
def test_activations_are_recomputed_where_one_prompt_is_too_much(
    recipe: Recipe, stages: list[StageRows]
) -> None:
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 1})})
    config = AutoConfig.from_pretrained(recipe.model.path)
    run = HollowRun(config, 1)
    sizes = [run.peak(way.applied(one), stages).total for way in ways("lora", 1)]
    assert sizes == sorted(sizes, reverse=True)
    found = fit(one, stages, sizes[0] - 1)
    assert found.recipe.train.gradient_checkpointing
    assert [t.fits for t in found.tried] == [False, True]
    found = fit(one, stages, sizes[1] - 1)
    assert found.recipe.model.quantization == "nf4"


def test_all_weights_then_fsdp2_then_lora(recipe: Recipe, stages: list[StageRows]) -> None:
    whole = fit(recipe, stages, 2**40, "full")
    assert (whole.recipe.model.tune, whole.recipe.train.optimizer, whole.way.sharded) == (
        "full",
        "adamw_kahan",
        False,
    )
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 1})})
    run = HollowRun(AutoConfig.from_pretrained(recipe.model.path), 4)
    full = [way for way in ways("full", 4) if way.model["tune"] == "full"]
    sizes = [run.peak(way.applied(one), stages).total for way in full if not way.sharded]
    found = fit(one, stages, min(sizes) - 1, "full", gpus=4)
    assert found.way.sharded
    spread = HollowRun(AutoConfig.from_pretrained(recipe.model.path), 4, sharded=True)
    assert found.memory == spread.peak(found.recipe, stages)
    assert spread.kept(found.recipe) < run.kept(found.recipe)
    names = [way.name for way in ways("full", 1)]
    assert not any("FSDP2" in name for name in names)
    assert names[-1].startswith("LoRA on weights in 4 bits")


@pytest.mark.parametrize(("tune", "memory"), [("lora", 100.0), ("full", 100.0), ("lora", 0.0)])
def test_a_gpu_without_bfloat16_units_computes_in_float32(
    recipe: Recipe, stages: list[StageRows], tune: Any, memory: float
) -> None:
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 1})})
    config = AutoConfig.from_pretrained(recipe.model.path)
    if not memory:  # what only 4 bits fit into
        whole = [way for way in ways("lora", 1, bf16=False) if "quantization" not in way.model]
        sizes = [HollowRun(config, 1).peak(way.applied(one), stages).total for way in whole]
        memory = (min(sizes) - 1) / MARGIN / USABLE / 2**30
    found = fitted(config, one, stages, Hardware(Gpu("old", memory, 1, bf16=False), 1), tune)
    model, train = found.recipe.model, found.recipe.train
    assert (model.tune, model.dtype, train.bf16, train.optimizer) == (tune, "float32", False, "adamw")
    assert (model.quantization == "nf4") == (memory < 1)


def test_a_checkpoint_that_lies_quantized_stays_as_it_is(recipe: Recipe, stages: list[StageRows]) -> None:
    settings = recipe.model.model_copy(
        update={"quantization": "nf4", "tune": "lora"}
    )  # as read_config finds it
    found = fit(recipe.model_copy(update={"model": settings}), stages, 2**40, "full")
    assert found.way.model == {"tune": "lora"}, "a recipe that quantizes it again is refused"
    assert "quantized weights" in found.memory.parts


def test_what_fsdp2_spreads(recipe: Recipe, stages: list[StageRows]) -> None:
    whole = {"gradient_accumulation_steps": 2, "optimizer": "adamw_kahan"}
    way = next(way for way in ways("full", 4) if way.sharded)
    asked = way.applied(recipe)
    asked = asked.model_copy(update={"train": asked.train.model_copy(update=whole)})
    config = AutoConfig.from_pretrained(recipe.model.path)
    alone, four, many = (
        HollowRun(config, gpus, sharded=gpus > 1).peak(asked, stages).parts for gpus in (1, 4, 10**9)
    )
    assert four["weights"] == alone["weights"] // 4
    assert four["gathered layers"] == many["gathered layers"] < 4 * alone["weights"]
    assert four["optimizer state"] == alone["optimizer state"] // 4
    assert "gradient buckets" not in four
    assert four["gradients"] == pytest.approx(alone["gradients"] / 4, rel=0.01)
    # Without gradients the peak is where most activations are, which is at most that of the whole step.
    activations = sum(many.values()) - many.get("weights", 0) - many["gathered layers"]
    assert activations == sum(v for k, v in many.items() if k in OF_THE_BATCH)
    kept = four["weights"] + four["gathered layers"] + four["optimizer state"]
    assert sum(four.values()) >= kept + activations
