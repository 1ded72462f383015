"""``cwdpo validate --show``: prints encoded rows to a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cwdpo.data.problems import printable

if TYPE_CHECKING:
    from rich.text import Text

    from cwdpo.data.validate.show import ShownResponse, ShownRow

WIDTH = 80
_LABEL = 12


def print_rows(rows: Iterable[ShownRow]) -> None:
    """Print rows, at most 80 columns wide: the prompt dim, bars between trained tokens, colours on terminals only."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    width = min(WIDTH, console.width)
    for row in rows:
        table = Table.grid(padding=(0, 1, 0, 0))
        table.width = width
        table.add_column(width=_LABEL, no_wrap=True)
        table.add_column(overflow="fold")
        if row.problem:
            table.add_row("not usable", Text(printable(row.problem)))
        else:
            sizes = ", ".join(f"{w} x {h} pixels" for w, h in row.images) or "none"
            table.add_row("images", sizes)
            if row.videos:
                frames = ", ".join(f"{n} frames of {w} x {h} pixels" for n, w, h in row.videos)
                table.add_row("videos", frames)
            table.add_row("prompt", f"{row.prompt_tokens} tokens, not trained")
            table.add_row("", Text(printable(row.prompt), style="dim"))
            for response in row.responses:
                table.add_row(response.name, _said(response))
                table.add_row("", _tokens(response))
        console.print(Text(printable(row.where), style="bold"), width=width)
        console.print(table, width=width)
        console.print()


def _said(response: ShownResponse) -> str:
    trained = f"{len(response.tokens)} tokens, all trained"
    if response.span is None:
        return trained
    if response.other_images:
        return f"{trained}; an image-side negative: the response to images of its own"
    first, last = response.span
    n = last - first
    return f"{trained}; {n} differ{'s' if n == 1 else ''} from chosen, from token {first + 1} on"


def _tokens(response: ShownResponse) -> Text:
    """The tokens with a bar between them; line breaks are printed as ``\\n``, so that every token is visible."""
    from rich.text import Text

    text = Text()
    for i, token in enumerate(response.tokens):
        if i:
            text.append("|", style="dim")
        differs = response.span is not None and response.span[0] <= i < response.span[1]
        text.append(printable(token.replace("\n", "\\n")), style="red" if differs else "green")
    return text
