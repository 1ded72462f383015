"""``cwdpo ask``: the policies of a run side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cwdpo.data.encode.collate import collate
from cwdpo.errors import DataError
from cwdpo.evaluation.ask import answers, ask, asked, policies
from cwdpo.evaluation.run import model_settings
from cwdpo.models.load import load_policy
from cwdpo.models.sample import Decoding
from cwdpo.models.settings import ModelSettings
from cwdpo.scoring import plain

GREEDY = Decoding(0.0, max_new_tokens=24)


def test_each_policy_answers_as_when_loaded_alone(trained: Path, picture: Path) -> None:
    found = ask(str(trained), "describe the picture .", [picture], decodings=[GREEDY], given=["a red ring ."])
    assert list(found) == ["base", "stage 1", "final"]
    assert len({one["sum_logp"] for said in found.values() for one in said if one["how"] == "given"}) == 3
    alone = load_policy(model_settings(str(trained)))
    example = asked("describe the picture .", [picture])
    (greedy,) = answers(alone, example, [GREEDY])
    assert greedy.text == found["final"][0]["text"]


def test_likelihoods_are_those_of_plain_scoring(trained: Path, picture: Path) -> None:
    policy = load_policy(model_settings(str(trained)))
    example = asked("describe the picture .", [picture])
    greedy, given = answers(policy, example, [GREEDY], given=["a red ring ."])
    assert (greedy.how, given.how, given.text) == ("greedy", "given", "a red ring .")
    encoder = policy.encoder()
    said = type(example)(**{**vars(example), "chosen": type(example.chosen)("a red ring .")})
    encoded = encoder.encode(said, "none")
    with torch.no_grad():
        logp = plain.score(policy.model, collate([encoded])).logp[0]
    assert given.sum_logp == pytest.approx(float(logp.sum()), abs=1e-4)
    assert given.mean_logp == pytest.approx(float(logp.mean()), abs=1e-5)
    assert [t.strip() for t, _ in given.tokens][:4] == ["a", "red", "ring", "."]
    assert sum(value for _, value in given.tokens) == pytest.approx(given.sum_logp, abs=1e-4)


def test_log_probabilities_are_those_of_a_plain_forward_pass(picture: Path) -> None:
    """Prompt and response through transformers' own processor and model, without our encoding and scoring."""
    policy = load_policy(ModelSettings(path="embedded", device="cpu"))
    example = asked("describe the picture .", [picture])
    (greedy,) = answers(policy, example, [GREEDY])
    content = [
        {"type": "image", "image": Image.open(picture)},
        {"type": "text", "text": "describe the picture ."},
    ]
    prompt = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    tokenizer = policy.processor.tokenizer
    said = [*tokenizer(greedy.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(said) == len(greedy.tokens)
    ids = torch.cat([prompt["input_ids"], torch.tensor([said])], dim=1)
    with torch.no_grad():
        found = policy.model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits[0].log_softmax(-1)
    start = prompt["input_ids"].shape[1]
    plainly = [float(found[start + i - 1, token]) for i, token in enumerate(said)]
    assert [value for _, value in greedy.tokens] == pytest.approx(plainly, abs=1e-4)
    assert len({round(value, 4) for value in plainly}) > 3


def test_a_model_that_is_no_run_answers_alone() -> None:
    assert list(policies("embedded")) == ["embedded"]


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: not an image"):
        asked("What?", [tmp_path / "text.png"])
    with pytest.raises(DataError, match=r"none\.png: not an image that can be read \(FileNotFoundError"):
        asked("What?", [tmp_path / "none.png"])
    with pytest.raises(DataError, match="the question is empty"):
        asked("  ", [])


def test_the_command(run, trained: Path, picture: Path, tmp_path: Path) -> None:
    done = run("ask", trained, "describe the picture .", "--image", picture, "--samples", 1, "--logprobs")
    assert done.code == 0
    assert [line for line in done.out.splitlines() if not line.startswith(" ")][:3] == [
        "base",
        "stage 1",
        "final",
    ]
    assert "temperature 1" in done.out
    done = run("ask", trained, "describe the picture .", "--image", picture, "--json")
    assert list(json.loads(done.out)) == ["base", "stage 1", "final"]
    done = run("ask", "embedded", "what <image> ?", "--image", picture)
    assert done.code == 1
    assert "the question" in done.err
