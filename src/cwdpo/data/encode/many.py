"""Token ids of many prompts from one call of the processor.

A call costs far more than the tokens of a prompt, and tokenizing a hundred copies of an image token far more than
writing their ids. So each image is written as one token, which is repeated among the ids. This is used as long as the
first rows of each number of images agree with single calls.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, starmap
from typing import TYPE_CHECKING, Any

from cwdpo.data.encode.embedded import check_embedded
from cwdpo.data.encode.expand import CHECKED, NOT_FOR_THE_MODEL, Written, blank
from cwdpo.errors import CwdpoError
from cwdpo.records import Example

if TYPE_CHECKING:
    from cwdpo.data.encode.prompts import PromptEncoder, Result


@dataclass(frozen=True)
class _Row:
    """A prompt: its text, what is written for each of its images, and how often each one's image token is repeated."""

    example: Example
    text: str
    texts: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


class ManyPrompts:
    """Encodes prompts together, without their images.

    Args:
        encoder: encodes single prompts.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder, self._checked, self._usable = encoder, Counter[int](), encoder.template.is_there

    @property
    def learnt(self) -> tuple[Counter[int], bool]:
        """Rows that were compared, by number of images, and whether all agreed."""
        return self._checked, self._usable

    @learnt.setter
    def learnt(self, learnt: tuple[Counter[int], bool]) -> None:
        self._checked, self._usable = learnt

    def __call__(self, examples: Iterable[Example]) -> list[tuple[Example, Result]]:
        """The ids and per-token outputs of those prompts that can be encoded together."""
        groups: dict[tuple[bool, bool, bool], list[_Row]] = {}
        for example in examples if self._usable else ():
            with contextlib.suppress(CwdpoError):  # encoding the row alone reports the error
                text = self._encoder.text(example).rstrip(" ")
                written = self._encoder.written(example)
                row = None if written is None or written.rest else self._row(example, text, written)
                if row is not None and written is not None:
                    kind = bool(example.images), written.base, self._encoder.adds_bos(text)
                    groups.setdefault(kind, []).append(row)
        found: list[tuple[Example, Result]] = []
        for (_, base, bos), rows in groups.items():
            if not self._usable:
                break
            found += self._together(rows, base=base, bos=bos)
        return found if self._usable else []

    def _row(self, example: Example, text: str, written: Written) -> _Row | None:
        """``None`` if an image is not written as its token, repeated, once."""
        token: str = getattr(self._encoder.processor, "image_token", None) or ""
        texts, counts = [], []
        if token and text.count(token) != len(written.texts):
            return None  # the processor would refuse it, and all others with it
        for said in written.texts:
            n = said.count(token) if token else 0
            if not n or token * n not in said:
                return None
            texts.append(said.replace(token * n, token))
            counts.append(n)
        return _Row(example, text, tuple(texts), tuple(counts))

    def _together(self, rows: Sequence[_Row], *, base: bool, bos: bool) -> list[tuple[Example, Result]]:
        encoder = self._encoder
        processor, more = encoder.processor, {}
        if rows[0].texts:
            processor = encoder.expansions.stand_in(
                Written(tuple(t for row in rows for t in row.texts), base=base)
            )
            nothing = blank((2, 2))
            more = {"images": [[nothing] * len(row.texts) for row in rows]}
        try:
            outputs = dict(processor(text=[row.text for row in rows], add_special_tokens=bos, **more))
        except Exception:  # a row that the processor refuses: each is encoded alone
            return []
        every = outputs.pop("input_ids")
        per_token = {k: v for k, v in outputs.items() if k.endswith("token_type_ids")}
        if not rows[0].texts and not outputs.keys() <= {*per_token, *NOT_FOR_THE_MODEL}:
            self._usable = False
            return []
        token = encoder.tokenizer.convert_tokens_to_ids(getattr(encoder.processor, "image_token", None) or "")
        found: list[tuple[Example, Result]] = []
        for i, row in enumerate(rows):
            ids, further = every[i], {k: v[i] for k, v in per_token.items()}
            times = iter(row.counts)
            repeated = [next(times, 0) if row.counts and one == token else 1 for one in ids]
            if sum(repeated) != len(ids) - len(row.counts) + sum(row.counts) or 0 in repeated:
                continue
            result = _expanded(ids, repeated), {k: _expanded(v, repeated) for k, v in further.items()}
            if self._agrees(row.example, result):
                with contextlib.suppress(CwdpoError):
                    check_embedded(
                        encoder.template, row.example, ids, encoder.template.checkpoint.placeholders
                    )
                    found.append((row.example, (*result, {})))
        return found

    def _agrees(self, example: Example, result: tuple[Any, Any]) -> bool:
        """Whether a row's result is that of a single call; later rows are not compared."""
        n = len(example.images)
        if self._usable and self._checked[n] < CHECKED:
            self._encoder.check_learns()
            with contextlib.suppress(CwdpoError):
                self._checked[n] += 1
                self._usable = self._encoder.alone(example)[:2] == result
        return self._usable


def _expanded(values: Sequence[int], times: Sequence[int]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(starmap(repeat, zip(values, times, strict=True))))
