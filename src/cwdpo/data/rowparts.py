"""Typed access to the parts of a row: texts, images, negatives. All formats use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cwdpo.data.columns import IMAGE_KEYS, VIDEO_KEYS, present
from cwdpo.data.completions import completion_of, margins_of, with_margin
from cwdpo.data.images import ImageFolder
from cwdpo.data.problems import RowError
from cwdpo.data.texts import plain_text, text_list, wrong_type
from cwdpo.records import SAMPLING, Completion, Example, ImageRef, Message, VideoRef, VideoSampling


@dataclass(frozen=True)
class ReadOptions:
    """Settings for reading that are not in the rows."""

    default_prompt: str = "Describe the image."
    captions_per_image: int = 1
    ignore: frozenset[str] = frozenset()
    """Columns to ignore."""
    video: VideoSampling = SAMPLING


@dataclass
class Row:
    """One row that is turned into an Example. Keys with the value null are treated as absent.

    ``dropped`` collects the errors of single negatives: the negative is left out, not the row. ``used`` are the columns
    that were read. ``pictures`` are the row's images and videos by key (``images[0]``).
    """

    values: Mapping[str, Any]
    file: str
    number: int
    folder: ImageFolder
    options: ReadOptions
    dropped: list[RowError] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    pictures: dict[str, ImageRef | VideoRef] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def take(self, key: str, allowed: str) -> Any:
        """The value of a required key; ``allowed`` describes the allowed values, for the error message."""
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
        videos: tuple[VideoRef, ...] = (),
    ) -> Example:
        """The Example of this row; reads this project's optional columns and puts all unused keys into ``extra``.

        ``example_id`` is for formats that make several examples of a row; default: the row's ``id``.
        """
        if not chosen.strip():
            raise RowError(
                "empty-chosen", "chosen", "the chosen response is empty", "fill it or drop the row"
            )
        negatives = self._negatives(self._under_rejected_images(list(rejected), chosen))
        gentle = self._completions("gentle")
        if references is None:
            references = self._references()
        return Example(
            id=example_id if example_id is not None else self.given_id() or self.default_id(),
            images=images,
            prompt=prompt,
            chosen=Completion(chosen),
            rejected=self._usable(negatives, chosen, images),
            gentle=self._usable(gentle, chosen, images),
            references=references,
            where=f"{self.file}:{self.number}",
            extra={k: v for k, v in self.values.items() if k not in self.used and v is not None},
            videos=videos,
        )

    def _under_rejected_images(
        self, rejected: list[tuple[str, Completion]], chosen: str
    ) -> list[tuple[str, Completion]]:
        """The rejected responses as responses to ``rejected_images``; without any, chosen's text is rejected there.

        As in ms-swift: a pair may differ in its text, in its images, or in both.
        """
        key = "rejected_images"
        if not present(self.values.get(key)):
            return rejected
        values = self.take(key, "a list of images")
        if not isinstance(values, list):
            raise wrong_type(key, values, "a list of images")
        images = tuple(self.take_image(value, f"{key}[{i}]") for i, value in enumerate(values))
        return [(where, replace(c, images=images)) for where, c in rejected or [(key, Completion(chosen))]]

    def _negatives(self, rejected: list[tuple[str, Completion]]) -> list[tuple[str, Completion]]:
        """The rejected responses and those of ``negatives``, each once, with reward margins from scores."""
        columns, margins = margins_of(self.values, len(rejected))
        self.used |= columns
        margin = {c.text.strip(): m for (_, c), m in zip(rejected, margins, strict=False)}
        others = {c.text.strip(): c.images for _, c in rejected}
        own = [
            (key, c if c.images is not None else replace(c, images=others.get(c.text.strip())))
            for key, c in self._completions("negatives")
        ]
        described = {c.text.strip() for _, c in own}
        # `rejected` may repeat an entry of `negatives`, for readers that know only TRL's columns.
        every = [*((key, c) for key, c in rejected if c.text.strip() not in described), *own]
        return [(key, with_margin(c, margin.get(c.text.strip()))) for key, c in every]

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
        """An id made of file and row, for rows without ``id``."""
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
        allowed = "a list of strings or of {text, kind, origin, made, images}"
        values = self.take(key, allowed)
        if not isinstance(values, list):
            raise wrong_type(key, values, allowed)
        return [(f"{key}[{i}]", self._completion(v, f"{key}[{i}]")) for i, v in enumerate(values)]

    def _completion(self, value: Any, key: str) -> Completion:
        completion = completion_of(value, key)
        own = value.get("images") if isinstance(value, Mapping) else None
        if own is None:
            return completion
        if not isinstance(own, list):
            raise wrong_type(f"{key}.images", own, "a list of images")
        images = tuple(self.take_image(image, f"{key}.images[{i}]") for i, image in enumerate(own))
        return replace(completion, images=images)

    def _usable(
        self, candidates: Iterable[tuple[str, Completion]], chosen: str, images: tuple[ImageRef, ...]
    ) -> tuple[Completion, ...]:
        """The negatives that are neither empty nor equal to chosen; the others are added to ``dropped``.

        Raises:
            RowError: a negative has another number of images than the prompt.
        """
        kept = []
        for key, candidate in candidates:
            # The images of the prompt are written out in ms-swift's `rejected_images`.
            negative = replace(candidate, images=None) if candidate.images == images else candidate
            if negative.images is not None and not negative.kind:
                negative = replace(negative, kind="image")
            if negative.images is not None and len(negative.images) != len(images):
                raise RowError(
                    "image-count",
                    key,
                    f"the rejected side has {len(negative.images)} images, the prompt has {len(images)}",
                    "give both sides the same number of images",
                )
            if not negative.text.strip():
                self.dropped.append(
                    RowError(
                        "empty-rejected",
                        key,
                        "the negative is empty; it was left out",
                        "fill it, or remove it from the row",
                    )
                )
            elif negative.images is None and negative.text.strip() == chosen.strip():
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
        """The images in ``images`` (a list), ``image`` or ``img_path`` (one, or a list); empty if all are absent.

        In the rows of MMPR and LLaVA with several images, ``image`` is a list.
        """
        return tuple(self.take_image(value, key) for key, value in self._listed(IMAGE_KEYS, "image"))

    def videos(self) -> tuple[VideoRef, ...]:
        """The videos in ``videos`` (a list) or ``video`` (one, or a list); empty if both are absent."""
        return tuple(self.take_video(value, key) for key, value in self._listed(VIDEO_KEYS, "video"))

    def _listed(self, keys: tuple[str, ...], medium: str) -> list[tuple[str, Any]]:
        """``(place, value)`` of each value of the one column of ``keys`` that is set; the first must be a list."""
        self.used |= set(keys)
        given = [key for key in keys if present(self.values.get(key))]
        if len(given) > 1:
            raise RowError(
                f"two-{medium}-keys",
                given[0],
                f"both {given[1]!r} and {given[0]!r} are set; allowed: one of {', '.join(keys)}",
                "keep one",
            )
        if not given:
            return []
        key, values = given[0], self.values[given[0]]
        if isinstance(values, list):
            return [(f"{key}[{i}]", value) for i, value in enumerate(values)]
        if key == keys[0]:
            raise wrong_type(
                key,
                values,
                f"a list of {medium}s",
                f'write "{medium}s": [...] for a list, or "{medium}" for one {medium}',
            )
        return [(key, values)]

    def take_image(self, value: Any, key: str) -> ImageRef:
        """One image of the row; ``key`` is the place of its value in the row.

        Raises:
            RowError: see :meth:`cwdpo.data.images.ImageFolder.take`.
        """
        image = self.folder.take(value, key)
        self.pictures[key] = image
        return image

    def take_video(self, value: Any, key: str) -> VideoRef:
        """One video of the row; ``key`` is the place of its value in the row.

        Raises:
            RowError: see :meth:`cwdpo.data.video_folder.VideoFolder.take`.
        """
        video = self.folder.videos.take(value, key, self.options.video)
        self.pictures[key] = video
        return video
