"""LLaMA-Factory's registry of data sets: where one lies, and what its columns and tags mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwdpo.errors import DataError, nearest

NAME = "dataset_info.json"
_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history",
    "messages": "conversations", "system": "system", "images": "images", "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
_ROLES = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
_UNREAD = {
    "ms_hub_url": "ModelScope is not read; download the data and name it by 'file_name'",
    "script_url": "loading scripts are not run; save what the script loads and name it by 'file_name'",
    "cloud_file_name": "cloud storage is not read; download the file and name it by 'file_name'",
    "subset": "subsets are not read; save the one that you want and name it by 'file_name'",
    "folder": "folders of a hub data set are not read; download it and name it by 'file_name'",
    "num_samples": "use data.limit instead",
}
_OTHER_MEDIA = ("videos", "audios", "kto_tag", "tools")


class Entry:
    """One data set of a registry.

    ``place`` is a path or a hub id, ``folder`` where image paths start (``None`` for the hub); :meth:`renamed` brings
    a row under LLaMA-Factory's default columns and tags.
    """

    def __init__(self, where: str, folder: Path, described: Mapping[str, Any]) -> None:
        self._columns = _strings(where, described, "columns")
        self._tags = _strings(where, described, "tags")
        for key, remedy in _UNREAD.items():
            if described.get(key) is not None:
                raise DataError(f"{where}: {key} = {described[key]!r}: {remedy}")
        for key in _OTHER_MEDIA:
            if key in self._columns:
                raise DataError(
                    f"{where}: columns.{key}: only images, texts and preferences are read; remove it"
                )
        if described.get("split") not in (None, "train"):
            raise DataError(f"{where}: split = {described['split']!r}: only 'train' is read; name a file")
        hub, file = described.get("hf_hub_url"), described.get("file_name")
        if hub is None and file is None:
            raise DataError(f"{where}: neither 'file_name' nor 'hf_hub_url'; add one of them")
        self.place = str(hub) if hub is not None else str(folder / str(file))
        self.folder = None if hub is not None else folder

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the names that LLaMA-Factory has for what its columns and tags mean."""
        named = {self._columns[key]: default for key, default in _COLUMNS.items() if key in self._columns}
        found = {key: value for key, value in row.items() if key not in named}
        found |= {default: row[own] for own, default in named.items() if own in row}
        if self._tags:
            for key in ("conversations", "chosen", "rejected"):
                if key in found:
                    found[key] = self._turns(found[key])
        return found

    def _turns(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._turns(one) for one in value]
        role, content = self._tags.get("role_tag", "from"), self._tags.get("content_tag", "value")
        if not isinstance(value, dict) or role not in value:
            return value
        roles = {self._tags.get(tag, usual): usual for tag, usual in _ROLES.items()}
        return {"from": roles.get(value[role], value[role]), "value": value.get(content)}


def registry_entry(path: str) -> Entry | None:
    """The entry that ``FOLDER/dataset_info.json:NAME`` names; ``None`` for any other path.

    Raises:
        DataError: no such registry or entry, or one that says what cannot be read.
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
    if not isinstance(registry, dict) or not isinstance(registry.get(name), dict):
        known = list(registry) if isinstance(registry, dict) else []
        raise DataError(
            f"{file}: no data set {name!r}{nearest(name, known)}; known: {', '.join(known[:20]) or 'none'}"
        )
    return Entry(f"{file}: {name}", file.parent, registry[name])


def _strings(where: str, described: Mapping[str, Any], key: str) -> dict[str, str]:
    found = described.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values() if v is not None):
        raise DataError(f"{where}: {key}: allowed: an object of names")
    return {str(k): v for k, v in found.items() if v is not None}
