"""Minimal edits of the chosen response: one word or phrase is replaced by another of the same kind."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import Field, PrivateAttr

from cwdpo.negatives.base import NegativeSource, known_true, normalised
from cwdpo.negatives.lexicon import KINDS, Kind, Lexicon, Words, load_lexicon
from cwdpo.negatives.rewrites import exchanges, negations
from cwdpo.negatives.writer import Writer
from cwdpo.records import Completion, Example
from cwdpo.remote import ServerSettings

_NEIGHBOURS = 3  # the new word must not already occur within this many words on each side
_VOWEL_SOUND = re.compile(
    r"(?!one\b|once\b|uni(?!n)|us[eaiu]|eu|ut[ei])[aeiou]|hour|honest|heir", re.IGNORECASE
)
EditKind = Kind | Literal["swap", "negation"]
DEFAULT_KINDS: tuple[EditKind, ...] = (*KINDS, "swap")
"""Without negation: captions rarely contain one, so a policy could learn to spot the word without the image."""


class _Place(NamedTuple):
    """An edit that may be made of the words ``[first, last)``; :func:`_edit_at` makes it.

    ``to`` is the new phrase, or the index of the word that exchanges its place with ``first``.
    """

    kind: EditKind
    first: int
    last: int
    to: str | int


@dataclass(frozen=True)
class Edit:
    """One edit of a text: its characters ``[start, end)`` become ``new``; the span includes an article that changes."""

    kind: EditKind
    start: int
    end: int
    old: str
    new: str
    word: int  # index of the first replaced word, the article not counted

    def apply(self, text: str) -> str:
        """``text`` after the edit."""
        return text[: self.start] + self.new + text[self.end :]


class PerturbNegatives(NegativeSource):
    """Fluent English edits that make the chosen response false: brown dog -> black dog, on -> next to.

    Kinds of edits are those of the lexicon, ``swap`` (two objects exchange a colour, size, material or number) and
    ``negation`` (is -> is not; off by default).

    An edit is not used if its result equals the chosen response or a reference (ignoring case and white space), or if
    the new word, or one that may mean the same, occurs in a reference, because the result might be true. There is no
    other check of the truth: the image is not looked at.
    """

    kinds: tuple[EditKind, ...] = Field(DEFAULT_KINDS, min_length=1)
    lexicon: str = ""
    per_example: int = Field(1, ge=1)
    writer: ServerSettings | None = Field(
        None, description="a language model that writes the edits; the lexicon is used where it gives none"
    )
    _writer: Writer | None = PrivateAttr(None)

    def prepare(self, examples: Sequence[Example]) -> None:
        """Request the writer's edits of all examples.

        Raises:
            ServerError: the estimated cost is above the limit, or the server does not answer.
        """
        if self.writer is not None:
            self._asked().prepare(examples)

    def _asked(self) -> Writer:
        assert self.writer is not None
        if self._writer is None:
            self._writer = Writer(self.writer, self.kinds)
        return self._writer

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """Up to ``per_example`` edits of kind ``hard``, with as many different kinds of edits as the text allows.

        ``made`` holds ``edit`` (the kind), ``from``, ``to``, ``start`` and ``end`` (characters of the chosen
        response: ``chosen[:start] + to + chosen[end:]`` is the negative) and ``word`` (index of the first
        replaced word).

        Raises:
            DataError: the lexicon cannot be read; the message names file and key.
        """
        del pool
        text = example.chosen.text
        if self.writer is not None:
            written = self._asked().edits(example)
            if written:
                return rng.sample(written, min(self.per_example, len(written)))
        made = []
        taken = set(known_true(example))
        for edit in self._ordered(example, rng):
            changed = edit.apply(text)
            if normalised(changed) in taken:
                continue
            taken.add(normalised(changed))
            how = {"edit": edit.kind, "from": edit.old, "to": edit.new}
            where = {"start": edit.start, "end": edit.end, "word": edit.word}
            made.append(Completion(changed, origin="perturbed", kind="hard", made=how | where))
            if len(made) == self.per_example:
                break
        return made

    def _ordered(self, example: Example, rng: random.Random) -> Iterator[Edit]:
        """Every allowed edit, alternating between kinds (in random order) and, within a kind, between words."""
        words = Words(example.chosen.text)
        found = _places(words, example, load_lexicon(self.lexicon))
        by_kind: list[list[_Place]] = []
        for kind in dict.fromkeys(self.kinds):
            at: dict[int, list[_Place]] = {}
            for place in found:
                if place.kind == kind:
                    at.setdefault(place.first, []).append(place)
            by_kind.append(_turns(list(at.values()), rng))
        rng.shuffle(by_kind)
        for turn in range(max(map(len, by_kind), default=0)):
            yield from (_edit_at(words, queue[turn]) for queue in by_kind if turn < len(queue))


def edits(example: Example, lexicon: Lexicon) -> list[Edit]:
    """All edits of the chosen response that ``lexicon`` allows and that no reference makes true."""
    words = Words(example.chosen.text)
    return [_edit_at(words, place) for place in _places(words, example, lexicon)]


def _places(words: Words, example: Example, lexicon: Lexicon) -> list[_Place]:
    """What :func:`edits` makes; a caption of 60 words has more than 100, of which one is used."""
    references = [Words(text) for text in example.references]
    found: list[_Place] = []
    for first, last, swaps in lexicon.matches(words):
        for swap in swaps:
            # The window includes the replaced word, so a word is never replaced by its synonym.
            near = words.contains(swap.means, max(0, first - _NEIGHBOURS), last + _NEIGHBOURS)
            if not near and not any(reference.contains(swap.means) for reference in references):
                found.append(_Place(swap.kind, first, last, swap.to))
    found += [_Place("swap", i, i + 1, j) for i, j in exchanges(words, references, lexicon)]
    found += [_Place("negation", *denied) for denied in negations(words, references, lexicon)]
    return found


def _edit_at(words: Words, place: _Place) -> Edit:
    kind, i, last, to = place
    if isinstance(to, str):
        return _edit(words, i, last, kind, to)
    left = _edit(words, i, last, kind, words.lower[to])
    right = _edit(words, to, to + 1, kind, words.lower[i])
    new = left.new + words.text[left.end : right.start] + right.new
    return Edit(kind, left.start, right.end, words.text[left.start : right.end], new, i)


def _edit(words: Words, first: int, last: int, kind: EditKind, to: str) -> Edit:
    text = words.text
    start, end = words.spans[first][0], words.spans[last - 1][1]
    new = _cased(to, text[start:end])
    if first and words.lower[first - 1] in ("a", "an") and words.run(first - 1) > 1:
        article = "an" if _VOWEL_SOUND.match(to) else "a"
        if article != words.lower[first - 1]:
            begin, stop = words.spans[first - 1]
            new = _cased(article, text[begin:stop]) + text[stop:start] + new
            start = begin
    return Edit(kind, start, end, text[start:end], new, first)


def _cased(new: str, old: str) -> str:
    """``new`` with capitals as in ``old``: all letters (if ``old`` has several), the first letter, or none."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _turns(places: list[list[_Place]], rng: random.Random) -> list[_Place]:
    """The edits of all places in random order, alternating between the places."""
    rng.shuffle(places)
    for place in places:
        rng.shuffle(place)
    longest = max(map(len, places), default=0)
    return [place[turn] for turn in range(longest) for place in places if turn < len(place)]
