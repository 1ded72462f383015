"""Whether a model has an embedding for every token of a row."""

from __future__ import annotations

from collections.abc import Sequence

from cwdpo.data.encode.template import ChatTemplate, RefusedRowError
from cwdpo.records import Example


def check_embedded(
    template: ChatTemplate, example: Example, ids: Sequence[int], allowed: frozenset[int]
) -> None:
    """Refuse ids that the model's embedding does not have: tokenizer and weights are of different checkpoints.

    Raises:
        RefusedRowError: naming the first such token.
    """
    rows = template.checkpoint.embedded
    if rows is None or max(ids, default=0) < rows:
        return
    beyond = [i for i in ids if i >= rows and i not in allowed]
    if beyond:
        raise RefusedRowError(
            example.where or example.id,
            "token-without-embedding",
            "",
            f"token {template.tokenizer.convert_ids_to_tokens(beyond[0])!r} has the id {beyond[0]}, and the model "
            f"embeds {rows} tokens",
            "fetch tokenizer and weights from the same place, or resize the embedding",
        )
