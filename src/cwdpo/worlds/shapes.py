"""The embedded world: small images of coloured shapes, generated and described by rules, with an exact judge.

It is written to disk in TRL's vision-preference format, and then read like any other data.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cwdpo.errors import DataError, FileError
from cwdpo.files.reading import read_object
from cwdpo.records import Completion
from cwdpo.registry import Settings
from cwdpo.worlds._grammar import (
    OPENERS,
    Sentence,
    StatedObject,
    caption,
    paraphrases,
    parse,
    true_captions,
)
from cwdpo.worlds._judge import Judgement, judge
from cwdpo.worlds._negatives import NEGATIVES, easy, edit, hard, medium, noisy_caption, shuffled
from cwdpo.worlds._questions import COUNTS, YES_NO, answer, question, wrong_answers
from cwdpo.worlds._scenes import (
    COLOURS,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    make_scene,
    render,
    stream,
)

__all__ = [
    "COLOURS",
    "COUNTS",
    "HELD_OUT",
    "NEGATIVES",
    "OPENERS",
    "PLACES",
    "PROMPT",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "VOCABULARY",
    "YES_NO",
    "Judgement",
    "Scene",
    "SceneObject",
    "Sentence",
    "ShapesSettings",
    "StatedObject",
    "answer",
    "caption",
    "easy",
    "hard",
    "judge",
    "make_scene",
    "materialise",
    "medium",
    "noisy_caption",
    "paraphrases",
    "parse",
    "question",
    "render",
    "shuffled",
    "stream",
    "true_captions",
    "write_split",
    "wrong_answers",
]

PROMPT = "describe the picture ."
"""The prompt of all rows that are not questions."""

_ASKING = ("what color is the ?", "how many shapes ?", "where is the ?", "is there a ?")
_PHRASES = (PROMPT, *OPENERS, "a and .", *PLACES, *RELATIONS, *_ASKING, *COUNTS, *YES_NO)
VOCABULARY = tuple(sorted({w for p in (*_PHRASES, *SIZES, *COLOURS, *SHAPES) for w in p.split()}))
"""All words of the prompts, descriptions and answers of this world."""

_REFERENCES = 4
_OTHERS = 8
_VERSION = 1


class ShapesSettings(Settings):
    """The sizes of the world's splits, and the negatives of its rows.

    ``shares`` are relative weights of the kinds of negatives; ``questions`` is the share of rows that ask a question.
    With ``caption_noise`` the training rows are for pretraining: they have ``prompt`` and ``completion`` but no
    negatives, and this share of the completions is wrong.
    """

    seed: int = 0
    train: int = Field(2000, ge=0)
    validation: int = Field(200, ge=0)
    test: int = Field(400, ge=0)
    negatives_per_prompt: int = Field(1, ge=1, le=16)
    shares: Mapping[str, float] = {"hard": 0.35, "medium": 0.15, "easy": 0.3, "shuffled": 0.2}
    questions: float = Field(0.2, ge=0, le=1)
    caption_noise: float | None = Field(None, ge=0, le=1)

    @field_validator("shares")
    @classmethod
    def _known_kinds(cls, shares: Mapping[str, float]) -> Mapping[str, float]:
        unknown = sorted(set(shares) - set(NEGATIVES))
        if unknown:
            raise ValueError(f"unknown kind {unknown[0]!r}; known: {', '.join(NEGATIVES)}")
        if min(shares.values(), default=0) < 0 or sum(shares.values()) <= 0:
            raise ValueError("shares must not be negative, and one must be above 0")
        return shares


def write_split(folder: Path, split: str, n: int, seed: int, *, settings: ShapesSettings) -> Path:
    """Write ``n`` rows to ``folder/<split>.jsonl`` and their images to ``folder/images``.

    Row ``i`` depends on ``seed``, ``split``, ``i`` and the settings (except their ``seed`` and sizes), not on ``n``.
    Each file gets its name only when it is complete.

    Returns:
        The path of the JSONL file.

    Raises:
        DataError: ``split`` is not train, validation or test.
    """
    from PIL import Image

    if split not in SPLITS:
        raise DataError(f"shapes world: unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(n):
        row = _row(seed, split, index, settings)
        picture = Image.fromarray(render(Scene.from_json(row["scene"])))
        encoded = io.BytesIO()
        picture.save(encoded, format="PNG")
        _whole(folder / row["images"][0], encoded.getvalue())
        lines.append(json.dumps(row))
    text = "".join(f"{line}\n" for line in lines)
    return _whole(folder / f"{split}.jsonl", text.encode())


def materialise(settings: ShapesSettings, folder: Path) -> dict[str, Path]:
    """Write the splits of the world, or reuse them if ``folder/world.json`` has the same settings.

    Captions of validation and test are never noisy; a split of size 0 is not written.

    Returns:
        The JSONL file of each split.

    Raises:
        DataError: a file in the folder would be replaced although this world did not write it.
    """
    sizes = {s: getattr(settings, s) for s in SPLITS if getattr(settings, s)}
    paths = {split: folder / f"{split}.jsonl" for split in sizes}
    note = folder / "world.json"
    wanted = {"world": "shapes", "version": _VERSION, "settings": settings.model_dump(mode="json")}
    found = _read_note(note)
    if found == {**wanted, "complete": True} and all(p.is_file() for p in paths.values()):
        return paths
    stale = [folder / f"{s}.jsonl" for s in SPLITS if (folder / f"{s}.jsonl").exists()]
    if stale and found.get("world") != "shapes":
        raise DataError(f"{stale[0]}: would be replaced, but {note} does not list it; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    # Mark the world as incomplete first, so that it is written again, not reused, if this process is killed.
    _write_note(note, {**wanted, "complete": False})
    for path in stale:
        path.unlink()
    clean = settings.model_copy(update={"caption_noise": None})
    for split, n in sizes.items():
        write_split(folder, split, n, settings.seed, settings=settings if split == "train" else clean)
    _write_note(note, {**wanted, "complete": True})
    return paths


def _read_note(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileError:  # absent or damaged
        return {}


def _write_note(path: Path, note: Mapping[str, Any]) -> None:
    _whole(path, (json.dumps(note, indent=2) + "\n").encode())


def _whole(path: Path, data: bytes) -> Path:
    """Write to a temporary name and rename, so that no reader sees an incomplete file."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return path


def _row(seed: int, split: str, index: int, settings: ShapesSettings) -> dict[str, Any]:
    scene = make_scene(seed, split, index)
    rng = stream(seed, split, index, "row")
    asking = rng.random() < settings.questions
    prompt, chosen = question(scene, rng) if asking else (PROMPT, caption(scene, rng))
    name = f"{split}-{index:05d}"
    row: dict[str, Any] = {
        "id": name,
        "images": [f"images/{name}.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
    }
    if settings.caption_noise is not None:
        if not asking:
            chosen = noisy_caption(scene, rng, settings.caption_noise)
        elif rng.random() < settings.caption_noise:
            chosen = rng.choice(wrong_answers(chosen))
        return {**row, "completion": _said(chosen), "scene": scene.to_json()}
    if asking:
        negatives, gentle = _wrong(chosen, settings.negatives_per_prompt, rng)
        references = [chosen]
    else:
        others = [make_scene(seed, split, index + 1 + rng.randrange(10_000)) for _ in range(_OTHERS)]
        negatives = _negatives(scene, chosen, others, settings, rng)
        gentle = hard(scene, chosen, rng)
        truths = [text for text in true_captions(scene) if text != chosen]
        references = [chosen, *rng.sample(truths, min(_REFERENCES - 1, len(truths)))]
    return {
        **row,
        "chosen": _said(chosen),
        "rejected": _said(negatives[0].text),
        "negatives": [{"text": c.text, "kind": c.kind, "origin": c.origin} for c in negatives],
        "gentle": [{"text": gentle.text, "kind": "hard", "origin": "perturbed", "made": dict(gentle.made)}],
        "references": references,
        "scene": scene.to_json(),
    }


def _said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def _negatives(
    scene: Scene, chosen: str, others: list[Scene], settings: ShapesSettings, rng: random.Random
) -> list[Completion]:
    """Different negatives with kinds drawn by the settings' shares; fewer than requested if there are not enough."""
    kinds, weights = list(settings.shares), list(settings.shares.values())
    found: dict[str, Completion] = {}
    # A scene of one object has only about a dozen hard negatives, so the number of tries is limited.
    for _ in range(50 * settings.negatives_per_prompt):
        if len(found) == settings.negatives_per_prompt:
            break
        kind = rng.choices(kinds, weights)[0]
        made = NEGATIVES[kind](scene, chosen, rng, others)
        found.setdefault(made.text, made)
    return list(found.values())


def _wrong(right: str, n: int, rng: random.Random) -> tuple[list[Completion], Completion]:
    """Up to ``n`` different wrong answers (fewer if there are not enough), and one for stage 1."""
    wrong = wrong_answers(right)
    negatives = [Completion(text, "dataset", "hard") for text in rng.sample(wrong, min(n, len(wrong)))]
    text = rng.choice(wrong)
    return negatives, Completion(text, "perturbed", "hard", edit(right, text))
