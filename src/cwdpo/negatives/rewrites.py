"""Edits that change more than one word: two objects exchange an attribute, and negation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cwdpo.negatives.lexicon import Kind, Lexicon, Swap, Words

ATTRIBUTES = ("colour", "size", "material", "number")
_BE = ("is", "are", "was", "were")
_ARTICLES = ("a", "an")
_OWNED = (*_ARTICLES, "the", "his", "her", "its", "their", "some", "two", "three")
_DENIALS = frozenset({("not",), ("no",), ("without",), ("never",), ("none",)})


def exchanges(words: Words, references: Sequence[Words], lexicon: Lexicon) -> Iterator[tuple[int, int]]:
    """Word positions of two attributes of the same kind that can be exchanged to change the meaning.

    Each attribute must be directly before a noun: in "a red ball and a blue car", red and blue. A pair is left out if
    a reference contains what the exchanged text would say about one of the nouns.
    """
    found: list[tuple[int, Kind, list[Swap]]] = []
    for first, last, swaps in lexicon.matches(words):
        kind = swaps[0].kind
        # Before a comma, or next to an "and", an attribute shares its noun with another one ("red and blue ball").
        shared = "and" in words.lower[last : last + 1] or (
            words.lower[first - 1 : first] == ("and",) and words.lower[first - 2 : first - 1] in lexicon.swaps
        )
        if kind in ATTRIBUTES and last == first + 1 and words.run(first) > 1 and not shared:
            found.append((first, kind, swaps))
    for at, (i, kind, swaps) in enumerate(found):
        for j, kind_of_j, back in found[at + 1 :]:
            one, two = words.lower[i], words.lower[j]
            if kind != kind_of_j or j == i + 1 or words.lower[i + 1] == words.lower[j + 1]:
                continue
            # Both attributes must not be true at once, so the lexicon must list one as a replacement of the other. For
            # colours it must list both directions, or the exchange could make a blue dog.
            ways = [any(s.to == two for s in swaps), any(s.to == one for s in back)]
            if not (all(ways) if kind == "colour" else any(ways)):
                continue
            new = frozenset({(two, words.lower[i + 1]), (one, words.lower[j + 1])})
            if not any(reference.contains(new) for reference in references):
                yield i, j


def negations(words: Words, references: Sequence[Words], lexicon: Lexicon) -> Iterator[tuple[int, int, str]]:
    """Word ranges ``[first, last)`` and the negated words to put there: is -> is not, with -> without.

    Nothing if the text or a reference already contains a negation: the result might be true.
    """
    if any(reference.contains(_DENIALS) for reference in (words, *references)):
        return
    text = words.lower
    actions = {first for first, _, swaps in lexicon.matches(words) if swaps[0].kind == "action"}
    for i, word in enumerate(text[:-1]):
        after, before = text[i + 1], text[i - 1] if i else ""
        if words.run(i) < 2:
            continue
        if word in _BE and before == "there":
            if after in _ARTICLES:
                yield i, i + 2, f"{word} no"
        elif word in _BE:
            yield i, i + 1, f"{word} not"
        elif word == "with" and after in _OWNED:
            yield i, i + 1, "without"
        elif word in ("has", "have") and after in _ARTICLES:
            yield i, i + 2, f"{word} no"
        elif (
            word.endswith("ing")
            and (i in actions or word == "wearing")
            and before not in ("", *_BE, *_OWNED, "and")
        ):
            yield i, i + 1, f"not {word}"
