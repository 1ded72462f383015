"""Sampling from the current policy: one prefill per prompt, shared by all of its samples.

Every draw has a generator of its own, seeded by (seed, example, number of the sample): what is drawn does not
depend on how prompts are batched, on their order, or on the number of processes. ``generate_batch``
(continuous batching) is not used: it silently ignores images.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cwdpo.data.encode.encoder import EncodedPrompt, Encoder
from cwdpo.models.inputs import device_of, image_inputs
from cwdpo.records import NEW_TOKENS, Example, Sample

_CHUNK = 2**24
"""Most probabilities that are summed up at once (they are in double precision)."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus: the smallest set of most likely tokens with at least this probability; 1 is all.
        max_new_tokens: longest response; one that does not end by then is cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = NEW_TOKENS


def sample(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """One response per example, in order. An example that stands in the list twice gets two draws.

    Args:
        model: the policy; its mode is restored afterwards.
        encoder: the checkpoint's encoder.
        examples: prompts to answer.
        temperature: 0 is greedy.
        max_new_tokens: longest response; one that does not end by then has ``ended = False``.
        batch_size: prompts per forward.
        seed: of the draws; the global generator is not touched.
        progress: called with the number of finished prompts.
    """
    decoding = Decoding(temperature, 1.0, max_new_tokens)
    seen: Counter[str] = Counter()
    keys = []
    for example in examples:
        keys.append(f"{example.id}\0{seen[example.id]}")
        seen[example.id] += 1
    results: dict[int, Sample] = {}
    for index in by_length(encoder, examples, batch_size):
        drawn = sample_batch(
            model, encoder, [examples[i] for i in index], 1, decoding, seed, [keys[i] for i in index]
        )
        results |= {i: own[0] for i, own in zip(index, drawn, strict=True)}
        progress(len(index))
    return [results[i] for i in range(len(examples))]


def by_length(encoder: Encoder, examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Batches of indices, prompts of like length together."""
    order = sorted(range(len(examples)), key=lambda i: (len(encoder.prompt(examples[i]).input_ids), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def sample_batch(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    n: int,
    decoding: Decoding,
    seed: int,
    keys: Sequence[str],
) -> list[list[Sample]]:
    """``n`` responses for each example of one batch; ``keys`` name the examples to the draws' generators."""
    pad = encoder.tokenizer.pad_token_id
    rows = shared_prefill(
        model,
        [encoder.prompt(e) for e in examples],
        n,
        decoding,
        [f"{seed}\0{key}\0{k}" for key in keys for k in range(n)],
        end_ids=encoder.end_ids,
        pad=encoder.tokenizer.eos_token_id if pad is None else pad,
    )
    samples = []
    for ids, logps in rows:
        ended = bool(ids) and ids[-1] in encoder.end_ids
        text = encoder.tokenizer.decode(ids[: len(ids) - ended], skip_special_tokens=True).strip()
        mean = None if decoding.temperature == 0 else sum(logps) / len(logps)
        samples.append(Sample(text, ended, len(ids), mean))
    return [samples[start : start + n] for start in range(0, len(samples), n)]


@torch.no_grad()
def shared_prefill(
    model: Any,
    prompts: Sequence[EncodedPrompt],
    n: int,
    decoding: Decoding,
    draws: Sequence[str],
    *,
    end_ids: frozenset[int],
    pad: int,
) -> list[tuple[list[int], list[float]]]:
    """Sample ``n`` continuations of each of B prompts.

    Prompts are padded on the left and prefilled once; the cache is then repeated ``n`` times. A row that has
    ended goes on as padding until half of the rows have, and then leaves the batch.

    Args:
        model: a causal vision-language model, bare or wrapped by peft; its mode is restored.
        prompts: what the encoder gave.
        n: continuations per prompt.
        decoding: how tokens are drawn.
        draws: [B * n] what seeds the generator of each row.
        end_ids: tokens that end a response; one is the last token of a response that ended.
        pad: any token id; it is masked.

    Returns:
        For each row, prompt by prompt, its T <= max_new_tokens token ids and their log-probabilities (nats) under
        the model at temperature 1.
    """
    was_training = model.training
    mrope = next((m for m in model.modules() if hasattr(m, "rope_deltas")), None)
    stale = None if mrope is None else mrope.rope_deltas
    model.eval()
    try:
        return _decode(model, mrope, prompts, n, decoding, draws, end_ids, pad)
    finally:
        if mrope is not None:
            mrope.rope_deltas = stale  # of another batch: the next forward makes its own
        model.train(was_training)


def _decode(
    model: Any,
    mrope: Any,
    prompts: Sequence[EncodedPrompt],
    n: int,
    decoding: Decoding,
    draws: Sequence[str],
    end_ids: frozenset[int],
    pad: int,
) -> list[tuple[list[int], list[float]]]:
    device = device_of(model)
    logits, cache, position, mask = _prefill(model, mrope, prompts, n, pad, device)
    uniform = _uniform(draws, decoding).to(device)
    live = torch.arange(len(draws), device=device)
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in draws]
    ends = torch.tensor(sorted(end_ids), device=device)
    done = torch.zeros(len(draws), dtype=torch.bool, device=device)
    for t in range(decoding.max_new_tokens):
        token, logp = _draw(logits.float(), decoding, uniform[live, t])
        found = zip(live.tolist(), done.tolist(), token.tolist(), logp.tolist(), strict=True)
        for row, over, id_, value in found:
            if not over:
                rows[row][0].append(id_)
                rows[row][1].append(value)
        done = done | torch.isin(token, ends)
        if bool(done.all()) or t + 1 == decoding.max_new_tokens:
            break
        if 2 * int(done.sum()) >= len(done):
            keep = (~done).nonzero().flatten()
            cache.batch_select_indices(keep)
            live, done, token, position, mask = (x[keep] for x in (live, done, token, position, mask))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        where = (position + t)[:, None]
        logits = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=where if mrope is None else where.expand(3, -1, -1),
            cache=cache,
            use_cache=True,
        ).logits[:, -1]
    return rows


def _prefill(
    model: Any, mrope: Any, prompts: Sequence[EncodedPrompt], n: int, pad: int, device: torch.device
) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
    """Logits of the first new token, the cache, its position, and the mask; all rows ``n`` times."""
    longest = max(len(p.input_ids) for p in prompts)

    def left(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (longest - len(r)) + list(r) for r in rows], device=device)

    mask = left([[1] * len(p.input_ids) for p in prompts], 0)
    inputs: dict[str, Any] = {
        "input_ids": left([p.input_ids for p in prompts], pad),
        "attention_mask": mask,
    }
    for name in sorted({k for p in prompts for k in p.per_token}):
        inputs[name] = left([p.per_token.get(name, [0] * len(p.input_ids)) for p in prompts], 0)
    inputs |= image_inputs(prompts, device)
    if mrope is None or not {"image_grid_thw", "video_grid_thw"} & set(inputs):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        inputs["position_ids"] = places if mrope is None else places.expand(3, -1, -1)
    if mrope is not None:
        mrope.rope_deltas = None
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = DynamicCache(config=inner.config.get_text_config(decoder=True))
    logits = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    position = mask.sum(1)
    if mrope is not None and mrope.rope_deltas is not None:
        # Positions on all three axes go on behind the largest one of the prompt.
        position = position + mrope.rope_deltas.to(device).flatten()
        mrope.rope_deltas = None
    cache.batch_repeat_interleave(n)
    logits, position, mask = (x.repeat_interleave(n, 0) for x in (logits, position, mask))
    return logits, cache, position, mask


def _uniform(draws: Sequence[str], decoding: Decoding) -> Tensor:
    """[rows, max_new_tokens] numbers in [0, 1), each row from a generator of its own."""
    rows = []
    for key in draws:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _draw(logits: Tensor, decoding: Decoding, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row, [rows], by inverting the cumulative distribution; and its log-probability."""
    tokens = []
    size = max(_CHUNK // logits.shape[1], 1)
    if decoding.temperature == 0:
        tokens.append(logits.argmax(-1))
    else:
        for rows, u in zip(logits.split(size), uniform.split(size), strict=True):
            tokens.append(_inverted((rows / decoding.temperature).softmax(-1).double(), decoding.top_p, u))
    token = torch.cat(tokens)
    return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)


def _inverted(probabilities: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """[rows] indices drawn from ``probabilities`` [rows, V], renormalised over the nucleus."""
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=1, descending=True, stable=True)
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:]
    if top_p < 1:
        last = (cumulative < top_p * total).sum(1, keepdim=True).clamp_max(cumulative.shape[1] - 1)
        total = cumulative.gather(1, last)
    index = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    index = index.clamp_max(cumulative.shape[1] - 1)
    return (index if order is None else order.gather(1, index))[:, 0]
