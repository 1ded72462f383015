"""A tiny checkpoint of each family, loaded once; tests here run in the environment of ``make test-families`` only."""

from __future__ import annotations

import importlib.util
import io
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
collect_ignore_glob = [] if importlib.util.find_spec("torchvision") else ["test_*.py"]

if not collect_ignore_glob:
    from checkpoints import FAMILIES, Traits, write

    from cwdpo.models.load import Policy, load_policy
    from cwdpo.models.settings import ModelSettings
    from cwdpo.records import VIDEO, Completion, Example, ImageRef, Message, VideoRef, VideoSampling


@dataclass(frozen=True)
class Family:
    """A family's checkpoint on disk and in memory."""

    name: str
    folder: Path
    policy: Policy
    traits: Traits

    @property
    def encoder(self) -> Any:
        return self.policy.encoder()

    @property
    def examples(self) -> list[Example]:
        """Rows of every kind that the family takes."""
        return [e for e in rows() if e.id not in self.traits.refuses]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = [m for m in metafunc.definition.iter_markers("parametrize") if m.args[0] == "family"]
    if "family" in metafunc.fixturenames and not marked:
        names = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]
        metafunc.parametrize("family", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name = request.param
    folder = write(name, tmp_path_factory.mktemp(name) / name)
    policy = load_policy(ModelSettings(path=str(folder)))
    policy.model.eval()
    return Family(name, folder, policy, FAMILIES[name][1])


def picture(width: int, height: int, seed: int) -> ImageRef:
    """A picture of random coarse patches, so that its parts differ."""
    import numpy as np
    from PIL import Image

    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return ImageRef(data=file.getvalue())


FPS = 4
KEPT = {7: [0, 2, 4], 1: [0]}
"""Frames of a video of 4 a second -> those that are kept at 2 a second: floor(7 * 2 / 4) = 3 of 7, floor(i * 7 / 3)."""


@cache
def clip(frames: int, width: int, height: int, seed: int) -> VideoRef:
    """A video of random coarse patches."""
    import av
    import numpy as np

    rng, file = np.random.default_rng(seed), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            patches = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            picture = np.kron(patches, np.ones((8, 8, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return VideoRef(data=file.getvalue(), sampling=VideoSampling(fps=2, max_frames=4))


def rows() -> list[Example]:
    """One row of each kind: a picture, several pictures, text only, several turns, a system prompt, negatives that are
    chosen's text and another one under another picture, a video, one of a single frame, and one beside a picture."""
    one, two, three = picture(100, 60, 1), picture(60, 110, 2), picture(64, 64, 3)
    chosen = Completion("A red square stands left of the blue circle.")
    wrong = Completion("A red square stands right of it.")

    def row(kind: str, images: tuple[ImageRef, ...], *prompt: Message) -> Example:
        return Example(kind, images, prompt, chosen, (wrong, Completion("Nothing is shown.")))

    ask = Message("user", (None, "What is shown here?"))
    watch = Message("user", (VIDEO, "What is shown here?"))
    other_picture = tuple(replace(c, images=(two,)) for c in (chosen, wrong))
    return [
        row("picture", (one,), ask),
        row("pictures", (one, two, three), Message("user", (None, None, None, "Which of the three is red?"))),
        row("text", (), Message("user", ("Is a circle round?",))),
        row("turns", (two,), ask, Message("assistant", ("A green triangle.",)), Message("user", ("And below it?",))),
        row("system", (three,), Message("system", ("Be brief.",)), ask),
        replace(row("image-side", (one,), ask), rejected=other_picture),
        replace(row("video", (), watch), videos=(clip(7, 64, 48, 1),)),
        replace(row("frame", (), watch), videos=(clip(1, 48, 64, 2),)),
        replace(
            row("beside", (three,), Message("user", (None, VIDEO, "What is shown in both?"))),
            videos=(clip(7, 64, 48, 3),),
        ),
    ]  # fmt: skip


_FOUND: dict[tuple[str, str], str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the cells of the table, in the process that has them all."""
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "cell":
                family, cell, found = value
                _FOUND[family, cell] = found


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where every cell was tried, the page's table is compared, and written anew if it does not agree."""
    from cells import CELLS, PAGE, table, with_table, written

    if collect_ignore_glob or hasattr(session.config, "workerinput"):
        return
    if {family for family, _ in _FOUND} != set(FAMILIES) or {cell for _, cell in _FOUND} != set(CELLS):
        return  # a part of the tests was chosen
    made = table(_FOUND, {name: traits.shared for name, (_, traits) in FAMILIES.items()})
    page = PAGE.read_text(encoding="utf-8")
    if written(page) != made:
        PAGE.write_text(with_table(page, made), encoding="utf-8")
        print("\ndocs/models.md did not agree with what was found: its table is written anew; commit it")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
