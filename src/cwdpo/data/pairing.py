"""Makes pairs of single labelled responses (KTO's rows) to the same prompt."""

from __future__ import annotations

import json
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

from cwdpo.data.columns import IMAGE_KEYS
from cwdpo.data.digests import DigestMap, as_text, digest8
from cwdpo.data.problems import RowError
from cwdpo.data.read.source import RawRow
from cwdpo.data.texts import wrong_type

_IN_MEMORY = 64 << 20  # bytes of rows; more are written to a temporary file


def pair_labelled(rows: Iterable[RawRow], notes: list[str]) -> Iterator[RawRow]:
    """One preference row for each response labelled true, with all responses labelled false for the same prompt.

    Rows have ``prompt``, ``completion`` and ``label`` (TRL), or ``messages`` that end in the response and ``label``
    (ms-swift). Two prompts are the same if their texts and images are. The rows of a prompt may be anywhere in the
    source, so all rows are read first. Above 64 MB they are kept in a temporary file; memory then has about 50 bytes
    per prompt.

    Args:
        rows: the rows; rows that are already an error are passed on.
        notes: one line with the number of rows and prompts is appended.
    """
    read = 0
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
        groups = _Groups(file)
        for raw in rows:
            read += 1
            split = raw if isinstance(raw.value, RowError) else _split(raw)
            if isinstance(split.value, RowError):
                yield split
            else:
                groups.add(_prompt_digest(split.value), split)
        notes.append(
            f"{read} labelled rows of {len(groups)} prompts: each response labelled true is paired with all that are "
            "labelled false for its prompt"
        )
        for group in groups:
            yield from _paired(group)


class _Groups:
    """Rows grouped by digest, in the order of their first rows; a stored row has the place of the previous one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._last = DigestMap()  # digest -> place of its last row, counted from 1
        self._order = array("Q")

    def __len__(self) -> int:
        return len(self._order)

    def add(self, digest: int, raw: RawRow) -> None:
        """Store a row under a digest."""
        place = self._file.tell()
        before = self._last.put(digest, place + 1)
        if before is None:
            self._order.append(digest)
        pickle.dump((before, raw), self._file)

    def __iter__(self) -> Iterator[list[RawRow]]:
        for digest in self._order:
            group: list[RawRow] = []
            place = self._last.get(digest)
            while place is not None:
                self._file.seek(place - 1)
                place, raw = pickle.load(self._file)
                group.append(raw)
            yield group[::-1]


def _split(raw: RawRow) -> RawRow:
    """The row with ``prompt``, ``completion`` and a label that is true or false, or the row as an error."""
    assert isinstance(raw.value, dict)
    value = dict(raw.value)
    label, turns = value.get("label"), value.get("messages")
    problem = None if label in (True, False) else wrong_type("label", label, "true or false")
    if value.get("prompt") is None:
        value.pop("messages", None)
        if isinstance(turns, list) and len(turns) > 1:
            value |= {"prompt": turns[:-1], "completion": turns[-1:]}
        else:
            problem = problem or wrong_type(
                "messages", turns, "a conversation that ends in the labelled response"
            )
    elif value.get("completion") is None:
        problem = problem or RowError(
            "missing-key", "completion", "the labelled response is missing", "add 'completion'"
        )
    return replace(raw, value=problem or {**value, "label": bool(label)}, line=None)


def _paired(group: Sequence[RawRow]) -> list[RawRow]:
    rows = [(raw, raw.value) for raw in group if isinstance(raw.value, dict)]
    good = [(raw, value) for raw, value in rows if value["label"]]
    bad = [value["completion"] for _, value in rows if not value["label"]]
    if not (good and bad):
        said = "true" if good else "false"
        error = RowError(
            "unpaired-label",
            "label",
            f"all {len(rows)} responses to this prompt are labelled {said}, so there is no pair",
            "add a response with the other label, or leave the prompt out"
            + ("; for SFT alone name 'label' in data.ignore_columns" if good else ""),
        )
        return [replace(raw, value=error) for raw, _ in rows]
    made = []
    for raw, value in good:
        kept = {key: v for key, v in value.items() if key not in ("completion", "label")}
        rejected = bad[0] if len(bad) == 1 else bad
        made.append(replace(raw, value={**kept, "chosen": value["completion"], "rejected": rejected}))
    return made


def _prompt_digest(value: Mapping[str, Any]) -> int:
    said = {key: value[key] for key in ("prompt", *IMAGE_KEYS) if value.get(key) is not None}
    return digest8(json.dumps(said, sort_keys=True, default=as_text).encode())
