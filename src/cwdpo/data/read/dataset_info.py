"""LLaMA-Factory's registry of data sets: the place of each data set, and the meaning of its columns and tags."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwdpo.data.problems import RowError
from cwdpo.errors import DataError, nearest
from cwdpo.hub import ADDRESS, HubData, hub_data

NAME = "dataset_info.json"
_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history",
    "messages": "conversations", "system": "system", "images": "images", "videos": "videos",
    "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
_NEEDED = ("prompt", "messages", "chosen", "rejected")
_ROLES = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
_TAGS = ("role_tag", "content_tag", *_ROLES, "observation_tag", "function_tag")
# What the parser of LLaMA-Factory's rows reads, so that a column of that name which is not listed is hidden from it.
_OURS = {*_COLUMNS.values(), "messages", "image", "img_path", "video"}
_UNREAD_COLUMNS = {
    "audios": "sound is not read; leave such rows out",
    "tools": "tool calls are not read; leave such rows out",
    "kto_tag": "KTO's labels are not read: make pairs of the rows, or keep those that are labelled true",
}
_UNREAD = {
    "ms_hub_url": "ModelScope is not read; download the data and name it by 'file_name'",
    "script_url": "loading scripts are not run; save what the script loads and name it by 'file_name'",
    "cloud_file_name": "cloud storage is not read; download the file and name it by 'file_name'",
    "folder": "folders of a hub data set are not read; download it and name it by 'file_name'",
    "num_samples": "all rows are read; remove it here and set data.limit in the recipe",
}
_OF_HUB = ("subset", "revision", "split")
_KNOWN = ("file_name", "hf_hub_url", *_OF_HUB, "formatting", "ranking", "columns", "tags", *_UNREAD)


class Entry:
    """One data set of a registry.

    ``place`` is a path or a hub id; image paths are relative to ``folder`` (``None`` for the hub). :meth:`renamed`
    changes a row to LLaMA-Factory's default columns and tags.
    """

    def __init__(self, where: str, folder: Path, described: Mapping[str, Any]) -> None:
        self._where = where
        _refuse_unknown(where, described)
        self._columns = _names(where, described, "columns", (*_COLUMNS, *_UNREAD_COLUMNS))
        self._tags = _names(where, described, "tags", _TAGS)
        for key, remedy in _UNREAD_COLUMNS.items():
            if key in self._columns:
                raise DataError(f"{where}: columns.{key}: {remedy}")
        hub, file = described.get("hf_hub_url"), described.get("file_name")
        for key, value in (("hf_hub_url", hub), ("file_name", file)):
            if value is not None and (not isinstance(value, str) or not value):
                raise DataError(f"{where}: {key} = {value!r}; allowed: a name")
        if hub is None and file is None:
            raise DataError(f"{where}: neither 'file_name' nor 'hf_hub_url'; add one of them")
        self.place = str(folder / str(file)) if hub is None else _of_hub(where, hub, described)
        self.folder = None if hub is not None else folder
        if hub is None and not os.path.exists(self.place):
            raise DataError(f"{where}: file_name = {file!r}: there is no {self.place}; correct it")

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any] | RowError:
        """The row with LLaMA-Factory's default names of columns and tags.

        If the entry lists columns, other columns with these default names are removed.
        """
        found = dict(row)
        if self._columns:
            absent = [key for key in _NEEDED if key in self._columns and self._columns[key] not in row]
            if absent:
                own = self._columns[absent[0]]
                has = ", ".join(sorted(row)) or "none"
                said = f"no such column, which columns.{absent[0]} of {self._where} names; the row has {has}"
                return RowError("missing-key", own, said[:500], "correct the registry, or the row")
            listed = set(self._columns.values())
            found = {key: value for key, value in row.items() if key not in listed and key not in _OURS}
            found |= {_COLUMNS[key]: row[own] for key, own in self._columns.items() if own in row}
            for key in ("images", "videos"):
                if found.get(key) is not None and not isinstance(found[key], list):
                    found[key] = [found[key]]  # LLaMA-Factory treats one image as a list of one
        try:
            for key in ("messages", "chosen", "rejected") if self._tags else ():
                ours = _COLUMNS[key]
                if ours in found:
                    found[ours] = self._turns(found[ours], self._columns.get(key, ours))
        except RowError as error:
            return error
        return found

    def _turns(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            return [self._turns(one, f"{where}[{i}]") for i, one in enumerate(value)]
        if not isinstance(value, dict):
            return value
        role, content = self._tags.get("role_tag", "from"), self._tags.get("content_tag", "value")
        for tag, key in (("role_tag", role), ("content_tag", content)):
            if key not in value:
                said = f"no key {key!r}, which tags.{tag} names; this turn has {', '.join(map(str, value))[:200]}"
                raise RowError("missing-key", f"{where}.{key}", said, f"set tags.{tag}, or correct the row")
        roles = {self._tags.get(tag, usual): usual for tag, usual in _ROLES.items()}
        if not isinstance(value[role], str) or value[role] not in roles:
            said = f"{str(value[role])[:60]!r}; allowed: {', '.join(roles)}"
            raise RowError("wrong-role", f"{where}.{role}", said, "set the tag of that role, or drop the row")
        return {"from": roles[value[role]], "value": value[content]}


def registry_entry(path: str) -> Entry | None:
    """The entry of a path ``FOLDER/dataset_info.json:NAME``; ``None`` for any other path.

    Raises:
        DataError: there is no such registry or entry, or the entry needs something that is not supported.
    """
    text, colon, name = path.rpartition(f"{NAME}:")
    if not colon:
        return None
    file = Path(text + NAME)
    try:
        registry = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); allowed: FOLDER/{NAME}:NAME") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON in UTF-8 ({str(error)[:120]})") from None
    if not isinstance(registry, dict):
        raise DataError(f"{file}: holds {type(registry).__name__}; allowed: an object of data sets by name")
    if name not in registry:
        known = ", ".join(list(registry)[:20]) or "none"
        raise DataError(f"{file}: no data set {name!r}{nearest(name, registry)}; known: {known}")
    if not isinstance(registry[name], dict):
        raise DataError(f"{file}: {name}: {type(registry[name]).__name__}; allowed: an object")
    return Entry(f"{file}: {name}", file.parent, registry[name])


def _of_hub(where: str, hub: str, described: Mapping[str, Any]) -> str:
    """The address of a data set of the hub (:mod:`cwdpo.hub`); LLaMA-Factory reads ``train`` if no split is named."""
    subset, revision, split = (described.get(key) for key in _OF_HUB)
    address = str(HubData(hub, revision, subset, split or "train"))
    if hub_data(address) is None:
        raise DataError(f"{where}: {address!r} is no data set of the hub; allowed: {ADDRESS}")
    return address


def _refuse_unknown(where: str, described: Mapping[str, Any]) -> None:
    for key in described:
        if key not in _KNOWN:
            raise DataError(f"{where}: unknown key {key!r}{nearest(key, _KNOWN)}; known: {', '.join(_KNOWN)}")
    for key, remedy in _UNREAD.items():
        beside = key in ("ms_hub_url", "script_url", "cloud_file_name") and described.get("hf_hub_url")
        if described.get(key) is not None and not beside:  # LLaMA-Factory ignores those beside a hub id too
            raise DataError(f"{where}: {key} = {described[key]!r}: {remedy}")
    for key in _OF_HUB if described.get("hf_hub_url") is None else ():
        if described.get(key) not in (None, "train"):
            raise DataError(f"{where}: {key} = {described[key]!r}: it belongs to 'hf_hub_url'; remove it")
    if described.get("formatting") not in (None, "alpaca", "sharegpt"):
        raise DataError(f"{where}: formatting = {described['formatting']!r}; allowed: alpaca, sharegpt")


def _names(where: str, described: Mapping[str, Any], key: str, known: tuple[str, ...]) -> dict[str, str]:
    """A mapping of the entry from LLaMA-Factory's names to those of the data; each name may be used once."""
    given = described.get(key) or {}
    if not isinstance(given, dict):
        raise DataError(f"{where}: {key}: {type(given).__name__}; allowed: an object of names")
    found: dict[str, str] = {}
    for name, value in given.items():
        if name not in known:
            raise DataError(
                f"{where}: unknown key {key}.{name}{nearest(name, known)}; known: {', '.join(known)}"
            )
        if value is None:
            continue
        if not isinstance(value, str) or value in found.values():
            raise DataError(f"{where}: {key}.{name} = {value!r}; allowed: a name that no other key has")
        found[name] = value
    return found
