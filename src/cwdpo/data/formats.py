"""The table of formats. To add one, write ``parse(row) -> list[Example]`` in a file and list it here."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from cwdpo.data.format_captions import parse_captions
from cwdpo.data.format_peers import parse_llamafactory, parse_ms_swift, parse_rlaifv
from cwdpo.data.format_trl import parse_trl
from cwdpo.data.rowparts import Row
from cwdpo.errors import DataError, nearest
from cwdpo.records import Example


@dataclass(frozen=True)
class Format:
    """One way to write an example as a row.

    ``columns`` lists the sets of columns of which one must be there, ``without`` columns that speak for
    another format. ``parse`` raises RowError for a row that cannot be used.
    """

    name: str
    parse: Callable[[Row], list[Example]]
    columns: tuple[frozenset[str], ...]
    without: frozenset[str] = frozenset()

    def matches(self, columns: Set[str]) -> bool:
        """Whether these columns can be this format."""
        return any(need <= columns for need in self.columns) and not self.without & columns


def _format(
    name: str, parse: Callable[[Row], list[Example]], columns: tuple[str, ...], without: str = ""
) -> tuple[str, Format]:
    needs = tuple(frozenset(group.split()) for group in columns)
    return name, Format(name, parse, needs, frozenset(without.split()))


FORMATS: dict[str, Format] = dict(
    (
        _format(
            "trl",
            parse_trl,
            ("chosen rejected", "prompt chosen", "prompt completion", "messages"),
            "conversations question rejected_response rejected_messages",
        ),
        _format("captions", parse_captions, ("image captions",)),
        _format("llamafactory", parse_llamafactory, ("conversations",), "rejected_conversations"),
        _format("ms_swift", parse_ms_swift, ("messages rejected_response", "messages rejected_messages")),
        _format("rlaifv", parse_rlaifv, ("image question chosen rejected", "image text"), "captions"),
    )
)


def find_format(name: str, columns: Set[str], where: str) -> Format:
    """The format called ``name``; for ``auto`` the only one that the columns match.

    Raises:
        DataError: an unknown name, or columns that match no format or several.
    """
    if name != "auto":
        if name not in FORMATS:
            raise DataError(
                f"unknown data format {name!r}{nearest(name, FORMATS)}; allowed: auto, {', '.join(FORMATS)}"
            )
        return FORMATS[name]
    matching = [form for form in FORMATS.values() if form.matches(columns)]
    if len(matching) == 1:
        return matching[0]
    seen = ", ".join(sorted(columns)) or "none"
    if matching:
        names = ", ".join(form.name for form in matching)
        raise DataError(
            f"{where}: the columns ({seen}) match several formats ({names}); set data.format to one"
        )
    known = "; ".join(
        f"{form.name}: {' or '.join('+'.join(sorted(need)) for need in form.columns)}"
        for form in FORMATS.values()
    )
    raise DataError(
        f"{where}: the columns ({seen[:500]}) match no known format; allowed: {known}. Rename the columns, "
        "or set data.format to have each row's problem named"
    )
