"""The recipe's ``data`` section: where the rows come from, and how they are split."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cwdpo.records import VideoSampling
from cwdpo.registry import Settings
from cwdpo.worlds.shapes import ShapesSettings

Spec = dict[str, Any]
"""A component in a recipe: its ``name`` and its settings."""


class VideoSettings(Settings):
    """Which frames of videos are kept."""

    fps: float = Field(
        VideoSampling.fps, gt=0, description="frames a second that are kept; the rate of folders of frames"
    )
    max_frames: int = Field(VideoSampling.max_frames, gt=0, description="most frames of one video")
    max_pixels: int | None = Field(
        VideoSampling.max_pixels, gt=0, description="most pixels of a frame; larger ones are scaled down"
    )

    @property
    def sampling(self) -> VideoSampling:
        """The settings, for readers."""
        return VideoSampling(self.fps, self.max_frames, self.max_pixels)


class DataSource(Settings):
    """One data set of a mixture; what is not set is as in ``data``."""

    path: str = Field(description="as data.path")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="for metrics and report; default: the path's last part",
    )
    repeat: float | None = Field(
        None,
        gt=0,
        description="how often each row is in the training data; 0.5: half of the rows; default: 1",
    )
    weight: float | None = Field(
        None, gt=0, description="share of the training rows, relative to the other sources' weights"
    )
    format: str | Spec | None = None
    ignore_columns: tuple[str, ...] | None = None
    image_root: str | None = None
    default_prompt: str | None = None
    limit: int | None = Field(None, gt=0)

    @property
    def title(self) -> str:
        """The name, or the path's last part without its ending."""
        last = self.path.rstrip("/").replace("\\", "/").rpartition("/")[2]
        return self.name or re.sub(r"[^A-Za-z0-9_.-]", "_", last.partition(".")[0] or last)


class StreamingSettings(Settings):
    """How much of a streamed source is on this machine at a time."""

    window: int = Field(
        10_000,
        gt=0,
        description="training rows that are read, encoded and shuffled together; one after another",
    )
    validation: int = Field(
        256, gt=0, description="the first rows are held out, when no validation_path; they are not trained on"
    )


class DataSettings(Settings):
    """The source of the examples, and their split."""

    path: str | None = Field(
        None,
        description="a file, a folder, or owner/name[@revision][:configuration][#split] of the hub",
    )
    sources: tuple[DataSource, ...] = Field((), description="a mixture of data sets, instead of path")
    world: ShapesSettings | None = Field(None, description="embedded world to generate in the run folder")
    format: str | Spec = Field(
        "auto",
        description="auto, a name, file.py:ClassName, or a mapping with name and the format's settings",
    )
    ignore_columns: tuple[str, ...] = Field((), description="columns to ignore")
    image_root: str | None = Field(
        None, description="folder of relative image paths; images must be in it; default: the data's folder"
    )
    validation_path: str | None = Field(None, description="held-out data; as path")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="by image, when no validation_path")
    stage1_fraction: float = Field(0.75, ge=0, le=1, description="share of training images in stage 1")
    captions_per_image: int = Field(1, gt=0, description="number of examples from one image with captions")
    streaming: StreamingSettings | None = Field(
        None,
        description="true, or a mapping: read the rows while training, a window at a time; needs steps, not epochs",
    )
    default_prompt: str = Field("Describe the image.", description="prompt for data without prompts")
    max_length: int | None = Field(None, gt=0, description="largest number of tokens of prompt + completion")
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    image_tokens: Literal["sizes", "processor"] = Field(
        "sizes",
        description="number of image tokens: from image sizes, or by processing each image before step 1",
    )
    video: VideoSettings = VideoSettings()
    cache_gb: float = Field(1.0, ge=0, description="memory for decoded image tensors")
    image_cache: str | None = Field(
        None, description="folder for processed images, shared between epochs, runs and processes"
    )
    image_cache_gb: float = Field(50.0, gt=0, description="largest size of data.image_cache, GiB")
    limit: int | None = Field(None, gt=0, description="read only this many examples")

    @field_validator("streaming", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _can_be_streamed(self) -> DataSettings:
        if self.streaming is None:
            return self
        if self.world is not None:
            raise ValueError("world: it is generated as a whole: leave out data.streaming")
        for source in self.sources:
            if source.weight is None or source.limit is not None:
                raise ValueError(
                    f"sources: {source.title!r}: with data.streaming each source has a 'weight', its share of every "
                    "window, and neither 'repeat' nor 'limit'"
                )
        for key, remedy in (
            ("limit", "the stages' steps say how much is read"),
            ("validation_fraction", "how many rows there are is not known: set data.streaming.validation"),
        ):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: not with data.streaming, {remedy}; leave {key} out")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.path is not None) + (self.world is not None) + bool(self.sources) != 1:
            raise ValueError("exactly one of 'path', 'sources' and 'world' must be given")
        names = [source.title for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources: two are called {twice[0]!r}: give each a 'name' of its own")
        weighted = [source.title for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(names):
            lacking = next(name for name in names if name not in weighted)
            raise ValueError(
                f"sources: {lacking!r} has no 'weight', but others have: give one to all, or to none"
            )
        if mixed := [s.title for s in self.sources if s.weight is not None and s.repeat is not None]:
            raise ValueError(f"sources: {mixed[0]!r} has 'weight' and 'repeat': leave out one of them")
        if self.world is not None and not (self.world.train and self.world.validation):
            raise ValueError("world.train and world.validation must be at least 1")
        return self

    @property
    def where(self) -> str:
        """Where the rows come from, for messages."""
        return self.path or ("data.sources" if self.sources else "data.world")

    @property
    def looked_at(self) -> int | None:
        """How many rows of a streamed source are looked at before a run; ``None`` for all."""
        if self.streaming is None:
            return None
        return self.streaming.window + (0 if self.validation_path else self.streaming.validation)

    @property
    def reading(self) -> dict[str, Any]:
        """How the rows are read: arguments of ``read_examples`` and of ``validate`` that do not depend on the file."""
        return {
            "format": self.format,
            "image_root": Path(self.image_root) if self.image_root else None,
            "default_prompt": self.default_prompt,
            "captions_per_image": self.captions_per_image,
            "ignore_columns": self.ignore_columns,
            "video": self.video.sampling,
        }

    def each(self) -> tuple[DataSettings, ...]:
        """The settings of each data set of a mixture, as if it were the only one; without a mixture, these."""
        if not self.sources:
            return (self,)
        own = ("path", "format", "ignore_columns", "image_root", "default_prompt", "limit")
        given = ({key: getattr(s, key) for key in own if getattr(s, key) is not None} for s in self.sources)
        return tuple(self.model_copy(update={"sources": (), **values}) for values in given)
