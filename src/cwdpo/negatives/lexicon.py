"""Words that may replace each other: reads lexicon.yaml and a user's extension, and matches them to a text.

The format is described at the top of lexicon.yaml.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cwdpo.errors import DataError, FileError, nearest
from cwdpo.files.yamlfile import read_yaml

Kind = Literal["colour", "size", "material", "number", "object", "relation", "action", "answer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHIPPED = Path(__file__).with_name("lexicon.yaml")

_CONDITIONS = ("before", "not_before", "after", "not_after", "without")
_GROUP_KEYS = ("words", "from", "to", "alone", *_CONDITIONS)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")

Phrase = tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """Where a swap is allowed. All phrases are in lower case.

    Attributes:
        before, after: the replaced phrase must be directly before (after) one of these.
        not_before, not_after: it must not be directly before (after) any of these.
        without: the text must not contain any of these.
        alone: ``True``: the replaced phrase must be the whole text; ``False``: it must not be.
    """

    before: frozenset[Phrase] | None = None
    after: frozenset[Phrase] | None = None
    not_before: frozenset[Phrase] = frozenset()
    not_after: frozenset[Phrase] = frozenset()
    without: frozenset[Phrase] = frozenset()
    alone: bool | None = None


@dataclass(frozen=True)
class Swap:
    """One allowed replacement; ``means`` is the set of all phrases that mean the same as ``to``, or may."""

    kind: Kind
    to: str
    means: frozenset[Phrase]
    context: Context


@dataclass
class Lexicon:
    """Swaps by the phrase that they replace, and in ``keep`` the phrases that are never edited."""

    swaps: dict[Phrase, list[Swap]] = field(default_factory=dict)
    keep: set[Phrase] = field(default_factory=set)

    def matches(self, text: Words) -> list[Match]:
        """Word ranges ``[first, last)`` of ``text`` that may be replaced, each with its swaps.

        Ranges do not overlap: at each word the longest phrase is used, even if it is one to keep.
        """
        if text.matched is None or text.matched[0] is not self:  # several kinds of edits ask for them
            text.matched = self, list(self._matches(text))
        return text.matched[1]

    def _matches(self, text: Words) -> Iterator[Match]:
        first = 0
        while first < len(text.lower):
            length, swaps = self._longest_at(text, first)
            if swaps:
                yield first, first + length, swaps
            first += length

    @functools.cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """For each word, how long the phrases are that begin with it; the longest first."""
        found: dict[str, set[int]] = {}
        for phrase in itertools.chain(self.swaps, self.keep):
            found.setdefault(phrase[0], set()).add(len(phrase))
        return {word: sorted(lengths, reverse=True) for word, lengths in found.items()}

    def _longest_at(self, text: Words, first: int) -> tuple[int, list[Swap]]:
        for length in self._lengths.get(text.lower[first], ()):
            phrase = text.lower[first : first + length]
            if length > text.run(first):
                continue
            if phrase in self.keep:
                return length, []
            fits: dict[int, bool] = {}  # many swaps share a context
            fitting = []
            for swap in self.swaps.get(phrase, ()):
                key = id(swap.context)
                if key not in fits:
                    fits[key] = text.fits(swap.context, first, first + length)
                if fits[key]:
                    fitting.append(swap)
            if fitting:
                return length, fitting
        return 1, []


Match = tuple[int, int, list[Swap]]
"""Words ``[first, last)`` that may be replaced, and by what."""


class Words:
    """A text split into words (letters with ' or - inside, or digits), with their positions."""

    def __init__(self, text: str) -> None:
        found = list(_WORD.finditer(text))
        self.text = text
        self.spans = [match.span() for match in found]
        self.lower: Phrase = tuple(match.group().lower() for match in found)
        ends = [end for _, end in self.spans[:-1]]
        gaps = (text[end:start] for end, (start, _) in zip(ends, self.spans[1:], strict=True))
        self._joined = [gap.isspace() for gap in gaps] + [False] if found else []
        self._found: dict[frozenset[Phrase], bool] = {}
        self._begins, self._lasts = list(range(len(found))), list(range(len(found)))
        for i, joined in enumerate(self._joined[:-1]):
            if joined:
                self._begins[i + 1] = self._begins[i]
        for i in range(len(found) - 2, -1, -1):
            if self._joined[i]:
                self._lasts[i] = self._lasts[i + 1]
        self.matched: tuple[Lexicon, list[Match]] | None = None

    def run(self, first: int) -> int:
        """How many words, starting with ``first``, follow each other with only white space in between."""
        return self._lasts[first] - first + 1

    def contains(self, phrases: frozenset[Phrase], first: int = 0, last: int | None = None) -> bool:
        """Whether any of ``phrases`` occurs among the words ``[first, last)``."""
        words = self.lower[first:last]
        starts = _by_first_word(phrases)
        return not starts.keys().isdisjoint(words) and any(
            phrase == words[i : i + len(phrase)]
            for i, word in enumerate(words)
            if word in starts
            for phrase in starts[word]
        )

    def fits(self, context: Context, first: int, last: int) -> bool:
        """Whether the words ``[first, last)`` are in a place that ``context`` allows."""
        if context.alone not in (None, (first, last) == (0, len(self.lower))):
            return False
        if context.without not in self._found:  # many swaps share a context
            self._found[context.without] = self.contains(context.without)
        if self._found[context.without]:
            return False
        # `left` and `right` are the words before and after, up to the nearest punctuation.
        left = self.lower[self._begins[first] : first]
        right = self.lower[last : last + self.run(last - 1) - 1]
        if context.before is not None and not _in(context.before, right, from_left=True):
            return False
        if context.after is not None and not _in(context.after, left, from_left=False):
            return False
        if context.not_before and _in(context.not_before, right, from_left=True):
            return False
        return not (context.not_after and _in(context.not_after, left, from_left=False))


def _in(phrases: frozenset[Phrase], words: Phrase, *, from_left: bool) -> bool:
    """Whether the first (``from_left``) or the last of ``words`` are one of ``phrases``."""
    return any((words[:n] if from_left else words[-n:]) in phrases for n in _lengths(phrases))


@functools.lru_cache(maxsize=2**14)
def _lengths(phrases: frozenset[Phrase]) -> frozenset[int]:
    """Lengths of phrases: there are few, while a condition may list thousands of phrases."""
    return frozenset(map(len, phrases))


@functools.lru_cache(maxsize=2**14)
def _by_first_word(phrases: frozenset[Phrase]) -> dict[str, list[Phrase]]:
    """Phrases by their first word: a text has fewer words than a lexicon has phrases."""
    found: dict[str, list[Phrase]] = {}
    for phrase in phrases:
        found.setdefault(phrase[0], []).append(phrase)
    return found


@functools.lru_cache(maxsize=8)
def load_lexicon(extension: str = "") -> Lexicon:
    """The shipped lexicon, extended by the YAML file ``extension`` if one is given.

    Raises:
        DataError: a file is missing or malformed; the message names file and key.
    """
    paths = [SHIPPED, *([Path(extension)] if extension else [])]
    files = [_File(path) for path in paths]
    lists: dict[str, list[str]] = {}
    for file in files:
        lists.update(file.lists())
    synonyms = [group for file in files for group in file.synonyms()]
    lexicon = Lexicon()
    for file in files:
        lexicon.keep |= file.phrases("keep", file.tree.get("keep", []), lists)
        for source, swap in file.swaps(lists, synonyms):
            lexicon.swaps.setdefault(source, []).append(swap)
    return lexicon


class _File:
    """One lexicon file; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tree = read_yaml(path, words=True)
        except FileError as error:
            raise DataError(f"lexicon {error}; name a YAML file") from None
        self.tree: dict[str, Any] = self.mapping(
            "the file", tree or {}, ("lists", "keep", "same", "covers", *KINDS)
        )

    def wrong(self, key: str, problem: str) -> DataError:
        return DataError(f"lexicon {self.path}: key {key!r}: {problem}")

    def mapping(self, key: str, value: Any, known: Sequence[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, f"must be a mapping, not {value!r}")
        for name in value:
            if known is not None and name not in known:
                allowed = ", ".join(known)
                raise self.wrong(key, f"unknown key {name!r}{nearest(str(name), known)}; allowed: {allowed}")
        return value

    def strings(self, key: str, value: Any) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
            raise self.wrong(key, f"must be a list of words, not {value!r}")
        return value

    def lists(self) -> dict[str, list[str]]:
        named = self.mapping("lists", self.tree.get("lists", {}))
        return {name: self.strings(f"lists.{name}", value) for name, value in named.items()}

    def phrases(self, key: str, value: Any, lists: Mapping[str, list[str]]) -> set[Phrase]:
        """Phrases in lower case; a ``$name`` is replaced by each word of that list, one phrase per word."""
        found: set[Phrase] = set()
        for text in self.strings(key, value):
            choices: list[list[Phrase]] = []
            for part in text.lower().split():
                if not part.startswith("$"):
                    choices.append([(part,)])
                elif part[1:] in lists:
                    choices.append([tuple(word.lower().split()) for word in lists[part[1:]]])
                else:
                    hint = nearest(part[1:], lists)
                    raise self.wrong(key, f"{part!r} names no list{hint}; known: {', '.join(sorted(lists))}")
            found |= {tuple(itertools.chain(*combined)) for combined in itertools.product(*choices)}
        return found

    def groups(self, key: str) -> list[Any]:
        value = self.tree.get(key, [])
        if not isinstance(value, list):
            raise self.wrong(key, f"must be a list of groups, not {value!r}")
        return value

    def synonyms(self) -> list[frozenset[Phrase]]:
        """Sets of phrases that may be true at the same time, from ``same`` and ``covers``."""
        together = [self.strings(f"same[{i}]", group) for i, group in enumerate(self.groups("same"))]
        for wide, narrow in self.mapping("covers", self.tree.get("covers", {})).items():
            together += [[wide, entry] for entry in self.strings(f"covers.{wide}", narrow)]
        return [frozenset(form for entry in group for form in _forms(entry) if form) for group in together]

    def swaps(
        self, lists: Mapping[str, list[str]], synonyms: Sequence[frozenset[Phrase]]
    ) -> Iterator[tuple[Phrase, Swap]]:
        for kind in KINDS:
            for i, group in enumerate(self.groups(kind)):
                key = f"{kind}[{i}]"
                sources, targets, context = self._group(key, group, lists)
                for source, target in itertools.product(sources, targets):
                    means = frozenset(filter(None, target))
                    means = means.union(*(same for same in synonyms if same & means))
                    for old, new in zip(source, target, strict=True):
                        if old and new:
                            yield old, Swap(kind, " ".join(new), means, context)

    def _group(
        self, key: str, group: Any, lists: Mapping[str, list[str]]
    ) -> tuple[list[list[Phrase]], list[list[Phrase]], Context]:
        if isinstance(group, list):
            group = {"words": group}
        self.mapping(key, group, _GROUP_KEYS)
        if ("words" in group) == ("from" in group) or ("from" in group) != ("to" in group):
            raise self.wrong(key, "needs either 'words' or both 'from' and 'to'")
        pair = ("words", "words") if "words" in group else ("from", "to")
        sides = []
        for name in pair:
            sides.append([_forms(entry) for entry in self.strings(f"{key}.{name}", group[name])])
        if len({len(entry) for side in sides for entry in side}) != 1:
            raise self.wrong(key, f"entries need the same number of forms (dog/dogs): {group!r}")
        alone = {"true": True, "false": False}.get(str(group.get("alone")))
        if "alone" in group and alone is None:
            raise self.wrong(f"{key}.alone", f"must be true or false, not {group['alone']!r}")
        near = {
            side: frozenset(self.phrases(f"{key}.{side}", group[side], lists))
            for side in _CONDITIONS
            if side in group
        }
        return sides[0], sides[1], Context(**near, alone=alone)


def _forms(entry: str) -> list[Phrase]:
    """The forms of an entry such as ``dog/dogs``, as phrases; ``-`` is a form that does not exist."""
    return [() if form.strip() == "-" else tuple(form.lower().split()) for form in entry.split("/")]
