"""Minimal edits written by a language model on a server, and checked here before they are used."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cwdpo.completions_api import Ask
from cwdpo.negatives.base import known_true, normalised
from cwdpo.records import Completion, Example, Message
from cwdpo.remote import Client, ServerSettings

_ASKED = 4
_LONGEST = 8
"""Largest number of words that an edit may remove or insert."""
_WORD = re.compile(r"\s+|\S+")
_logger = logging.getLogger(__name__)

QUESTION = (
    "Below is a true description of an image{others}. Write {n} versions of it, each with one small edit that makes "
    "it false for that image: change only the word or phrase that carries one fact, keep everything else as it is, "
    "and keep it fluent and plausible. Use different kinds of edits among: {kinds}. Answer with a JSON list of "
    '{{"kind": ..., "text": ...}} and nothing else.\n\nDescription: {text}{references}'
)


class Writer:
    """Requests edits from a server; answers are cached in the user's cache folder and not requested again.

    Args:
        server: settings of the server.
        kinds: names of the kinds of edits to request.
    """

    def __init__(self, server: ServerSettings, kinds: Sequence[str]) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.kinds = tuple(kinds)
        self.client = Client(server, cache / "cwdpo" / "edits.jsonl")

    def prepare(self, examples: Sequence[Example]) -> None:
        """Request the edits of all examples, several at a time, after logging an estimate of the cost.

        Raises:
            ServerError: the estimate is above the limit, or the server does not answer.
        """
        asks = [self._ask(e) for e in examples]
        estimate = self.client.estimate(asks)
        if estimate.requests:
            _logger.warning("edits by %s: %s", self.client.settings.model, estimate)
            self.client.ask(asks)

    def edits(self, example: Example) -> list[Completion]:
        """The edits of an example's chosen response that are small, different from each other and not known true."""
        (answer,) = self.client.ask([self._ask(example)])
        taken, found = set(known_true(example)), []
        for kind, text in _listed(answer.text):
            span = differing(example.chosen.text, text)
            if span is None or normalised(text) in taken:
                continue
            taken.add(normalised(text))
            start, end, old, new = span
            made = {
                "edit": kind if kind in self.kinds else "other",
                "from": old,
                "to": new,
                "start": start,
                "end": end,
            }
            made["writer"] = self.client.settings.model
            found.append(Completion(text, "perturbed", "hard", made))
        return found

    def _ask(self, example: Example) -> Ask:
        listed = "".join(f"\nAlso true: {text}" for text in example.references)
        question = QUESTION.format(
            n=_ASKED, kinds=", ".join(self.kinds), text=example.chosen.text, references=listed,
            others=", and other true ones" if listed else "",
        )  # fmt: skip
        return Ask(
            (Message("user", (question,)),),
            temperature=0.0,
            max_tokens=64 * _ASKED + len(example.chosen.text),
        )


def _listed(answer: str) -> Iterator[tuple[str, str]]:
    """The ``(kind, text)`` of the JSON list in the answer; nothing if there is none."""
    begin, end = answer.find("["), answer.rfind("]")
    try:
        rows = json.loads(answer[begin : end + 1]) if 0 <= begin < end else []
    except ValueError:
        return
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"].strip():
            yield str(row.get("kind", "")), row["text"].strip()


def differing(chosen: str, text: str) -> tuple[int, int, str, str] | None:
    """Where the texts differ: ``(start, end, old, new)``, with ``chosen[start:end] == old`` replaced by ``new``.

    ``None`` if they do not differ, or differ by more than eight words.

    >>> differing("a red dog runs", "a blue dog runs")
    (2, 5, 'red', 'blue')
    """
    a, b = _WORD.findall(chosen), _WORD.findall(text)
    shortest = min(len(a), len(b))
    first = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    last = 0
    while last < shortest - first and a[-1 - last] == b[-1 - last]:
        last += 1
    old, new = "".join(a[first : len(a) - last]), "".join(b[first : len(b) - last])
    if normalised(old) == normalised(new) or max(len(old.split()), len(new.split())) > _LONGEST:
        return None
    start = len("".join(a[:first]))
    return start, start + len(old), old, new
