"""Columns that change the meaning of a row. If the format does not read such a column, the row is an error.

Any other column that a format does not read is kept for judges and metrics (``Example.extra``), and listed by
``cwdpo validate`` and at the start of ``train``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from functools import lru_cache
from typing import Any

from cwdpo.data.media import holds_media, looks_like_a_picture
from cwdpo.data.problems import RowError, shown

OTHERWISE = "or ignore the column: add it to data.ignore_columns (validate: --ignore)"
FOR_JUDGES = frozenset({"scene", "objects", "options", "kind", "category", "provenance"})
"""Columns in ``Example.extra`` that metrics, judges and probe sets of the package use."""
IMAGE_KEYS = ("images", "image", "img_path")
"""A list of images, or one image (``img_path`` in the data of mDPO and VLFeedback)."""

VIDEO_KEYS = ("videos", "video")
"""A list of videos, or one video."""

_VIDEO = (
    "a video",
    "videos are read from 'videos' (a list) or 'video' in rows of trl, llamafactory and ms_swift",
)
_SECOND_VIDEO = (
    "a video of one of the two responses",
    "pairs whose videos differ are not read: leave such rows out",
)
_AUDIO = ("sound", "sound is not read: leave such rows out")
_SECOND = (
    "pictures of one of the two responses",
    "a pair whose pictures differ is read from rows of trl and ms_swift: the prompt's in 'images', those of the "
    "rejected side in 'rejected_images' (a list)",
)
_PLACES = (
    "places in the picture",
    "write them into the text as your model wants them, and remove the column",
)
_TOOLS = (
    "tools that the model may call",
    "tools are read from the column 'tools' of trl rows, as a list of {type: function, function: {...}}",
)
_LABEL = (
    "a label of the response",
    "single labelled responses are read as 'prompt', 'completion' and 'label' (true or false), and paired within a "
    "prompt; else make pairs of the rows, or keep those that are labelled true",
)
_VERDICT = ("which response is better", "put the better one into 'chosen' and the other into 'rejected'")
_WEIGHT = (
    "a weight of the row",
    "rows are not weighted: leave the column out, or repeat rows with an id of their own",
)
_SYSTEM = ("the system turn", "put it into the prompt as a first turn with the role 'system'")
_HISTORY = ("earlier turns", "put them into the prompt as turns")
_CONTEXT = ("a part of the question", "write it into the prompt")
_PREFIX = ("the beginning of the response", "write it into the responses: they are trained whole")
_TEMPLATE = ("settings of the chat template", "the checkpoint's own template is used: change it there")
_TOKENS = ("a row that is tokenized already", "give texts: tokens are made by the model's own processor")
_REFERENCE = (
    "reference log-probabilities",
    "they are computed here, from the policy at the start of the stage: remove the column",
)
_MORE = ("a further response", "give several rejected responses as a list in 'rejected'")

MEANING: dict[str, tuple[str, str]] = {
    **dict.fromkeys((*VIDEO_KEYS, "video_path", "video_url", "frames"), _VIDEO),
    **dict.fromkeys(("chosen_videos", "rejected_videos"), _SECOND_VIDEO),
    **dict.fromkeys(("audios", "audio", "audio_path", "audio_url", "speech", "chosen_audios", "rejected_audios"),
                    _AUDIO),
    **dict.fromkeys(("rejected_images", "rejected_image", "chosen_images", "chosen_image"), _SECOND),
    **dict.fromkeys(("bbox", "bboxes", "boxes", "points", "regions"), _PLACES),
    **dict.fromkeys(("tools", "functions", "tool_choice", "function_call"), _TOOLS),
    **dict.fromkeys(("label", "kto_tag", "desirable", "is_correct", "is_chosen", "thumbs_up"), _LABEL),
    **dict.fromkeys(("preference", "preferred", "winner", "better_response_id", "rank", "ranking", "ranks"), _VERDICT),
    **dict.fromkeys(("weight", "weights", "sample_weight", "sample_weights", "loss_weight", "loss_scale"), _WEIGHT),
    **dict.fromkeys(("system", "system_prompt", "system_message"), _SYSTEM),
    **dict.fromkeys(("history", "previous_turns", "dialogue_history"), _HISTORY),
    **dict.fromkeys(("context", "passage", "hint", "documents", "choices"), _CONTEXT),
    **dict.fromkeys(("prefix", "prefill", "assistant_prefix", "response_prefix"), _PREFIX),
    **dict.fromkeys(("chat_template", "chat_template_kwargs"), _TEMPLATE),
    **dict.fromkeys(("input_ids", "prompt_input_ids", "chosen_input_ids", "rejected_input_ids", "labels",
                     "attention_mask", "pixel_values", "completion_mask", "assistant_masks"), _TOKENS),
    **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps", "reference_chosen_logps", "reference_rejected_logps",
                     "logps"), _REFERENCE),
}  # fmt: skip
"""Column -> (what it means, what to do instead)."""

_PICTURES = frozenset(
    ("img", "imgs", "image_path", "image_paths", "image_url", "image_urls", "image_file", "file_name", "picture",
     "pictures", "photo", "photos", "jpg", "jpeg", "png", "webp")
)  # fmt: skip
_NUMBERED_PICTURE = re.compile(r"(image|img|picture)s?_?\d+")
_NUMBERED_RESPONSE = re.compile(r"(chosen|rejected|response|completion)_?\d+")


def present(value: Any) -> bool:
    """Whether a cell has a value: tables fill cells without a value with null or an empty value."""
    return value is not None and not (isinstance(value, str | bytes | list | tuple | dict) and not value)


def refuse_unread(values: Mapping[str, Any], reads: Set[str]) -> None:
    """Raise an error if a row has a column that changes its meaning and that its format does not read.

    Args:
        values: the row.
        reads: columns of :data:`MEANING` that the format reads.

    Raises:
        RowError: of kind ``column-not-read``, for the first such column.
    """
    pictured = any(present(values.get(key)) for key in (*IMAGE_KEYS, *(reads & {*VIDEO_KEYS})))
    for key, value in values.items():
        if key in IMAGE_KEYS or key in reads or not present(value):
            continue
        if (why := _why(key, value, pictured)) is not None:
            said, remedy = why
            raise RowError("column-not-read", key, f"{shown(value, 60)}: {said}", f"{remedy}; {OTHERWISE}")


def _why(key: str, value: Any, pictured: bool) -> tuple[str, str] | None:
    """What an unread column means, and what to do; ``None`` if it may be ignored."""
    meaning, numbered, named = _by_name(key)
    if meaning is not None:
        said, remedy = meaning
        return None if meaning is _WEIGHT and _all_one(value) else (f"{said}, which is not read", remedy)
    if key == "objects" and isinstance(value, Mapping):  # boxes of ms-swift; metrics use a list of names
        return f"{_PLACES[0]}, which are not read", _PLACES[1]
    if holds_media(value):
        return (
            "a picture, video or sound, which is not read",
            "put the row's pictures into 'images', one place each",
        )
    if (named and not pictured) or (numbered and looks_like_a_picture(value)):
        return "a picture under a name that is not read", "call the column 'image', or 'images' for a list"
    if not pictured and looks_like_a_picture(value):
        return "the path of a picture, which is not read", "call the column 'image', or 'images' for a list"
    return None


@lru_cache(maxsize=1024)
def _by_name(key: str) -> tuple[tuple[str, str] | None, bool, bool]:
    """From a column's name: its entry in the table, whether it is a numbered image, and whether it is an image."""
    name = key.strip().lower()
    meaning = MEANING.get(name) or (_MORE if _NUMBERED_RESPONSE.fullmatch(name) else None)
    numbered = _NUMBERED_PICTURE.fullmatch(name) is not None
    return meaning, numbered, numbered or name in _PICTURES or name in IMAGE_KEYS


def _all_one(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, int | float) and not isinstance(v, bool) and v == 1 for v in values)
