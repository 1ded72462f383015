"""The table of formats. To add one, write ``parse(row) -> list[Example]`` in a file and list it here."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from cwdpo.data.format_captions import parse_captions
from cwdpo.data.format_peers import parse_llamafactory, parse_ms_swift, parse_povid, parse_rlaifv
from cwdpo.data.format_trl import parse_trl
from cwdpo.data.format_vlfeedback import parse_vlfeedback
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
        return bool(self.matched(columns))

    def matched(self, columns: Set[str]) -> frozenset[str]:
        """The largest set of columns by which these are known as this format; empty where they are not."""
        found = [need for need in self.columns if need <= columns and not self.without & columns]
        return max(found, key=len, default=frozenset())


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
            "conversations question rejected_response rejected_messages instruction",
        ),
        _format("captions", parse_captions, ("image captions",)),
        _format(
            "llamafactory",
            parse_llamafactory,
            (
                "conversations",
                "messages chosen rejected",
                "instruction chosen rejected",
                "instruction output",
            ),
            "rejected_conversations contrastive_conversations prompt",
        ),
        _format("ms_swift", parse_ms_swift, ("messages rejected_response", "messages rejected_messages")),
        _format(
            "povid",
            parse_povid,
            ("conversations rejected_conversations", "conversations contrastive_conversations"),
        ),
        _format("vlfeedback", parse_vlfeedback, ("prompt completions",)),
        _format("rlaifv", parse_rlaifv, ("image question chosen rejected", "image text"), "captions"),
    )
)


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
        f"{form.name}: {' or '.join('+'.join(sorted(need)) for need in form.columns)}"
        for form in FORMATS.values()
    )
    raise DataError(
        f"{where}: the columns ({seen[:500]}) match no known format; allowed: {known}. Rename the columns, "
        "or set data.format to have each row's problem named"
    )
