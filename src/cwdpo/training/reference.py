"""The reference pass of a run: values are stored as they come, so that a kill loses one batch at most."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import torch
import transformers
from torch import nn

from cwdpo.data.encode import EncodedExample, with_reference
from cwdpo.errors import NonFiniteError
from cwdpo.rundir import RunDir, read_jsonl
from cwdpo.scoring.pairs import reference_pass

FILE = "reference.jsonl"
Values = list[tuple[float, float]]


def stored_reference_pass(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    run: RunDir,
    *,
    batch_size: int,
    bf16: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> list[EncodedExample]:
    """As :func:`cwdpo.scoring.pairs.reference_pass`, to the last bit, but only for what the run lacks.

    Rows of ``reference.jsonl`` are found by the reference's weights and the example's place, id and tokens:
    those of another reference, precision, picture or other data never match. A batch that is stored in part is scored
    again as a whole, because a row's last bits depend on the rows that it was padded with.

    Args:
        model: the reference.
        examples: P prompts with their completions.
        run: where values are stored; nothing is written where ``run.writes`` is not set.
        batch_size: prompts per forward.
        bf16: whether the caller scores under bfloat16.
        progress: called with the number of finished prompts.

    Returns:
        The examples with reference sums (nats), in their order.

    Raises:
        NonFiniteError: the reference has no finite log-likelihood for an example.
    """
    start = f"{weights_digest(model)} {bf16}"
    keys = [_key(start, i, example) for i, example in enumerate(examples)]
    stored: dict[str, Values] = {row["key"]: row["values"] for row in read_jsonl(run.path / FILE)}
    done: dict[int, EncodedExample] = {}
    order = sorted(range(len(examples)), key=lambda i: (examples[i].n_tokens, i))
    for first in range(0, len(order), batch_size):
        index = order[first : first + batch_size]
        if all(keys[i] in stored for i in index):
            done |= {i: with_reference(examples[i], stored[keys[i]]) for i in index}
        else:
            scored = reference_pass(model, [examples[i] for i in index], batch_size=batch_size)
            done |= zip(index, scored, strict=True)
            run.append(
                FILE,
                (
                    {"id": examples[i].id, "key": keys[i], "values": _finite_values(done[i])}
                    for i in index
                    if keys[i] not in stored
                ),
            )
        progress(len(index))
    return [done[i] for i in range(len(examples))]


def _finite_values(example: EncodedExample) -> Values:
    """(sum_logp, span_sum_logp) of chosen, then of each negative."""
    values: Values = []
    for completion in (example.chosen, *example.negatives):
        total, span = completion.reference_sum_logp, completion.reference_span_sum_logp
        assert total is not None
        assert span is not None
        if not (math.isfinite(total) and math.isfinite(span)):
            raise NonFiniteError(
                f"example {example.id}: the reference gives one of its responses the log-likelihood {total}; nothing "
                "was trained. Look at its picture and texts with `cwdpo validate`, or at the model's weights"
            )
        values.append((total, span))
    return values


def _key(start: str, place: int, example: EncodedExample) -> str:
    parts = [
        start,
        place,
        example.id,
        example.prompt.input_ids,
        example.prompt.image_digest,
        [(c.ids, c.span) for c in (example.chosen, *example.negatives)],
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """A digest of what scores: all weights (cheap sums, which any training step changes), dtype, attention, version."""
    digest = hashlib.blake2b(digest_size=16)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    digest.update(f"{attention} {transformers.__version__}\n".encode())
    for name, parameter in model.named_parameters():
        total = float(parameter.detach().sum(dtype=torch.float64))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total!r}\n".encode())
    return digest.hexdigest()
