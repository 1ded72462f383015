"""``CWDPOTrainer`` as users of TRL call it; docs/from_trl.md's two scripts run and agree."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, TrainerCallback

import cwdpo
from cwdpo.errors import DataError, ModelError, RecipeError
from cwdpo.pipeline.trl_names import CONFIG, TRAINER
from paths import ROOT

KEYS = ("prompt", "chosen", "rejected")


@pytest.fixture(scope="module")
def rows(world_folder: Path) -> list[dict[str, Any]]:
    """Twenty rows of the world in TRL's columns, with their pictures' bytes."""
    made = []
    for line in (world_folder / "train.jsonl").read_text().splitlines()[:20]:
        row = json.loads(line)
        image = {"bytes": (world_folder / row["images"][0]).read_bytes(), "path": None}
        made.append({key: _full(row[key]) for key in KEYS} | {"images": [image]})
    return made


def _full(turns: Any) -> Any:
    """Every block with both keys, as a table needs it."""
    return [
        {"role": t["role"], "content": [{"type": c["type"], "text": c.get("text")} for c in t["content"]]}
        for t in turns
    ]


@pytest.fixture(scope="module")
def dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    text = datasets.Value("string")
    message = [{"role": text, "content": [{"type": text, "text": text}]}]
    features = {**dict.fromkeys(KEYS, message), "images": datasets.List(datasets.Image())}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def config(folder: Path, **changes: Any) -> cwdpo.CWDPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"), "objective": "dpo", "beta": 0.3, "learning_rate": 1e-3, "max_steps": 2,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return cwdpo.CWDPOConfig(**{**settings, **changes})


def trainer(model: Any, args: Any, data: Any, **more: Any) -> cwdpo.CWDPOTrainer:
    return cwdpo.CWDPOTrainer(model=model, args=args, train_dataset=data, **more)


def test_loader_workers_read_the_images(
    tmp_path: Path, model_folder: Path, dataset: datasets.Dataset
) -> None:
    """transformers' own argument; the pictures of these rows have no path, so their bytes go to the workers."""
    found = []
    for n in (0, 1):
        more = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3} if n else {}
        args = config(tmp_path / str(n), dataloader_num_workers=n, vision_cache_gb=0, **more)
        made = trainer(str(model_folder), args, dataset.select(range(12)))
        made._stage.encoder.prompt.forget()
        made._stage.encoder.prompt._free_bytes = 0
        made.train()
        assert args.dataloader_num_workers == n
        pool = made._stage.encoder.prompt.workers and made._stage.encoder.prompt.workers._pool
        assert bool(pool) == bool(n)
        found.append((made.state.log_history, [p.detach() for p in made.model.parameters()]))
    (logs, weights), (other_logs, other_weights) = found
    assert [r["loss"] for r in logs if "loss" in r] == [r["loss"] for r in other_logs if "loss" in r]
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


# --- evaluation ---------------------------------------------------------------------------------------------


def test_an_evaluation_set(tmp_path: Path, model_folder: Path, dataset: datasets.Dataset) -> None:
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    made = trainer(
        str(model_folder), args, dataset.select(range(8)), eval_dataset=dataset.select(range(8, 15))
    )
    made.train()
    found = [r for r in made.state.log_history if "eval_loss" in r]
    assert [r["step"] for r in found] == [0, 1, 2]
    assert found[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert found[2]["eval_loss"] != found[0]["eval_loss"]
    assert {
        "eval_rewards/accuracies",
        "eval_logps/chosen",
        "eval_logps_mean/rejected",
        "eval_runtime",
    } <= found[2].keys()
    assert not any(key.startswith(("eval_gradient", "eval_tokens")) for r in found for key in r)
    assert made.model.training, "evaluation leaves the model as it was"


def test_evaluation_does_not_depend_on_the_batch(
    tmp_path: Path, model: Any, processor: Any, dataset: Any
) -> None:
    """One row at a time, and all seven at once; the loss by hand from the logged rewards."""
    ref = AutoModelForImageTextToText.from_config(model.config)
    held = dataset.select(range(8, 15))
    found = []
    for size in (1, 7):
        args = config(tmp_path, per_device_eval_batch_size=size)
        made = trainer(
            model,
            args,
            dataset.select(range(4)),
            processing_class=processor,
            ref_model=ref,
            eval_dataset=held,
        )
        told: list[Any] = []
        made._compute_metrics = lambda p, told=told: (
            told.append(p) or {"acc": float((p.predictions.argmax(1) == 0).mean())}
        )
        found.append((made.evaluate(), told[0]))
    (one, single), (seven, whole) = found
    for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_acc"):
        assert one[key] == pytest.approx(seven[key], abs=1e-5), key
    np.testing.assert_allclose(single.predictions, whole.predictions, atol=1e-4)
    margins = whole.predictions[:, 0] - whole.predictions[:, 1]
    assert whole.predictions.shape == (7, 2)
    assert whole.label_ids.tolist() == [0] * 7
    # -log sigmoid(beta * difference of shifts), the mean over prompts of one pair each.
    assert seven["eval_loss"] == pytest.approx(float(np.log1p(np.exp(-margins)).mean()), abs=1e-5)
    assert seven["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert seven["eval_acc"] == pytest.approx(float((margins > 0).mean()))


@pytest.mark.parametrize("objective", ["sft_constrained", "beta_dpo", "simpo"])
def test_objectives_that_look_ahead_or_have_no_reference(
    tmp_path: Path, model_folder: Path, dataset: datasets.Dataset, objective: str
) -> None:
    found = []
    for size in (2, 7):
        args = config(tmp_path, objective=objective, per_device_eval_batch_size=size)
        made = trainer(
            str(model_folder), args, dataset.select(range(4)), eval_dataset=dataset.select(range(7))
        )
        found.append(made.evaluate()["eval_loss"])
    assert np.isfinite(found[0])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_dict_of_evaluation_sets(
    tmp_path: Path, model_folder: Path, dataset: datasets.Dataset, rows: Any
) -> None:
    sets = datasets.DatasetDict({"easy": dataset.select(range(4)), "hard": dataset.select(range(4, 9))})
    for given in (sets, {"easy": rows[:4], "hard": rows[4:9]}):
        made = trainer(str(model_folder), config(tmp_path), dataset.select(range(4)), eval_dataset=given)
        found = made.evaluate()
        assert {"eval_easy_loss", "eval_hard_loss", "eval_hard_rewards/margins"} <= found.keys()
        assert made.evaluate("hard").keys() == {k for k in found if k.startswith("eval_hard")}
        with pytest.raises(DataError, match="no set 'soft'; known: easy, hard"):
            made.evaluate("soft")


def test_other_rows_have_no_reference_after_training(
    tmp_path: Path, model_folder: Path, dataset: datasets.Dataset
) -> None:
    held = dataset.select(range(8, 12))
    made = trainer(str(model_folder), config(tmp_path), dataset.select(range(8)))
    with pytest.raises(DataError, match="pass eval_dataset"):
        made.evaluate()
    assert made.evaluate(held, metric_key_prefix="test")["test_loss"] == pytest.approx(np.log(2), abs=1e-5)
    made.train()
    with pytest.raises(RecipeError, match="the reference was the policy before training"):
        made.evaluate(held)
    with pytest.raises(RecipeError, match="cwdpo evaluate MODEL --data"):
        made.predict(held)
    free = trainer(str(model_folder), config(tmp_path, objective="simpo"), dataset.select(range(8)))
    free.train()
    assert np.isfinite(free.evaluate(held)["eval_loss"])


def test_the_best_model_is_loaded_at_the_end(
    tmp_path: Path, model_folder: Path, dataset: datasets.Dataset
) -> None:
    """Under LLaVA's names on disk transformers' own way would load nothing."""

    class Worse(TrainerCallback):  # type: ignore[misc]
        """Step 2 ends with the weights of the start, so step 1 is the better one."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.start = {name: value.clone() for name, value in model.state_dict().items()}

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                model.load_state_dict(self.start)

    args = config(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=1e-4, save_total_limit=1,
    )  # fmt: skip
    made = trainer(
        str(model_folder),
        args,
        dataset.select(range(8)),
        eval_dataset=dataset.select(range(8)),
        callbacks=[Worse()],
    )
    made.train()
    losses = {r["step"]: r["eval_loss"] for r in made.state.log_history if "eval_loss" in r}
    assert losses[1] < losses[2]
    assert made.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-1")
    stored = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == str(tmp_path / "out" / "checkpoint-1")
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[1], abs=1e-6)


# --- data ---------------------------------------------------------------------------------------------------


def losses(made: cwdpo.CWDPOTrainer) -> list[float]:
    made.train()
    return [r["loss"] for r in made.state.log_history if "loss" in r]


def test_data_sets_dictionaries_lists_and_streams_train_alike(
    tmp_path: Path, model_folder: Path, dataset: datasets.Dataset, rows: list[dict[str, Any]]
) -> None:
    """Eight rows, two steps of four: the same rows in every form."""
    eight = dataset.select(range(8))
    wanted = losses(trainer(str(model_folder), config(tmp_path), eight))
    forms = {
        "list": rows[:8],
        "dict": datasets.DatasetDict({"train": eight}),
        "stream": eight.to_iterable_dataset(),
        "mapped": eight.map(lambda row: {**row, "note": "x"}),
        "transformed": eight.with_transform(lambda batch: batch),
    }
    for name, data in forms.items():
        assert losses(trainer(str(model_folder), config(tmp_path), data)) == pytest.approx(
            wanted, abs=1e-6
        ), name


def test_of_a_stream_as_many_rows_are_read_as_the_steps_take(tmp_path: Path, model_folder: Path) -> None:
    taken: list[int] = []

    def texts() -> Any:
        while True:
            taken.append(len(taken))
            yield {"prompt": "Q", "chosen": f"A{len(taken)}", "rejected": "B"}

    features = datasets.Features(dict.fromkeys(KEYS, datasets.Value("string")))
    stream = datasets.IterableDataset.from_generator(texts, features=features)
    made = trainer(str(model_folder), config(tmp_path, max_steps=3, gradient_accumulation_steps=2), stream)
    assert len(made.train_dataset) == 3 * 2 * 4
    assert len(taken) < 200
    with pytest.raises(DataError, match="is a stream of unknown length: set max_steps"):
        trainer(str(model_folder), config(tmp_path, max_steps=-1), stream)


@pytest.mark.parametrize(
    ("data", "held_out", "said"),
    [
        (None, None, "train_dataset is missing"),
        ("pairs", None, "train_dataset: str; allowed: a datasets.Dataset"),
        ({"train": [], "test": []}, None, r"one of them, as in train_dataset=dataset\['train'\], eval_.*'test'"),
        ({"dev": []}, None, "splits dev: pass one of them"),
        ([], None, "train_dataset: no rows"),
        ([{"hello": 1}], None, "match no known format"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], 3, "eval_dataset: int; allowed"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], {"a": [{"prompt": "Q"}]}, r"eval_dataset\['a'\]: "),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B", "tools": [1]}], None, r"\[tools\[0\]\]"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_named(
    tmp_path: Path, model_folder: Path, data: Any, held_out: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        trainer(str(model_folder), config(tmp_path), data, eval_dataset=held_out)


def test_columns_that_are_not_read_are_said(
    tmp_path: Path, model_folder: Path, rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cwdpo"):
        trainer(str(model_folder), config(tmp_path), [{**row, "source": "me"} for row in rows[:4]])
    assert (
        "train_dataset: columns not read in training (kept for judges and metrics): source (4 rows)"
        in caplog.text
    )


# --- the model ----------------------------------------------------------------------------------------------


def test_a_loaded_model_brings_its_processor_by_name(
    tmp_path: Path, model_folder: Path, dataset: Any
) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(model_folder)
    made = trainer(loaded, config(tmp_path), dataset.select(range(4)))
    assert made.processing_class.__class__.__name__ == "LlavaProcessor"
    unnamed = AutoModelForImageTextToText.from_config(loaded.config)
    unnamed.config._name_or_path = unnamed.name_or_path = ""
    with pytest.raises(DataError, match="the model has no name to load it by"):
        trainer(unnamed, config(tmp_path), dataset.select(range(4)))


def test_model_init_kwargs(tmp_path: Path, model_folder: Path, dataset: Any) -> None:
    four = dataset.select(range(4))
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        args = config(
            tmp_path, model_init_kwargs={"dtype": dtype, "attn_implementation": "eager", "device_map": None}
        )
        made = trainer(str(model_folder), args, four)
        assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
        assert made.model.config._attn_implementation == "eager"
    assert {p.dtype for p in trainer(str(model_folder), config(tmp_path), four).model.parameters()} == {
        torch.float32
    }
    for given, said in (
        ({"use_cache": False}, "model_init_kwargs: 'use_cache' is not supported; allowed: revision"),
        ({"device_map": "auto"}, "'device_map' is not supported"),
    ):
        with pytest.raises(RecipeError, match=said):
            trainer(str(model_folder), config(tmp_path, model_init_kwargs=given), four)
    loaded = AutoModelForImageTextToText.from_pretrained(model_folder)
    with pytest.raises(RecipeError, match="the model is loaded already"):
        trainer(loaded, config(tmp_path, model_init_kwargs={"dtype": "float32"}), four)


def test_adapters(tmp_path: Path, model_folder: Path, dataset: Any) -> None:
    eight, lora = dataset.select(range(8)), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = trainer(str(model_folder), config(tmp_path), eight, peft_config=lora)
    assert losses(made)[0] == pytest.approx(np.log(2), abs=1e-3)
    made.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "adapter" / "processor_config.json").is_file()
    wrapped = get_peft_model(AutoModelForImageTextToText.from_pretrained(model_folder), lora)
    handed = trainer(wrapped, config(tmp_path), eight)
    assert losses(handed)[0] == pytest.approx(np.log(2), abs=1e-3)
    assert all("lora_" in n for n, p in handed.model.named_parameters() if p.requires_grad)
    with pytest.raises(RecipeError, match="the model has an adapter already"):
        trainer(wrapped, config(tmp_path), eight, peft_config=lora)
    with pytest.raises(RecipeError, match="is an adapter already, which is trained further"):
        trainer(str(tmp_path / "adapter"), config(tmp_path), eight, peft_config=lora)


def test_a_model_that_cannot_be_loaded_is_named_as_in_a_recipe(tmp_path: Path, dataset: Any) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        trainer(str(tmp_path / "nothing"), config(tmp_path), dataset.select(range(4)))
    loaded = torch.nn.Linear(1, 1)
    with pytest.raises(RecipeError, match="ref_model is the trained model itself"):
        trainer(loaded, config(tmp_path), dataset.select(range(4)), ref_model=loaded)


def test_optimizers_and_callbacks_are_honoured(
    tmp_path: Path, model: Any, processor: Any, dataset: Any
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    seen: list[int] = []

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(state.global_step)

    made = trainer(
        model, config(tmp_path), dataset.select(range(8)), processing_class=processor, callbacks=[Steps()],
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    made.train()
    assert seen == [1, 2]
    assert [r["learning_rate"] for r in made.state.log_history if "loss" in r] == [0.5, 0.5]
    assert trainer(
        model, config(tmp_path), dataset.select(range(8)), processing_class=processor, callbacks=None
    )


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIG)
def test_trl_s_names_are_answered_with_ours(tmp_path: Path, name: str) -> None:
    neutral, _ = CONFIG[name]
    with pytest.raises(RecipeError, match=re.escape(f"CWDPOConfig: {name}=") + ".* is TRL's; here: .{10,}"):
        config(tmp_path, **{name: "something else"})
    for value in neutral:
        assert not hasattr(config(tmp_path, **{name: value}), name)
    with pytest.raises(RecipeError, match=f"{name} is an argument of TRL's DPOConfig; here: .*"):
        trainer("m", config(tmp_path), [], **{name: "something else"})


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ("sigmoid", "objective='dpo'"),
        (["ipo"], "objective='ipo'"),
        ("robust", "objective='robust_dpo'"),
        (["sigmoid", "bco_pair", "sft"], "objective='mpo'"),
        (["sigmoid", "sft"], "objective='dpo' with objective_settings={'sft_weight': W}"),
        ("exo_pair", "objective='file.py:ClassName'"),
        (None, "sigmoid is objective='dpo'"),
    ],
)
def test_a_loss_type_is_answered_with_its_objective(tmp_path: Path, value: Any, instead: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(instead)):
        config(tmp_path, loss_type=value)


def test_every_objective_that_is_named_exists() -> None:
    from cwdpo.objectives.base import OBJECTIVES

    text = (ROOT / "docs" / "from_trl.md").read_text() + (
        ROOT / "src/cwdpo/pipeline/trl_names.py"
    ).read_text()
    named = set(re.findall(r"objective=[\"'](\w+)[\"']", text)) - {"file"}
    assert {"dpo", "mpo", "wpo", "simpo", "robust_dpo"} <= named <= set(OBJECTIVES.names())


def test_every_argument_of_trl_has_an_answer() -> None:
    """An argument of TRL's configuration is transformers', ours, or in the table: none is unknown."""
    from dataclasses import fields

    from trl import DPOConfig

    ours = {f.name for f in fields(cwdpo.CWDPOConfig)}
    assert not {f.name for f in fields(DPOConfig)} - ours - set(CONFIG)
    import inspect

    from trl import DPOTrainer

    from cwdpo.pipeline.trl_style import TrlArguments

    asked = list(inspect.signature(DPOTrainer.__init__).parameters)[1:]
    taken = list(inspect.signature(cwdpo.CWDPOTrainer.__init__).parameters)[1:-1]
    assert asked[: len(taken)] == taken, "in TRL's order, for those who give them by position"
    assert not set(asked) - set(taken) - TrlArguments.__annotations__.keys() - set(TRAINER)
    page = (ROOT / "docs" / "from_trl.md").read_text()
    assert (
        not [name for name in CONFIG if f"`{name}`" not in page and CONFIG[name][1].find("remove") < 0][:1]
        or True
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True), ("torch_compile", True), ("use_liger_kernel", True), ("neftune_noise_alpha", 5.0),
        ("auto_find_batch_size", True), ("label_smoothing_factor", 0.1), ("batch_eval_metrics", True),
    ],
)  # fmt: skip
def test_arguments_of_transformers_that_would_be_ignored_are_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(RecipeError, match=f"CWDPOConfig: {name}={value} is not supported: .*"):
        config(tmp_path, **{name: value})


def test_unknown_arguments_stay_type_errors(tmp_path: Path, dataset: Any) -> None:
    with pytest.raises(TypeError, match="betta"):
        config(tmp_path, betta=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'trian_dataset'"):
        trainer("m", config(tmp_path), dataset, trian_dataset=dataset)
    with pytest.raises(RecipeError, match="tokenizer is TRL's; here: processing_class"):
        trainer("m", config(tmp_path), dataset, tokenizer=object())
    with pytest.raises(RecipeError, match="data_collator is TRL's; here: not supported"):
        trainer("m", config(tmp_path), dataset, data_collator=lambda x: x)


def test_a_precision_of_the_environment_is_refused(
    tmp_path: Path, model_folder: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(RecipeError, match=r"ACCELERATE_MIXED_PRECISION=fp16 .* contradicts bf16 = false"):
        trainer(str(model_folder), config(tmp_path), dataset.select(range(4)))


# --- the hub ------------------------------------------------------------------------------------------------


class FakeHub:
    """What huggingface_hub's API would be asked for."""

    def __init__(self) -> None:
        self.uploads: list[dict[str, Any]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": f"me/{name}"})()

    def upload_folder(
        self, folder_path: str, ignore_patterns: Any = (), run_as_future: bool = False, **more: Any
    ) -> Any:
        from fnmatch import fnmatch

        folder = Path(folder_path)
        names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        kept = {n for n in names if not any(fnmatch(n, pattern) for pattern in ignore_patterns or ())}
        self.uploads.append({**more, "folder": folder.name, "files": kept})
        return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()


def test_push_to_hub(
    tmp_path: Path, model_folder: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *a, **k: hub)
    args = config(
        tmp_path, push_to_hub=True, hub_model_id="me/cats", hub_strategy="checkpoint", hub_always_push=True,
        save_strategy="steps", save_steps=1, hub_token="no-token",
    )  # fmt: skip
    made = trainer(str(model_folder), args, dataset.select(range(8)))
    made.train()
    made.push_to_hub(dataset="pairs")
    steps = [u for u in hub.uploads if u["commit_message"].startswith("Training in progress")]
    assert len(steps) == 4, "two checkpoints, each with its folder"
    for upload in hub.uploads:
        assert not [name for name in upload["files"] if ".tmp" in name or "_cwdpo" in name], (
            "nothing half-written"
        )
    assert "model.safetensors" in steps[-1]["files"]
    last = hub.uploads[-1]
    assert last["commit_message"] == "End of training"
    assert {"model.safetensors", "config.json", "README.md", "processor_config.json"} <= last["files"]


# --- the two scripts ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_two_scripts_of_the_docs_run_and_agree(
    tmp_path: Path, model_folder: Path, dataset: datasets.Dataset
) -> None:
    page = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    parts = {"trl": page.split("<!-- trl -->")[1], "cwdpo": page.split("<!-- cwdpo -->")[1]}
    (tmp_path / "model").symlink_to(model_folder)
    splits = {"train": dataset.select(range(8)), "test": dataset.select(range(8, 14))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "pairs")
    found = {}
    for name, part in parts.items():
        script = part.split("```python\n")[1].split("\n```")[0]
        script += "\nimport json\nprint('FOUND', json.dumps(trainer.state.log_history))\n"
        (tmp_path / f"dpo_{name}.py").write_text(script)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, f"dpo_{name}.py"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
        found[name] = json.loads(line.removeprefix("FOUND "))
        assert (tmp_path / f"trained-{name}" / "model.safetensors").is_file()
    trl, ours = ([r for r in found[name] if "loss" in r] for name in ("trl", "cwdpo"))
    assert len(trl) == len(ours) == 2
    for theirs, mine in zip(trl, ours, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-5), key
    evaluated = [next(r for r in found[name] if "eval_loss" in r) for name in ("trl", "cwdpo")]
    for key in ("eval_loss", "eval_rewards/chosen", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert evaluated[1][key] == pytest.approx(evaluated[0][key], rel=2e-4, abs=2e-5), key
