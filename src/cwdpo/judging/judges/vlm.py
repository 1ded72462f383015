"""A vision-language model behind any OpenAI-compatible server, asked in both orders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from cwdpo.judging.base import Judge, Verdict
from cwdpo.records import Example, Message
from cwdpo.remote import Ask, Client, ServerSettings
from cwdpo.rundir import write_text

QUESTION = (
    "You see an image, a request about it, and two responses, A and B. Which response is better: more correct "
    "about what the image shows, without anything that is not there, and more helpful?"
)
_READ = re.compile(r"^\W*(?:response|answer|option)?\W*(A|B|T|TIE|EQUAL|BOTH)\b", re.IGNORECASE)


def read(text: str) -> str | None:
    """``A``, ``B`` or ``T`` (a tie); ``None`` for anything else.

    >>> read("B"), read("**A** is better"), read("Tie."), read("a dog")
    ('B', 'A', 'T', None)
    """
    match = _READ.match(text)
    if match is None:
        return None
    word = match[1]
    # "a dog" begins with an article, not with a verdict.
    if word == "a" and text.strip(" \n*\"'().:").lower() != "a":
        return None
    return word[0].upper() if word.upper() in ("A", "B") else "T"


class Vlm(Judge):
    """Each pair is asked twice, with the responses in either order; who wins once and loses once has tied.

    An answer that names neither response nor a tie makes its pair ``bad``. Every answer is stored as it comes, so
    that a run that was cut off asks only for what is missing; the transcript stands in ``transcript.jsonl``.

    Args:
        server: where to ask, see :class:`cwdpo.remote.ServerSettings`; ``max_usd`` refuses what costs more.
        question: what is asked.
        max_tokens: of an answer.
    """

    server: ServerSettings
    question: str = QUESTION
    max_tokens: int = Field(8, gt=0)

    def estimate(
        self, examples: Sequence[Example], ours: Sequence[str], theirs: Sequence[str], store: Path | None
    ) -> str:
        """Requests, tokens and cost before anything is sent."""
        return str(self._client(store).estimate(self._asks(examples, ours, theirs)))

    def __call__(
        self,
        examples: Sequence[Example],
        ours: Sequence[str],
        theirs: Sequence[str],
        *,
        store: Path | None = None,
    ) -> list[Verdict]:
        """One verdict per example.

        Raises:
            ServerError: the server does not answer, or the estimate is above ``max_usd``.
            MissingPackageError: the ``openai`` package is not installed.
        """
        asks = self._asks(examples, ours, theirs)
        answers = self._client(store).ask(asks)
        n = len(examples)
        verdicts: list[Verdict] = []
        rows = []
        for i, example in enumerate(examples):
            first, second = answers[i].text, answers[n + i].text
            verdict = decide(first, second)
            verdicts.append(verdict)
            rows.append(
                {
                    "id": example.id, "prompt": example.prompt_text, "ours": ours[i], "theirs": theirs[i],
                    "ours_first": first, "theirs_first": second, "verdict": verdict,
                }
            )  # fmt: skip
        if store is not None:
            path = store / "transcript.jsonl"
            old = path.read_text(encoding="utf-8") if path.is_file() else ""
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            known = set(old.splitlines())  # judged again from stored answers, a pair stands there once
            write_text(path, old + "".join(f"{line}\n" for line in lines if line not in known))
        return verdicts

    def _client(self, store: Path | None) -> Client:
        return Client(self.server, None if store is None else store / "answers.jsonl")

    def _asks(self, examples: Sequence[Example], ours: Sequence[str], theirs: Sequence[str]) -> list[Ask]:
        orders = ((ours, theirs), (theirs, ours))
        return [
            self._ask(e, a, b) for one, other in orders for e, a, b in zip(examples, one, other, strict=True)
        ]

    def _ask(self, example: Example, a: str, b: str) -> Ask:
        text = (
            f"{self.question}\n\nRequest: {example.prompt_text}\n\nResponse A: {a}\n\nResponse B: {b}\n\n"
            "Answer with one letter: A, B, or T if they are equally good."
        )
        parts = (*[None] * len(example.images), text)
        return Ask((Message("user", parts),), example.images, max_tokens=self.max_tokens)


def decide(ours_first: str, theirs_first: str) -> Verdict:
    """The verdict from both orders' answers: both must agree on a winner, or one of them says tie."""
    worth = {"A": 1, "T": 0, "B": -1}
    first, second = read(ours_first), read(theirs_first)
    if first is None or second is None:
        return "bad"
    total = worth[first] - worth[second]
    return "win" if total > 0 else "loss" if total < 0 else "tie"
