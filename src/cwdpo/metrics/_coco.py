"""Tokens for the caption metrics, and pycocoevalcap's scorers. No Java unless the PTB tokenizer is asked for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any, Literal

from cwdpo.errors import MissingPackageError, optional_package
from cwdpo.metrics.base import Answer, references_of

Tokenizer = Literal["simple", "ptb"]
# Contractions are split and punctuation is dropped as the PTB tokenizer of the COCO evaluation does.
_WORD = re.compile(
    r"n't\b|'(?:s|m|d|ll|re|ve)\b|[^\W_]+(?:[-'][^\W_]+)*?(?=n't\b|'(?:s|m|d|ll|re|ve)\b)|[^\W_]+(?:-[^\W_]+)*"
)


def scorer(module: str, metric: str) -> Any:
    """A module of pycocoevalcap.

    Raises:
        MissingPackageError: it is not installed.
    """
    return optional_package(f"pycocoevalcap.{module}", f"metric {metric}", "pip install 'cwdpo[captions]'")


def need_java(feature: str) -> None:
    """Refuse a feature whose library starts a Java program where there is none.

    Raises:
        MissingPackageError: no ``java`` on the path.
    """
    if shutil.which("java") is None:
        raise MissingPackageError(
            f"{feature} starts a Java program, and there is no 'java' on the path: install a JRE, e.g. "
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
    """References and responses by number, as pycocoevalcap's scorers take them."""
    references = {i: references_of(a) for i, a in enumerate(answers)}
    responses = {i: [a.text] for i, a in enumerate(answers)}
    if tokenizer == "simple":
        return _each(references, simple_tokens), _each(responses, simple_tokens)
    need_java(f"metric {metric} with tokenizer ptb")
    ptb = scorer("tokenizer.ptbtokenizer", metric).PTBTokenizer()

    def run(texts: dict[int, list[str]]) -> dict[int, list[str]]:
        # An empty line would be lost and shift the rest.
        return dict(
            ptb.tokenize({i: [{"caption": t.strip() or "."} for t in own] for i, own in texts.items()})
        )

    return run(references), run(responses)


def _each(texts: dict[int, list[str]], change: Any) -> dict[int, list[str]]:
    return {i: [change(t) for t in own] for i, own in texts.items()}
