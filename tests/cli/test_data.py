"""`cwdpo validate`: exit codes and reports. `cwdpo sample`: pairs in TRL's format, the same after a kill, and back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.config import load_recipe
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.onpolicy.preferences import make_preferences
from cwdpo.stage.listener import Listener
from paths import RECIPES

Run = Callable[..., Any]  # the fixture `run`: arguments -> code, out, err
TINY = RECIPES / "tiny.yaml"
SMALL = ("data.world.train=24", "negatives.sampler.batch_size=5", "negatives.sampler.samples=3")


# --- sample ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for a kill."""


def made(out: Path, *more: str, listener: Listener | None = None) -> Any:
    return make_preferences(load_recipe(TINY, [*SMALL, *more]), out, listener=listener)


def test_pairs_are_judged_samples_in_trls_columns(tmp_path: Path) -> None:
    from cwdpo.worlds.shapes import Scene, judge

    found = made(tmp_path / "pairs.jsonl")
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert len(rows) == found.rows > 15
    for row in rows:
        assert [m["role"] for m in (*row["prompt"], *row["chosen"], *row["rejected"])] == [
            "user",
            "assistant",
            "assistant",
        ]
        assert (
            sum(block["type"] == "image" for block in row["prompt"][0]["content"]) == len(row["images"]) == 1
        )
        assert (tmp_path / row["images"][0]).is_file()
        rejected = row["rejected"][0]["content"][0]["text"]
        assert row["negatives"][0]["text"] == rejected
        assert row["negatives"][0]["origin"] == "on_policy"
        if row["chosen"][0]["content"][0]["text"].endswith("."):  # a caption, not an answer to a question
            assert not judge(rejected, Scene.from_json(row["scene"])).all_correct
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs-images", "pairs.jsonl"]
    examples = read_examples(tmp_path / "pairs.jsonl").examples
    assert [c.origin for e in examples for c in e.rejected] == ["on_policy"] * len(rows)


def test_a_killed_start_goes_on_and_ends_with_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made(tmp_path / "a" / "pairs.jsonl")
    drawn = []

    def stop(round_: int, done: int, total: int) -> None:
        drawn.append(done)
        if done == 30:
            raise Killed

    with pytest.raises(Killed):
        made(tmp_path / "b" / "pairs.jsonl", listener=Listener(sampled=stop))
    work = tmp_path / "b" / ".pairs.jsonl.work"
    kept = read_jsonl(work / "pool.jsonl")
    assert len(kept) == 10
    pictures = tmp_path / "b" / "pairs-images"
    pictures.mkdir()
    written = sorted(path.name for path in (tmp_path / "a" / "pairs-images").iterdir())
    for name in (written[0], "mine"):
        (pictures / f".{name}.0123456789abcdef.tmp").write_text("half")
    made(tmp_path / "b" / "pairs.jsonl")
    assert sorted(path.name for path in pictures.iterdir()) == [".mine.0123456789abcdef.tmp", *written]
    assert (tmp_path / "b" / "pairs.jsonl").read_bytes() == (tmp_path / "a" / "pairs.jsonl").read_bytes()
    assert not work.exists()


def test_several_negatives_and_other_sources(tmp_path: Path) -> None:
    mix = ("negatives.mix={dataset: 1, shuffled: 1}", "data.world.questions=0")
    found = made(tmp_path / "p.jsonl", "negatives.on_policy_fraction=0.5", "negatives.per_prompt=2", *mix)
    rows = read_jsonl(tmp_path / "p.jsonl")
    assert len({r["id"] for r in rows}) == len(rows) > 40
    origins = [r["negatives"][0]["origin"] for r in rows]
    assert origins.count("on_policy") / len(rows) == pytest.approx(found.counts.realised)
    assert found.counts.realised == pytest.approx(0.5, abs=0.03)


def test_parquet_holds_its_pictures(tmp_path: Path) -> None:
    made(tmp_path / "pairs.parquet")
    examples = read_examples(tmp_path / "pairs.parquet").examples
    assert all(e.images[0].open().size == (48, 48) for e in examples)
    assert {c.origin for e in examples for c in e.rejected} == {"on_policy"}


def test_a_file_that_stands_or_has_another_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(DataError, match="exists"):
        made(tmp_path / "there.jsonl")
    with pytest.raises(DataError, match=r"'\.csv'; allowed: \.jsonl, \.parquet"):
        made(tmp_path / "x.csv")


@pytest.mark.slow
def test_best_and_worst_by_a_judge(run, tmp_path: Path) -> None:
    """The rows' scores are those that the judge gives to the written texts."""
    from torchmetrics.functional.text import chrf_score

    more = (*SMALL, "data.world.questions=0", "negatives.judge={name: references}")
    done = run("sample", TINY, *more, "--chosen", "best", "--out", tmp_path / "pairs.jsonl")
    assert done.code == 0, done.err
    assert "no worse sample" in done.out
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert len(rows) > 10
    for row in rows:
        known = [*row["references"]]
        best, worst = (row[key][0]["content"][0]["text"] for key in ("chosen", "rejected"))
        best, worst = (max(float(chrf_score([text], [[one]])) for one in known) for text in (best, worst))
        made = row["negatives"][0]["made"]
        assert (made["chosen_score"], made["score"]) == pytest.approx(
            (best, worst), abs=0.002
        )  # another implementation
        assert best > worst
    refused = run(
        "sample", TINY, *SMALL, "negatives.judge=none", "--chosen", "best", "--out", tmp_path / "x.jsonl"
    )
    assert (refused.code, "set negatives.judge" in refused.err) == (1, True)


def test_the_commands_go_both_ways(run, tmp_path: Path) -> None:
    sampled = run("sample", TINY, *SMALL, "--out", tmp_path / "pairs.jsonl")
    assert sampled.code == 0, sampled.err
    assert "on_policy)" in sampled.out
    assert "equal" in sampled.out
    trained = run(
        "train", TINY, "--from", tmp_path / "pairs.jsonl", "--out", tmp_path / "run", "stage1.enabled=false",
        "stage2.steps=2", "evaluation.prompts=0", "calibration.samples=4",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.path == str(tmp_path / "pairs.jsonl")
    kinds = {
        k
        for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")
        for k in r
        if k.startswith("cooling/weight/")
    }
    assert kinds == {"cooling/weight/on_policy"}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_trl_trains_on_the_file(ending: str, tmp_path: Path, model_folder: Path) -> None:
    import datasets

    out = tmp_path / f"pairs.{ending}"
    made(out)
    if ending == "jsonl":
        rows = [
            {
                **{k: r[k] for k in ("prompt", "chosen", "rejected")},
                "images": [str(tmp_path / i) for i in r["images"]],
            }
            for r in map(json.loads, out.read_text().splitlines())
        ]
        data = datasets.Dataset.from_list(rows)
    else:
        files = {"data_files": str(out), "cache_dir": str(tmp_path / "cache")}
        data = datasets.load_dataset("parquet", split="train", **files)
        data = data.select_columns(["prompt", "chosen", "rejected", "images"])
    data = data.cast_column("images", datasets.List(datasets.Image()))
    losses = trl_losses(model_folder, data, tmp_path / "trl")
    assert len(losses) == 2
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), (
        "the policy is its own reference before the first update"
    )


def trl_losses(model: Path, data: Any, out: Path) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(
            output_dir=str(out), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
            max_length=None, bf16=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = DPOTrainer(str(model), args=args, train_dataset=data)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# --- validate -------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    Image.effect_noise((24, 24), 90).save(tmp_path / "a.png")
    return [
        {"image": "a.png", "prompt": "What is it?", "chosen": "a cat", "rejected": "a dog"},
        {"image": "a.png", "prompt": "Which one?", "chosen": "the left", "rejected": "the right"},
    ]


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_validate_good_data(run: Run, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = written(tmp_path, rows)
    done = run("validate", file)
    assert (done.code, done.err) == (0, "")
    assert "trl" in done.out
    done = run("validate", file, "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert (report["format"], report["rows"], report["bad"], report["problems"]) == ("trl", 2, 0, [])


def test_validate_bad_data(run: Run, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = written(tmp_path, [*rows, {**rows[0], "image": "absent.png"}])
    done = run("validate", file)
    assert (done.code, done.err) == (1, "")
    assert "absent.png" in done.out
    done = run("validate", file, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert (report["rows"], report["bad"], len(report["problems"])) == (3, 1, 1)


def test_validate_with_a_wrong_file_or_format(run: Run, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    done = run("validate", tmp_path / "absent.jsonl")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("cwdpo: ")
    assert "absent.jsonl" in done.err
    done = run("validate", written(tmp_path, rows), "--format", "trll")
    assert (done.code, done.out) == (1, "")
    assert "'trl'" in done.err
