"""The table of formats. To add one, write ``parse(row) -> list[Example]`` in a file and list it here."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from cwdpo.data.formats.captions import parse_captions
from cwdpo.data.formats.peers import parse_llamafactory, parse_ms_swift, parse_povid, parse_rlaifv
from cwdpo.data.formats.trl import parse_trl
from cwdpo.data.formats.vlfeedback import parse_vlfeedback
from cwdpo.data.rowparts import Row
from cwdpo.errors import DataError, nearest
from cwdpo.records import Example


@dataclass(frozen=True)
class Columns:
    """Columns by which a format is known: those that must be there, and those that speak for another format."""

    need: frozenset[str]
    without: frozenset[str]

    def match(self, columns: Set[str]) -> bool:
        """Whether these columns can be this format."""
        return self.need <= columns and not self.without & columns


@dataclass(frozen=True)
class Format:
    """One way to write an example as a row.

    ``columns`` lists the sets of columns of which one must be there. ``parse`` raises RowError for a row that cannot
    be used.
    """

    name: str
    parse: Callable[[Row], list[Example]]
    columns: tuple[Columns, ...]

    def matched(self, columns: Set[str]) -> frozenset[str]:
        """The largest set of columns by which these are known as this format; empty where they are not."""
        found = [one.need for one in self.columns if one.match(columns)]
        return max(found, key=len, default=frozenset())


def _format(name: str, parse: Callable[[Row], list[Example]], *groups: str) -> tuple[str, Format]:
    """A format and its groups of columns; ``!column`` in a group is one that must not be there."""
    columns = []
    for words in (group.split() for group in groups):
        need = frozenset(w for w in words if not w.startswith("!"))
        columns.append(Columns(need, frozenset(w[1:] for w in words if w.startswith("!"))))
    return name, Format(name, parse, tuple(columns))


_NOT_TRL = "!conversations !question !rejected_response !rejected_messages"
_NOT_POVID = "!rejected_conversations !contrastive_conversations"

FORMATS: dict[str, Format] = dict(
    (
        _format(
            "trl", parse_trl,
            *(f"{group} {_NOT_TRL}" for group in ("chosen rejected", "prompt chosen", "prompt completion", "messages")),
        ),
        _format("captions", parse_captions, "image captions"),
        _format(
            "llamafactory", parse_llamafactory,
            f"conversations {_NOT_POVID}",
            *(f"{one} !prompt" for one in ("messages chosen", "messages chosen rejected")),
            *(f"{one} !prompt" for one in ("instruction", "instruction chosen rejected")),
        ),
        _format("ms_swift", parse_ms_swift, "messages rejected_response", "messages rejected_messages"),
        _format("povid", parse_povid, *(f"conversations {key}" for key in _NOT_POVID.replace("!", "").split())),
        _format("vlfeedback", parse_vlfeedback, "prompt completions"),
        _format("rlaifv", parse_rlaifv, "image question chosen rejected !captions", "image text !captions"),
    )
)  # fmt: skip


def find_format(name: str, columns: Set[str], where: str) -> Format:
    """The format called ``name``; for ``auto`` the only one that the columns match, or that asks for more than others.

    Raises:
        DataError: an unknown name, or columns that match no format or several.
    """
    if name != "auto":
        if name not in FORMATS:
            raise DataError(
                f"unknown data format {name!r}{nearest(name, FORMATS)}; allowed: auto, {', '.join(FORMATS)}"
            )
        return FORMATS[name]
    known_by = {form.name: form.matched(columns) for form in FORMATS.values()}
    matching = [
        form
        for form in FORMATS.values()
        if known_by[form.name] and not any(known_by[form.name] < other for other in known_by.values())
    ]
    if len(matching) == 1:
        return matching[0]
    seen = ", ".join(sorted(columns)) or "none"
    if matching:
        names = ", ".join(form.name for form in matching)
        raise DataError(
            f"{where}: the columns ({seen}) match several formats ({names}); set data.format to one"
        )
    known = "; ".join(
        f"{form.name}: {' or '.join('+'.join(sorted(one.need)) for one in form.columns)}"
        for form in FORMATS.values()
    )
    raise DataError(
        f"{where}: the columns ({seen[:500]}) match no known format{_nearest(columns)}; allowed: {known}. "
        "Rename the columns, or set data.format to have each row's problem named"
    )


def _nearest(columns: Set[str]) -> str:
    """The format of which most is there, and what it lacks or what speaks against it."""
    groups = [(form.name, one) for form in FORMATS.values() for one in form.columns if one.need & columns]
    if not groups:
        return ""
    name, best = max(groups, key=lambda g: len(g[1].need & columns) - len(g[1].need - columns))
    lacks = ", ".join(repr(c) for c in sorted(best.need - columns))
    against = ", ".join(repr(c) for c in sorted(best.without & columns))
    told = [f"without {lacks}"] if lacks else []
    told += [f"with {against}, which it must not have"] if against else []
    return f"; nearest is {name}, {' and '.join(told)}" if told else ""
