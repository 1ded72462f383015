"""Checkpoints whose tokenizer, template or size does not go with the rows: trained as meant, or answered in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cwdpo.config import parse_recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import CwdpoError, DataError
from cwdpo.models.load import load_policy, read_checkpoint_tokens
from cwdpo.models.settings import ModelSettings
from cwdpo.pipeline.two_stage import train_two_stage

Like = Callable[..., Path]


@pytest.fixture
def like(model_folder: Path, tmp_path: Path) -> Like:
    """A copy of the small LLaVA: with settings changed in its files, or another chat template."""

    def made(template: str | None = None, tokens: tuple[str, ...] = (), **changes: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        for name, change in changes.items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        if template is not None:
            own = (folder / "chat_template.jinja").read_text()
            (folder / "chat_template.jinja").write_text(template.replace("OWN", own))
        if tokens:
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(folder)
            processor.tokenizer.add_tokens(list(tokens))
            processor.save_pretrained(folder)
        return folder

    return made


def encoder(folder: Path) -> Encoder:
    return load_policy(ModelSettings(path=str(folder), device="cpu")).encoder()


def rows(world: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], at: int = 0) -> Path:
    """Four rows of the world, one of them changed."""
    lines = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:4]]
    for line in lines:
        line["images"] = [str(world / name) for name in line["images"]]
    change(lines[at])
    file = world / f"changed-{tmp_path.name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def append(text: str) -> Callable[[dict[str, Any]], None]:
    def change(row: dict[str, Any]) -> None:
        row["chosen"][0]["content"][0]["text"] += text

    return change


def test_without_an_eos_the_template_s_end_is_trained(like: Like, world_folder: Path) -> None:
    found = encoder(like(tokenizer_config={"eos_token": None}))
    example = read_examples(world_folder / "train.jsonl", limit=1).examples[0]
    ids = found.encode(example).chosen.ids
    assert found.tokenizer.convert_ids_to_tokens(ids[-1]) == "<|end|>"


def test_contents_as_text(like: Like, world_folder: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    found = encoder(like(template))
    example = read_examples(world_folder / "train.jsonl", limit=1).examples[0]
    text = found.tokenizer.decode(found.encode(example).chosen.ids)
    assert text.replace(" ", "") == example.chosen.text.replace(" ", "") + "<|end|>"
    assert "[{" not in found.prompt_text(example)


def test_a_broken_template_is_named_in_train_and_validate(
    like: Like, world_folder: Path, tmp_path: Path, run: Any
) -> None:
    folder = like("OWN{% if %}")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: {folder}, device: cpu}}\ndata: {{path: {world_folder / 'train.jsonl'}}}\n"
        "stage1: {enabled: false}\n"
    )
    for command in (["train", recipe, "--out", tmp_path / "run"], ["validate", recipe]):
        done = run(*command)
        said = " ".join((done.out + done.err).split())
        assert done.code == 1
        assert "chat template" in said
        assert "TemplateSyntaxError" in said
        assert "train.jsonl:1" in said


def test_a_role_that_a_template_refuses_costs_the_row_alone(
    like: Like, world_folder: Path, tmp_path: Path, run: Any
) -> None:
    folder = like(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}OWN"
    )
    system = {"role": "system", "content": [{"type": "text", "text": "be brief ."}]}
    data = rows(world_folder, tmp_path, lambda row: row["prompt"].insert(0, system), at=2)
    done = run("validate", data, "--model", folder)
    said = " ".join(done.out.split())
    assert done.code == 1
    assert "System role not supported" in said
    assert f"{data.name}:3" in said
    recipe = parse_recipe(
        {
            "name": "small", "model": {"path": str(folder), "device": "cpu"},
            "data": {"path": str(data), "validation_path": str(world_folder / "validation.jsonl"),
                     "max_bad_fraction": 0.5},
            "stage1": {"enabled": False},
            "stage2": {"objective": {"name": "dpo"}, "learning_rate": 1e-4, "steps": 1},
            "train": {"batch_size": 2}, "probes": {"prompts": 2, "every": 5}, "evaluation": {"prompts": 0},
        }
    )  # fmt: skip
    found = train_two_stage(recipe, tmp_path / "run")
    assert "System role not supported" in (found.path / "problems.jsonl").read_text()
    with pytest.raises(DataError, match=r"System role not supported[\s\S]*raise the fraction"):
        train_two_stage(
            recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_bad_fraction": 0.1})}),
            tmp_path / "strict",
        )


def test_tokens_without_an_embedding(like: Like, world_folder: Path, tmp_path: Path, run: Any) -> None:
    rows_of = len(encoder(like()).tokenizer)
    shutil.rmtree(tmp_path / "model")
    more = tuple(f"<box{i}>" for i in range(500 - rows_of))  # more than the embedding has rows
    folder = like(tokens=more)
    data = rows(world_folder, tmp_path, append(f" {more[-1]}"))
    (first, *_) = read_examples(data).examples
    with pytest.raises(
        CwdpoError, match=r"has the id \d+, and the model embeds \d+ tokens.*resize the embedding"
    ):
        encoder(folder).encode(first)
    done = run("validate", data, "--model", folder)
    assert done.code == 1
    assert "the model embeds" in " ".join(done.out.split())


def test_an_end_token_of_the_data_is_trained_once(like: Like, world_folder: Path, tmp_path: Path) -> None:
    found = encoder(like())
    plain = read_examples(rows(world_folder, tmp_path, append(""))).examples[0]
    closed = read_examples(rows(world_folder, tmp_path, append(" <|end|>"))).examples[0]
    assert found.encode(closed).chosen.ids == found.encode(plain).chosen.ids


def test_more_tokens_than_positions(like: Like, world_folder: Path, tmp_path: Path, run: Any) -> None:
    folder = like()
    data = rows(world_folder, tmp_path, append(" red" * 600))
    (first, second, *_) = read_examples(data).examples
    found = encoder(folder)
    with pytest.raises(DataError, match=r"changed.*:1: 6\d\d tokens, and the model has 512 positions"):
        found.encode(first)
    assert found.encode(second).negatives
    done = run("validate", data, "--model", folder)
    assert done.code == 1
    assert "and the model has 512 positions" in " ".join(done.out.split())
    assert read_checkpoint_tokens(str(folder), ModelSettings(path=str(folder))).positions == 512
