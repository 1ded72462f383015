"""Tokenizers for the caption metrics, and pycocoevalcap's scorers. Only the PTB tokenizer needs Java."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any, Literal

from cwdpo.errors import MissingPackageError, optional_package
from cwdpo.metrics.base import Answer, references_of

Tokenizer = Literal["simple", "ptb"]
# Splits contractions and drops punctuation like the PTB tokenizer of the COCO evaluation.
_WORD = re.compile(
    r"n't\b|'(?:s|m|d|ll|re|ve)\b|[^\W_]+(?:[-'][^\W_]+)*?(?=n't\b|'(?:s|m|d|ll|re|ve)\b)|[^\W_]+(?:-[^\W_]+)*"
)


def scorer(module: str, metric: str) -> Any:
    """Import a module of pycocoevalcap.

    Raises:
        MissingPackageError: it is not installed.
    """
    return optional_package(f"pycocoevalcap.{module}", f"metric {metric}", "pip install 'cwdpo[captions]'")


def need_java(feature: str) -> None:
    """Raise an error if Java is not installed; for features whose library starts a Java program.

    Raises:
        MissingPackageError: no ``java`` on the path.
    """
    if shutil.which("java") is None:
        raise MissingPackageError(
            f"{feature} starts a Java program, but there is no 'java' on the path: install a JRE, e.g. "
            "apt-get install default-jre-headless"
        )


def simple_tokens(text: str) -> str:
    """Lower-case words joined by spaces, without punctuation.

    >>> simple_tokens("It's a red-brown dog, isn't it?")
    "it 's a red-brown dog is n't it"
    """
    return " ".join(_WORD.findall(text.lower()))


def tokenized(
    answers: Sequence[Answer], tokenizer: Tokenizer, metric: str
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and responses by index, tokenized, in the form that pycocoevalcap's scorers take."""
    references = {i: references_of(a) for i, a in enumerate(answers)}
    responses = {i: [a.text] for i, a in enumerate(answers)}
    if tokenizer == "simple":
        return _each(references, simple_tokens), _each(responses, simple_tokens)
    need_java(f"metric {metric} with tokenizer ptb")
    ptb = scorer("tokenizer.ptbtokenizer", metric).PTBTokenizer()

    def run(texts: dict[int, list[str]]) -> dict[int, list[str]]:
        # The tokenizer would drop an empty line and shift all later ones.
        return dict(
            ptb.tokenize({i: [{"caption": t.strip() or "."} for t in own] for i, own in texts.items()})
        )

    return run(references), run(responses)


def _each(texts: dict[int, list[str]], change: Any) -> dict[int, list[str]]:
    return {i: [change(t) for t in own] for i, own in texts.items()}
