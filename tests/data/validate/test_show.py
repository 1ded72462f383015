"""Rows as the model sees them: every token is shown once, and what is trained is what the encoder says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.validate.show import shown_rows
from cwdpo.records import Completion, Example, Message

Run = Callable[..., Any]


def example(chosen: str, *rejected: str, prompt: str = "what ?") -> Example:
    return Example(
        "x", (), (Message("user", (prompt,)),), Completion(chosen), tuple(map(Completion, rejected))
    )


def test_tokens_are_the_encoders(encoder: Encoder, examples: list[Example]) -> None:
    decode = encoder.tokenizer.decode
    for one, row in zip(examples[:6], shown_rows(encoder, examples[:6]), strict=True):
        encoded = encoder.encode(one, "rejected")
        assert row.prompt_tokens == len(encoded.prompt.input_ids)
        chosen, *others = row.responses
        assert chosen.span is None
        assert [len(chosen.tokens), *(len(r.tokens) for r in others if r.name.startswith("rejected"))] == [
            len(c.ids) for c in encoded.completions
        ]
        assert "".join(chosen.tokens) == decode(list(encoded.chosen.ids), skip_special_tokens=False)
        assert chosen.tokens[-1] == encoder.tokenizer.convert_ids_to_tokens(encoded.chosen.ids[-1])
        assert [r.span for r in others if r.name.startswith("rejected")] == [
            c.span for c in encoded.negatives
        ]
        image = encoder.processor.image_token
        n = list(encoded.prompt.input_ids).count(encoder.tokenizer.convert_tokens_to_ids(image))
        assert f"{image} (x {n})" in row.prompt
        assert row.images == ((48, 48),)


def test_a_character_of_several_tokens_is_shown_whole(tmp_path: Path) -> None:
    """Byte-level tokens of one emoji are four; three have no text of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<e>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["a cat"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<e>",
        chat_template="{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}"
        "{% if m.role == 'assistant' %}<e>{% else %}:{% endif %}{% endfor %}",
    )

    class TextProcessor:
        """A processor of texts alone."""

        def __init__(self) -> None:
            self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template
            self.apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: list[str], **more: Any) -> Any:
            return tokenizer(text, return_tensors="pt", add_special_tokens=False)

    (row,) = shown_rows(Encoder(TextProcessor()), [example("a🐱", "a🐶b")])
    chosen, rejected = row.responses
    assert chosen.tokens == ("a", "", "", "", "🐱", "<e>")
    assert rejected.tokens == ("a", "", "", "", "🐶", "b", "<e>")
    assert row.prompt == "what ?:"


def test_a_row_that_cannot_be_used_says_why(encoder: Encoder, examples: list[Example]) -> None:
    narrow = Encoder(encoder.processor, max_length=5)
    (row,) = shown_rows(narrow, examples[:1])
    assert not row.responses
    assert "more than data.max_length = 5" in row.problem


def test_the_command_shows_them_at_80_columns(world_folder: Path, model_folder: Path, run: Run) -> None:
    rows = [json.loads(line) for line in (world_folder / "train.jsonl").read_text().splitlines()[:3]]
    rows[1]["prompt"][0]["content"].append({"type": "text", "text": "\x1b[31m" + "red " * 60})
    data = world_folder / "shown.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("validate", data, "--model", model_folder, "--show", 2)
    shown = done.out[done.out.index(f"{data}:1\n") if f"{data}:1\n" in done.out else 0 :]
    assert max(len(line) for line in shown.splitlines() if str(data) not in line) <= 80
    assert "\x1b" not in done.out
    assert "\\x1b[31m" in shown.replace("\n", "")
    assert "tokens, not trained" in shown
    assert "tokens, all trained; " in shown
    assert shown.count("not trained") == 2
    said = rows[0]["chosen"][0]["content"][0]["text"]
    assert "".join(said.split()) in "".join(shown.replace("|", "").split())
    as_json = run("validate", data, "--model", model_folder, "--show", 1, "--json")
    last = json.loads(as_json.out.splitlines()[-1])
    assert len(last["shown"]) == 1
    assert last["shown"][0]["responses"][0]["tokens"][-1] == "<|end|>"
    refused = run("validate", data, "--show", 1)
    assert refused.code == 2
    assert "--model" in refused.err


def test_a_recipe_names_the_model(world_folder: Path, model_folder: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: {model_folder}}}\ndata: {{path: {world_folder / 'train.jsonl'}, max_length: 6}}\n"
    )
    done = run("validate", recipe, "--show", 1)
    assert "not usable" in done.out
    assert run("validate", recipe, "--show", 1, "data.max_length=2000").out.count("not trained") == 1
