"""InternVL's registry of data sets (``meta.json`` of MMPR): the place of each, and how often its rows are used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cwdpo.data.columns import IMAGE_KEYS
from cwdpo.data.problems import shown
from cwdpo.data.read.source import RawRow, Source
from cwdpo.errors import DataError, nearest

_NAMED = re.compile(r"(?P<file>.+\.json):(?P<name>[^/\\]+)", re.DOTALL)
_KNOWN = ("root", "annotation", "repeat_time", "length", "data_augment")
_UNREAD = {
    "max_dynamic_patch": "tiles are the processor's: set model.processor_options",
    "min_dynamic_patch": "tiles are the processor's: set model.processor_options",
    "dynamic_image_size": "tiles are the processor's: set model.processor_options",
    "conversation_template": "the checkpoint's own chat template is used; remove the key",
}
_MOST_TIMES = 1000  # largest repeat_time
_MOST_BYTES = 64 << 20  # largest registry; a .json list of rows is recognised by its first character


@dataclass(frozen=True)
class _Set:
    """One data set of a registry: its rows, the folder of its images relative to the base, and ``repeat_time``."""

    name: str
    source: Source
    root: str
    times: float


def registry_source(path: str, open_file: Callable[[Path], Source]) -> Source | None:
    """The rows of all data sets of ``META.json``, or of one as ``META.json:NAME``; ``None`` for any other path.

    A registry is an object of objects with ``annotation``. ``root`` and ``annotation`` are relative to the folder of
    the file or to the folder above it, as MMPR's releases need, and must stay inside. If ``repeat_time`` is an integer,
    each row is used that often. If it is a share below 1, a hash of a row's place decides whether it is used, so that
    the same rows are used each time.

    Raises:
        DataError: there is no such entry, a path leads outside the folder, or a key is not supported.
    """
    named = _NAMED.fullmatch(path)
    file = Path(named["file"] if named else path)
    entries = _registry(file)
    if entries is None:
        return None
    names = list(entries)
    if named is not None:
        names = [named["name"]]
        if names[0] not in entries:
            known = ", ".join(list(entries)[:20])
            raise DataError(f"{file}: no data set {names[0]!r}{nearest(names[0], entries)}; known: {known}")
    base, sets = _opened(file, {name: entries[name] for name in names}, open_file)

    def rows() -> Iterator[RawRow]:
        for one in sets:
            yield from _taken(one)

    return Source(path, base, rows)


def _registry(file: Path) -> dict[str, Any] | None:
    """The entries of a registry, or ``None`` if the file is not one."""
    try:
        if not os.path.isfile(file) or file.suffix.lower() != ".json" or file.stat().st_size > _MOST_BYTES:
            return None
        with file.open("rb") as stream:
            if stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
                return None
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None  # the error is reported when the file is read as rows
    is_registry = entries and all(isinstance(one, dict) and "annotation" in one for one in entries.values())
    return entries if is_registry else None


def _opened(
    file: Path, entries: Mapping[str, Mapping[str, Any]], open_file: Callable[[Path], Source]
) -> tuple[Path, list[_Set]]:
    """The folder that the entries' paths are relative to, and their data sets."""
    first = next(iter(entries.values()))["annotation"]
    folders = [file.parent.resolve(), file.parent.resolve().parent]
    base = next((one for one in folders if isinstance(first, str) and os.path.isfile(one / first)), None)
    if base is None:
        raise DataError(
            f"{file}: annotation = {shown(first, 200)}: there is no such file in {folders[0]} or {folders[1]}; "
            "correct it, or move the registry"
        )
    return base, [_entry(file, name, base, entry, open_file) for name, entry in entries.items()]


def _entry(
    file: Path, name: str, base: Path, entry: Mapping[str, Any], open_file: Callable[[Path], Source]
) -> _Set:
    where = f"{file}: {name}"
    for key in entry:
        if key in _UNREAD:
            raise DataError(f"{where}: {key} = {shown(entry[key])}: {_UNREAD[key]}")
        if key not in _KNOWN:
            raise DataError(f"{where}: unknown key {key!r}{nearest(key, _KNOWN)}; known: {', '.join(_KNOWN)}")
    if entry.get("data_augment"):
        raise DataError(f"{where}: data_augment = true: pictures are not altered; set it to false")
    times = entry.get("repeat_time", 1)
    number = times if isinstance(times, int | float) and not isinstance(times, bool) else -1
    if not (0 < number < 1 or (1 <= number <= _MOST_TIMES and number == int(number))):
        raise DataError(
            f"{where}: repeat_time = {shown(times)}; allowed: a whole number from 1 to {_MOST_TIMES}, or a share "
            "between 0 and 1"
        )
    root = entry.get("root") or ""
    for key, value in (("annotation", entry["annotation"]), ("root", root)):
        if not _is_inside(value, base):
            raise DataError(f"{where}: {key} = {shown(value)}: leads outside {base}; move the data below it")
    annotation = base / entry["annotation"]
    if not os.path.isfile(annotation):
        raise DataError(
            f"{where}: annotation = {entry['annotation']!r}: there is no {annotation}; correct it"
        )
    return _Set(name, open_file(annotation), root, float(number))


def _is_inside(value: Any, base: Path) -> bool:
    try:
        return isinstance(value, str) and (base / value).resolve().is_relative_to(base)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # no path: half of a surrogate pair, a null character, a loop of links
        return False


def _taken(one: _Set) -> Iterator[RawRow]:
    """The rows of a data set, as often as ``repeat_time`` says, with image paths relative to the base."""
    for time in range(max(1, int(one.times))):
        for raw in one.source.rows():
            if one.times < 1 and not _drawn(raw, one.times):
                continue
            if not isinstance(raw.value, dict):
                yield raw
                continue
            value = dict(raw.value)
            for key in IMAGE_KEYS:
                if key in value:
                    value[key] = _below(one.root, value[key])
            # Ids are unique only within an annotation file.
            value["id"] = f"{one.name}#{raw.number}" + (f"@{time + 1}" if time else "")
            yield replace(raw, value=value, line=None, again=time > 0)


def _below(root: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_below(root, one) for one in value]
    if not (isinstance(value, str) and value and root) or value.startswith(("/", "data:")) or "://" in value:
        return value
    return f"{root.rstrip('/')}/{value}"


def _drawn(raw: RawRow, share: float) -> bool:
    digest = blake2b(f"{Path(raw.file).name}:{raw.number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
