"""Digests of a run's inputs besides its recipe: rows, images and base model. They must be the same in a resumed run.

``inputs.json`` contains digests only. Every image file is read once in a run, without decoding it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cwdpo.data.contents import image_content, video_digest
from cwdpo.errors import CwdpoError, DataError, RecipeError
from cwdpo.models.load import Policy
from cwdpo.models.sharding import is_sharded
from cwdpo.pipeline.resume import keep_old
from cwdpo.records import Completion, Example, ImageRef, VideoRef
from cwdpo.rundir import RunDir
from cwdpo.scoring.reference_cache import weights_digest
from cwdpo.stage.splits import Splits
from cwdpo.waiting import from_first

FILE = "inputs.json"
_as_json = json.JSONEncoder(sort_keys=True, default=str).encode


def check_inputs(run: RunDir, splits: Splits, policy: Policy, *, resume: bool, accept_changes: bool) -> None:
    """Store the digests of the inputs; in a resumed run, compare them first. All processes must call this together.

    Raises:
        RecipeError: an input differs and ``accept_changes`` is not set; the message names every difference.
    """
    trouble: list[Exception | None] = [None]
    weights = weights_digest(policy.model) if run.writes or is_sharded(policy.model) else ""
    if run.writes:
        try:
            now = _of_splits(splits)
            now["model"] = _of_model(policy, weights, videos=any(part["videos"] for part in now.values()))
            before = run.json(FILE) if resume else {}
            found = differences(before, now) if before else []
            if found and not accept_changes:
                lines = "".join(f"\n  {line}" for line in found)
                trouble = [
                    RecipeError(
                        f"{run.path / FILE}: the run was started with other inputs:{lines}\nRestore them; or continue "
                        "with the changed inputs with --accept-changes; or start a new run in another --out"
                    )
                ]
            else:
                if found:
                    keep_old(run, {"inputs": found})
                run.write_json(FILE, now)
        except (CwdpoError, OSError) as error:  # the other processes would wait for ever
            trouble = [error]
    found_trouble = from_first(trouble[0], "checking the inputs")
    if found_trouble is not None:
        raise found_trouble


def _of_splits(splits: Splits) -> dict[str, Any]:
    named = {"stage1": splits.stage1, "stage2": splits.stage2, "validation": splits.validation}
    return {name: of_rows(rows) for name, rows in named.items()}


def of_rows(rows: Sequence[Example]) -> dict[str, Any]:
    """Numbers of rows and videos, and digests of texts, of their order, and of images and videos (in any order)."""
    texts, images, videos = bytearray(), bytearray(), 0
    for row in rows:
        texts += _digest([_texts(row)]).encode()
        images += _digest([row.id, *map(_image, row.all_images), *map(_video, row.videos)]).encode()
        videos += len(row.videos)
    said, seen = (np.frombuffer(bytes(found), dtype="S32") for found in (texts, images))
    return {
        "rows": len(rows),
        "texts": _digest(one.decode() for one in np.sort(said)),
        "order": _digest(one.decode() for one in said),
        "pictures": _digest(one.decode() for one in np.sort(seen)),
        "videos": videos,
    }


def _texts(row: Example) -> str:
    """All contents of a row that training or judging uses, as one text."""

    def said(completion: Completion) -> list[Any]:
        return [completion.text, completion.origin, completion.kind, completion.made]

    parts = [
        row.id,
        [{"role": m.role, "parts": m.parts, "more": m.more} for m in row.prompt],
        said(row.chosen),
        [said(c) for c in row.rejected],
        [said(c) for c in row.gentle],
        row.references,
        row.extra,
    ]
    return _as_json(parts)


def _image(image: ImageRef) -> str:
    try:
        return image_content(image).digest.hex() + (repr(image.edit) if image.edit else "")
    except DataError:  # encoding the row later reports the error
        return "unreadable"


def _video(video: VideoRef) -> str:
    try:
        return f"video {video_digest(video).hex()} {video.sampling}"
    except DataError:  # as above
        return "unreadable"


def _of_model(policy: Policy, weights: str, *, videos: bool) -> dict[str, Any]:
    tokenizer = getattr(policy.processor, "tokenizer", policy.processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    seeing: list[Any] = [getattr(policy.processor, "image_processor", None)]
    if videos:
        seeing.append(getattr(policy.processor, "video_processor", None))
    return {
        "weights": weights,
        "tokenizer": _digest(
            [backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())]
        ),
        "template": _digest(
            [str(getattr(one, "chat_template", None)) for one in (policy.processor, tokenizer)]
        ),
        "image processor": _digest(
            [one.to_json_string() if hasattr(one, "to_json_string") else "" for one in seeing]
        ),
    }


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All differences, one line each."""
    found = []
    for name in ("stage1", "stage2", "validation"):
        old, new = before.get(name), now[name]
        if not isinstance(old, dict):
            continue
        label = f"rows of {name}"
        if old.get("rows") != new["rows"]:
            found.append(f"{label}: {old.get('rows')} -> {new['rows']}")
        elif old.get("texts") != new["texts"]:
            found.append(f"{label}: other texts (prompts, responses, which is chosen, or further columns)")
        elif old.get("order") != new["order"]:
            found.append(f"{label}: the same in another order")
        elif old.get("pictures") != new["pictures"]:
            found.append(f"{label}: other images or videos")
    base: Any = before.get("model")
    for part, digest in now["model"].items() if isinstance(base, dict) else ():
        if base.get(part) != digest:
            found.append(f"base model: another {part}" if part != "weights" else "base model: other weights")
    return found
