"""A prompt as model input: token ids, and images that are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cwdpo.clock import spent_on

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as model input.

    ``input_ids``: token ids with the image tokens expanded. ``per_token``: further outputs of the processor with one
    value per token (``mm_token_type_ids``, ``token_type_ids``). ``load_images``: returns the inputs of the vision
    tower, of images and videos. ``image_digest``: digest of their files and of the processor's settings, which these
    inputs depend on; empty if there are none. ``n_videos``: number of videos.
    """

    input_ids: tuple[int, ...]
    per_token: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    load_images: Callable[[], Mapping[str, Tensor]] = field(default=dict, repr=False, compare=False)
    image_digest: str = ""
    n_videos: int = 0

    @property
    def images(self) -> Mapping[str, Tensor]:
        """The inputs of the vision tower; decoded now if they are not in the encoder's cache.

        Raises:
            DataError: an image or video cannot be read, or its size is not the one that the prompt was made for.
        """
        with spent_on("images"):
            return self.load_images()

    def loaded(self) -> EncodedPrompt:
        """The prompt with its images in memory.

        Raises:
            DataError: an image cannot be read.
        """
        images = self.images
        return replace(self, load_images=lambda: images)

    def ahead(self) -> EncodedPrompt:
        """The prompt whose images a worker process reads from now on; ``images`` then waits for them, and keeps them.

        The prompt itself if there is no worker, or its images are in the encoder's cache.
        """
        begin = getattr(self.load_images, "begin", None)
        coming = None if begin is None else begin()
        return self if coming is None else replace(self, load_images=coming)
