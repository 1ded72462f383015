"""Examples to token ids and image tensors: the prompt once, each completion apart.

Prompt and completion are tokenized so that joined equals apart: the completion's ids are what the
tokenizer gives for it *behind* the prompt, and generation sees exactly the prompt's ids.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from cwdpo.data.encode.span import differing_span
from cwdpo.data.encode.template import ChatTemplate, CheckpointTokens, RefusedRowError
from cwdpo.errors import DataError
from cwdpo.records import Completion, Example, Origin

if TYPE_CHECKING:
    from torch import Tensor

NegativeSet = Literal["rejected", "gentle", "none"]
_NOT_FOR_THE_MODEL = ("attention_mask", "labels")
"""Rows that processors make and scoring makes itself, or that would make the model compute a loss of its own."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the model sees it.

    ``input_ids``: image tokens expanded. ``per_token``: further rows of the same length that the family's
    processor made (``mm_token_type_ids``, ``token_type_ids``). ``load_images``: gives the vision tower's inputs,
    of which ``image_digest`` is a digest: another picture or another processor setting gives another one.
    """

    input_ids: tuple[int, ...]
    per_token: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    load_images: Callable[[], Mapping[str, Tensor]] = field(default=dict, repr=False, compare=False)
    image_digest: str = ""

    @property
    def images(self) -> Mapping[str, Tensor]:
        """The vision tower's inputs; decoded again where they no longer lie in the encoder's cache."""
        return self.load_images()

    def loaded(self) -> EncodedPrompt:
        """The prompt with its images in memory.

        Raises:
            DataError: one cannot be read.
        """
        images = self.images
        return replace(self, load_images=lambda: images)


@dataclass(frozen=True)
class EncodedCompletion:
    """Token ids of one completion, its end token included, and what the reference says of it.

    ``span`` is the half-open token range that differs from chosen (the whole range for chosen itself).
    ``reference_sum_logp`` and ``reference_span_sum_logp`` are in nats; ``None`` before the reference pass.
    ``reward_margin`` is how much better a reward model finds chosen, where the data says so.
    """

    ids: tuple[int, ...]
    origin: Origin = "dataset"
    kind: str = ""
    span: tuple[int, int] = (0, 0)
    reference_sum_logp: float | None = None
    reference_span_sum_logp: float | None = None
    reward_margin: float | None = None

    @property
    def reference_mean_logp(self) -> float | None:
        """Nats per token under the reference; ``None`` before the reference pass."""
        return None if self.reference_sum_logp is None else self.reference_sum_logp / len(self.ids)


@dataclass(frozen=True)
class EncodedExample:
    """One prompt with its chosen response and the negatives that this stage uses."""

    id: str
    prompt: EncodedPrompt
    chosen: EncodedCompletion
    negatives: tuple[EncodedCompletion, ...] = ()

    @property
    def completions(self) -> tuple[EncodedCompletion, ...]:
        """Chosen, then the negatives."""
        return (self.chosen, *self.negatives)

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest sequence: prompt plus longest completion."""
        return len(self.prompt.input_ids) + max(len(c.ids) for c in self.completions)

    def row_tokens(self, *, shared: bool) -> tuple[int, ...]:
        """Tokens of each row that scoring lays out: one shared-prefix row, or a plain row per completion."""
        prompt, completions = len(self.prompt.input_ids), [len(c.ids) for c in self.completions]
        return (prompt + sum(completions),) if shared else tuple(prompt + n for n in completions)


class Encoder:
    """Turns examples into token ids with a checkpoint's own processor and chat template.

    Args:
        processor: what ``AutoProcessor.from_pretrained`` gave.
        max_length: most tokens of prompt plus completion; ``None`` for no limit. Nothing is ever truncated:
            an example that is longer raises :class:`DataError`, and the caller leaves it out.
        cache_gb: memory for image tensors; what does not fit is decoded again at every use.
        checkpoint: what generation_config and weights say of tokens; :meth:`cwdpo.models.load.Policy.encoder` knows.
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
        """Let go of the prompts and pictures that are kept."""
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
        """The prompt through the chat template, ready for a response (images as placeholders).

        Raises:
            DataError: the template refuses it.
        """
        if example.prompt not in self._texts:
            self._texts[example.prompt] = self.template.prompt(example)
        return self._texts[example.prompt]

    def prompt(self, example: Example) -> EncodedPrompt:
        """Encode images and prompt; the result is kept, because several stages ask for it.

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
            pictures = [image.open() for image in example.images]
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{example.where or example.id}: images: cannot be decoded ({reason})") from error
        # A list of pictures is one picture of each text to some processors (LLaVA-OneVision): the list is nested.
        kwargs: dict[str, Any] = {"images": [pictures]} if pictures else {}
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
        """The processor's outputs; one that writes the line break of a bare prompt itself is not given a second."""
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
        """Refuse ids behind the model's embedding: tokenizer and weights are not of one checkpoint."""
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
        """Ids of a response behind its prompt, ending in the end-of-turn token.

        Raises:
            DataError: nothing is left to train on.
        """
        prompt, end = self.prompt_text(example), self.template.end
        tail = self.template.continuation(example, text)
        # A prompt that ends in a space would tokenize differently joined than apart: the space moves over.
        prompt, tail = prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :] + tail
        before, joined = self._ids(prompt), self._ids(prompt + tail)
        ids = joined[len(before) :] if joined[: len(before)] == before else self._ids(tail)
        ids = ids if end.closing else [*ids, end.token]
        if len(ids) < 2:
            raise DataError(f"{example.where or example.id}: a response without tokens: {text!r}")
        self._check_embedded(example, ids, frozenset())
        return tuple(ids)

    def encode(self, example: Example, negatives: NegativeSet = "rejected") -> EncodedExample:
        """Encode one example with the negatives of its stage.

        Raises:
            DataError: unreadable image, response without tokens, or longer than ``max_length`` tokens.
        """
        offered = {"rejected": example.rejected, "gentle": example.gentle, "none": ()}[negatives]
        said = ((f"{negatives}[{k}]", completion.text) for k, completion in enumerate(offered))
        self.template.check_texts(example, [("chosen", example.chosen.text), *said])
        chosen_ids = self.completion_ids(example, example.chosen.text)
        chosen = _encoded(example.chosen, chosen_ids, (0, len(chosen_ids)))
        rejected = []
        for completion in offered:
            ids = self.completion_ids(example, completion.text)
            if ids != chosen_ids:
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

    def readable(self, examples: Iterable[Example], limit: int) -> list[Example]:
        """The first ``limit`` examples whose prompt can be encoded."""
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
        """Encode what can be encoded; the second list says, row by row, what was left out and why."""
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
        """Whether the tokenizer must put its bos in front: it has one by itself, and the template wrote none.

        Some templates (LLaVA 1.5) leave bos to the tokenizer. One that would also close the text is not asked.
        """
        bos = self.tokenizer.bos_token
        if bos is None or text.startswith(bos):
            return False
        plain = self._ids("a")
        added = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        return added == [self.tokenizer.bos_token_id, *plain]

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


def with_reference(example: EncodedExample, values: Sequence[tuple[float, float]]) -> EncodedExample:
    """The example with ``(sum_logp, span_sum_logp)`` of the reference, chosen first, then each negative."""
    chosen, *negatives = (
        replace(c, reference_sum_logp=total, reference_span_sum_logp=span)
        for c, (total, span) in zip(example.completions, values, strict=True)
    )
    return replace(example, chosen=chosen, negatives=tuple(negatives))
