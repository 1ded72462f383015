"""What one reading of an image file tells, compared with the decoded image."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from cwdpo.data.contents import image_content
from cwdpo.errors import DataError
from cwdpo.records import ImageRef


def written(format: str, orientation: int = 1, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.frombytes("RGB", (30, 20), random.Random(0).randbytes(30 * 20 * 3))
    noise.convert(mode).save(file, format, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_opened_image(format: str, orientation: int) -> None:
    ref = ImageRef(data=written(format, orientation))
    size = image_content(ref).size
    if format == "TIFF":
        assert size is None
        return
    assert size == ref.open().size[::-1]
    assert size == ((30, 20) if orientation in (5, 6, 7, 8) else (20, 30))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_file_that_was_cut_off_is_not_complete(format: str) -> None:
    data = written(format, mode="L")
    assert image_content(ImageRef(data=data)).complete
    for cut in range(80, 240):  # any byte may stand at the cut
        assert not image_content(ImageRef(data=data[:-cut])).complete
    assert image_content(ImageRef(data=data + b"\0" * 8)).complete, "a few bytes may follow"


def test_a_header_that_cannot_be_read_has_no_size() -> None:
    found = image_content(ImageRef(data=b"not an image"))
    assert (found.size, found.complete) == (None, False)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(written("JPEG"))
    read: list[Path] = []
    encoded = ImageRef.stored
    monkeypatch.setattr(ImageRef, "stored", lambda self: read.append(self.path) or encoded(self))
    first = image_content(ImageRef(path=path))
    assert image_content(ImageRef(path=path)) == first
    assert read == [path]
    stat = path.stat()
    path.write_bytes(written("JPEG")[:-1] + b"\x83")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time of change
    assert image_content(ImageRef(path=path)).digest != first.digest
    assert read == [path, path]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(No such file"):
        image_content(ImageRef(path=path))
