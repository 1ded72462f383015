"""A judge that asks a vision-language model on an OpenAI-compatible server.

It asks which of two responses is better, in both orders, or whether a single response is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path

from pydantic import Field

from cwdpo.completions_api import Ask
from cwdpo.errors import ServerError, optional_package
from cwdpo.files.writing import write_text
from cwdpo.judging.base import WORTH, Judge, Verdict
from cwdpo.records import Example, Message
from cwdpo.remote import Client, ServerSettings

QUESTION = (
    "You see an image, a request about it, and two responses, A and B. Which response is better: more correct "
    "about what the image shows, without anything that is not there, and more helpful?"
)
RIGHT_QUESTION = (
    "Here is a request about the image, a response that is known to be good, and another response. Is the other "
    "response fully correct too: does it answer the request, and does it say nothing that the image does not show?"
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
    # In "a dog" the "a" is an article, not the answer A.
    if word == "a" and text.strip(" \n*\"'().:").lower() != "a":
        return None
    return word[0].upper() if word.upper() in ("A", "B") else "T"


class VlmJudge(Judge):
    """Asks a model which of two responses is better, or whether a response is right.

    Scores: for each pair of candidates of a prompt the model is asked twice, once with each candidate first. A
    candidate that is preferred once and not preferred once has a tie. The score of a candidate is its mean over its
    pairs (win 1, tie 0.5, loss 0). If an answer names neither a response nor a tie, its pair is bad and is left out. A
    candidate without any pair left has no score.

    Right: the model is asked whether the response is right, given the chosen response as a good example. It must
    answer yes or no; after any other answer it is not known whether the response is right.

    Every answer is stored at once, so that an interrupted run requests only the missing ones. Pairs are written to
    ``transcript.jsonl``.

    Args:
        server: settings of the server, see :class:`cwdpo.remote.ServerSettings`; ``max_usd`` limits the cost.
        question: the question about two responses.
        right_question: the question about one response.
        max_tokens: largest number of tokens in an answer.
    """

    server: ServerSettings = Field(description="the server with the model")
    question: str = Field(QUESTION, description="the question about two responses")
    right_question: str = Field(RIGHT_QUESTION, description="the question about one response")
    max_tokens: int = Field(8, gt=0, description="largest number of tokens in an answer")

    def check(self, examples: Sequence[Example]) -> None:
        """Check that the client's package is installed.

        Raises:
            MissingPackageError: the ``openai`` package is not installed.
        """
        optional_package("openai", "judge vlm", "pip install 'cwdpo[server]'")

    def scores(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> list[list[float | None]]:
        """[B][n] mean points of each candidate against the others, 0 to 1; ``None`` if all its pairs are bad.

        Raises:
            ServerError: the server does not answer, or the estimate is above ``max_usd``.
            MissingPackageError: the ``openai`` package is not installed.
        """
        pairs = _pairs(examples, candidates)
        replies = self._client(store).ask(self._asks(examples, candidates))
        worth: list[list[list[float]]] = [[[] for _ in own] for own in candidates]
        rows = []
        for m, (k, i, j) in enumerate(pairs):
            first, second = replies[m].text, replies[len(pairs) + m].text
            verdict = decide(first, second)
            if verdict != "bad":
                worth[k][i].append(WORTH[verdict])
                worth[k][j].append(1 - WORTH[verdict])
            rows.append(
                {
                    "id": examples[k].id, "prompt": examples[k].prompt_text, "ours": candidates[k][i],
                    "theirs": candidates[k][j], "ours_first": first, "theirs_first": second, "verdict": verdict,
                }
            )  # fmt: skip
        if store is not None:
            _append_new(store / "transcript.jsonl", rows)
        return [[sum(w) / len(w) if w else None for w in own] for own in worth]

    def right(
        self, examples: Sequence[Example], texts: Sequence[str], *, store: Path | None = None
    ) -> list[bool | None]:
        """Whether each response is right; ``None`` if the answer is neither yes nor no.

        Raises:
            ServerError: the server does not answer, or the estimate is above ``max_usd``.
            MissingPackageError: the ``openai`` package is not installed.
        """
        asks = [
            self._ask(
                e,
                f"{self.right_question}\n\nRequest: {e.prompt_text}\nGood response: {e.chosen.text}\n"
                f"Other response: {text}\n\nAnswer with one word, yes or no.",
            )
            for e, text in zip(examples, texts, strict=True)
        ]
        words = [reply.text.strip().strip("*\"'.").lower() for reply in self._client(store).ask(asks)]
        return [True if w.startswith("yes") else False if w.startswith("no") else None for w in words]

    def estimate(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> str:
        """The number of requests and tokens, and the cost, of :meth:`scores`; nothing is sent."""
        return str(self._client(store).estimate(self._asks(examples, candidates)))

    @cached_property
    def _clients(self) -> dict[Path | None, Client]:
        return {}

    def _client(self, store: Path | None) -> Client:
        # A client reads the stored answers when it is created, so each folder gets one client for all calls.
        if store not in self._clients:
            self._clients[store] = Client(self.server, None if store is None else store / "answers.jsonl")
        return self._clients[store]

    def _asks(self, examples: Sequence[Example], candidates: Sequence[Sequence[str]]) -> list[Ask]:
        """The requests of all pairs in the given order, then of all pairs in the opposite order."""
        pairs = _pairs(examples, candidates)
        turned = [(k, j, i) for k, i, j in pairs]
        return [
            self._ask(
                examples[k],
                f"{self.question}\n\nRequest: {examples[k].prompt_text}\n\nResponse A: {candidates[k][i]}\n\n"
                f"Response B: {candidates[k][j]}\n\n"
                "Answer with one letter: A, B, or T if they are equally good.",
            )
            for k, i, j in (*pairs, *turned)
        ]

    def _ask(self, example: Example, text: str) -> Ask:
        if example.videos:
            raise ServerError(
                f"{example.where or example.id}: a prompt with a video is not sent to a judge: leave such rows out, or "
                "use another judge"
            )
        parts = (*[None] * len(example.images), text)
        return Ask((Message("user", parts),), example.images, max_tokens=self.max_tokens)


def _pairs(examples: Sequence[Example], candidates: Sequence[Sequence[str]]) -> list[tuple[int, int, int]]:
    """All pairs of candidates of each prompt, as index triples (prompt, candidate, candidate)."""
    return [
        (k, i, j)
        for k, (_, own) in enumerate(zip(examples, candidates, strict=True))
        for i, j in combinations(range(len(own)), 2)
    ]


def _append_new(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Append the rows that are not in the file yet; a pair judged again from stored answers is not repeated."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    known = set(old.split("\n"))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, old + "".join(f"{line}\n" for line in lines if line not in known))


def decide(ours_first: str, theirs_first: str) -> Verdict:
    """The verdict from the answers in both orders: a win if both prefer it, or one does and the other says tie."""
    worth = {"A": 1, "T": 0, "B": -1}
    first, second = read(ours_first), read(theirs_first)
    if first is None or second is None:
        return "bad"
    total = worth[first] - worth[second]
    return "win" if total > 0 else "loss" if total < 0 else "tie"
