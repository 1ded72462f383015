"""Requests and answers of OpenAI's chat completions. Does not import torch."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

from cwdpo.errors import FileError, ServerError
from cwdpo.files.reading import parse_json
from cwdpo.records import TOOLS, VIDEO, ImageRef, Message

_MIME = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class Ask:
    """One request: a conversation with images, and settings of sampling.

    ``draw`` numbers repeated requests; ``logprobs`` asks for the log-probabilities of the answer's tokens; ``bos``: the
    server's tokenizer is to add its first token, which the chat template does not write (vLLM leaves it out otherwise).
    """

    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    draw: int = 0
    seed: int | None = None
    logprobs: bool = False
    bos: bool = False


@dataclass(frozen=True)
class Reply:
    """A server's response, and whether it ended with an end token (``stop``) or was cut (``length``).

    ``n_tokens`` and ``mean_logp`` (nats per token) are of its log-probabilities, if they were requested and given.
    """

    text: str
    ended: bool
    n_tokens: int | None = None
    mean_logp: float | None = None


def read_reply(body: bytes) -> Reply:
    """Parse a server's answer.

    Raises:
        ValueError: it is not a chat completion.
    """
    try:
        choice = parse_json(body, "the answer")["choices"][0]
        text, ended = choice["message"]["content"] or "", choice.get("finish_reason") == "stop"
        # Single surrogates are replaced: tokenizers and files refuse them.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (FileError, LookupError, TypeError, AttributeError) as error:
        start = body[:120].decode(errors="replace")
        raise ValueError(
            f"the answer is not a chat completion ({type(error).__name__}: {str(error)[:100]}): {start!r}"
        ) from None
    return Reply(text.strip(), ended, *_likelihood(choice.get("logprobs")))


def _likelihood(logprobs: Any) -> tuple[int, float] | tuple[None, None]:
    """Number and mean of an answer's log-probabilities; ``None`` if the server gives none."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    values = [t.get("logprob") for t in tokens if isinstance(t, dict)] if isinstance(tokens, list) else []
    known = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return (len(known), sum(known) / len(known)) if known and len(known) == len(values) else (None, None)


def messages_of(ask: Ask) -> list[dict[str, Any]]:
    """Messages in OpenAI's format; each image is a data URI at its place in the text.

    Raises:
        ServerError: the prompt has tools or a video, which are not sent.
    """
    if any(VIDEO in m.parts for m in ask.messages):
        raise ServerError(
            "a prompt with a video is not sent to a server: leave such rows out, or sample here"
        )
    if any(m.more or m.role == TOOLS for m in ask.messages):
        raise ServerError("a prompt with tools is not sent to a server: leave such rows out, or sample here")
    images = iter(ask.images)
    return [
        {
            "role": m.role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image_url", "image_url": {"url": data_uri(next(images))}}
                for part in m.parts
            ],
        }
        for m in ask.messages
    ]


def data_uri(image: ImageRef) -> str:
    """The image as ``data:image/...;base64,...``; encodings other than JPEG, PNG and GIF are converted to PNG.

    Images with 16 bits per channel or transparency are converted too: a server would decode them differently than
    training does.
    """
    data = image.encoded()
    mime = next((m for start, m in _MIME.items() if data.startswith(start)), None)
    if mime is None or image.is_altered():
        buffer = io.BytesIO()
        image.open().save(buffer, "PNG")
        data, mime = buffer.getvalue(), "image/png"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
