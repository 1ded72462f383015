"""Multiple choice: scored by the log-likelihood of the options, and by the generated answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from cwdpo.errors import DataError
from cwdpo.metrics._calibration import calibration
from cwdpo.metrics.base import Answer, Measured, Metric, mean_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MultipleChoice(Metric):
    """MMMU / MMBench style. A row has ``options`` (texts); its chosen response is the right option's text or letter.

    By likelihood: the option with the highest log-likelihood as a response. Its confidence is its softmax probability
    among the options; the answer-level ECE is computed from it. By answer: the letter or option that the generated
    response names. A response that names none is wrong and counted in ``mc_unread``; no random guess replaces it.

    Args:
        score: ``sum`` compares sum_logp of the options, ``mean`` compares mean_logp.
        bins: number of bins of the ECE.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text", "options"})

    score: Literal["sum", "mean"] = "sum"
    bins: int = Field(10, ge=2)

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``mc_likelihood``, ``mc_answer``, ``mc_unread`` (shares) and ``answer_ece``."""
        by_likelihood: list[float] = []
        by_answer: list[float] = []
        unread: list[float] = []
        pairs = []
        for a in answers:
            options = options_of(a)
            right = right_option(a, options)
            if len(a.option_logps) != len(options):
                raise DataError(f"{a.example.where or a.example.id}: options: not all of them were scored")
            scores = [
                s / n if self.score == "mean" else s
                for s, n in zip(a.option_logps, a.option_tokens, strict=True)
            ]
            best = max(range(len(scores)), key=scores.__getitem__)
            total = sum(math.exp(s - scores[best]) for s in scores)
            pairs.append([(1 / total, best == right)])
            by_likelihood.append(float(best == right))
            read = parsed(a.text, options)
            by_answer.append(float(read == right))
            unread.append(float(read is None))
        return [
            mean_of(
                "mc_likelihood", answers, by_likelihood, unit="share", help="most likely option is right"
            ),
            mean_of("mc_answer", answers, by_answer, unit="share", help="generated answer is right"),
            mean_of(
                "mc_unread", answers, unread, unit="share", better="lower", help="answers that name no option"
            ),
            calibration("answer_ece", answers, pairs, self.bins),
        ]


def options_of(answer: Answer) -> list[str]:
    """The texts of the options.

    Raises:
        DataError: there are fewer than two.
    """
    value = answer.example.extra.get("options")
    if isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) and v.strip() for v in value):
        return [v.strip() for v in value]
    where = answer.example.where or answer.example.id
    raise DataError(f"{where}: options: a list of at least two texts is needed, got {value!r}")


def right_option(answer: Answer, options: Sequence[str]) -> int:
    """Index of the right option: the chosen response is its letter or its text.

    Raises:
        DataError: the chosen response is neither.
    """
    found = parsed(answer.example.chosen.text, options)
    if found is None:
        where, text = answer.example.where or answer.example.id, answer.example.chosen.text
        raise DataError(
            f"{where}: chosen: {text!r} is neither one of the options {list(options)} nor the letter of one"
        )
    return found


def spelled(answer: Answer) -> list[str]:
    """The options as responses to score: letters if the chosen response is a letter, else texts."""
    options = options_of(answer)
    letter = re.fullmatch(r"\(?([A-Z])[.)]?", answer.example.chosen.text.strip())
    if letter is None or answer.example.chosen.text.strip() in options:
        return options
    return [answer.example.chosen.text.strip().replace(letter[1], LETTERS[i]) for i in range(len(options))]


def parsed(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that a response names: by its whole text, by a letter, or by containing one option's text.

    >>> parsed("The answer is (B).", ["a cat", "a dog"]), parsed("a dog", ["a cat", "a dog"]), parsed("cow", ["a", "b"])
    (1, 1, None)
    """
    stripped = _bare(text)
    for i, option in enumerate(options):
        if stripped.lower() == _bare(option).lower():
            return i
    letters = LETTERS[: len(options)]
    patterns = (
        rf"^\(?([{letters}])(?:[.):]|$|\s*$)",
        rf"\(([{letters}])\)",
        rf"(?i:answer|option|choice)(?:\s+(?i:is|would be))?\s*:?\s*\(?([{letters}])\b",
    )
    for pattern in patterns:
        match = re.search(pattern, stripped)
        if match:
            return letters.index(match[1])
    inside = [
        i
        for i, o in enumerate(options)
        if re.search(rf"(?<!\w){re.escape(_bare(o).lower())}(?!\w)", stripped.lower())
    ]
    return inside[0] if len(inside) == 1 else None


def _bare(text: str) -> str:
    return text.strip().rstrip(".").strip()
