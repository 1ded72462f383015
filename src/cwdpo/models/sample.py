"""Sampling from the current policy: one prefill per prompt, shared by all its samples.

Every sample has its own random generator, seeded by (seed, example, number of the sample). So samples do not depend on
how prompts are batched, on their order, or on the number of processes. transformers' ``generate_batch`` (continuous
batching) is not used, because it ignores images without an error.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin

from cwdpo.data.encode.encoder import EncodedPrompt, Encoder
from cwdpo.data.encode.reading import read_ahead
from cwdpo.models.families.base import Family
from cwdpo.models.inputs import device_of, image_inputs, unwrapped
from cwdpo.models.shared_attention import model_family
from cwdpo.models.turns import in_turns, take_turn, unchanged
from cwdpo.records import NEW_TOKENS, Example, Sample
from cwdpo.waiting import of_all

_PREPARED = signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _PREPARED else "past_key_values"  # before transformers 5.24
_CHUNK = 2**24
"""Largest number of probabilities in one cumulative sum (in double precision), to limit memory."""


@dataclass(frozen=True)
class Decoding:
    """Settings of sampling.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus sampling: only the smallest set of most likely tokens with at least this total probability is
            sampled from; 1 is all tokens.
        max_new_tokens: largest number of new tokens; longer responses are cut.
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
    together: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """One response per example, in order. An example that is in the list twice gets two different samples.

    Args:
        model: the policy; its mode (train or eval) is restored afterwards.
        encoder: the checkpoint's encoder.
        examples: prompts.
        temperature: 0 is greedy.
        max_new_tokens: largest number of new tokens; a response that is cut has ``ended = False``.
        batch_size: prompts per forward pass.
        seed: seed of the samples; torch's global generator is not used.
        together: all processes of the run call this, each draws a part of the batches, and all get all samples. Of a
            sharded model, all processes must call this together in any case.
        progress: called with the number of finished prompts.
    """
    drawn = sample_several(
        model, encoder, examples, 1, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size,
        seed=seed, repeated=repeats(examples, Counter()), together=together, progress=progress,
    )  # fmt: skip
    return [own[0] for own in drawn]


def repeats(examples: Sequence[Example], asked: Counter[str]) -> list[int]:
    """For each example, how often its id was asked before, ``asked`` times in earlier calls; ``asked`` is updated."""
    found = []
    for example in examples:
        found.append(asked[example.id])
        asked[example.id] += 1
    return found


def sample_several(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    n: int,
    *,
    repeated: Sequence[int],
    temperature: float = 1.0,
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int = 64,
    seed: int = 0,
    together: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> list[list[Sample]]:
    """``n`` responses per example behind one prefill, in order.

    Args:
        model, encoder, examples, temperature, max_new_tokens, seed, together, progress: see :func:`sample`.
        n: responses per example.
        repeated: for each example, how often it was asked before with this seed (:func:`repeats`); another number
            gives other samples.
        batch_size: responses per forward pass; at least those of one example.
    """
    decoding = Decoding(temperature, 1.0, max_new_tokens)
    keys = [f"{example.id}\0{number}" for example, number in zip(examples, repeated, strict=True)]
    results: dict[int, list[Sample]] = {}
    batches = by_length(encoder, examples, max(1, batch_size // n))
    if together:
        state = PartialState()
        batches = batches[state.process_index :: state.num_processes]
    prompts = ([encoder.prompt(examples[i]) for i in index] for index in batches)
    with in_turns(model):
        for index, begun in zip(batches, read_ahead(prompts, begun_prompts, len), strict=True):
            drawn = sample_batch(model, encoder, begun, n, decoding, seed, [keys[i] for i in index])
            results |= zip(index, drawn, strict=True)
            progress(len(index))
    if together:
        results = dict(of_all(list(results.items()), "sampling"))
    return [results[i] for i in range(len(examples))]


def by_length(encoder: Encoder, examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Batches of indices; prompts of similar length are in the same batch."""
    order = sorted(range(len(examples)), key=lambda i: (len(encoder.prompt(examples[i]).input_ids), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def begun_prompts(prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """The prompts of a batch, whose images are read from now on if the encoder has workers; each prompt once."""
    coming = {id(p): p.ahead() for p in {id(p): p for p in prompts}.values()}
    return [coming[id(p)] for p in prompts]


def sample_batch(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    n: int,
    decoding: Decoding,
    seed: int,
    keys: Sequence[str],
) -> list[list[Sample]]:
    """``n`` responses for each prompt of one batch.

    Args:
        model, encoder: see :func:`sample`.
        prompts: the encoder's.
        n: responses per prompt.
        decoding: settings of sampling.
        seed, keys: each generator is seeded by the seed, the prompt's key and the number of the sample.
    """
    pad = encoder.tokenizer.pad_token_id
    rows = shared_prefill(
        model,
        prompts,
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
    """Sample ``n`` completions of each of B prompts.

    Prompts are padded on the left and prefilled once; then the cache is repeated ``n`` times. When half of the rows
    have ended, the ended rows are removed from the batch.

    Args:
        model: a causal vision-language model, bare or wrapped by peft; its mode is restored.
        prompts: encoded prompts.
        n: completions per prompt.
        decoding: settings of sampling.
        draws: [B * n] texts that seed the generator of each row.
        end_ids: tokens that end a response; the end token is part of the result.
        pad: any token id; it is masked.

    Returns:
        For each row, in the order of the prompts: its T <= max_new_tokens token ids, and their log-probabilities
        (nats) under the model at temperature 1.
    """
    family, inner = model_family(model), unwrapped(model)
    groups = [0 if family is None else family.group(inner, p) for p in prompts]
    found: dict[int, tuple[list[int], list[float]]] = {}
    with unchanged(model):
        for group in sorted(set(groups)):
            index = [i for i, own in enumerate(groups) if own == group]
            rows = [i * n + k for i in index for k in range(n)]
            batch = _Rows(model, [prompts[i] for i in index], pad)
            found |= zip(rows, _decode(batch, n, decoding, [draws[r] for r in rows], end_ids), strict=True)
    return [found[row] for row in range(len(draws))]


@torch.no_grad()
def forced_logps(model: Any, prompt: EncodedPrompt, ids: Sequence[int]) -> Tensor:
    """[tokens] log-probabilities (nats) of a given completion, computed by the model's own generation code.

    They are computed token by token with the model's cache, so they do not depend on the rows of scoring.
    """
    with unchanged(model):
        rows = _Rows(model, [prompt], 0)
        logits, found = rows.prefill(), []
        for token in ids:
            found.append(logits.float().log_softmax(-1)[0, token])
            logits = rows.step(torch.tensor([token], device=logits.device))
    return torch.stack(found)


class _Rows:
    """The state of B rows during generation (cache, mask, positions), as in transformers' ``generate``.

    Positions, token types and further masks come from the model's own ``prepare_inputs_for_generation`` and
    ``_update_model_kwargs_for_generation``, which families override.

    Args:
        model: bare or wrapped by peft.
        prompts: B prompts; they are padded on the left.
        pad: any token id; it is masked.
    """

    def __init__(self, model: Any, prompts: Sequence[EncodedPrompt], pad: int) -> None:
        self.model, self.inner = model, unwrapped(model)
        device, family = device_of(model), model_family(model) or Family()
        longest = max(len(p.input_ids) for p in prompts)
        before = [longest - len(p.input_ids) for p in prompts]
        self.ids = torch.tensor(
            [[pad] * n + list(p.input_ids) for n, p in zip(before, prompts, strict=True)], device=device
        )
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in before], device=device)
        rows = {k: v.to(device) for k, v in family.token_rows(prompts, longest, left=True).items()}
        images = family.fit(image_inputs(prompts, device), prompts, longest, left=True)
        self.cache = DynamicCache(config=self.inner.config.get_text_config(decoder=True))
        self._of_tokens = {"attention_mask", "position_ids", *rows, *family.token_inputs}
        self.state: dict[str, Any] = {"attention_mask": mask, **rows, **images, _CACHE: self.cache}
        self.state["position_ids"] = self.inner._prepare_position_ids_for_generation(self.ids, self.state)

    def prefill(self) -> Tensor:
        """[B, V] logits of the first new token."""
        logits = self._forward(self.ids, first=True)
        # The images are in the cache now. Their tensors are not needed and could not be indexed by row.
        self.state = {k: v for k, v in self.state.items() if k in self._of_tokens}
        return logits

    def step(self, token: Tensor) -> Tensor:
        """[B, V] logits after one more token of each row.

        Args:
            token: [B] token ids.
        """
        return self._forward(token[:, None], first=False)

    def select(self, index: Tensor) -> None:
        """Keep the rows of ``index``, in this order; an index may be repeated."""
        self.cache.reorder_cache(index)
        for name, value in self.state.items():
            self.state[name] = value.index_select(-2 if name == "position_ids" else 0, index)

    def _forward(self, ids: Tensor, *, first: bool) -> Tensor:
        inputs = self.inner.prepare_inputs_for_generation(
            ids,
            next_sequence_length=ids.shape[1],
            is_first_iteration=first,
            use_cache=True,
            logits_to_keep=1,
            **{**self.state, _CACHE: self.cache},
        )
        take_turn(self.model, inputs)
        outputs = self.model(**inputs)
        self.state = self.inner._update_model_kwargs_for_generation(
            outputs, self.state, is_encoder_decoder=False
        )
        self.state.pop(_CACHE, None)
        logits: Tensor = outputs.logits[:, -1]
        return logits


def _decode(
    batch: _Rows, n: int, decoding: Decoding, draws: Sequence[str], end_ids: frozenset[int]
) -> list[tuple[list[int], list[float]]]:
    logits = batch.prefill()
    device = logits.device
    repeated = torch.arange(len(logits), device=device).repeat_interleave(n)
    batch.select(repeated)
    logits = logits[repeated]
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
            batch.select(keep)
            live, done, token = (x[keep] for x in (live, done, token))
        logits = batch.step(token)
    return rows


def _uniform(draws: Sequence[str], decoding: Decoding) -> Tensor:
    """[rows, max_new_tokens] random numbers in [0, 1); each row has its own generator."""
    rows = []
    for key in draws:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _draw(logits: Tensor, decoding: Decoding, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample the next token of each row by inverting the cumulative distribution.

    Returns:
        [rows] token ids and [rows] their log-probabilities (nats, at temperature 1).
    """
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
    """[rows] token ids sampled from ``probabilities`` [rows, V], renormalised over the nucleus.

    Args:
        probabilities: [rows, V].
        top_p: see :class:`Decoding`.
        uniform: [rows] random numbers in [0, 1).
    """
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
