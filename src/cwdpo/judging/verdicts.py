"""Which samples of a policy are right: the world's judge, a metric against references, or a model behind a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cwdpo.errors import DataError
from cwdpo.negatives.settings import JudgeSettings
from cwdpo.records import Example, Message
from cwdpo.remote import Ask, Client
from cwdpo.worlds.judged import judge_captions

Judge = Callable[[Sequence[Example], Sequence[str]], list[bool | None]]
"""Examples and one text for each -> right, wrong, or not known."""

QUESTION = (
    "Here is a request about the image, a response that is known to be good, and another response. Is the other "
    "response fully correct too: does it answer the request, and does it say nothing that the image does not show?"
)


def build_judge(
    settings: JudgeSettings, examples: Sequence[Example], store: Path | None = None
) -> Judge | None:
    """The judge that the settings name; ``None`` where inequality to chosen has to do.

    Args:
        settings: the recipe's ``negatives.judge``.
        examples: those that will be judged; ``auto`` looks whether they are the world's.
        store: file of a server's answers.

    Raises:
        DataError: the named judge needs what an example does not have.
    """
    name = settings.name
    worldly = bool(examples) and all(e.extra.get("scene") is not None for e in examples)
    if name == "none" or (name == "auto" and not worldly):
        return None
    if name in ("auto", "world"):
        return _by_world
    if name == "references":
        bare = next((e for e in examples if not e.references), None)
        if bare is not None:
            raise DataError(
                f"{bare.where or bare.id}: references: missing; negatives.judge.name = references compares samples "
                "with them: add the column, or choose another judge"
            )
        return _by_references(settings.threshold)
    assert settings.server is not None
    return _by_server(Client(settings.server, store))


def _by_world(examples: Sequence[Example], texts: Sequence[str]) -> list[bool | None]:
    return [j.all_correct for j in judge_captions(examples, texts)]


def _by_references(threshold: float) -> Judge:
    """chrF++ (characters up to 6, words up to 2; Popovic 2017) against the nearest reference."""
    from torchmetrics.functional.text import chrf_score

    def judge(examples: Sequence[Example], texts: Sequence[str]) -> list[bool | None]:
        return [
            max(float(chrf_score([text], [[ref]])) for ref in (*example.references, example.chosen.text))
            >= threshold
            for example, text in zip(examples, texts, strict=True)
        ]

    return judge


def _by_server(client: Client) -> Judge:
    def judge(examples: Sequence[Example], texts: Sequence[str]) -> list[bool | None]:
        answers = client.ask([_question(e, t) for e, t in zip(examples, texts, strict=True)])
        words = [a.text.strip().strip("*\"'.").lower() for a in answers]
        return [True if w.startswith("yes") else False if w.startswith("no") else None for w in words]

    return judge


def _question(example: Example, text: str) -> Ask:
    parts = (
        *[None] * len(example.images),
        f"{QUESTION}\n\nRequest: {example.prompt_text}\nGood response: {example.chosen.text}\n"
        f"Other response: {text}\n\nAnswer with one word, yes or no.",
    )
    return Ask((Message("user", parts),), example.images, max_tokens=8)
