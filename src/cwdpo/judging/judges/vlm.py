"""A vision-language model on any OpenAI-compatible server as a judge.

It compares two responses in both orders, and says yes or no to a single one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path

from pydantic import Field

from cwdpo.errors import optional_package
from cwdpo.files.writing import write_text
from cwdpo.judging.base import WORTH, Judge, Verdict
from cwdpo.records import Example, Message
from cwdpo.remote import Ask, Client, ServerSettings

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
    # "a dog" begins with an article, not with a verdict.
    if word == "a" and text.strip(" \n*\"'().:").lower() != "a":
        return None
    return word[0].upper() if word.upper() in ("A", "B") else "T"


class VlmJudge(Judge):
    """A model is asked which of two responses is better, or whether one is right.

    Scores: each two candidates of a prompt are asked about twice, with either one first; a candidate that wins once
    and loses once has tied. A candidate's score is its mean over its pairs (win 1, tie 0.5, loss 0). An answer that
    names neither response nor a tie makes its pair bad, and the pair is left out; with two candidates none is left,
    so both have no score.

    Right: a question of its own about the response next to the chosen one, answered by yes or no; any other answer
    is not known.

    Every answer is stored as it comes, so that a run that was cut off asks only for what is missing. Pairs are
    written to ``transcript.jsonl``.

    Args:
        server: where to ask, see :class:`cwdpo.remote.ServerSettings`; ``max_usd`` refuses what costs more.
        question: what is asked about two responses.
        right_question: what is asked about one.
        max_tokens: of an answer.
    """

    server: ServerSettings = Field(description="who is asked")
    question: str = Field(QUESTION, description="what is asked about two responses")
    right_question: str = Field(RIGHT_QUESTION, description="what is asked about one response")
    max_tokens: int = Field(8, gt=0, description="of an answer")

    def check(self, examples: Sequence[Example]) -> None:
        """The client's package must be there.

        Raises:
            MissingPackageError: the ``openai`` package is not installed.
        """
        optional_package("openai", "judge vlm", "pip install 'cwdpo[server]'")

    def scores(
        self, examples: Sequence[Example], candidates: Sequence[Sequence[str]], *, store: Path | None = None
    ) -> list[list[float | None]]:
        """[B][n] mean worth of each candidate against the others, 0 to 1; ``None`` where no pair could be read.

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
        """Yes, no, or not known.

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
        """Requests, tokens and cost of :meth:`scores` before anything is sent."""
        return str(self._client(store).estimate(self._asks(examples, candidates)))

    @cached_property
    def _clients(self) -> dict[Path | None, Client]:
        return {}

    def _client(self, store: Path | None) -> Client:
        # A client reads the stored answers when it is made: one for all calls with the same folder.
        if store not in self._clients:
            self._clients[store] = Client(self.server, None if store is None else store / "answers.jsonl")
        return self._clients[store]

    def _asks(self, examples: Sequence[Example], candidates: Sequence[Sequence[str]]) -> list[Ask]:
        """The requests of all pairs in one order, then those in the other."""
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
        parts = (*[None] * len(example.images), text)
        return Ask((Message("user", parts),), example.images, max_tokens=self.max_tokens)


def _pairs(examples: Sequence[Example], candidates: Sequence[Sequence[str]]) -> list[tuple[int, int, int]]:
    """(prompt, candidate, candidate) of each two candidates of a prompt."""
    return [
        (k, i, j)
        for k, (_, own) in enumerate(zip(examples, candidates, strict=True))
        for i, j in combinations(range(len(own)), 2)
    ]


def _append_new(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Append the rows that the file lacks: judged again from stored answers, a pair is listed once."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    known = set(old.split("\n"))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, old + "".join(f"{line}\n" for line in lines if line not in known))


def decide(ours_first: str, theirs_first: str) -> Verdict:
    """The verdict from both orders' answers: both must agree on a winner, or one of them says tie."""
    worth = {"A": 1, "T": 0, "B": -1}
    first, second = read(ours_first), read(theirs_first)
    if first is None or second is None:
        return "bad"
    total = worth[first] - worth[second]
    return "win" if total > 0 else "loss" if total < 0 else "tie"
