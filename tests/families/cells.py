"""The table of docs/models.md: its columns, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by make test-families -->", "<!-- end -->"
WORKS, REFUSED = "yes", "refused"
CELLS = (
    "validate",
    "stage 1 + 2, LoRA, bf16",
    "full",
    "on-policy",
    "several pictures",
    "text-only mixed in",
    "several turns",
    "system prompt",
    "evaluate",
    "sample",
    "export",
    "nf4",
    "int8",
    "image-side",
    "video",
)


def table(found: Mapping[tuple[str, str], str], shared: Mapping[str, bool]) -> str:
    """The table in Markdown.

    Args:
        found: by family and cell.
        shared: by family, whether its rows share their prefix.
    """
    head = ["family", "rows", *CELLS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for family, shares in shared.items():
        cells = [found.get((family, cell), "FAILED") for cell in CELLS]
        lines.append(f"| {' | '.join([family, 'shared' if shares else 'plain', *cells])} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The table that a page holds."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def with_table(page: str, made: str) -> str:
    """The page with another table."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"
