"""Encodes examples to token ids and image tensors: the prompt once, and each completion on its own.

The ids of a completion are those that the tokenizer gives for its text *after* the prompt. So the ids of prompt and
completion together are the ids of the joined text, and generation starts from exactly the same prompt ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from cwdpo.data.encode.embedded import check_embedded
from cwdpo.data.encode.encoded_prompt import EncodedPrompt as EncodedPrompt
from cwdpo.data.encode.image_cache import ImageCache
from cwdpo.data.encode.prompts import PromptEncoder
from cwdpo.data.encode.reading import read_ahead
from cwdpo.data.encode.render import Asked
from cwdpo.data.encode.span import differing_span
from cwdpo.data.encode.template import ChatTemplate, CheckpointTokens, RefusedRowError
from cwdpo.errors import DataError
from cwdpo.records import Completion, Example, Origin

NegativeSet = Literal["rejected", "gentle", "none"]
TOGETHER = 128
"""Examples that are rendered and tokenized together."""


@dataclass(frozen=True)
class EncodedCompletion:
    """Token ids of one completion, with its end token, and its log-probabilities under the reference model.

    ``span`` is the half-open token range that differs from chosen (for chosen itself: all its tokens).
    ``reference_sum_logp`` and ``reference_span_sum_logp`` are in nats; ``None`` before the reference is scored.
    ``reward_margin`` is the reward of chosen minus the reward of this completion, if the data has it.
    ``prompt`` is the prompt of an image-side negative, whose images are not the example's; else ``None``.
    """

    ids: tuple[int, ...]
    origin: Origin = "dataset"
    kind: str = ""
    span: tuple[int, int] = (0, 0)
    reference_sum_logp: float | None = None
    reference_span_sum_logp: float | None = None
    reward_margin: float | None = None
    prompt: EncodedPrompt | None = None

    @property
    def reference_mean_logp(self) -> float | None:
        """Mean log-probability under the reference model, in nats per token; ``None`` before it is scored."""
        return None if self.reference_sum_logp is None else self.reference_sum_logp / len(self.ids)


@dataclass(frozen=True)
class EncodedExample:
    """One prompt with its chosen completion and the negatives that this stage uses; ``source`` as in Example."""

    id: str
    prompt: EncodedPrompt
    chosen: EncodedCompletion
    negatives: tuple[EncodedCompletion, ...] = ()
    source: str = ""

    @property
    def completions(self) -> tuple[EncodedCompletion, ...]:
        """Chosen, then the negatives."""
        return (self.chosen, *self.negatives)

    def prompt_of(self, completion: EncodedCompletion) -> EncodedPrompt:
        """The prompt that a completion responds to."""
        return completion.prompt or self.prompt

    @property
    def prompts(self) -> tuple[EncodedPrompt, ...]:
        """The example's prompt, then those of image-side negatives, each once."""
        others = {id(c.prompt): c.prompt for c in self.negatives if c.prompt is not None}
        return (self.prompt, *others.values())

    def ahead(self, wanted: Callable[[EncodedPrompt], bool]) -> EncodedExample:
        """The example whose images worker processes read from now on, see :meth:`EncodedPrompt.ahead`.

        Args:
            wanted: whether the images of a prompt will be needed.
        """
        coming = {id(p): p.ahead() if wanted(p) else p for p in self.prompts}
        negatives = (
            c if c.prompt is None else replace(c, prompt=coming[id(c.prompt)]) for c in self.negatives
        )
        return replace(self, prompt=coming[id(self.prompt)], negatives=tuple(negatives))

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the longest sequence: a prompt plus a completion."""
        return max(self.row_tokens(shared=False))

    def row_tokens(self, *, shared: bool) -> tuple[int, ...]:
        """Number of tokens of each row in scoring: a shared-prefix row per prompt, or a plain row per completion."""
        if not shared:
            return tuple(len(self.prompt_of(c).input_ids) + len(c.ids) for c in self.completions)
        return tuple(
            len(prompt.input_ids) + sum(len(c.ids) for c in self.completions if self.prompt_of(c) is prompt)
            for prompt in self.prompts
        )


def offered(example: Example, negatives: NegativeSet) -> tuple[Completion, ...]:
    """The negatives of an example that a stage uses."""
    return {"rejected": example.rejected, "gentle": example.gentle, "none": ()}[negatives]


class Encoder:
    """Encodes examples with a checkpoint's own processor and chat template.

    Args:
        processor: the result of ``AutoProcessor.from_pretrained``.
        max_length: largest number of tokens of prompt plus completion; ``None`` for no limit. Nothing is truncated:
            a longer example raises :class:`DataError`, and the caller leaves it out.
        cache_gb: memory for image tensors, in GiB; images that do not fit are decoded again at every use.
        checkpoint: token ids from generation_config and weights; :meth:`cwdpo.models.load.Policy.encoder` passes them.
        from_sizes, workers, on_disk: see :class:`PromptEncoder`.

    Attributes:
        prompt: encodes the prompt of an example.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        cache_gb: float = 1.0,
        checkpoint: CheckpointTokens | None = None,
        *,
        from_sizes: bool = True,
        workers: int = 0,
        on_disk: ImageCache | None = None,
    ) -> None:
        template = ChatTemplate(processor, checkpoint)
        self._set(
            PromptEncoder(template, cache_gb, from_sizes=from_sizes, workers=workers, on_disk=on_disk),
            max_length,
        )

    @classmethod
    def around(cls, prompt: PromptEncoder, max_length: int | None) -> Encoder:
        """An encoder whose prompts are encoded by ``prompt``, for instance the copy of a worker."""
        encoder = cls.__new__(cls)
        encoder._set(prompt, max_length)
        return encoder

    def _set(self, prompt: PromptEncoder, max_length: int | None) -> None:
        self.prompt, self.max_length = prompt, max_length
        self.processor, self.template, self.tokenizer = prompt.processor, prompt.template, prompt.tokenizer
        # Parts are found by an example's place in memory, so the examples are kept as long as their parts.
        self._named: list[Example] = []
        self._foreseen_parts: dict[tuple[int, str], tuple[str, str]] = {}

    def forget(self) -> None:
        """Empty the caches of prompts and images."""
        self.prompt.forget()

    def prompt_text(self, example: Example) -> str:
        """See :meth:`cwdpo.data.encode.prompts.PromptEncoder.text`."""
        return self.prompt.text(example)

    def adds_bos(self, example: Example) -> bool:
        """Whether the prompt begins with bos by the tokenizer, because the chat template writes none (LLaVA 1.5)."""
        return self.prompt.adds_bos(self.prompt_text(example))

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids at which a response ends; see :attr:`cwdpo.data.encode.template.ChatTemplate.stops`."""
        return frozenset(self.template.stops)

    def check_positions(self, example: Example, n_tokens: int) -> None:
        """Refuse a row that is longer than the sequences that the model was made for.

        Raises:
            RefusedRowError: naming both numbers.
        """
        positions = self.template.checkpoint.positions
        if positions is not None and n_tokens > positions:
            raise RefusedRowError(
                example.where or example.id,
                "too-long-for-the-model",
                "",
                f"{n_tokens} tokens, and the model has {positions} positions (max_position_embeddings)",
                "shorten the texts, shrink the images (model.processor_options), or leave the row out; where its "
                "positions are meant to reach further, raise the number in its config.json",
            )

    def completion_ids(self, example: Example, text: str) -> tuple[int, ...]:
        """Token ids of a response after its prompt; the last one is the end-of-turn token.

        Raises:
            DataError: the response has no tokens besides the end token.
        """
        found = self._foreseen_parts.get((id(example), text))
        prompt, tail = found or self._parts(example, self.prompt_text(example), text)
        ids, end = self.prompt.tails(prompt, tail), self.template.end
        ids = ids if end.closing else [*ids, end.token]
        if len(ids) < 2:
            raise DataError(f"{example.where or example.id}: a response without tokens: {text!r}")
        check_embedded(self.template, example, ids, frozenset())
        return tuple(ids)

    def _parts(self, example: Example, prompt: str, text: str) -> tuple[str, str]:
        """The prompt, and what follows it in a conversation with the response."""
        tail = self.template.continuation(example, prompt, text)
        # Tokenizers join a final space with the next word: the space is moved from the prompt to the completion.
        bare = prompt.rstrip(" ")
        return bare, prompt[len(bare) :] + tail

    def _foreseen(self, examples: Iterable[Example], negatives: NegativeSet) -> Iterator[Example]:
        """The examples; what encoding them takes is made before, for many of them together."""
        for said, asked, texts in self._rendered(examples, negatives):
            self.template.foresee(asked, texts)
            some = [example for example, _ in said]
            parts: dict[tuple[int, str], tuple[str, str]] = {}
            for example, responses in said:
                with contextlib.suppress(DataError):  # encoding the row reports the error
                    prompt = self.prompt_text(example)
                    for text in responses:
                        parts[id(example), text] = self._parts(example, prompt, text)
            self._named, self._foreseen_parts = some, parts
            self.prompt.tails.foresee(parts.values())
            self.prompt.foresee(some)
            yield from some
        self._named, self._foreseen_parts = [], {}
        self.prompt.tails.forget()
        self.prompt.foresee(())

    def _rendered(
        self, examples: Iterable[Example], negatives: NegativeSet
    ) -> Iterator[tuple[list[tuple[Example, list[str]]], Asked, list[str | None]]]:
        """Examples with their responses, and the renderer's texts: it renders the next ones while these are used."""
        source = iter(examples)
        groups = iter(lambda: list(islice(source, TOGETHER)), [])
        with ThreadPoolExecutor(1) as pool:

            def begun(some: list[Example]) -> Any:
                said = [(e, [e.chosen.text, *(c.text for c in offered(e, negatives))]) for e in some]
                asked = self.template.asked(said)
                return said, asked, pool.submit(self.template.rendered, asked)

            for said, asked, texts in read_ahead(groups, begun, len):
                yield said, asked, texts.result()

    def encode(self, example: Example, negatives: NegativeSet = "rejected") -> EncodedExample:
        """Encode one example with the negatives of its stage; negatives with the same ids as chosen are left out.

        Raises:
            DataError: an image cannot be read, a response has no tokens, or the example is longer than ``max_length``.
        """
        own = offered(example, negatives)
        said = ((f"{negatives}[{k}]", completion.text) for k, completion in enumerate(own))
        self.template.check_texts(example, [("chosen", example.chosen.text), *said])
        chosen_ids = self.completion_ids(example, example.chosen.text)
        chosen = _encoded(example.chosen, chosen_ids, (0, len(chosen_ids)))
        rejected = []
        for completion in own:
            ids = self.completion_ids(example, completion.text)
            if completion.images is not None:
                # All tokens count as different from chosen: each follows another image.
                negative = _encoded(completion, ids, (0, len(ids)))
                rejected.append(replace(negative, prompt=self._other_prompt(example, completion)))
            elif ids != chosen_ids:
                rejected.append(_encoded(completion, ids, differing_span(chosen_ids, ids)))
        encoded = EncodedExample(example.id, self.prompt(example), chosen, tuple(rejected), example.source)
        self.check_positions(example, encoded.n_tokens)
        if self.max_length is not None and encoded.n_tokens > self.max_length:
            raise DataError(
                f"{example.where or example.id}: {encoded.n_tokens} tokens (prompt {len(encoded.prompt.input_ids)}) "
                f"are more than data.max_length = {self.max_length}; nothing is truncated: raise the limit or "
                "shrink the images (model.processor_options)"
            )
        return encoded

    def _other_prompt(self, example: Example, completion: Completion) -> EncodedPrompt:
        """The prompt of an image-side negative: the example's messages with the negative's images."""
        images = completion.images or ()
        if len(images) != len(example.images):
            raise DataError(
                f"{example.where or example.id}: a negative has {len(images)} images of its own, the prompt has "
                f"{len(example.images)}; allowed: the same number"
            )
        return self.prompt(replace(example, images=images))

    def readable(self, examples: Iterable[Example], limit: int) -> list[Example]:
        """The first ``limit`` examples whose prompts can be encoded and whose images can be decoded."""
        good: list[Example] = []
        for example in examples:
            if len(good) >= limit:
                break
            with contextlib.suppress(DataError):
                _ = self.prompt(example).images
                good.append(example)
        return good

    def encode_all(
        self, examples: Iterable[Example], negatives: NegativeSet, *, require_negative: bool
    ) -> tuple[list[EncodedExample], list[str]]:
        """Encode all examples that can be encoded; the second list has one message for each example left out."""
        problems: list[str] = []
        found = self.encodings(examples, negatives, problems, require_negative=require_negative)
        return [encoded for _, _, encoded in found], problems

    def encodings(
        self,
        examples: Iterable[Example],
        negatives: NegativeSet,
        problems: list[str],
        *,
        require_negative: bool,
    ) -> Iterator[tuple[int, Example, EncodedExample]]:
        """The place, the example and its encoding, of all that can be encoded; the others add to ``problems``."""
        for number, example in enumerate(self._foreseen(examples, negatives)):
            try:
                encoded = self.encode(example, negatives)
            except DataError as error:
                problems.append(str(error))
                continue
            if require_negative and not encoded.negatives:
                problems.append(f"{example.where or example.id}: no negative for this stage")
                continue
            yield number, example, encoded


def _encoded(completion: Completion, ids: Sequence[int], span: tuple[int, int]) -> EncodedCompletion:
    margin = completion.made.get("reward_margin")
    return EncodedCompletion(
        tuple(ids),
        completion.origin,
        completion.kind,
        span,
        reward_margin=None if margin is None else float(margin),
    )
