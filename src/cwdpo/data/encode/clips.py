"""Videos of a row as a processor takes them, and rows that it would take wrongly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cwdpo.data.encode.template import RefusedRowError
from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.versions import version_of
from cwdpo.videos import decoded

_PIXELS = "pixel_values_videos"


def check_taken(processor: Any, example: Example) -> None:
    """Refuse a row with videos if the processor takes none, or drops the images beside them.

    Raises:
        RefusedRowError: naming the processor.
    """
    if not example.videos:
        return
    videos, images = (getattr(processor, f"{kind}_processor", None) for kind in ("video", "image"))
    if videos is None:
        raise _refused(
            example,
            f"this family's processor ({type(processor).__name__}) takes no video",
            "leave rows with videos out, or take a model that sees videos (docs/models.md)",
        )
    made = [set(getattr(one, "model_input_names", ())) for one in (videos, images)]
    if example.images and made[0] & made[1]:
        raise _not_both(
            example, f"this family's processor ({type(processor).__name__}) drops images beside videos"
        )


def check_apart(processor: Any, example: Example, ids: Sequence[int], outputs: Collection[str]) -> None:
    """Refuse a row with images and videos whose tokens are the same (GLM-4V): the model takes them for each other.

    Args:
        processor: made the ids.
        example: the row.
        ids: of the prompt.
        outputs: names of the inputs of the vision tower.

    Raises:
        RefusedRowError: naming the processor.
    """
    told_apart = getattr(processor, "video_token_id", None) in ids
    if example.images and example.videos and _PIXELS in outputs and not told_apart:
        raise _not_both(
            example, f"this family's processor ({type(processor).__name__}) writes videos as images"
        )


def video_inputs(processor: Any, example: Example) -> dict[str, Any]:
    """The arguments of a processor for the row's videos; empty if it has none.

    Raises:
        DataError: a video cannot be decoded, or the processor takes none.
    """
    if not example.videos:
        return {}
    check_taken(processor, example)
    # Processors that take frames in pairs repeat the last one; of a single frame, some make an error.
    fewest = int(getattr(processor.video_processor, "temporal_patch_size", None) or 1)
    try:
        clips = [decoded(video).padded(fewest) for video in example.videos]
    except DataError as error:
        raise DataError(f"{example.where or example.id}: videos: {error}") from error
    return {
        "videos": [clip.frames for clip in clips],
        "video_metadata": [clip.metadata for clip in clips],
        "do_sample_frames": False,  # they are those that data.video keeps
    }


def video_settings(processor: Any) -> str:
    """What the inputs of the vision tower depend on besides the videos."""
    made = getattr(processor, "video_processor", None)
    return "\n".join([*settings_of(made), f"av {version_of('av') or 'none'}"])


def settings_of(made: Any) -> tuple[str, str]:
    """Class and settings of an image or video processor."""
    return type(made).__name__, made.to_json_string() if hasattr(made, "to_json_string") else repr(made)


def _not_both(example: Example, reason: str) -> RefusedRowError:
    return _refused(example, reason, "leave the row out, or give either images or videos")


def _refused(example: Example, reason: str, remedy: str) -> RefusedRowError:
    return RefusedRowError(example.where or example.id, "video-not-taken", "videos", reason, remedy)
