"""A video in the report's gallery is a strip of its frames."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cwdpo.report._text import strip_uri
from cwdpo.report.render import write_report
from videos import grey, write_video


def opened(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_strip_has_four_frames_of_the_whole_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", grey(40, (64, 48)))
    strip = opened(strip_uri("a.mp4", tmp_path))
    assert strip.size == (4 * 64, 48)
    pixels = np.asarray(strip.convert("L"))
    # Frames 0, 10, 20, 30, each 5 lighter than the one before.
    assert [round(int(pixels[24, 32 + 64 * i]) / 50) for i in range(4)] == [0, 1, 2, 3]
    write_video(tmp_path / "one.mp4", grey(1, (640, 480)))
    width, height = opened(strip_uri(str(tmp_path / "one.mp4"), tmp_path)).size
    assert width * height <= 160 * 160


def test_what_cannot_be_decoded_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for path in ("bad.mp4", "none.mp4", None, "a\0b"):
        assert strip_uri(path, tmp_path) is None
    write_video(tmp_path / "a.mp4", grey(4))
    monkeypatch.setitem(sys.modules, "av", None)
    assert strip_uri("a.mp4", tmp_path) is None


def test_the_page_shows_strips_of_samples_and_pairs(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", grey(40, (64, 48)))
    said = {"prompt": "What happens?", "chosen": "a cat jumps", "responses": []}
    sample = {"id": "1", "image": None, "video": str(tmp_path / "a.mp4"), **said}
    pair = {"id": "1", "image": None, "video": "a.mp4", "chosen": "a", "rejected": "b", "origin": "dataset"}
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "samples.jsonl").write_text(
        json.dumps(sample) + "\n" + json.dumps({**sample, "video": "no.mp4"}) + "\n"
    )
    (tmp_path / "rounds.jsonl").write_text(
        json.dumps({"stage": "stage2", "round": 0, "pairs": [pair]}) + "\n"
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    strips = re.findall(r'<img class="strip" src="(data:[^"]+)"', page)
    assert len(strips) == 2
    assert all(opened(uri).size == (256, 48) for uri in strips)
    assert page.count("image not available") == 1
