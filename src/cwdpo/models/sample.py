"""Sampling captions from the current policy, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cwdpo.data.encode import Encoder
from cwdpo.models.inputs import device_of, image_inputs
from cwdpo.records import Example


@dataclass(frozen=True)
class Sample:
    """One sampled response: its text, whether it ended by itself, its tokens and mean_logp (nats per token).

    ``mean_logp`` is under the sampling policy at temperature 1, the end token included; ``None`` for greedy.
    """

    text: str
    ended: bool
    n_tokens: int
    mean_logp: float | None


@torch.no_grad()
def sample(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """One response per example, in order.

    Args:
        model: the policy; its mode is restored afterwards.
        encoder: the checkpoint's encoder.
        examples: prompts to answer.
        temperature: 0 is greedy.
        max_new_tokens: longest response; one that does not end by then has ``ended = False``.
        batch_size: prompts per forward; prompts are grouped by length, so results do not depend on it
            for greedy.
        seed: of the sampler; the global generator is left as it was.
        progress: called with the number of finished prompts.
    """
    was_training = model.training
    model.eval()
    results: dict[int, Sample] = {}
    order = sorted(range(len(examples)), key=lambda i: (len(encoder.prompt(examples[i]).input_ids), i))
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = [examples[i] for i in chosen]
                results |= zip(
                    chosen, _generate(model, encoder, batch, temperature, max_new_tokens), strict=True
                )
                progress(len(chosen))
    finally:
        model.train(was_training)
    return [results[i] for i in range(len(examples))]


def _cuda_devices(model: nn.Module) -> list[int]:
    device = device_of(model)
    return [device.index or 0] if device.type == "cuda" else []


def _generate(
    model: Any, encoder: Encoder, examples: Sequence[Example], temperature: float, max_new_tokens: int
) -> list[Sample]:
    device = device_of(model)
    prompts = [encoder.prompt(e) for e in examples]
    longest = max(len(p.input_ids) for p in prompts)
    pad = encoder.tokenizer.pad_token_id
    pad = encoder.tokenizer.eos_token_id if pad is None else pad

    def left(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[fill] * (longest - len(r)) + list(r) for r in rows], device=device)

    inputs: dict[str, Any] = {
        "input_ids": left([p.input_ids for p in prompts], pad),
        "attention_mask": left([[1] * len(p.input_ids) for p in prompts], 0),
    }
    for name in sorted({n for p in prompts for n in p.per_token}):
        inputs[name] = left([p.per_token.get(name, [0] * len(p.input_ids)) for p in prompts], 0)
    inputs |= image_inputs(prompts, device)
    outputs = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        # Spelled out, because a checkpoint's generation_config may hold others.
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=sorted(encoder.end_ids),
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=temperature > 0,
    )
    new = outputs.sequences[:, longest:]
    logps = None
    if temperature > 0:
        steps = [x.float().log_softmax(-1) for x in outputs.logits]
        logps = torch.stack([s.gather(-1, new[:, t, None])[:, 0] for t, s in enumerate(steps)], 1).tolist()
    results = []
    for row, ids in enumerate(new.tolist()):
        end = next((t for t, token in enumerate(ids) if token in encoder.end_ids), None)
        n = len(ids) if end is None else end + 1
        text = encoder.tokenizer.decode(ids[: n if end is None else end], skip_special_tokens=True).strip()
        mean = None if logps is None else sum(logps[row][:n]) / n
        results.append(Sample(text, end is not None, n, mean))
    return results
