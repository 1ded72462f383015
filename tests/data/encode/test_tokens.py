"""What follows a prompt has the ids that it has in the joined text, and the rest of the prompt is not tokenized."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from cwdpo.data.encode.tokens import Tails, _runs_into


def whole(tokenizer: Any, prompt: str, tail: str) -> list[int]:
    """The ids of a tail by its definition: from two whole texts, or those of the tail alone."""
    before, joined, alone = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, prompt + tail, tail)
    )
    return joined[len(before) :] if joined[: len(before)] == before else alone


class Counted:
    """A tokenizer that remembers what it was asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.asked = tokenizer, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        self.asked += texts
        return self._tokenizer(texts, **settings)


def tails_of(tokenizer: Any, *structural: str) -> Tails:
    template: Any = SimpleNamespace(tokenizer=tokenizer, structural=dict.fromkeys(structural, 0))
    return Tails(template)


def prompt_of(encoder: Any, examples: Any) -> str:
    return str(encoder.prompt_text(examples[0])).rstrip(" ")


@pytest.mark.parametrize(
    "tail", ["a red ring .", " a red ring .", "\nring", "?", "<|end|>", "a <|end|> b", ""]
)
def test_they_are_those_of_the_joined_text(encoder: Any, examples: Any, tail: str) -> None:
    prompt = prompt_of(encoder, examples)
    tails = Tails(encoder.template)
    wanted = whole(encoder.tokenizer, prompt, tail)
    assert tails(prompt, tail) == wanted
    tails.foresee([(prompt, tail), (prompt, "other")])
    assert tails(prompt, tail) == wanted


def test_most_of_a_prompt_is_not_tokenized(encoder: Any, examples: Any) -> None:
    counted = Counted(encoder.tokenizer)
    tails = tails_of(counted, *encoder.template.structural)
    prompt = prompt_of(encoder, examples)
    tails.foresee([(prompt, f"answer {i}") for i in range(8)])  # compared with the whole texts
    counted.asked.clear()
    tails.foresee([(prompt, "one"), (prompt, "two")])
    begin = tails._begin(prompt)
    assert len(begin) < len(prompt)
    assert counted.asked == [begin, f"{begin}one", f"{begin}two"]


def test_a_token_that_another_one_runs_into_cuts_nothing(processor: Any) -> None:
    tokenizer = copy.deepcopy(processor.tokenizer)
    special = next(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    assert tails_of(tokenizer, special)._begin(f"What ?{special}") == special
    tokenizer.add_tokens([f"?{special[0]}"])
    assert tails_of(tokenizer, special)._begin(f"What ?{special}") == f"What ?{special}"
    for tail in ("yes", " no"):
        wanted = whole(tokenizer, f"What ?{special}", tail)
        assert tails_of(tokenizer, special)(f"What ?{special}", tail) == wanted


def test_a_tokenizer_that_counts_from_the_start_is_found_out(processor: Any) -> None:
    """No tokenizer of the hub is known to give ids by place; one that does gets whole texts."""

    class ByPlace(Counted):
        def __call__(self, texts: list[str], **settings: Any) -> Any:
            return {"input_ids": [[ord(c) + 1000 * i for i, c in enumerate(text)] for text in texts]}

    special = next(t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special)
    tails = tails_of(ByPlace(processor.tokenizer), special)
    prompt = f"What ?{special}"
    tails.foresee([(prompt, "yes")])
    assert tails(prompt, "yes") == [ord(c) + 1000 * i for i, c in enumerate(prompt + "yes")][len(prompt) :]


@pytest.mark.parametrize(
    ("other", "token", "found"),
    [
        ("a<", "<s>", True),
        ("a<s>b", "<s>", True),
        ("<s>", "<s>", False),
        ("aba", "aba", True),
        ("s>", "<s>", False),
    ],
)
def test_which_tokens_run_into_which(other: str, token: str, found: bool) -> None:
    assert _runs_into(other, token) is found
