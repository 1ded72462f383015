"""Images of a row: found inside one folder only, and checked."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cwdpo.data.digests import DigestMap, digest8
from cwdpo.data.facts import ImageFacts
from cwdpo.data.inside import missing, path_inside, remember
from cwdpo.data.media import from_base64, from_data_uri
from cwdpo.data.problems import RowError, shown
from cwdpo.data.video_folder import VideoFolder
from cwdpo.errors import DataError
from cwdpo.records import ImageEdit, ImageRef, as_rgb, has_alpha, image_formats, is_deep
from cwdpo.videos import VideoFacts

CheckImages = Literal["none", "exists", "identify", "decode"]
CHECK_LEVELS: tuple[CheckImages, ...] = ("none", "exists", "identify", "decode")
IMAGE_FORMS = (
    "a path inside the image folder, {'bytes': ..., 'path': ...}, a data URI, base64, bytes, or a PIL image"
)

_ORIENTATION = 0x0112  # the EXIF tag


class ImageFolder:
    """Turns the image values of rows into ImageRefs and checks each file once.

    Args:
        root: folder that paths are relative to and must not leave; ``None`` if there is none.
        check: ``none`` checks only that the path stays in the folder, ``exists`` that the file exists, ``identify``
            reads its header, ``decode`` reads all pixels.
        seen: called with the facts of each image whose header was read: once per file, or once per value for images
            given as bytes.
        seen_video: the same for videos, see :class:`cwdpo.data.video_folder.VideoFolder`.

    Attributes:
        videos: the videos of the same folder.
    """

    def __init__(
        self,
        root: Path | None,
        check: CheckImages = "identify",
        seen: Callable[[ImageFacts], None] | None = None,
        seen_video: Callable[[VideoFacts, bool], None] | None = None,
    ) -> None:
        if check not in CHECK_LEVELS:
            raise DataError(f"check_images = {check!r}; allowed: {', '.join(CHECK_LEVELS)}")
        self.root = root.resolve() if root is not None else None
        self.check, self.seen = check, seen
        self.videos = VideoFolder(self.root, check, seen_video)
        # Only a digest of each good file is kept, so that a million images fit in memory; refused files with a reason.
        self._good = DigestMap()
        self._refused: dict[Path, tuple[str, str, str]] = {}
        self._taken: dict[str, ImageRef] = {}  # the good files that were named last

    def take(self, value: Any, key: str) -> ImageRef:
        """The image of a value.

        Raises:
            RowError: the value is not an image, or the image is outside the folder, missing, unreadable, truncated or
                too large.
        """
        if isinstance(value, str):
            return self._from_text(value, key)
        if isinstance(value, bytes):
            return self._from_bytes(value, key)
        if isinstance(value, Mapping) and value.get("edit") is not None:
            plain = {k: v for k, v in value.items() if k != "edit"}
            return replace(self.take(plain, key), edit=_edit_of(value["edit"], f"{key}.edit"))
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            if value.get("bytes") is not None:
                return self._from_bytes(value["bytes"], key)
            if isinstance(value.get("path"), str):
                return self._from_text(value["path"], key)
        elif hasattr(value, "save") and hasattr(value, "getbands"):
            return self._from_bytes(_lossless(value), key)
        raise RowError(
            "wrong-type",
            key,
            f"{type(value).__name__} is not an image; allowed: {IMAGE_FORMS}",
            "give each image in one of these forms",
        )

    def _from_text(self, text: str, key: str) -> ImageRef:
        """The image of a path, or of the image itself as a data URI or in base64."""
        if (taken := self._taken.get(text)) is not None:
            return taken
        if text.startswith("data:"):
            data = from_data_uri(text)
            if data is None:
                raise RowError(
                    "image-unreadable",
                    key,
                    f"{shown(text, 60)} is not a data URI of a picture in base64",
                    "store the encoded picture (JPEG, PNG, ...), or its path",
                )
            return self._from_bytes(data, key)
        inside = from_base64(text)
        return self._from_path(text, key) if inside is None else self._from_bytes(inside, key)

    def _from_bytes(self, data: Any, key: str) -> ImageRef:
        if isinstance(data, str):
            data = from_base64(data) or data
        if not isinstance(data, bytes) or not data:
            raise RowError(
                "image-missing", key, "the image has no bytes", "store the encoded file (JPEG, PNG, ...)"
            )
        if self.check in ("identify", "decode"):
            self._examine(data, key, "the image bytes")
        return ImageRef(data=data)

    def _from_path(self, text: str, key: str) -> ImageRef:
        path = path_inside(self.root, text, key, "image", IMAGE_FORMS)
        digest = digest8(bytes(path))
        if self._good.get(digest) is not None:
            return remember(self._taken, text, ImageRef(path=path))
        if path not in self._refused:
            try:
                self._check_file(path, text, key)
            except RowError as error:
                remember(self._refused, path, (error.kind, error.message, error.remedy))
            else:
                self._good.add(digest)
                return remember(self._taken, text, ImageRef(path=path))
        kind, message, remedy = self._refused[path]
        raise RowError(kind, key, message, remedy)

    def _check_file(self, path: Path, text: str, key: str) -> None:
        if self.check == "none":
            return
        try:
            found = path.is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise missing(self.root, text, key, "image")
        if self.check != "exists":
            self._examine(path, key, shown(text, 200))

    def _examine(self, source: Path | bytes, key: str, name: str) -> None:
        from PIL import Image, ImageOps

        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            with warnings.catch_warnings():
                # Ignore warnings about EXIF or palettes; only the warning about the image's size is an error.
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(stream, formats=image_formats()) as image:
                    facts = ImageFacts(
                        image.width, image.height, image.mode, is_deep(image), has_alpha(image)
                    )
                    if self.check == "decode":  # the same steps as when the image is read for training
                        animated = bool(getattr(image, "is_animated", False))
                        turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
                        facts = replace(facts, turned=turned, animated=animated)
                        as_rgb(ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise RowError(
                "image-bomb",
                key,
                f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit",
                "scale the image down",
            ) from None
        except Exception as error:  # Pillow's plugins raise many types of error on broken files
            truncated = "truncated" in str(error)
            raise RowError(
                "image-truncated" if truncated else "image-unreadable",
                key,
                f"{name} {'ends too early' if truncated else 'is not an image that Pillow can read'}"
                f" ({type(error).__name__})",
                "fetch the file again, or leave the row out",
            ) from None
        if self.seen is not None:
            self.seen(facts)


def _edit_of(value: Any, key: str) -> ImageEdit:
    """The edit of a written negative, see :meth:`ImageRef.as_value`."""
    try:
        left, top, right, bottom = map(float, value["box"])
        return ImageEdit((left, top, right, bottom), float(value["noise"]), int(value["seed"]))
    except (TypeError, ValueError, LookupError, OverflowError, AttributeError) as error:
        raise RowError(
            "wrong-type",
            key,
            f"{shown(value, 60)} ({error}); allowed: {{box: [left, top, right, bottom], noise, seed}}",
            "correct it, or store the edited image",
        ) from None


def _lossless(image: Any) -> bytes:
    """A decoded image as bytes, without loss; modes that PNG and TIFF do not support (CMYK, HSV, ...) become RGB."""
    if is_deep(image):
        kind, image = (
            "TIFF",
            image.convert("I") if image.mode == "I;16N" else image,
        )  # TIFF does not support I;16N
    elif image.mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        kind = "PNG"
    else:
        kind, image = "PNG", as_rgb(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()
