"""`cwdpo evaluate`, `compare` and `export` on small models, from data to page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cwdpo.errors import DataError, MissingPackageError, RunDirError
from cwdpo.evaluation import run as evaluation
from cwdpo.files.reading import read_jsonl
from cwdpo.metrics.base import METRICS


def evaluated(world: Path, out: Path, model: str = "embedded", **options: Any) -> dict[str, Any]:
    settings = {"max_new_tokens": 16, "data_options": {"limit": 12}, **options}
    return evaluation.evaluate(model, str(world / "validation.jsonl"), out, **settings)


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cwdpo.worlds.shapes import ShapesSettings, materialise

    folder = tmp_path_factory.mktemp("captions")
    materialise(
        ShapesSettings(seed=9, train=0, validation=16, test=0, questions=0.0, negatives_per_prompt=3), folder
    )
    return folder


# --- evaluate -------------------------------------------------------------------------------------------


def test_every_number_has_an_n_and_an_interval(captions: Path, tmp_path: Path) -> None:
    found = evaluated(
        captions,
        tmp_path / "e",
        metrics=[{"name": n} for n in ("world", "cider", "bleu4", "length", "token_ece")],
    )
    numbers = found["numbers"]
    assert {"all_correct", "judge_score", "cider", "bleu4", "words", "token_ece"} <= set(numbers)
    for name, one in numbers.items():
        assert one["n"] >= 12, name
        assert one["n_prompts"] == 12
        if one["low"] is not None:
            assert one["low"] <= one["value"] <= one["high"], name
    rows = read_jsonl(tmp_path / "e" / "responses.jsonl")
    assert len(rows) == 12
    # The numbers are those of the stored responses, recomputed by hand.
    words = [len(r["text"].split()) for r in rows]
    assert numbers["words"]["value"] == pytest.approx(sum(words) / 12)
    tokens = [(t, c) for r in rows for t, c in zip(r["top1"], r["correct"], strict=True)]
    assert numbers["token_ece"]["n"] == len(tokens)
    assert sum(b["n"] for b in found["reliability"]["token_ece"]) == len(tokens)
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["numbers"] == numbers


def test_several_samples_are_one_prompt(captions: Path, tmp_path: Path) -> None:
    found = evaluated(captions, tmp_path, temperature=1.0, samples=3, metrics=[{"name": "length"}])
    assert found["numbers"]["words"]["n"] == 36
    assert found["numbers"]["words"]["n_prompts"] == 12
    texts = [r["text"] for r in read_jsonl(tmp_path / "responses.jsonl")]
    assert len(set(texts)) > 12


def test_options_are_scored_as_responses(
    world_folder: Path, tmp_path: Path, model: Any, processor: Any, encoder: Any
) -> None:
    from cwdpo.data.encode.collate import collate
    from cwdpo.models.load import Policy
    from cwdpo.scoring import plain

    rows = []
    for line in (world_folder / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        wrong = [n["text"] for n in row["negatives"]]
        rows.append(
            {k: row[k] for k in ("id", "images", "prompt", "chosen")}
            | {"options": [*wrong, row["references"][0]]}
        )
        rows[-1]["chosen"] = [
            {"role": "assistant", "content": [{"type": "text", "text": row["references"][0]}]}
        ]
        rows[-1]["rejected"] = [{"role": "assistant", "content": [{"type": "text", "text": wrong[0]}]}]
    file = world_folder / "choice.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows[:5]))
    examples = evaluation.read_data(str(file), {})
    from cwdpo.evaluation.responses import collect

    answers = collect(Policy(model, processor, "x"), encoder, examples, {"options"}, batch_size=2)
    for answer in answers:
        options = answer.example.extra["options"]
        assert len(answer.option_logps) == len(options)
        from dataclasses import replace

        from cwdpo.records import Completion

        for text, logp, n in zip(options, answer.option_logps, answer.option_tokens, strict=True):
            alone = encoder.encode(replace(answer.example, chosen=Completion(text)), "none")
            tokens = plain.score(model, collate([alone]))
            assert logp == pytest.approx(float(tokens.logp.sum().detach()), abs=1e-4)
            assert n == len(alone.chosen.ids)
    measured = {m.name: m for m in METRICS.build("multiple_choice")(answers)}
    best = [max(range(len(a.option_logps)), key=a.option_logps.__getitem__) for a in answers]
    right = [b == len(a.option_logps) - 1 for a, b in zip(answers, best, strict=True)]
    assert measured["mc_likelihood"].value == pytest.approx(sum(right) / len(right))


def test_the_command_line(run: Any, captions: Path, tmp_path: Path) -> None:
    done = run(
        "evaluate", "embedded", "--data", captions / "validation.jsonl", "--metrics", "world",
        "--metrics", "{name: length}", "--out", tmp_path / "e", "--limit", 4, "--max-new-tokens", 8,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "all_correct" in done.out
    assert "words" in done.out
    assert "n=4" in done.out
    done = run(
        "evaluate",
        "embedded",
        "--data",
        captions / "validation.jsonl",
        "--metrics",
        "wrld",
        "--out",
        tmp_path / "f",
    )
    assert done.code == 1
    assert "unknown metric 'wrld'; did you mean 'world'?" in done.err


def test_lmms_eval_is_named_where_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(MissingPackageError, match=r"--lmms-eval needs the package .*pip install lmms-eval"):
        evaluation.lmms_eval(tmp_path, "mmmu_val", tmp_path, model="llava_hf", batch_size=1)


def test_lmms_eval_is_called_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(evaluation, "optional_package", lambda *a: None)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(evaluation.subprocess, "run", lambda command, check: called.append(command) or done)
    assert (
        evaluation.lmms_eval(tmp_path, "mmmu_val,pope", tmp_path / "o", model="qwen2_5_vl", batch_size=2) == 0
    )
    text = " ".join(called[0][1:])
    assert text == (
        f"-m lmms_eval --model qwen2_5_vl --model_args pretrained={tmp_path} --tasks mmmu_val,pope --batch_size 2 "
        f"--output_path {tmp_path / 'o' / 'lmms-eval'}"
    )


# --- compare --------------------------------------------------------------------------------------------


def test_runs_are_compared_in_pairs_with_a_page(run: Any, captions: Path, tmp_path: Path) -> None:
    specs = [{"name": "world"}, {"name": "length"}]
    evaluated(captions, tmp_path / "greedy", metrics=specs, max_new_tokens=40)
    same = evaluated(captions, tmp_path / "same", metrics=specs, max_new_tokens=40)
    rows = read_jsonl(tmp_path / "same" / "responses.jsonl")
    for row in rows[:10]:
        row["text"] = "the the the"
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse" / "responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "worse" / "evaluation.json").write_text(json.dumps(same))
    done = run(
        "compare", tmp_path / "greedy", tmp_path / "same", tmp_path / "worse", "--out", tmp_path / "page"
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "page" / "summary.json").read_text())
    by_pair = {(d["ours"], d["theirs"]): d["figures"] for d in found["differences"]}
    assert by_pair["greedy", "same"]["judge_score"] | {"p_corrected": None} == {
        "value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "n_prompts": 12, "p_corrected": None,
        "word": "no clear difference",
    }  # fmt: skip
    ill = by_pair["same", "worse"]["ill_formed"]
    assert ill["value"] < 0
    assert ill["word"] == "better"
    wins = {(w["ours"], w["theirs"]): w for w in found["wins"]}
    assert wins["greedy", "same"]["tie"] == 1.0
    assert wins["same", "worse"]["win"] > 0.3
    assert found["strength"][-1]["name"] == "worse"
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Bradley-Terry" in page
    assert "same against worse" in page
    assert "<script" not in page


MY_JUDGE = """
from cwdpo.judging.base import ScoringJudge


class Brief(ScoringJudge):
    def score(self, examples, texts):
        return [-float(len(t)) for t in texts]
"""
MY_METRIC = """
from cwdpo.metrics.base import Metric, mean_of


class Letters(Metric):
    def __call__(self, answers):
        return [mean_of("letters", answers, [float(len(a.text)) for a in answers])]
"""


def test_judges_and_metrics_are_chosen_by_name_or_by_file(run: Any, captions: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(MY_JUDGE)
    (tmp_path / "metric.py").write_text(MY_METRIC)
    metric = f"{tmp_path / 'metric.py'}:Letters"
    found = evaluated(captions, tmp_path / "one", metrics=[{"name": metric}])
    rows = read_jsonl(tmp_path / "one" / "responses.jsonl")
    assert found["numbers"]["letters"]["value"] == pytest.approx(sum(len(r["text"]) for r in rows) / 12)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "evaluation.json").write_text((tmp_path / "one" / "evaluation.json").read_text())
    lines = [
        json.dumps(r | {"text": r["text"][: len(r["text"]) // 2 if i < 9 else None]})
        for i, r in enumerate(rows)
    ]
    (tmp_path / "two" / "responses.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def compare(judge: str, out: str) -> Any:
        return run("compare", tmp_path / "two", tmp_path / "one", "--out", tmp_path / out, "--judge", judge)

    done = compare(f"{tmp_path / 'judge.py'}:Brief", "mine")
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    (row,) = summary["wins"]
    assert (row["judge"], row["win"], row["tie"], row["loss"]) == ("Brief", 0.75, 0.25, 0.0)
    assert summary["differences"][0]["figures"]["letters"]["value"] < 0
    assert compare("{name: references, threshold: 0.5}", "references").code == 0
    assert "by references" in (tmp_path / "references" / "report.html").read_text()
    assert compare("none", "none").code == 0
    assert json.loads((tmp_path / "none" / "summary.json").read_text())["wins"] == []
    for judge, complaint in (
        ("exact", "judge 'exact' is now called 'world'"),
        ("wurld", "did you mean 'world'"),
        ("world,metric", "'world,metric' names 2 components: name one"),
    ):
        done = compare(judge, "wrong")
        assert done.code == 1
        assert complaint in done.err


def test_what_cannot_be_paired_is_refused(captions: Path, tmp_path: Path) -> None:
    evaluated(captions, tmp_path / "a", metrics=[{"name": "length"}])
    evaluated(captions, tmp_path / "b", metrics=[{"name": "length"}], data_options={"limit": 6})
    with pytest.raises(DataError, match="cannot be paired: data_digest differs"):
        evaluation.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match=r"d: not evaluated yet: run cwdpo evaluate"):
        evaluation.compare([tmp_path / "a", tmp_path / "d"], tmp_path / "c")
    with pytest.raises(DataError, match="at least two runs"):
        evaluation.compare([tmp_path / "a"], tmp_path / "c")


# --- export ---------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
assert not any(m.split(".")[0] in ("cwdpo", "peft") for m in sys.modules)
folder, image, out = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the picture ."}]}]
text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
picture = Image.open(image).convert("RGB")
inputs = processor(text=[text], images=[picture], return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1]:]
assert not any(m.split(".")[0] in ("cwdpo", "peft") for m in sys.modules)
text = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
json.dump({"logits": logits.tolist(), "text": text}, open(out, "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_an_exported_run_loads_elsewhere_and_says_the_same(tune: str, tmp_path: Path, captions: Path) -> None:
    import torch

    from cwdpo.config import parse_recipe
    from cwdpo.data.encode.encoder import Encoder
    from cwdpo.evaluation.run import model_settings
    from cwdpo.models.load import load_policy
    from cwdpo.models.sample import sample
    from cwdpo.pipeline.export import export
    from cwdpo.pipeline.two_stage import train_two_stage

    recipe = parse_recipe(
        {
            "name": "small", "model": {"path": "embedded", "device": "cpu", "tune": tune, "freeze": ["vision"]},
            "data": {"path": str(captions / "validation.jsonl")},
            "stage1": {"enabled": False},
            "stage2": {"objective": {"name": "dpo"}, "learning_rate": 1e-3, "steps": 3},
            "train": {"batch_size": 4}, "probes": {"prompts": 2, "every": 3}, "evaluation": {"prompts": 0},
        }
    )  # fmt: skip
    folder = train_two_stage(recipe, tmp_path / "run").path
    out = export(folder, tmp_path / "out" / "model", merge=True).path
    example = evaluation.read_data(str(captions / "validation.jsonl"), {})[0]
    policy = load_policy(model_settings(str(folder)))
    encoder = Encoder(policy.processor)
    said = sample(policy.model, encoder, [example], temperature=0.0, max_new_tokens=20)[0].text
    prompt = encoder.prompt(example)
    policy.model.eval()
    with torch.no_grad():
        ours = policy.model(input_ids=torch.tensor([prompt.input_ids]), **prompt.images).logits[0, -1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        ELSEWHERE,
        str(out),
        str(example.images[0].path),
        str(tmp_path / "said.json"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "said.json").read_text())
    assert theirs["text"] == said
    gap = float((torch.tensor(theirs["logits"]) - ours).abs().max())
    assert gap < 1e-4, gap
    base = load_policy(evaluation.model_settings("embedded")).model.eval()
    with torch.no_grad():
        before = base(input_ids=torch.tensor([prompt.input_ids]), **prompt.images).logits[0, -1]
    assert float((before - ours).abs().max()) > 1e-2, "training changed nothing, so nothing was compared"
    assert not (out / "adapter_config.json").exists()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text")
    assert "`dpo` at learning rate 0.001" in card
    assert "## Recipe" in card
    assert "stage2, step 3: kl" in card
    assert "base_model" not in card.split("---")[1], "the base is the embedded one"
    assert str(tmp_path) not in card
    shutil.copy(example.images[0].path, out / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    used = subprocess.run(
        [sys.executable, "-c", code], cwd=out, env=environment, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip(), "the card's code answers nothing"
    with pytest.raises(RunDirError, match="is not empty"):
        export(folder, out, merge=True)
