"""Templates are known by what they do: contents, ends of turns, roles, and texts that hold special tokens."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.template import CheckpointTokens, RefusedRowError
from cwdpo.data.validate.checks import validate
from cwdpo.data.validate.lengths import token_counter
from cwdpo.errors import DataError, ModelError
from cwdpo.files.writing import write_text
from cwdpo.records import Completion, Message

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>BODY{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AS_TEXT = TURNS.replace("BODY", "{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}")
"""Prints a list of blocks as Python writes it."""
CONCATENATES = AS_TEXT.replace("{{ m['content'] }}", "{{ '' + m['content'] }}")
"""Fails on a list of blocks."""
BLOCKS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
)
ENDLESS = TURNS.replace("BODY", BLOCKS)
"""Writes nothing behind a response."""


@pytest.fixture
def changed(processor):
    """Makes an encoder of the small LLaVA with another template, and other settings of its tokenizer."""

    def make(template: str | None, checkpoint: CheckpointTokens | None = None, **tokenizer: Any) -> Encoder:
        made = copy.deepcopy(processor)
        made.chat_template = made.tokenizer.chat_template = template
        for name, value in tokenizer.items():
            setattr(made.tokenizer, name, value)
        return Encoder(made, checkpoint=checkpoint)

    return make


def said(encoder: Encoder, example: Any, text: str) -> str:
    return encoder.tokenizer.decode(encoder.completion_ids(example, text))


@pytest.fixture
def asked(examples):
    return replace(examples[0], images=(), prompt=(Message("user", ("why ?",)),))


@pytest.mark.parametrize("template", [AS_TEXT, CONCATENATES, TURNS.replace("BODY", BLOCKS + "<|end|>")])
def test_contents_are_given_as_the_template_takes_them(changed, asked, template) -> None:
    encoder = changed(template)
    assert encoder.prompt_text(asked).startswith("<|user|>why ?")
    assert said(encoder, asked, "a red ring .") == "a red ring .<|end|>"


def test_pictures_stand_in_text_as_their_token(changed, examples) -> None:
    text = changed(AS_TEXT).prompt_text(examples[0])
    assert text.count("<image>") == 1
    assert "type" not in text


def test_a_template_that_prints_no_contents_is_refused(changed, asked) -> None:
    encoder = changed(TURNS.replace("BODY", "{{ m['content']|length }}"))
    with pytest.raises(RefusedRowError, match=r"takes no user turn \(it does not print their text"):
        encoder.prompt(asked)


def test_what_ends_a_turn_comes_from_generation_config_then_the_template_then_the_tokenizer(
    changed, asked
) -> None:
    closed = TURNS.replace("BODY", BLOCKS + "{% if m['role'] == 'assistant' %}<|end|>\n{% endif %}")
    eos = changed(ENDLESS).tokenizer.eos_token_id
    system = changed(ENDLESS).tokenizer.convert_tokens_to_ids("<|system|>")
    user = changed(ENDLESS).tokenizer.convert_tokens_to_ids("<|user|>")
    assert said(changed(closed), asked, "yes") == "yes<|end|>"
    assert said(changed(ENDLESS), asked, "yes") == "yes<|end|>"  # the tokenizer's
    # Known to generation_config alone, and written where the next turn begins (GLM-4V).
    glm = changed(ENDLESS, CheckpointTokens(stops=(eos, user)))
    assert said(glm, asked, "yes") == "yes<|user|>"
    assert glm.end_ids == {eos, user}
    # The template's own token wins over one of generation_config that it does not write, and sampling stops at both.
    both = changed(closed, CheckpointTokens(stops=(system,)), eos_token="<s>")
    assert said(both, asked, "yes") == "yes<|end|>"
    assert both.end_ids == {system, eos, both.tokenizer.bos_token_id}


def test_the_end_is_trained_once_and_only_at_the_end(changed, asked) -> None:
    encoder = changed(ENDLESS)
    once = encoder.completion_ids(asked, "a red ring .")
    for text in ("a red ring .<|end|>", "a red ring . <|end|>\n", "a red ring .<|end|><|end|>"):
        assert encoder.completion_ids(asked, text) == once
    assert said(encoder, asked, "the <|end|> is old") == "the <|end|> is old<|end|>"


def test_roles_that_a_template_refuses_are_rows_that_are_left_out(changed, asked) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    encoder = changed(refusing + ENDLESS)
    row = replace(asked, where="rows.jsonl:7", prompt=(Message("system", ("be brief",)), *asked.prompt))
    told = r"^rows.jsonl:7: the chat template takes no system turn \(.*System role not supported"
    with pytest.raises(RefusedRowError, match=told):
        encoder.encode(row)
    good, problems = encoder.encode_all([asked, row], "rejected", require_negative=False)
    assert [e.id for e in good] == [asked.id]
    assert len(problems) == 1


def test_broken_jinja_is_one_line_naming_the_row(changed, asked) -> None:
    encoder = changed("{% for m in messages %}{{ m['content'] ")
    with pytest.raises(DataError) as error:
        encoder.encode(replace(asked, where="rows.jsonl:1"))
    assert str(error.value).startswith(
        "rows.jsonl:1: the chat template takes no user turn (TemplateSyntaxError"
    )
    assert "\n" not in str(error.value)


def test_without_a_template_a_prompt_is_one_user_turn(changed, asked) -> None:
    encoder = changed(None)
    assert said(encoder, asked, "yes") == "yes<|end|>"
    with pytest.raises(RefusedRowError, match="has no chat template, so a prompt is one user turn"):
        encoder.prompt(replace(asked, prompt=(Message("system", ("be brief",)), *asked.prompt)))


def test_special_tokens_in_texts_are_named_with_their_key(encoder, asked) -> None:
    rows = {
        "prompt[0]": replace(asked, prompt=(Message("user", ("what is <image> ?",)),)),
        "chosen": replace(asked, chosen=Completion("red <|user|> blue")),
        "rejected[1]": replace(asked, rejected=(Completion("no"), Completion("<|end|> of it"))),
    }
    for key, row in rows.items():
        with pytest.raises(RefusedRowError, match="a special token of this checkpoint") as error:
            encoder.encode(row)
        assert error.value.key == key
    encoder.encode(replace(asked, chosen=Completion("red<|end|>")))


def test_validate_names_row_and_key_of_a_special_token(processor, tmp_path) -> None:
    row = {"prompt": "why", "chosen": "red", "rejected": "no"}
    rows = "".join(json.dumps(r) + "\n" for r in (row, {**row, "prompt": "why so", "chosen": "<s>"}))
    path = tmp_path / "rows.jsonl"
    write_text(path, rows)
    report = validate(path, lengths=token_counter(processor))
    assert [(group.kind, group.count) for group in report.problems] == [("special-token", 1)]
    problem = report.problems[0].first[0]
    assert (problem.row, problem.key) == (2, "chosen")


def test_a_checkpoint_without_an_end_token_is_refused(changed) -> None:
    encoder = changed(ENDLESS, eos_token=None)
    with pytest.raises(ModelError, match="ends a response: the tokenizer has no eos_token"):
        encoder.end_ids  # noqa: B018 - the property
    with pytest.raises(ModelError, match="ends a response"):
        token_counter(encoder.processor)


def test_tokens_that_the_model_does_not_embed_are_refused(changed, asked) -> None:
    encoder = changed(ENDLESS, CheckpointTokens(embedded=20))
    with pytest.raises(RefusedRowError, match="and the model embeds 20 tokens: fetch tokenizer and weights"):
        encoder.encode(asked)
