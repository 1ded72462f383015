"""Encodes examples to token ids and image tensors: the prompt once, and each completion on its own.

The ids of a completion are those that the tokenizer gives for its text *after* the prompt. So the ids of prompt and
completion together are the ids of the joined text, and generation starts from exactly the same prompt ids.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from cwdpo.data.encode.span import differing_span
from cwdpo.data.encode.template import ChatTemplate, CheckpointTokens, RefusedRowError
from cwdpo.errors import DataError
from cwdpo.records import Completion, Example, Origin

if TYPE_CHECKING:
    from torch import Tensor

NegativeSet = Literal["rejected", "gentle", "none"]
_NOT_FOR_THE_MODEL = ("attention_mask", "labels")
"""Processor outputs that are not passed on: scoring makes its own mask, and labels make the model compute a loss."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as model input.

    ``input_ids``: token ids with the image tokens expanded. ``per_token``: further outputs of the processor with one
    value per token (``mm_token_type_ids``, ``token_type_ids``). ``load_images``: returns the inputs of the vision
    tower. ``image_digest``: digest of these inputs; it changes with the images and with the processor's settings.
    """

    input_ids: tuple[int, ...]
    per_token: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    load_images: Callable[[], Mapping[str, Tensor]] = field(default=dict, repr=False, compare=False)
    image_digest: str = ""

    @property
    def images(self) -> Mapping[str, Tensor]:
        """The inputs of the vision tower; decoded again if they are not in the encoder's cache."""
        return self.load_images()

    def loaded(self) -> EncodedPrompt:
        """The prompt with its images in memory.

        Raises:
            DataError: an image cannot be read.
        """
        images = self.images
        return replace(self, load_images=lambda: images)


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
    """One prompt with its chosen completion and the negatives that this stage uses."""

    id: str
    prompt: EncodedPrompt
    chosen: EncodedCompletion
    negatives: tuple[EncodedCompletion, ...] = ()

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


class Encoder:
    """Encodes examples with a checkpoint's own processor and chat template.

    Args:
        processor: the result of ``AutoProcessor.from_pretrained``.
        max_length: largest number of tokens of prompt plus completion; ``None`` for no limit. Nothing is truncated:
            a longer example raises :class:`DataError`, and the caller leaves it out.
        cache_gb: memory for image tensors, in GiB; images that do not fit are decoded again at every use.
        checkpoint: token ids from generation_config and weights; :meth:`cwdpo.models.load.Policy.encoder` passes them.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        cache_gb: float = 1.0,
        checkpoint: CheckpointTokens | None = None,
    ) -> None:
        self.processor = processor
        self.template = ChatTemplate(processor, checkpoint)
        self.tokenizer = self.template.tokenizer
        self.max_length = max_length
        self._prompts: dict[tuple[Any, ...], EncodedPrompt] = {}
        self._images: dict[tuple[Any, ...], Mapping[str, Tensor]] = {}
        self._free_bytes = cache_gb * 2**30
        self._texts: dict[tuple[Any, ...], str] = {}

    def forget(self) -> None:
        """Empty the caches of prompts and images."""
        self._free_bytes += sum(
            t.numel() * t.element_size() for i in self._images.values() for t in i.values()
        )
        for kept in (self._prompts, self._images, self._texts):
            kept.clear()

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids at which a response ends; see :attr:`cwdpo.data.encode.template.ChatTemplate.stops`."""
        return frozenset(self.template.stops)

    def prompt_text(self, example: Example) -> str:
        """The prompt as text, rendered by the chat template up to the start of the response (images as placeholders).

        Raises:
            DataError: the template refuses it.
        """
        if example.prompt not in self._texts:
            self._texts[example.prompt] = self.template.prompt(example)
        return self._texts[example.prompt]

    def prompt(self, example: Example) -> EncodedPrompt:
        """Encode images and prompt; the result is cached, because several stages use it.

        Raises:
            DataError: an image cannot be decoded, or the processor refuses the prompt.
        """
        key = (example.images, example.prompt)
        if key not in self._prompts:
            ids, per_token, images = self._process(example)
            self._keep(key, images)
            load = partial(self._load_images, example) if images else dict[str, Any]
            self._prompts[key] = EncodedPrompt(ids, per_token, load, _digest(images))
        return self._prompts[key]

    def _keep(self, key: tuple[Any, ...], images: Mapping[str, Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in images.values())
        if size <= self._free_bytes:
            self._images[key] = images
            self._free_bytes -= size

    def _load_images(self, example: Example) -> Mapping[str, Tensor]:
        key = (example.images, example.prompt)
        return self._images[key] if key in self._images else self._process(example)[2]

    def _process(
        self, example: Example
    ) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]], dict[str, Tensor]]:
        try:
            opened = [image.open() for image in example.images]
        except Exception as error:  # on broken files Pillow's plugins raise errors of many types
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{example.where or example.id}: images: cannot be decoded ({reason})") from error
        # Nested: some processors (LLaVA-OneVision) take a flat list as one image for each text.
        kwargs: dict[str, Any] = {"images": [opened]} if opened else {}
        text = self.prompt_text(example).rstrip(" ")
        try:
            outputs = self._processed(text, kwargs)
        except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
            raise DataError(
                f"{example.where or example.id}: prompt: refused by the processor ({error})"
            ) from error
        ids = outputs.pop("input_ids")[0]
        per_token = {
            k: tuple(v[0].tolist())
            for k, v in outputs.items()
            if k.endswith("token_type_ids") and tuple(v.shape) == (1, ids.shape[0])
        }
        images = {k: v for k, v in outputs.items() if k not in (*per_token, *_NOT_FOR_THE_MODEL)}
        self._check_embedded(example, ids.tolist(), self.template.checkpoint.placeholders)
        return tuple(ids.tolist()), per_token, images

    def _processed(self, text: str, kwargs: Mapping[str, Any]) -> Any:
        """The processor's outputs.

        Without a chat template the prompt ends with a line break. Some processors (PaliGemma) add it themselves; they
        get the prompt without it.
        """
        if not self.template.is_there:
            bare = self._call(text.removesuffix("\n"), kwargs)
            if self.tokenizer.decode(bare["input_ids"][0]).endswith("\n"):
                return bare
        return self._call(text, kwargs)

    def _call(self, text: str, kwargs: Mapping[str, Any]) -> Any:
        return self.processor(
            text=[text], return_tensors="pt", add_special_tokens=self._adds_bos(text), **kwargs
        )

    def _check_embedded(self, example: Example, ids: Sequence[int], allowed: frozenset[int]) -> None:
        """Refuse ids that the model's embedding does not have: tokenizer and weights are of different checkpoints."""
        rows = self.template.checkpoint.embedded
        beyond = [] if rows is None else [i for i in ids if i >= rows and i not in allowed]
        if beyond:
            raise RefusedRowError(
                example.where or example.id,
                "token-without-embedding",
                "",
                f"token {self.tokenizer.convert_ids_to_tokens(beyond[0])!r} has the id {beyond[0]}, and the model "
                f"embeds {rows} tokens",
                "fetch tokenizer and weights from the same place, or resize the embedding",
            )

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
        prompt, end = self.prompt_text(example), self.template.end
        tail = self.template.continuation(example, prompt, text)
        # Tokenizers join a final space with the next word: the space is moved from the prompt to the completion.
        prompt, tail = prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :] + tail
        before, joined = self._ids(prompt), self._ids(prompt + tail)
        ids = joined[len(before) :] if joined[: len(before)] == before else self._ids(tail)
        ids = ids if end.closing else [*ids, end.token]
        if len(ids) < 2:
            raise DataError(f"{example.where or example.id}: a response without tokens: {text!r}")
        self._check_embedded(example, ids, frozenset())
        return tuple(ids)

    def encode(self, example: Example, negatives: NegativeSet = "rejected") -> EncodedExample:
        """Encode one example with the negatives of its stage; negatives with the same ids as chosen are left out.

        Raises:
            DataError: an image cannot be read, a response has no tokens, or the example is longer than ``max_length``.
        """
        offered = {"rejected": example.rejected, "gentle": example.gentle, "none": ()}[negatives]
        said = ((f"{negatives}[{k}]", completion.text) for k, completion in enumerate(offered))
        self.template.check_texts(example, [("chosen", example.chosen.text), *said])
        chosen_ids = self.completion_ids(example, example.chosen.text)
        chosen = _encoded(example.chosen, chosen_ids, (0, len(chosen_ids)))
        rejected = []
        for completion in offered:
            ids = self.completion_ids(example, completion.text)
            if completion.images is not None:
                # All tokens count as different from chosen: each follows another image.
                negative = _encoded(completion, ids, (0, len(ids)))
                rejected.append(replace(negative, prompt=self._other_prompt(example, completion)))
            elif ids != chosen_ids:
                rejected.append(_encoded(completion, ids, differing_span(chosen_ids, ids)))
        encoded = EncodedExample(example.id, self.prompt(example), chosen, tuple(rejected))
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
        """The first ``limit`` examples whose prompts can be encoded."""
        good: list[Example] = []
        for example in examples:
            if len(good) >= limit:
                break
            with contextlib.suppress(DataError):
                self.prompt(example)
                good.append(example)
        return good

    def encode_all(
        self, examples: Iterable[Example], negatives: NegativeSet, *, require_negative: bool
    ) -> tuple[list[EncodedExample], list[str]]:
        """Encode all examples that can be encoded; the second list has one message for each example left out."""
        good: list[EncodedExample] = []
        problems: list[str] = []
        for example in examples:
            try:
                encoded = self.encode(example, negatives)
            except DataError as error:
                problems.append(str(error))
                continue
            if require_negative and not encoded.negatives:
                problems.append(f"{example.where or example.id}: no negative for this stage")
                continue
            good.append(encoded)
        return good, problems

    def _adds_bos(self, text: str) -> bool:
        """Whether the tokenizer must add its bos token: it does so by default, and the template did not write one."""
        bos = self.tokenizer.bos_token
        return bos is not None and not text.startswith(bos) and self._has_bos_by_default

    @cached_property
    def _has_bos_by_default(self) -> bool:
        """Whether the tokenizer adds bos, and nothing else, by default: some templates (LLaVA 1.5) rely on it."""
        added = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        return added == [self.tokenizer.bos_token_id, *self._ids("a")]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _digest(images: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(images.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest() if images else ""


def _encoded(completion: Completion, ids: Sequence[int], span: tuple[int, int]) -> EncodedCompletion:
    margin = completion.made.get("reward_margin")
    return EncodedCompletion(
        tuple(ids),
        completion.origin,
        completion.kind,
        span,
        reward_margin=None if margin is None else float(margin),
    )
