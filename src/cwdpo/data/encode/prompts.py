"""Encodes prompts: token ids from the sizes of the images, and tensors of images and videos when they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from cwdpo.data.contents import ImageContent, image_content
from cwdpo.data.encode.clips import (
    check_apart,
    check_taken,
    settings_of,
    video_inputs,
)
from cwdpo.data.encode.embedded import check_embedded
from cwdpo.data.encode.encoded_prompt import EncodedPrompt
from cwdpo.data.encode.expand import NOT_FOR_THE_MODEL, Expansions, Sizes, Written, blank, sizes_of
from cwdpo.data.encode.image_cache import ImageCache
from cwdpo.data.encode.many import ManyPrompts
from cwdpo.data.encode.picture_digest import picture_digest
from cwdpo.data.encode.reading import Coming, Job, Workers
from cwdpo.data.encode.template import ChatTemplate
from cwdpo.data.encode.tokens import Tails
from cwdpo.data.inside import remember
from cwdpo.errors import DataError
from cwdpo.records import Example, ImageRef
from cwdpo.versions import version_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Result = tuple[tuple[int, ...], dict[str, tuple[int, ...]], "dict[str, Tensor]"]
"""Token ids of a prompt, per-token outputs of the processor, and the inputs of the vision tower."""


@dataclass(frozen=True)
class ImageSource:
    """Loads the images of an encoded prompt, now or in a worker."""

    encoder: PromptEncoder
    example: Example
    ids: tuple[int, ...]
    per_token: Mapping[str, tuple[int, ...]]
    digest: str
    """:attr:`EncodedPrompt.image_digest`."""

    def __call__(self) -> Mapping[str, Tensor]:
        """The inputs of the vision tower."""
        return self.encoder.load(self)

    def begin(self) -> Coming | None:
        """Let a worker read them."""
        return self.encoder.begin(self)

    def job(self, example: Example) -> Job:
        """What reading them takes."""
        return Job(example, self.encoder.text(example), self.ids, self.per_token, self.digest)


class NotLearntError(Exception):
    """A row from which an encoder would have to learn that learns nothing (:meth:`PromptEncoder.take_over`)."""


class PromptEncoder:
    """Encodes prompts with a checkpoint's own processor; what it made is kept.

    Args:
        template: the checkpoint's chat template.
        cache_gb: memory for image tensors, in GiB; images that do not fit are decoded again at every use.
        from_sizes: compute the number of image tokens from the sizes of the images, as far as the processor's results
            on rows of the run agree; else every image is processed when its prompt is encoded.
        workers: processes that read the images of prompts for which :meth:`EncodedPrompt.ahead` was called.
        on_disk: where images are stored that were processed once.

    Attributes:
        workers: the processes; ``None`` without any.
        learns: whether rows may teach it how the processor expands images, see :mod:`cwdpo.data.encode.expand`.
    """

    def __init__(
        self,
        template: ChatTemplate,
        cache_gb: float,
        *,
        from_sizes: bool = True,
        workers: int = 0,
        on_disk: ImageCache | None = None,
    ) -> None:
        self.template, self.processor, self.tokenizer = template, template.processor, template.tokenizer
        self._prompts: dict[tuple[Any, ...], EncodedPrompt] = {}
        self._images: dict[tuple[Any, ...], Mapping[str, Tensor]] = {}
        self._free_bytes = cache_gb * 2**30
        self._texts: dict[tuple[Any, ...], str] = {}
        self._from_sizes, self.expansions = from_sizes, Expansions(self.processor)
        self.workers = Workers(self, workers) if workers else None
        self.learns = True
        self._many, self._foreseen = ManyPrompts(self), dict[tuple[Any, ...], Result]()
        self._contents: dict[tuple[ImageRef, ...], list[ImageContent]] = {}
        self.tails = Tails(template)
        self._on_disk = on_disk

    def __reduce__(self) -> tuple[Any, ...]:
        """The copy of a worker: nothing is kept in memory."""
        made = partial(PromptEncoder, from_sizes=self._from_sizes, on_disk=self._on_disk)
        return made, (self.template, 0.0)

    @property
    def learnt(self) -> Any:
        """What is known about the processor from rows so far, for :meth:`take_over`."""
        return self.expansions.learnt, self._many.learnt

    def take_over(self, learnt: Any) -> None:
        """Know what another encoder has learnt, and learn nothing more: that is the other's work."""
        self.expansions.learnt, self._many.learnt = learnt
        self.learns = False

    def check_learns(self) -> None:
        """Called before something is learnt from a row.

        Raises:
            NotLearntError: this encoder learns nothing.
        """
        if not self.learns:
            raise NotLearntError

    def forget(self) -> None:
        """Empty the caches."""
        self._free_bytes += sum(
            t.numel() * t.element_size() for i in self._images.values() for t in i.values()
        )
        for kept in (self._prompts, self._images, self._texts):
            kept.clear()

    def text(self, example: Example) -> str:
        """The prompt as text, rendered by the chat template up to the start of the response (images as placeholders).

        Raises:
            DataError: the template refuses it, or it has a video, and the processor takes none.
        """
        check_taken(self.processor, example)
        known = self._texts.get(example.prompt)
        return (
            remember(self._texts, example.prompt, self.template.prompt(example)) if known is None else known
        )

    def __call__(self, example: Example) -> EncodedPrompt:
        """Encode the prompt; the result is cached, because several stages use it.

        Images are not decoded, except on a few rows (see :mod:`cwdpo.data.encode.expand`), and except files that do
        not end as their format does. The others are decoded when :attr:`EncodedPrompt.images` is read. Videos are
        decoded here, too.

        Raises:
            DataError: an image or video cannot be decoded, or the processor refuses the prompt.
        """
        key = _key(example)
        known = self._prompts.get(key)
        return remember(self._prompts, key, self._encoded_prompt(example, key)) if known is None else known

    def _encoded_prompt(self, example: Example, key: tuple[Any, ...]) -> EncodedPrompt:
        contents: list[ImageContent] = []
        with contextlib.suppress(DataError):  # decoding the images reports it
            contents = self._contents_of(example)
        known = self._foreseen.get(key)
        ids, per_token, images = known or self._sized(example, sizes_of(contents)) or self._process(example)
        if not (images or contents):
            return EncodedPrompt(ids, per_token)
        if len(contents) < len(example.images):  # the processor could read them after all
            contents = self._contents_of(example)
        digest = picture_digest(self.image_settings, self.processor, example, contents)
        if self.workers is not None:
            self.workers.warm_up()
        if images:
            self._keep(key, images)
            if self._on_disk is not None:
                self._on_disk.put(ImageCache.key(digest, ids, per_token), images)
        return EncodedPrompt(
            ids, per_token, ImageSource(self, example, ids, per_token, digest), digest, len(example.videos)
        )

    def foresee(self, examples: Sequence[Example]) -> None:
        """Encode together what can be; :meth:`__call__` then takes the results, until the next examples are named."""
        wanted = {_key(e): e for e in examples if not e.videos}
        keys = {id(e): key for key, e in wanted.items() if key not in self._prompts}
        self._contents = {}
        for images in {example.images: None for example in examples}:
            with contextlib.suppress(DataError):  # encoding the row alone reports the error
                self._contents[images] = [*map(image_content, images)]
        found = self._many(e for e in wanted.values() if id(e) in keys)
        self._foreseen = {keys[id(example)]: result for example, result in found}

    def _contents_of(self, example: Example) -> list[ImageContent]:
        """What the row's image files hold; those of the examples that were named last are not looked at again.

        Raises:
            DataError: one cannot be read.
        """
        known = self._contents.get(example.images)
        return [*map(image_content, example.images)] if known is None else known

    def written(self, example: Example) -> Written | None:
        """What the processor writes for the row's images, if that is known."""
        if not example.images:
            return Written(())
        contents = self._contents_of(example)
        sizes = sizes_of(contents)
        known = self._from_sizes and len(sizes) == len(contents)
        return self.expansions.of(sizes) if known else None

    def alone(self, example: Example) -> Result:
        """Ids and per-token outputs of one prompt from a call of its own."""
        written = self.written(example) if example.images else None
        return (written and self._stood_in(example, written)) or self._process(example)

    def _sized(self, example: Example, sizes: Sizes) -> Result | None:
        """The prompt from the sizes of its images; ``None`` if they are not enough.

        The last result has the images, if they were decoded to compare.
        """
        if not self._from_sizes or not sizes or len(sizes) != len(example.images) or example.videos:
            return None
        written = self.expansions.of(sizes)
        if written is None:
            if self.expansions.usable:
                self.check_learns()
            recorder, found = self.expansions.recorder()
            enough = self.expansions.blank_is_enough(sizes)
            opened = [blank(size) for size in sizes] if enough else _opened(example)
            result = self._run(example, opened, recorder)
            ways = found[0].simpler() if found and len(found[0].texts) == len(sizes) else ()
            wanted: Result = (result[0], result[1], {})
            fitting = next((way for way in ways if self._stood_in(example, way) == wanted), None)
            if fitting is None:
                self.expansions.give_up()
            else:
                self.expansions.learn(sizes, fitting)
            if not enough:
                return result
            written = self.expansions.of(sizes)
        return None if written is None else self._stood_in(example, written)

    def _stood_in(self, example: Example, written: Written) -> Result | None:
        """Ids and per-token outputs of the prompt without looking at its images."""
        stand_in = self.expansions.stand_in(written)
        try:
            ids, per_token, _ = self._run(example, [blank((2, 2)) for _ in written.texts], stand_in)
        except Exception:  # a processor that needs more than the texts
            return None
        return ids, per_token, {}

    def _keep(self, key: tuple[Any, ...], images: Mapping[str, Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in images.values())
        if size <= self._free_bytes and key not in self._images:
            self._images[key] = images
            self._free_bytes -= size

    def load(self, source: ImageSource) -> Mapping[str, Tensor]:
        """The images of a prompt, from the cache or read now; see :meth:`read`."""
        key = _key(source.example)
        if key not in self._images:
            images = self.read(source.job(source.example))
            self._keep(key, images)
            return images
        return self._images[key]

    def begin(self, source: ImageSource) -> Coming | None:
        """Let a worker read the images of a prompt; ``None`` if there is no worker, or they are in the cache."""
        key = _key(source.example)
        if self.workers is None or key in self._images:
            return None
        arrived = self.workers.submit(source.job(replace(source.example, rejected=(), gentle=(), extra={})))
        return None if arrived is None else Coming(arrived, partial(self._keep, key))

    def read(self, job: Job) -> Mapping[str, Tensor]:
        """The images of a prompt, from the disk's cache, or decoded and processed.

        Raises:
            DataError: an image cannot be read, or the processor gives other token ids than when the row was encoded.
        """
        if self._on_disk is None:
            return self._decoded(job)
        key = ImageCache.key(job.digest, job.ids, job.per_token)
        images = self._on_disk.get(key)
        if images is None:
            images = dict(self._decoded(job))
            self._on_disk.put(key, images)
        return images

    def _decoded(self, job: Job) -> Mapping[str, Tensor]:
        example, ids = job.example, job.ids
        found, found_per_token, images = self._run(example, _opened(example), self.processor, job.text)
        if (found, found_per_token) != (ids, job.per_token):
            raise DataError(
                f"{example.where or example.id}: images: the processor gives {len(found)} tokens now, and "
                f"{len(ids)} when the row was encoded: an image or video was changed during the run, or its number of "
                "tokens does not follow from its size; start again, with data.image_tokens: processor in the "
                "second case"
            )
        return images

    @cached_property
    def image_settings(self) -> str:
        """Everything that the inputs of the vision tower depend on besides the image files."""
        made: Any = getattr(self.processor, "image_processor", None)
        packages = (
            f"{name} {version_of(name) or 'none'}" for name in ("transformers", "pillow", "torchvision")
        )
        return "\n".join([type(self.processor).__name__, *settings_of(made), *packages])

    def _process(self, example: Example) -> Result:
        return self._run(example, _opened(example), self.processor)

    def _run(self, example: Example, opened: Sequence[Image], processor: Any, text: str = "") -> Result:
        """Ids, per-token outputs and inputs of the vision tower, from one call of the processor.

        ``text`` is the rendered prompt, if the caller has it.
        """
        # Nested: some processors (LLaVA-OneVision) take a flat list as one image for each text.
        kwargs: dict[str, Any] = {"images": [list(opened)]} if opened else {}
        kwargs |= video_inputs(self.processor, example)
        text = (text or self.text(example)).rstrip(" ")
        try:
            outputs = self._processed(processor, text, kwargs)
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
        images = {k: v for k, v in outputs.items() if k not in (*per_token, *NOT_FOR_THE_MODEL)}
        check_apart(self.processor, example, ids.tolist(), images)
        check_embedded(self.template, example, ids.tolist(), self.template.checkpoint.placeholders)
        return tuple(ids.tolist()), per_token, images

    def _processed(self, processor: Any, text: str, kwargs: Mapping[str, Any]) -> Any:
        """The processor's outputs.

        Without a chat template the prompt ends with a line break. Some processors (PaliGemma) add it themselves; they
        get the prompt without it.
        """
        if not self.template.is_there:
            bare = self._call(processor, text.removesuffix("\n"), kwargs)
            if self.tokenizer.decode(bare["input_ids"][0]).endswith("\n"):
                return bare
        return self._call(processor, text, kwargs)

    def _call(self, processor: Any, text: str, kwargs: Mapping[str, Any]) -> Any:
        return processor(text=[text], return_tensors="pt", add_special_tokens=self.adds_bos(text), **kwargs)

    def adds_bos(self, text: str) -> bool:
        """Whether the tokenizer must add its bos token: it does so by default, and the template did not write one."""
        bos = self.tokenizer.bos_token
        return bos is not None and not text.startswith(bos) and self._has_bos_by_default

    @cached_property
    def _has_bos_by_default(self) -> bool:
        """Whether the tokenizer adds bos, and nothing else, by default: some templates (LLaVA 1.5) rely on it."""
        added = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        return added == [
            self.tokenizer.bos_token_id,
            *self.tokenizer("a", add_special_tokens=False)["input_ids"],
        ]


def _key(example: Example) -> tuple[Any, ...]:
    """What an encoded prompt depends on."""
    return example.images, example.videos, example.prompt


def _opened(example: Example) -> list[Image]:
    """The decoded images of a row.

    Raises:
        DataError: one cannot be decoded.
    """
    try:
        return [image.open() for image in example.images]
    except Exception as error:  # on broken files Pillow's plugins raise errors of many types
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{example.where or example.id}: images: cannot be decoded ({reason})") from error
