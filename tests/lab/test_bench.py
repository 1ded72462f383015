"""The benchmark compares the same work: one batch, one loss, one gradient, and reports what it is given."""

from __future__ import annotations

import json

import pytest
import torch

from cwdpo.cli.bench import data_text, end_to_end_text, recipe_text, scale_text, step_text
from cwdpo.errors import RecipeError
from cwdpo.lab.bench.setting import Setting, processor, rows
from cwdpo.models.load import EMBEDDED

SMALL = {"prompt_tokens": 64, "completion_tokens": 8}


@pytest.mark.parametrize("prompt_tokens", [32, 64, 256, 1024])
def test_lengths_are_exact(prompt_tokens: int) -> None:
    made = processor()
    (row,) = rows(Setting(prompt_tokens=prompt_tokens, completion_tokens=8), made.tokenizer)
    inputs = made(text=[row["prompt"]], images=row["images"], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == prompt_tokens
    share = float((inputs["mm_token_type_ids"] == 1).float().mean())
    assert 0.6 < share <= 0.9
    for side in ("chosen", "rejected"):
        assert len(made.tokenizer(row[side], add_special_tokens=False)["input_ids"]) == 8


def test_a_prompt_that_cannot_hold_a_picture_is_refused() -> None:
    with pytest.raises(RecipeError, match="--prompt-tokens 8"):
        rows(Setting(prompt_tokens=8), processor().tokenizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [
        {"tune": "lora"},
        {"tune": "full"},
        {"tune": "lora", "negatives": 3},
        {"tune": "lora", "grad_checkpointing": True},
        {"tune": "full", "reference": "live"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_loss_and_gradient_are_those_of_trl(changes: dict) -> None:
    from cwdpo.lab.bench.steps import build, largest_difference

    bench = build(Setting(**SMALL, **changes))
    losses = {name: bench.run(name) for name in bench.steps}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["trl"]), abs=1e-4)
    assert abs(losses["trl"] - 0.6931) > 1e-4, "at the reference everything would agree"
    wanted = bench.gradients("trl")
    for name in ("trl_completions", "trl_cached", "cwdpo"):
        difference, scale = largest_difference(wanted, bench.gradients(name))
        assert scale > 1e-3
        assert difference <= 1e-5 * max(scale, 1.0), name


@pytest.mark.slow
def test_the_command_reports_every_rival(run) -> None:
    code, out, _ = run(
        "bench", "step", "--prompt-tokens", 64, "--completion-tokens", 8, "--repeats", 2, "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert set(found["rivals"]) == {"trl", "trl_completions", "trl_cached"}
    for rival in found["rivals"].values():
        assert rival["time"]["min"] <= rival["time"]["median"] <= rival["time"]["max"]
        assert rival["flops"] > 1.2, "TRL runs prompt and picture for every completion"
    assert found["gradient"]["largest_difference"] < 1e-5
    text = step_text(found)
    assert f"{found['rivals']['trl']['flops']:6.2f}" in text
    assert "K = 1, lora" in text


def test_reports_say_what_they_are_given() -> None:
    cost = {"median": 1.5, "min": 1.25, "max": 1.75}
    assert "negatives          4    1.50 (1.25 to 1.75)" in scale_text(
        [{"what": "negatives", "value": 4, "time": cost}]
    )
    half = {"tokens_per_second": 100.0, "padding": 0.25, "seconds_per_step": 0.5}
    text = recipe_text(
        {
            "before": half,
            "after": {**half, "tokens_per_second": 150.0},
            "ratio": 1.5,
            "ratio_of_halves": [1.4, 1.6],
        }
    )
    assert "150 tokens/s" in text
    assert "padding 25.0%" in text
    assert "ratio 1.50 (halves of the steps: 1.40 and 1.60)" in text


@pytest.mark.slow
def test_memory_for_scoring_does_not_grow_with_the_vocabulary(monkeypatch) -> None:
    """What is kept for the backward pass, weights aside, is the same for a vocabulary eight times as large."""
    from cwdpo.data.encode.collate import collate
    from cwdpo.models.shared_attention import use_scoring
    from cwdpo.scoring import token_logp
    from cwdpo.scoring.score import score
    from random_models import build, ragged

    def kept(vocabulary: int) -> int:
        model = build("llava")
        model.resize_token_embeddings(vocabulary)
        use_scoring(model, "shared_prefix")
        batch = collate(ragged("llava", model, 3))
        monkeypatch.setattr(token_logp, "CHUNK_VALUES", vocabulary * 4)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logp = score(model, batch).logp
        logp.sum().backward()
        return sum(saved.values())

    assert kept(8 * 512) == pytest.approx(kept(512), rel=0.01)


def test_the_data_path_is_measured_by_workers(run, world_folder) -> None:
    data, model = f"data.path={world_folder / 'train.jsonl'}", "model.path=embedded"
    more = ["--rows", 10, "--step", 0, "--workers", 0, "--workers", 1]
    recipe = ("tiny", data, "data.world=null", model, "train.batch_size=4")
    ended = run("bench", "data", *recipe, *more, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["rows"], report["batch_size"], report["step"]) == (10, 4, 0.0)
    assert [row["n"] for row in report["workers"]] == [0, 1]
    assert all(0 < row["waiting"] <= 1 and row["rows_per_second"] > 0 for row in report["workers"])
    assert report["decode"] > 0
    assert report["stored"] > 0
    image = json.loads((EMBEDDED / "processor_config.json").read_text())["image_processor"]["crop_size"]
    assert report["bytes"] == 4 * 3 * image["height"] * image["width"]


def test_data_without_images_cannot_be_measured(run, tmp_path) -> None:
    row = {"prompt": "Say a colour.", "chosen": "red", "rejected": "soup"}
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({**row, "id": str(i)}) + "\n" for i in range(20)))
    ended = run("bench", "data", "tiny", f"data.path={tmp_path / 'text.jsonl'}", "data.world=null")
    assert ended.code == 1
    assert "text.jsonl: no training row has an image to read" in ended.err


def test_the_report_on_data_says_what_it_is_given() -> None:
    rows = [
        {"n": 0, "rows_per_second": 5.0, "waiting": 0.6, "own_cpu": 120.4},
        {"n": 2, "rows_per_second": 12.5, "waiting": 0.04, "own_cpu": 6.0},
    ]
    text = data_text(
        {
            "rows": 64, "step": 0.9, "batch_size": 16, "decode": 14.2, "process": 112.0, "stored": 31.0,
            "bytes": 23 * 2**20, "workers": rows,
        }
    )  # fmt: skip
    assert "decoding 14 ms, processing 112 ms; or a read from data.image_cache 31 ms; 23.0 MiB" in text
    assert [line.split()[:4] for line in text.splitlines()[2:]] == [
        ["0", "5.00", "60.0%", "120"],
        ["2", "12.50", "4.0%", "6"],
    ]


def test_the_phases_of_a_run_are_sums_of_its_parts() -> None:
    from cwdpo.lab.bench.end_to_end import own_phases

    rows = [
        {"parts": {"data": 1.0, "other": 0.5}, "cpu": {"data": 0.75}},
        {"probe_prompts": 4},
        {
            "parts": {
                "reference pass": 2.0,
                "reference pass: images": 0.5,
                "step: forward": 3.0,
                "encoding": 0.25,
            },
            "cpu": {"reference pass": 1.0, "reference pass: images": 0.25, "step: backward": 4.0},
        },
    ]
    assert own_phases(rows) == {
        "reading rows": (1.25, 0.75), "steps": (3.5, 4.0), "reference pass": (2.5, 1.25),
    }  # fmt: skip


def test_a_longer_job_is_extrapolated_from_the_parts() -> None:
    """By hand: 18 held-out rows become 222, of which 64 are probed and evaluated."""
    from cwdpo.lab.bench.end_to_end import REST, extrapolated
    from cwdpo.lab.bench.job import Job

    def both(**seconds: float) -> dict[str, tuple[float, float]]:
        return {name.replace("_", " "): (2 * value, value) for name, value in seconds.items()}

    ours = both(reading_rows=1, reference_pass=8, calibration=5, probes=3, steps=20, evaluation=9, report=2)
    theirs = both(imports=7, first_step=4, further_steps=57, saving=1)
    runs = {
        "cwdpo": [{"phases": {**ours, REST: (16.0, 8.0)}, "probe_prompts": 16}],
        "trl": [{"phases": {**theirs, REST: (4.0, 2.0)}}],
    }
    found = extrapolated(Job(steps=20, batch_size=8, rows=160), runs, 1600, 2)
    assert found["steps"] == 400
    # 10 times the rows, 64 of 18 prompts; probes: (400 / 25 + 3) / 3 passes over 64 of 16 prompts, 76 s, but no more
    # than a tenth of 400 steps of a second, 40 s
    cpu = found["cpu"]
    assert cpu["phases"]["probes"] == pytest.approx(40)
    assert cpu["cwdpo"] == pytest.approx(10 + 80 + 5 + 40 + 400 + 9 * 64 / 18 + 2 + 8)
    assert cpu["trl"] == pytest.approx(7 + 1 + 2 + 3 * 400)
    assert found["wall"]["ratio"] == pytest.approx(cpu["ratio"]) == cpu["trl"] / cpu["cwdpo"]


def test_both_jobs_get_the_same_rows_and_settings(tmp_path) -> None:
    from transformers import AutoProcessor

    from cwdpo.data.read.reader import read_examples
    from cwdpo.lab.bench.job import MODEL, TRAIN, Job, recipe_of, write_inputs

    job = Job(prompt_tokens=64, completion_tokens=16, steps=2, batch_size=4, rows=8)
    write_inputs(job, tmp_path)
    recipe = recipe_of(job, tmp_path)
    assert (recipe.stage1.enabled, recipe.stage2.steps, recipe.train.batch_size) == (False, 2, 4)
    assert recipe.calibration == type(recipe.calibration)(), "our defaults"
    examples = read_examples(tmp_path / TRAIN).examples
    assert len({e.images[0].path for e in examples}) == len(examples) == 8
    tokenizer = AutoProcessor.from_pretrained(tmp_path / MODEL).tokenizer
    prompts = [len(tokenizer(e.prompt_text)["input_ids"]) + job.side**2 for e in examples]
    assert all(0.8 * 64 <= n <= 1.2 * 64 for n in prompts)
    lengths = [len(tokenizer(e.chosen.text)["input_ids"]) for e in examples]
    assert 12 <= sum(lengths) / len(lengths) <= 22


@pytest.mark.slow
def test_whole_jobs_are_compared(run) -> None:
    code, out, err = run(
        "bench", "end-to-end", "--prompt-tokens", 64, "--completion-tokens", 16, "--steps", 3, "--batch-size", 4,
        "--rows", 16, "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["gradient"]["largest"] > 1e-3
    assert found["gradient"]["largest_difference"] < 1e-5
    for side, phase in (("cwdpo", "calibration"), ("trl", "further steps")):
        (one,) = found["runs"][side]
        for i, key in enumerate(("wall", "cpu")):
            assert sum(p[i] for p in one["phases"].values()) == pytest.approx(one[key], rel=1e-6)
        assert one["phases"][phase][1] > 0
    assert found["ratio"]["cpu"]["median"] > 0
    text = end_to_end_text(found)
    assert f"TRL / cwdpo, CPU time: {found['ratio']['cpu']['median']:.2f}" in text
