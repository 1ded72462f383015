"""Samplers of on-policy responses: the policy in this process, or a server. Actors of Ray are in ``on_ray``."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import nn

from cwdpo.completions_api import Ask
from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import EncodedPrompt, Encoder
from cwdpo.errors import ServerError
from cwdpo.models.load import load_policy
from cwdpo.models.sample import Decoding, sample_batch
from cwdpo.models.turns import in_turns
from cwdpo.negatives.settings import SamplerSettings
from cwdpo.records import Example, Sample
from cwdpo.remote import Adapter, Client
from cwdpo.stage.model import encoder_of
from cwdpo.stage.stage import autocast

ANSWERS = "answers.jsonl"
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Settings of vLLM's sampling under which a sample is one of the policy."""
_ENOUGH = 4
"""Number of prompts whose samples must all be equal before we conclude that a server decodes greedily."""


class Sampler(Protocol):
    """Generates the samples of one batch of prompts."""

    @property
    def together(self) -> bool:
        """Whether every process samples a part of the prompts; else the first process samples all."""

    def at_work(self) -> AbstractContextManager[None]:
        """All processes enter this together, and sample inside it, each as much as it likes."""

    def begin(self, examples: Sequence[Example], seed: int, round_: int) -> None:
        """Called before a batch is sampled, while another one is: its images may be read, or requests sent."""

    def __call__(self, examples: Sequence[Example], seed: int, round_: int) -> list[tuple[Sample, ...]]:
        """The samples of each example; they depend on the seed, the round and the example only."""

    def close(self) -> None:
        """Called when all prompts have been sampled."""


class BatchSampler(Protocol):
    """Samples many batches at once, elsewhere."""

    def drawn(
        self, batches: Sequence[Sequence[Example]], seed: int, round_: int
    ) -> Generator[tuple[int, list[tuple[Sample, ...]]]]:
        """The number of a batch and the samples of its examples, in the order in which batches are finished."""


class LocalSampler:
    """Samples the policy in this process."""

    together = True

    def __init__(self, model: nn.Module, encoder: Encoder, settings: SamplerSettings) -> None:
        self.model, self.encoder, self.settings = model, encoder, settings
        self._begun: dict[str, EncodedPrompt] = {}

    def at_work(self) -> AbstractContextManager[None]:
        """The processes call a sharded policy in turns."""
        return in_turns(self.model)

    def begin(self, examples: Sequence[Example], seed: int, round_: int) -> None:
        """Let the encoder's workers read the images."""
        self._begun |= {e.id: self.encoder.prompt(e).ahead() for e in examples}

    def __call__(self, examples: Sequence[Example], seed: int, round_: int) -> list[tuple[Sample, ...]]:
        """The samples of each example; a prompt is prefilled once for all its samples."""
        s = self.settings
        decoding = Decoding(s.temperature, s.top_p, s.max_new_tokens)
        keys = [f"round {round_}\0{e.id}" for e in examples]
        prompts = [self._begun.pop(e.id) if e.id in self._begun else self.encoder.prompt(e) for e in examples]
        drawn = sample_batch(self.model, self.encoder, prompts, s.samples, decoding, seed, keys)
        return [
            # Rounded as in the stored file, so that a resumed run reads the same number.
            tuple(replace(d, mean_logp=round(d.mean_logp or 0.0, 6)) for d in own)
            for own in drawn
        ]

    def close(self) -> None:
        """Nothing is kept."""


def loaded_sampler(recipe: Recipe) -> tuple[Encoder, LocalSampler, AbstractContextManager[None]]:
    """The encoder of a recipe's model, its sampler in this process, and the precision to sample in."""
    policy = load_policy(recipe.model)
    encoder = encoder_of(policy, recipe)
    sampler = LocalSampler(policy.model, encoder, recipe.negatives.sampler)
    return encoder, sampler, autocast(policy.model, recipe.train.bf16)


class ServerSampler:
    """Samples the model of one or several servers; these samples have no mean_logp.

    The log-probabilities of other inference engines differ from those in training (vllm#12699). They are kept beside
    the samples, and only compared with those (:mod:`cwdpo.onpolicy.agreement`).

    Args:
        settings: of the sampler.
        store: file for the server's answers.
        served: the model to request: a name, or an adapter of the server's base; default: the name in the settings.
        encoder: of the policy; with an adapter, it says which prompts need the tokenizer's first token.
        logprobs: request the log-probabilities of the samples.
    """

    together = False

    def __init__(
        self,
        settings: SamplerSettings,
        store: Path,
        served: str | Adapter | None = None,
        encoder: Encoder | None = None,
        *,
        logprobs: bool = False,
    ) -> None:
        server, adapter = settings.server, None
        assert server is not None
        if isinstance(served, Adapter):
            adapter = served
            # Otherwise vLLM takes them from the base's generation_config, and the samples are of another distribution.
            server = server.model_copy(update={"extra_body": {**NEUTRAL, **server.extra_body}})
        elif served is not None:
            server = server.model_copy(update={"model": served})
        self.client, self.settings, self._logprobs = Client(server, store, adapter), settings, logprobs
        self._encoder = None if adapter is None else encoder

    def at_work(self) -> AbstractContextManager[None]:
        """Nothing: the server works."""
        return nullcontext()

    def begin(self, examples: Sequence[Example], seed: int, round_: int) -> None:
        """Send the requests of a batch, so that the servers have work while another batch is judged."""
        self.client.begin(self._asks(examples, seed, round_))

    def __call__(self, examples: Sequence[Example], seed: int, round_: int) -> list[tuple[Sample, ...]]:
        """The samples of each example; each sample is one request with its own seed, if the server supports seeds."""
        n = self.settings.samples
        answers = self.client.ask(self._asks(examples, seed, round_))
        drawn = [
            Sample(a.text, a.ended, engine_tokens=a.n_tokens, engine_mean_logp=a.mean_logp) for a in answers
        ]
        found = [tuple(drawn[start : start + n]) for start in range(0, len(drawn), n)]
        if n > 1 and len(found) >= _ENOUGH and all(len({d.text for d in own}) == 1 for own in found):
            raise ServerError(
                f"{self.client.settings.place}: all {n} samples of each of {len(found)} prompts are equal: the "
                f"server ignores temperature = {self.settings.temperature:g}. transformers serve samples only with "
                """sampler.server.extra_body: {generation_config: '{"do_sample": true, "top_k": 0}'}"""
            )
        return found

    def close(self) -> None:
        """Let the servers unload the adapter."""
        self.client.close()

    def _asks(self, examples: Sequence[Example], seed: int, round_: int) -> list[Ask]:
        return [self._ask(e, seed, round_, k) for e in examples for k in range(self.settings.samples)]

    def _ask(self, example: Example, seed: int, round_: int, k: int) -> Ask:
        s = self.settings
        text = f"{seed}\0{round_}\0{example.id}\0{k}"
        own = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
        encoder = self._encoder
        return Ask(
            example.prompt,
            example.images,
            s.temperature,
            s.top_p,
            s.max_new_tokens,
            k,
            own,
            self._logprobs,
            bos=encoder is not None and encoder.adds_bos(example),
        )


def build_sampler(
    settings: SamplerSettings,
    model: nn.Module,
    encoder: Encoder,
    store: Path,
    served: str | Adapter | None = None,
) -> Sampler:
    """The sampler of the recipe.

    Args:
        settings: of the sampler.
        model: the policy, sampled in this process if no server is set.
        encoder: of the policy.
        store: file for the server's answers.
        served: the model to request from the server; default: the name in its settings.
    """
    if settings.server is None:
        return LocalSampler(model, encoder, settings)
    return ServerSampler(settings, store, served, encoder, logprobs=settings.logprobs)
