"""What a processor writes in place of each image's placeholder, from the sizes of the images, without their pixels.

The processor itself is called, with a stand-in for its image part (``_process_images`` of transformers' processors).
The texts that this part would give come from the family's own rule (``_get_num_multimodal_tokens``), if they are a
repeated token, or else from processing one blank image of each size. Both are compared with the processor on rows of
the run.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from cwdpo.data.contents import ImageContent

logger = logging.getLogger("cwdpo")
Sizes = tuple[tuple[int, int], ...]
"""(height, width) in pixels of each image of a row."""
NOT_FOR_THE_MODEL = ("attention_mask", "labels")
"""Processor outputs that are not passed on: scoring makes its own mask, and labels make the model compute a loss."""
CHECKED = 8
"""Rows of different image sizes that are compared with the processor before its rule is used for further sizes."""


@dataclass(frozen=True)
class Written:
    """What the image part of a processor gave for the images of a row.

    ``texts``: what replaces each placeholder. ``rest``: its outputs without pixels, which some processors read.
    ``base``: whether the tokens are those of transformers' base class, so that the rest of a family's own ``__call__``
    (which may look at pixels) is left out.
    """

    texts: tuple[str, ...]
    rest: Mapping[str, Any] = field(default_factory=dict)
    base: bool = False

    def simpler(self) -> tuple[Written, Written, Written]:
        """Ways to stand in for the image part, the simplest first."""
        return Written(self.texts), Written(self.texts, base=True), self


@dataclass
class _Kind:
    """What is known about rows with one number of images.

    ``checked``: rows compared with the processor. ``by_rule``: whether the family's rule held for all of them, so that
    each text is ``around[0]``, the image token repeated, ``around[1]``. ``base``: see :class:`Written`.
    """

    checked: int = 0
    by_rule: bool = True
    base: bool = False
    around: tuple[str, str, int] | None = None
    seen: dict[Sizes, Written] = field(default_factory=dict)


class Expansions:
    """Learns how a processor expands image placeholders.

    Args:
        processor: the result of ``AutoProcessor.from_pretrained``.

    Attributes:
        usable: whether anything can be computed from sizes.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._kinds: dict[int, _Kind] = {}
        self.usable = hasattr(processor, "_process_images")

    @property
    def learnt(self) -> tuple[dict[int, _Kind], bool]:
        """What rows have taught so far; another process may take it over."""
        return self._kinds, self.usable

    @learnt.setter
    def learnt(self, learnt: tuple[dict[int, _Kind], bool]) -> None:
        self._kinds, self.usable = learnt

    def of(self, sizes: Sizes) -> Written | None:
        """What the processor writes for images of these sizes; ``None`` if that is not known."""
        kind = self._kinds.get(len(sizes))
        if not self.usable or kind is None:
            return None
        if sizes in kind.seen:
            return kind.seen[sizes]
        if kind.checked < CHECKED or not kind.by_rule or kind.around is None:
            return None
        counts = self._counts(sizes)
        if counts is None:
            return None
        before, after, extra = kind.around
        token = self._processor.image_token
        return Written(tuple(before + token * (n - extra) + after for n in counts), base=kind.base)

    def blank_is_enough(self, sizes: Sizes) -> bool:
        """Whether a blank image of each size may be processed instead of the row's own images."""
        kind = self._kinds.get(len(sizes))
        return self.usable and kind is not None and kind.checked >= CHECKED

    def stand_in(self, written: Written) -> Any:
        """The processor with an image part that looks at no image."""
        twin = copy.copy(self._processor)
        twin._process_images = lambda *_, **__: (dict(written.rest), list(written.texts))
        if not written.base:
            return twin
        (base,) = (one for one in type(twin).__mro__ if one.__name__ == "ProcessorMixin")
        return partial(base.__call__, twin)

    def recorder(self) -> tuple[Any, list[Written]]:
        """The processor, and a list that gets what its image part writes."""
        found: list[Written] = []
        if not self.usable:
            return self._processor, found
        twin = copy.copy(self._processor)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            outputs, texts = self._processor._process_images(*args, **kwargs)
            rest = {k: v for k, v in outputs.items() if not k.startswith("pixel")}
            found.append(Written(tuple(texts), rest))
            return outputs, texts

        twin._process_images = recorded
        return twin, found

    def learn(self, sizes: Sizes, written: Written) -> None:
        """Take up what gave the processor's result for a row with images of these sizes."""
        kind = self._kinds.setdefault(len(sizes), _Kind(base=written.base))
        kind.checked += 1
        kind.by_rule = kind.by_rule and not written.rest and kind.base == written.base
        kind.by_rule = kind.by_rule and self._follows_rule(kind, sizes, written.texts)
        kind.seen[sizes] = written

    def give_up(self) -> None:
        """Compute nothing from sizes any more; said once."""
        if self.usable:
            logger.warning(
                "%s: the number of image tokens cannot be computed from the sizes of images, so every image is "
                "processed before the first step",
                type(self._processor).__name__,
            )
        self.usable = False

    def _follows_rule(self, kind: _Kind, sizes: Sizes, texts: Sequence[str]) -> bool:
        counts, token = self._counts(sizes), getattr(self._processor, "image_token", None)
        if counts is None or not token:
            return False
        for text, count in zip(texts, counts, strict=True):
            n = text.count(token)
            before, _, rest = text.partition(token * n) if n else ("", "", "")
            if not n or before + token * n + rest != text:
                return False
            around = before, rest, count - n
            kind.around = kind.around or around
            if around != kind.around:
                return False
        return True

    def _counts(self, sizes: Sizes) -> list[int] | None:
        """The number of image tokens of each image by the family's own rule; ``None`` if it has none."""
        rule = getattr(self._processor, "_get_num_multimodal_tokens", None)
        if rule is None:
            return None
        try:
            counts = rule(image_sizes=[list(size) for size in sizes]).num_image_tokens
        except Exception:  # code of model families, made for another use
            return None
        return None if counts is None or len(counts) != len(sizes) else [int(n) for n in counts]


def sizes_of(contents: Sequence[ImageContent]) -> Sizes:
    """The sizes of those images whose size is known and whose file is whole."""
    return tuple(c.size for c in contents if c.size is not None and c.complete)


def blank(size: tuple[int, int]) -> Image:
    """A black image of (height, width) pixels."""
    from PIL import Image

    return Image.new("RGB", size[::-1])
