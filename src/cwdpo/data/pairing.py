"""Single labelled responses (KTO's rows) to pairs: those of one prompt are brought together."""

from __future__ import annotations

import json
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import IO, Any

from cwdpo.data.columns import IMAGE_KEYS
from cwdpo.data.digests import DigestMap, digest8
from cwdpo.data.problems import RowError
from cwdpo.data.read.source import RawRow
from cwdpo.data.texts import wrong_type

_IN_MEMORY = 64 << 20  # bytes of rows; more go to a temporary file


def pair_labelled(rows: Iterable[RawRow], notes: list[str]) -> Iterator[RawRow]:
    """A preference row for each response labelled true, with all that are labelled false for the same prompt.

    Rows are ``prompt``, ``completion`` and ``label`` (TRL), or ``messages`` that end in the response and ``label``
    (ms-swift). Prompts are the same when their texts and pictures are. Rows of a prompt may be anywhere in the
    source, so all are read before the first is given; above 64 MB they wait in a temporary file, and memory holds
    some 50 bytes a prompt.

    Args:
        rows: the rows; those that are problems already are passed on.
        notes: gets one line that says how many rows and prompts there were.
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
    """Rows by digest, in the order in which each digest was met first. A stored row knows where the one before is."""

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
    """The row with ``prompt`` and ``completion`` apart and a label of true or false, or what is wrong with it."""
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
            f"every response to this prompt ({len(rows)}) is labelled {said}: there is nothing to prefer it to",
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
    return digest8(json.dumps(said, sort_keys=True, default=_content).encode())


def _content(value: Any) -> str:
    """What JSON cannot hold, told apart by its content: bytes, or a decoded picture."""
    data = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    return repr(value) if data is None else blake2b(data, digest_size=16).hexdigest()
