"""Encoded rows for display: the prompt's text, and the trained tokens of each response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from cwdpo.data.encode.encoder import EncodedCompletion, Encoder
from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.videos import decoded

LONG_RUN = 4
"""At least this many equal tokens in sequence (image tokens) are printed once, with their number."""


@dataclass(frozen=True)
class ShownResponse:
    """One response. ``tokens``: texts of all trained tokens, with the end token.

    ``span``: half-open range of tokens that differ from chosen; ``None`` for chosen itself. ``other_images``: the
    response is to images of its own.
    """

    name: str
    tokens: tuple[str, ...]
    span: tuple[int, int] | None = None
    other_images: bool = False


@dataclass(frozen=True)
class ShownRow:
    """One row. ``prompt``: text of the prompt's tokens, which are not trained. ``images``: (width, height) in pixels.

    ``videos``: (frames that are kept, width, height) of each video.

    ``problem``: why the row cannot be encoded; then the other fields are empty.
    """

    where: str
    prompt: str = ""
    prompt_tokens: int = 0
    images: tuple[tuple[int, int], ...] = ()
    videos: tuple[tuple[int, int, int], ...] = ()
    responses: tuple[ShownResponse, ...] = ()
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as a dictionary."""
        return asdict(self)


def shown_rows(encoder: Encoder, examples: Iterable[Example]) -> Iterator[ShownRow]:
    """The examples as they are encoded for training."""
    for example in examples:
        where = example.where or example.id
        try:
            sets = [encoder.encode(example, negatives) for negatives in ("rejected", "gentle")]
            sizes = tuple(image.open().size for image in example.images)
            shapes = [decoded(video).frames.shape for video in example.videos]
        except DataError as error:
            yield ShownRow(where, problem=str(error))
            continue
        row, gentle = sets
        negatives = [*_numbered("rejected", row.negatives), *_numbered("gentle", gentle.negatives)]
        yield ShownRow(
            where,
            _prompt_text(encoder.tokenizer, row.prompt.input_ids),
            len(row.prompt.input_ids),
            sizes,
            tuple((n, width, height) for n, height, width, _ in shapes),
            (
                ShownResponse("chosen", token_texts(encoder.tokenizer, row.chosen.ids)),
                *(
                    ShownResponse(name, token_texts(encoder.tokenizer, c.ids), c.span, c.prompt is not None)
                    for name, c in negatives
                ),
            ),
        )


def _numbered(name: str, completions: Sequence[EncodedCompletion]) -> Iterator[tuple[str, EncodedCompletion]]:
    for i, completion in enumerate(completions):
        yield name if len(completions) == 1 else f"{name} {i + 1}", completion


def _prompt_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The prompt's text; repeated equal tokens are written once with their number."""
    parts: list[str] = []
    plain: list[int] = []
    for token, run in groupby(ids):
        n = len(list(run))
        if n < LONG_RUN:
            plain += [token] * n
            continue
        parts += [_decode(tokenizer, plain), f"{_decode(tokenizer, [token])} (x {n})"]
        plain = []
    return "".join([*parts, _decode(tokenizer, plain)])


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token. If a character has several tokens, the last one has the text and the others are empty."""
    texts, said = [], ""
    for n in range(1, len(ids) + 1):
        whole = _decode(tokenizer, ids[:n])
        if whole.endswith("\ufffd") and n < len(ids):  # an incomplete character
            texts.append("")
            continue
        texts.append(whole[len(said) :] if whole.startswith(said) else _decode(tokenizer, [ids[n - 1]]))
        said = whole
    return tuple(texts)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )  # fmt: skip
