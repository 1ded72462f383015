"""Rows with tools: read as TRL and OpenAI write them, printed by the template, or refused with row and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError
from cwdpo.onpolicy.preferences import trl_rows
from cwdpo.records import TOOLS, Example, without_tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "its name"}},
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
PROMPT: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it cold in Oslo ?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "4 degrees"},
]
ROW = {"tools": [WEATHER], "prompt": PROMPT, "chosen": "Yes , 4 degrees .", "rejected": "No ."}
# With the traits of Qwen's: tools in the system turn, calls and answers in tags.
QWEN = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{%- else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_TOOLS = QWEN.replace("{%- if tools %}", "{%- if false %}")
WITHOUT_CALLS = QWEN.replace("m.tool_calls or []", "[]")
WITHOUT_ROLE = QWEN.replace("{%- for m in messages %}", (
    "{%- for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('Only user and assistant roles') }}{% endif %}"
))  # fmt: skip


def read(tmp_path: Path, *rows: dict[str, Any]) -> list[Example]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(file, max_bad_fraction=0).examples


@pytest.fixture(scope="session")
def with_template() -> Callable[[str], Encoder]:
    """An encoder of texts with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["a"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )

    def made(template: str) -> Encoder:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template
        )

        class TextProcessor(SimpleNamespace):
            def __call__(self, text: list[str], **more: Any) -> Any:
                return tokenizer(text, return_tensors="pt", add_special_tokens=False)

        return Encoder(
            TextProcessor(
                tokenizer=tokenizer,
                chat_template=template,
                apply_chat_template=tokenizer.apply_chat_template,
            )
        )

    return made


def test_what_is_read(tmp_path: Path) -> None:
    (example,) = read(tmp_path, ROW)
    turns, tools = without_tools(example.prompt)
    assert tools == [WEATHER]
    assert [turn.as_chat() for turn in turns] == [
        {"role": "user", "content": [{"type": "text", "text": "Is it cold in Oslo ?"}]},
        {"role": "assistant", "content": [], "tool_calls": [CALL]},
        {"role": "tool", "content": [{"type": "text", "text": "4 degrees"}], "name": "weather"},
    ]
    assert example.prompt_text == "Is it cold in Oslo ?"


def test_spellings_that_mean_the_same(tmp_path: Path) -> None:
    """Tools in JSON or bare; arguments in JSON; nulls of a table."""
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"town": "Oslo"})}}
    bare = {"name": "weather", "arguments": {"town": "Oslo", "day": None}}
    prompts = [
        [PROMPT[0], {"role": "assistant", "content": "", "tool_calls": [c]}, PROMPT[2]] for c in (call, bare)
    ]
    rows = [
        {**ROW, "tools": json.dumps([WEATHER]), "prompt": prompts[0]},
        {**ROW, "tools": [{**WEATHER["function"], "strict": None}], "prompt": prompts[1]},
        {**ROW, "prompt": [{"tool_calls": None, "tool_call_id": None, **turn} for turn in PROMPT]},
    ]
    for row in rows:
        (example,) = read(tmp_path, row)
        assert example.prompt == read(tmp_path, ROW)[0].prompt


def test_the_prompt_is_the_templates_own(tmp_path: Path, with_template: Callable[[str], Encoder]) -> None:
    encoder = with_template(QWEN)
    (example,) = read(tmp_path, ROW)
    chat = [
        PROMPT[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        PROMPT[2],
    ]
    wanted = encoder.tokenizer.apply_chat_template(
        chat, tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert encoder.prompt_text(example) == wanted
    assert '"arguments": {"town": "Oslo"}' in wanted
    encoded = encoder.encode(example)
    decode = encoder.tokenizer.decode
    assert decode(list(encoded.prompt.input_ids)) == wanted
    assert decode(list(encoded.chosen.ids)) == "Yes , 4 degrees .<|im_end|>"


@pytest.mark.parametrize(
    ("template", "drop", "reason"),
    [
        (WITHOUT_TOOLS, (), r"rows\.jsonl:1 \[tools\]: the chat template does not print tools"),
        (
            WITHOUT_CALLS,
            ("tools",),
            r"rows\.jsonl:1 \[tool_calls\]: the chat template does not print tool_calls",
        ),
        (
            WITHOUT_ROLE,
            ("tools", "call"),
            r"rows\.jsonl:1: the chat template takes no tool turn .*Only user and ass",
        ),
    ],
)
def test_what_a_template_drops_or_refuses_is_refused(
    template: str, drop: tuple[str, ...], reason: str, tmp_path: Path, with_template: Callable[[str], Encoder]
) -> None:
    encoder = with_template(template)
    row = dict(ROW)
    if "tools" in drop:
        del row["tools"]
    if "call" in drop:
        row["prompt"] = [PROMPT[0], {"role": "assistant", "content": "I look ."}, PROMPT[2]]
    (example,) = read(tmp_path, row)
    with pytest.raises(DataError, match=reason):
        encoder.encode(example)
    (plain,) = read(tmp_path, {"prompt": "Is it cold ?", "chosen": "Yes .", "rejected": "No ."})
    assert encoder.encode(plain).negatives


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tools": "weather"}, r"\[tools\]: 'weather' is no JSON; allowed: a list of tools in JSON"),
        ({"tools": [{"type": "function"}]}, r"\[tools\[0\]\]: .*allowed: .*\"function\": \{\"name\""),
        ({"tools": [3]}, r"\[tools\[0\]\]: int \(3\); allowed"),
        ({"prompt": [PROMPT[0], {"role": "assistant", "tool_calls": [{"function": {}}]}, PROMPT[2]]},
         r"prompt\[1\]\.tool_calls\[0\]\]: .*name the function"),
        ({"prompt": [PROMPT[0], {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "x"}}]}, PROMPT[2]]}, r"arguments\]: 'x' is no JSON"),
        ({"prompt": [{**PROMPT[0], "tool_calls": [CALL]}]}, r"prompt\[0\]\.tool_calls\]: .*in a turn of user"),
        ({"prompt": [PROMPT[0], {"role": "assistant", "content": "a", "function_call": {"name": "f"}}, PROMPT[2]]},
         r"prompt\[1\]\.function_call\]: .*write it as 'tool_calls'"),
        ({"chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]},
         r"\[chosen\]: the response calls a tool.*in the form that your template has for it"),
        ({"prompt": [PROMPT[2]]}, r"the prompt has no user turn"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, {**ROW, **change})
    said = " ".join(str(caught.value).split())
    assert re.search(problem, said), said
    assert "rows.jsonl:1 [" in said


def test_tools_are_part_of_what_a_row_is(tmp_path: Path, with_template: Callable[[str], Encoder]) -> None:
    """Two rows that differ by a tool or a call alone are two prompts, for the split and for duplicates too."""
    from cwdpo.data.split import split_by_image
    from cwdpo.data.validate.checks import validate

    other_tool = {**WEATHER, "function": {**WEATHER["function"], "description": "Rain"}}
    other_call = {**CALL, "function": {"name": "weather", "arguments": {"town": "Rome"}}}
    rows = [
        ROW,
        {**ROW, "tools": [other_tool]},
        {**ROW, "prompt": [PROMPT[0], {"role": "assistant", "tool_calls": [other_call]}, PROMPT[2]]},
    ]
    examples = read(tmp_path, *rows)
    assert len({e.prompt for e in examples}) == 3
    encoder = with_template(QWEN)
    assert len({encoder.prompt(e).input_ids for e in examples}) == 3
    report = validate(tmp_path / "rows.jsonl")
    assert (report.duplicates, report.problems) == (0, [])
    parts = split_by_image(examples, {"a": 0.5, "b": 0.5}, 0)
    assert sum(map(len, parts.values())) == 3


def test_pairs_that_are_written_are_read_again(tmp_path: Path) -> None:
    (example,) = read(tmp_path, ROW)
    (row,) = trl_rows([example])
    again = read(tmp_path, {**row, "images": []})
    assert again[0].prompt == example.prompt
    assert again[0].prompt[0].role == TOOLS
