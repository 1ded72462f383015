"""Images with captions, as in COCO and Flickr: several true captions for each image."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from cwdpo.data.columns import present
from cwdpo.data.formats.base import Format
from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text, text_list
from cwdpo.records import Example, Message


class Captions(Format):
    """``{"image": ..., "captions": [str, ...]}``: one example for each of ``captions_per_image`` captions.

    A hash of the id decides which captions become chosen, so this does not depend on the order of rows, and with more
    captions per image the earlier ones stay. All captions are references.
    """

    columns = ("image captions",)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "image": "a.png",
            "captions": ["a cat on a red mat", "a cat sits on a mat"],
        },
    )

    def parse(self, row: Row) -> list[Example]:
        """``data.captions_per_image`` examples per row, or fewer if there are fewer captions."""
        if not present(row.values.get("image")):
            raise RowError(
                "missing-key", "image", "there is no picture; allowed: one", "add 'image', or drop the row"
            )
        images = row.images()
        captions = text_list(row.take("captions", "a list of strings"), "captions")
        if not captions or not all(caption.strip() for caption in captions):
            raise RowError(
                "empty-chosen",
                "captions",
                "no caption, or an empty one; allowed: one or more with text",
                "fill or remove the empty captions",
            )
        stem = _picture_name(row)
        draw = sorted(
            range(len(captions)), key=lambda i: blake2b(f"{stem}#{i}".encode(), digest_size=8).digest()
        )
        question = plain_text(row.options.default_prompt, "data.default_prompt")
        prompt = (Message("user", (*[None] * len(images), question)),)
        return [
            row.example(prompt, images, captions[i], references=tuple(captions), example_id=f"{stem}#{rank}")
            for rank, i in enumerate(draw[: row.options.captions_per_image])
        ]


def _picture_name(row: Row) -> str:
    given = row.given_id()
    if given is not None:
        return given
    image = row.values["image"]
    path = image.get("path") if isinstance(image, Mapping) else image
    return Path(path).stem if isinstance(path, str) and path else row.default_id()
