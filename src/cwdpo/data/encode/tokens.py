"""Token ids of texts that follow a prompt, from calls of the tokenizer for many rows.

The ids are those that the joined text of prompt and response has after the prompt's own. Most of a prompt need not be
tokenized for that: a tokenizer cuts a text at its special tokens before it does anything else, so what follows the last
one of the prompt has the same ids wherever it stands. The first rows are compared with the joined text all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cwdpo.data.encode.template import ChatTemplate

CHECKED = 8
"""Pairs of prompt and response whose ids are compared with those of the joined text."""


class Tails:
    """Tokenizes what follows a prompt.

    Args:
        template: names the tokenizer, and the special tokens that a prompt may have.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template, self.tokenizer = template, template.tokenizer
        self._known: dict[str, list[int]] = {}
        self._cuts: dict[str, bool] = {}
        self._start, self._usable, self._checked = "", hasattr(self.tokenizer, "backend_tokenizer"), 0

    def __call__(self, prompt: str, tail: str) -> list[int]:
        """Token ids of a text after its prompt.

        Args:
            prompt: the prompt without spaces at its end.
            tail: the text.
        """
        return self._after(self._begin(prompt), tail)

    def foresee(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Tokenize together what the next calls ask for, until other pairs of prompt and text are named."""
        named = list(pairs)
        begun = [(self._begin(prompt), tail) for prompt, tail in named]
        if self._usable and self._checked < CHECKED:
            begun += self._compared(named)
        texts = {text: None for begin, tail in begun for text in (begin, begin + tail)}
        self._known = dict(zip(texts, self._tokenized(list(texts)) if texts else (), strict=True))

    def forget(self) -> None:
        """Free what :meth:`foresee` made."""
        self._known = {}

    def _compared(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The pairs, if the parts of some prompts do not give the ids of the whole ones; else none."""
        for prompt, tail in pairs[: CHECKED - self._checked]:
            self._usable = self._usable and self._after(self._begin(prompt), tail) == self._after(
                prompt, tail
            )
            self._checked += 1
        return [] if self._usable else pairs

    def _after(self, begin: str, tail: str) -> list[int]:
        before, joined = self._ids(begin), self._ids(begin + tail)
        return joined[len(before) :] if joined[: len(before)] == before else self._ids(tail)

    def _begin(self, prompt: str) -> str:
        """The prompt from its last special token on; the whole prompt if it has none."""
        if not self._usable or (self._start and prompt.endswith(self._start)):
            return self._start if self._usable else prompt
        places = {prompt.rfind(token): token for token in self._template.structural}
        last = max(places, default=-1)
        if last < 0 or not self._cuts_there(places[last]):
            return prompt
        self._start = prompt[last:]
        return self._start

    def _cuts_there(self, token: str) -> bool:
        """Whether every text is cut where this special token stands: no other added token may overlap with it."""
        if token not in self._cuts:
            added = {one.content: one for one in self.tokenizer.added_tokens_decoder.values()}
            found: Any = added.get(token)
            self._cuts[token] = (
                found is not None
                and not (found.normalized or found.single_word or token[0].isspace())
                and not getattr(self.tokenizer, "split_special_tokens", False)
                and not any(_runs_into(other, token) for other in added)
            )
        return self._cuts[token]

    def _ids(self, text: str) -> list[int]:
        known = self._known.get(text)
        return self._tokenized([text])[0] if known is None else known

    def _tokenized(self, texts: list[str]) -> list[list[int]]:
        made = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return [list(ids) for ids in made["input_ids"]]


def _runs_into(other: str, token: str) -> bool:
    """Whether a token may begin inside another one that begins before it.

    >>> _runs_into("a<", "<s>"), _runs_into("<s>", "<s>")
    (True, False)
    """
    return any(token.startswith(other[k:]) or other.startswith(token, k) for k in range(1, len(other)))
