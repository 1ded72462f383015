"""Reads and writes probe sets: the format of Ren & Sutherland (``prompt`` and one key per type) with provenance.

Does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.data.read.reader import read_examples
from cwdpo.dynamics.settings import TYPES
from cwdpo.errors import DataError, FileError
from cwdpo.records import Example, without_tools

REN = {
    "chosen_gptsemantic": "chosen_paraphrase",
    "chosen_gptformat": "chosen_paraphrase",
    "rejected_gptsemantic": "rejected_paraphrase",
    "rejected_gptformat": "rejected_paraphrase",
    "reject_gptsemantic": "rejected_paraphrase",
    "reject_gptformat": "rejected_paraphrase",
    "irr_train": "other_train",
    "irr_test": "other_test",
    "irr_hum": "unrelated",
    "random_permute": "shuffled",
}
"""Names of response types in Ren & Sutherland's data (arXiv 2407.10490), and our type for each."""
_NOT_TYPES = frozenset({"provenance", "where", "scene"})


@dataclass(frozen=True)
class Response:
    """One response of a probe set; ``provenance`` is a text that says where it comes from."""

    type: str
    text: str
    provenance: str


def read_probe_file(path: str | Path) -> tuple[list[Example], dict[str, list[Response]]]:
    """Read held-out examples, and their further responses by example id, from a file.

    Rows are preference rows (``prompt``, ``chosen``, ``rejected``, possibly ``image``). Every further key with a text
    is a response type; Ren's names are mapped by :data:`REN`, other names are kept. ``provenance`` may be a mapping
    from type to text.

    Raises:
        DataError: a row cannot be read, or a provenance or response is not text; the message names file, row and key.
    """
    examples = list(read_examples(path, format="trl", max_bad_fraction=0.0).examples)
    return examples, {e.id: _responses(e, str(path)) for e in examples}


def _responses(example: Example, file: str) -> list[Response]:
    given = example.extra.get("provenance") or {}
    if not isinstance(given, Mapping):
        raise DataError(
            f"{example.where}: provenance: must map response types to texts, got {type(given).__name__}; correct it, "
            "or leave it out"
        )
    found = []
    for key, value in example.extra.items():
        kind = REN.get(key, key)
        texts = value if isinstance(value, list) else [value]
        if key in _NOT_TYPES or not (texts and all(isinstance(text, str) for text in texts)):
            if kind in TYPES:
                raise DataError(
                    f"{example.where}: {key}: must be a text or a list of texts, got {type(value).__name__}; correct "
                    "it, or leave it out"
                )
            continue
        said = given.get(kind) or given.get(key) or f"{file}, key {key!r}"
        found += _with_provenance(kind, texts, said)
    return found


def _with_provenance(kind: str, texts: Sequence[str], said: Any) -> list[Response]:
    each = said if isinstance(said, list) and len(said) == len(texts) else [said] * len(texts)
    return [Response(kind, text, str(words)) for text, words in zip(texts, each, strict=True)]


def to_jsonl(examples: Sequence[Example], responses: Mapping[str, Sequence[Response]]) -> str:
    """A probe set as JSON lines; :func:`read_probe_file` can read it again if its images are still in place."""
    return "".join(json.dumps(_row(e, responses.get(e.id, ())), ensure_ascii=False) + "\n" for e in examples)


def _row(example: Example, responses: Iterable[Response]) -> dict[str, Any]:
    own: dict[str, list[Response]] = {}
    for response in responses:
        own.setdefault(response.type, []).append(response)
    turns, tools = without_tools(example.prompt)
    kinds = [c.kind or "rejected" for c in example.rejected]
    provenance = {
        "chosen": f"chosen of {example.where or example.id}",
        "negatives": [f"{kind}, origin {c.origin}" for kind, c in zip(kinds, example.rejected, strict=True)],
        **{kind: _one_or_all([r.provenance for r in found]) for kind, found in own.items()},
    }
    return {
        "id": example.id,
        **({"images": [str(i.path) for i in example.images if i.path]} if example.images else {}),
        **({"videos": [str(v.path) for v in example.videos if v.path]} if example.videos else {}),
        **({"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}),
        "prompt": [m.as_chat() for m in turns],
        "chosen": example.chosen.text,
        "negatives": [
            {
                "text": c.text,
                "kind": kind,
                "origin": c.origin,
                **({} if c.images is None else {"images": [image.as_value() for image in c.images]}),
            }
            for kind, c in zip(kinds, example.rejected, strict=True)
        ],
        **{kind: _one_or_all([r.text for r in found]) for kind, found in own.items()},
        "provenance": provenance,
    }


def _one_or_all(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else values


def stored_responses(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Response]]:
    """The further responses of a stored probe set, by example id.

    Raises:
        FileError: a row is not one of :func:`to_jsonl`.
    """
    found: dict[str, list[Response]] = {}
    for number, row in enumerate(rows, 1):
        try:
            own = found.setdefault(str(row["id"]), [])
            for kind, said in row["provenance"].items():
                if kind not in ("chosen", "negatives"):
                    texts = row[kind] if isinstance(row[kind], list) else [row[kind]]
                    own += _with_provenance(kind, [text for text in texts if isinstance(text, str)], said)
        except (LookupError, AttributeError) as error:
            raise FileError(
                f"the stored probe set: row {number} is damaged ({error!r}): delete its file, and --resume makes it "
                "again"
            ) from None
    return found
