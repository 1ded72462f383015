"""Typed access to the parts of a row: texts, images, negatives. Shared by every format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from cwdpo.data.images import ImageFolder
from cwdpo.data.problems import RowError
from cwdpo.errors import nearest
from cwdpo.records import Completion, Example, ImageRef, Message, Origin

# What models write into their input where a picture or film stands; as plain text it would be read as one more.
PLACEHOLDERS = (
    "<image>",
    "<|image|>",
    "<|image_pad|>",
    "<video>",
    "<|video_pad|>",
    "<|video|>",
    "<|vision_start|>",
    "<start_of_image>",
    "<image_soft_token>",
    "<fake_token_around_image>",
    "<IMG_CONTEXT>",
    "[IMG]",
)
_COMPLETION_KEYS = ("text", "kind", "origin", "made")
IMAGE_KEYS = ("images", "image", "img_path")
"""A list of pictures, or one picture (``img_path`` in the data of mDPO and VLFeedback)."""


def image_key(values: Mapping[str, Any]) -> str | None:
    """The key under which a row has its pictures; ``None`` for a row without."""
    return next((key for key in IMAGE_KEYS if values.get(key) is not None), None)


@dataclass(frozen=True)
class ReadOptions:
    """What rows do not say themselves."""

    default_prompt: str = "Describe the image."
    captions_per_image: int = 1


@dataclass
class Row:
    """One row on its way to an Example. Keys whose value is null count as absent.

    ``dropped`` collects what is wrong with single negatives: those cost the negative, not the row.
    """

    values: Mapping[str, Any]
    file: str
    number: int
    folder: ImageFolder
    options: ReadOptions
    dropped: list[RowError] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def take(self, key: str, allowed: str) -> Any:
        """The value of a key that must be there; ``allowed`` says what belongs there."""
        self.used.add(key)
        if not self.has(key):
            raise RowError(
                "missing-key",
                key,
                f"the key {key!r} is missing or null; allowed: {allowed}",
                f"add {key!r}, or name another format by data.format",
            )
        return self.values[key]

    def example(
        self,
        prompt: tuple[Message, ...],
        images: tuple[ImageRef, ...],
        chosen: str,
        rejected: Iterable[tuple[str, Completion]] = (),
        *,
        references: tuple[str, ...] | None = None,
        example_id: str | None = None,
    ) -> Example:
        """The Example of this row, with our own optional columns read and every key left over in ``extra``.

        ``example_id`` is for formats that make several examples of one row; else the row's ``id`` counts.
        """
        if not chosen.strip():
            raise RowError(
                "empty-chosen", "chosen", "the chosen response is empty", "fill it or drop the row"
            )
        own = self._completions("negatives")
        described = {completion.text.strip() for _, completion in own}
        # `negatives` may describe what stands in `rejected` for readers that know only TRL's columns.
        negatives = [*((k, c) for k, c in rejected if c.text.strip() not in described), *own]
        gentle = self._completions("gentle")
        if references is None:
            references = self._references()
        return Example(
            id=example_id if example_id is not None else self.given_id() or self.default_id(),
            images=images,
            prompt=prompt,
            chosen=Completion(chosen),
            rejected=self._usable(negatives, chosen),
            gentle=self._usable(gentle, chosen),
            references=references,
            where=f"{self.file}:{self.number}",
            extra={k: v for k, v in self.values.items() if k not in self.used and v is not None},
        )

    def given_id(self) -> str | None:
        """The row's own ``id``, if it has one."""
        self.used.add("id")
        if not self.has("id"):
            return None
        value = self.values["id"]
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise wrong_type("id", value, "a string or a whole number")
        return plain_text(str(value), "id")

    def default_id(self) -> str:
        """File and row, for rows without ``id``."""
        return f"{Path(self.file).stem}#{self.number}"

    def _references(self) -> tuple[str, ...]:
        if not self.has("references"):
            self.used.add("references")
            return ()
        return tuple(text_list(self.take("references", "a list of strings"), "references"))

    def _completions(self, key: str) -> list[tuple[str, Completion]]:
        if not self.has(key):
            self.used.add(key)
            return []
        allowed = "a list of strings or of {text, kind, origin, made}"
        values = self.take(key, allowed)
        if not isinstance(values, list):
            raise wrong_type(key, values, allowed)
        return [(f"{key}[{i}]", _completion(v, f"{key}[{i}]")) for i, v in enumerate(values)]

    def _usable(self, candidates: Iterable[tuple[str, Completion]], chosen: str) -> tuple[Completion, ...]:
        """The negatives that are neither empty nor the chosen response; the others are reported."""
        kept = []
        for key, negative in candidates:
            if not negative.text.strip():
                self.dropped.append(
                    RowError(
                        "empty-rejected",
                        key,
                        "the negative is empty; it was left out",
                        "fill it, or remove it from the row",
                    )
                )
            elif negative.text.strip() == chosen.strip():
                self.dropped.append(
                    RowError(
                        "chosen-equals-rejected",
                        key,
                        "the negative equals the chosen response; it was left out",
                        "give a response that differs, or remove it from the row",
                    )
                )
            else:
                kept.append(negative)
        return tuple(kept)

    def images(self) -> tuple[ImageRef, ...]:
        """The pictures of ``images`` (a list), ``image`` or ``img_path`` (one); none when all are absent."""
        self.used |= set(IMAGE_KEYS)
        given = [key for key in IMAGE_KEYS if self.has(key)]
        if len(given) > 1:
            raise RowError(
                "two-image-keys",
                given[0],
                f"both {given[1]!r} and {given[0]!r} are set; allowed: one of {', '.join(IMAGE_KEYS)}",
                "keep one",
            )
        if not given:
            return ()
        values = self.values[given[0]]
        if given[0] != "images":
            if isinstance(values, list):
                raise wrong_type(given[0], values, "one image", "call a list of images 'images'")
            return (self.folder.take(values, given[0]),)
        if not isinstance(values, list):
            raise wrong_type(
                "images",
                values,
                "a list of images",
                'write "images": [...] for a list, or "image" for one image',
            )
        return tuple(self.folder.take(v, f"images[{i}]") for i, v in enumerate(values))


def wrong_type(key: str, value: Any, allowed: str, remedy: str = "") -> RowError:
    """A value of the wrong type, with what belongs there."""
    shown = repr(value)[:60]
    message = f"{type(value).__name__} ({shown}); allowed: {allowed}"
    return RowError("wrong-type", key, message, remedy or f"make it {allowed}")


def plain_text(value: Any, key: str) -> str:
    """``value`` as a string that a tokenizer can take and that hides no image.

    Raises:
        RowError: not a string, half a surrogate pair, or a literal image placeholder.
    """
    if not isinstance(value, str):
        raise wrong_type(key, value, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            "bad-text", key, "half of a surrogate pair, which no UTF-8 text can hold", "repair the encoding"
        ) from None
    found = next((p for p in PLACEHOLDERS if p in value), None)
    if found is not None:
        raise RowError(
            "placeholder-in-text",
            key,
            f"the text holds a literal {found!r}, which the model would read as a picture or film",
            'write the turn as blocks ({"type": "image"}, {"type": "text", "text": ...}), or remove it',
        )
    return value


def text_list(value: Any, key: str) -> list[str]:
    """A list of strings, each fit for a tokenizer."""
    if not isinstance(value, list):
        raise wrong_type(key, value, "a list of strings")
    return [plain_text(v, f"{key}[{i}]") for i, v in enumerate(value)]


def _completion(value: Any, key: str) -> Completion:
    if isinstance(value, str):
        return Completion(plain_text(value, key))
    if not isinstance(value, dict):
        raise wrong_type(key, value, "a string or {text, kind, origin, made}")
    unknown = next((k for k in value if k not in _COMPLETION_KEYS), None)
    if unknown is not None:
        raise RowError(
            "unknown-key",
            f"{key}.{unknown}",
            f"unknown key{nearest(unknown, _COMPLETION_KEYS)}; allowed: {', '.join(_COMPLETION_KEYS)}",
            "rename or remove it; notes of your own belong in 'made'",
        )
    origin: Any = value.get("origin") or "dataset"
    if origin not in get_args(Origin):
        raise RowError(
            "unknown-origin",
            f"{key}.origin",
            f"{str(origin)[:60]!r}; allowed: {', '.join(get_args(Origin))}",
            "use one of these",
        )
    made = value.get("made") or {}
    if not isinstance(made, dict):
        raise wrong_type(f"{key}.made", made, "an object")
    kind = plain_text(value.get("kind") or "", f"{key}.kind")
    return Completion(plain_text(value.get("text"), f"{key}.text"), origin=origin, kind=kind, made=made)
