"""Videos are decoded as transformers does, only the kept frames stay in memory, and what is damaged is named."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cwdpo import videos
from cwdpo.errors import MissingPackageError
from cwdpo.records import VideoRef, VideoSampling
from cwdpo.videos import VideoError, decoded, fitted, frame_files, kept_frames, video_facts
from videos import grey, greys, write_video

EVERY = VideoSampling(fps=1000, max_frames=1000, max_pixels=None)


@pytest.mark.parametrize(
    ("frames", "fps", "sampling", "kept"),
    [
        # 5 seconds, 2 a second: 10 of 50, every fifth.
        (50, Fraction(10), VideoSampling(2, 32), (0, 5, 10, 15, 20, 25, 30, 35, 40, 45)),
        # The same, 4 at most: 0, 50/4 = 12.5, 25, 37.5, rounded down.
        (50, Fraction(10), VideoSampling(2, 4), (0, 12, 25, 37)),
        # 7/30 of a second hold less than one frame of 2 a second: one is kept.
        (7, Fraction(30), VideoSampling(2, 32), (0,)),
        # 30 frames at 29.97 a second are 1.001 seconds: 2.002 frames, so 2.
        (30, Fraction(30000, 1001), VideoSampling(2, 32), (0, 15)),
        # More a second than there are: all, none twice.
        (5, Fraction(4), VideoSampling(24, 32), (0, 1, 2, 3, 4)),
        (1, Fraction(25), VideoSampling(2, 32), (0,)),
        # A frame in 4 seconds: 10,000 / 25 / 4 = 100, 3 at most.
        (10_000, Fraction(25), VideoSampling(0.25, 3), (0, 3333, 6666)),
    ],
)
def test_which_frames_are_kept(
    frames: int, fps: Fraction, sampling: VideoSampling, kept: tuple[int, ...]
) -> None:
    assert kept_frames(frames, fps, sampling) == kept


@pytest.mark.parametrize(
    ("size", "most", "made"),
    [
        ((640, 480), None, (640, 480)),
        ((64, 64), 4096, (64, 64)),
        # The square root of 1/4 halves both sides.
        ((640, 480), 640 * 480 // 4, (320, 240)),
        # 100/300 = 0.333: sides times 0.577, rounded down: 17.3 and 5.77.
        ((30, 10), 100, (17, 5)),
        ((1000, 1), 10, (10, 1)),
    ],
)
def test_how_large_frames_are(size: tuple[int, int], most: int | None, made: tuple[int, int]) -> None:
    assert fitted(size, most) == made


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "mpeg4"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx"),
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),
    ],
)
def test_every_container_gives_its_frames(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, grey(20, (64, 48)), codec=codec)
    facts = video_facts(VideoRef(path))
    assert (facts.width, facts.height, facts.frames, facts.kept) == (64, 48, 20, 4)
    clip = decoded(VideoRef(path))
    assert clip.indices == (0, 5, 10, 15)
    assert clip.frames.shape == (4, 48, 64, 3)
    assert greys(clip.frames) == [0, 5, 10, 15]
    assert decoded(VideoRef(data=path.read_bytes())).frames.tobytes() == clip.frames.tobytes()


def test_frames_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.video_utils import read_video_pyav

    rng = np.random.default_rng(0)
    noise = [
        np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(30)
    ]
    path = write_video(tmp_path / "a.mp4", noise)
    clip = decoded(VideoRef(path, sampling=VideoSampling(fps=3)))
    theirs, metadata = read_video_pyav(str(path), lambda metadata, **_: list(clip.indices))
    assert np.array_equal(clip.frames, theirs)
    for name in ("total_num_frames", "fps", "duration", "frames_indices", "width", "height"):
        assert clip.metadata[name] == metadata[name], name


class Counted:
    """A decoded frame that counts how many of its kind are there."""

    alive = most = made = 0

    def __init__(self, frame: Any) -> None:
        self._frame = frame
        Counted.alive += 1
        Counted.made += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frame, name)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_a_clip_of_ten_thousand_frames_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "long.mp4", (f for _ in range(200) for f in grey(50)), codec="mpeg4")
    frames, pictures = videos._frames, []

    def counted(*args: Any) -> Iterator[Any]:
        return map(Counted, frames(*args))

    upright = videos._upright
    monkeypatch.setattr(videos, "_frames", counted)
    monkeypatch.setattr(videos, "_upright", lambda frame: pictures.append(1) or upright(frame))
    clip = decoded(VideoRef(path, sampling=VideoSampling(fps=2, max_frames=8)))
    assert clip.facts.frames == 10_000
    assert clip.indices == tuple(1250 * i for i in range(8))
    assert clip.frames.shape == (8, 32, 32, 3)
    assert Counted.made == 8751, "nothing is decoded after the last kept frame"
    assert Counted.most <= 2, "a frame that is not kept is gone when the next one comes"
    assert len(pictures) == 8, "only kept frames are converted"


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    clip = decoded(VideoRef(write_video(tmp_path / "a.mp4", grey(1))))
    assert clip.indices == (0,)
    assert clip.frames.shape == (1, 32, 32, 3)
    pair = clip.padded(2)
    assert pair.indices == (0, 0)
    assert np.array_equal(pair.frames[0], pair.frames[1])
    assert pair.padded(2) is pair


def test_frames_that_change_their_size_get_that_of_the_first(tmp_path: Path) -> None:
    first = write_video(tmp_path / "a.ts", grey(5, (64, 48)))
    second = write_video(tmp_path / "b.ts", grey(5, (32, 32)))
    both = tmp_path / "c.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    clip = decoded(VideoRef(both, sampling=EVERY))
    assert clip.frames.shape == (10, 48, 64, 3)
    assert clip.resized
    assert greys(clip.frames) == [0, 1, 2, 3, 4] * 2
    assert not decoded(VideoRef(first)).resized


def test_large_frames_are_scaled_down(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", grey(4, (64, 32)))
    clip = decoded(VideoRef(path, sampling=VideoSampling(max_pixels=512)))
    assert clip.frames.shape[1:3] == (16, 32)


def test_turned_videos_are_put_upright(tmp_path: Path) -> None:
    """A phone's portrait is a landscape with a matrix: here, a quarter turn to the right, left becomes top."""
    light_left = np.concatenate(
        [np.full((48, 32, 3), 250, np.uint8), np.full((48, 32, 3), 5, np.uint8)], axis=1
    )
    path = write_video(tmp_path / "a.mp4", [light_left] * 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and ids, reserved, layer to volume
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    (frame, *_) = decoded(VideoRef(path, sampling=EVERY)).frames
    assert frame.shape == (64, 48, 3)
    assert frame[:30].mean() > 200
    assert frame[34:].mean() < 50


# --- folders of frames --------------------------------------------------------------------------------


def folder_of(place: Path, names: list[str], size: tuple[int, int] = (32, 32)) -> Path:
    place.mkdir()
    for name, frame in zip(names, grey(len(names), size), strict=True):
        Image.fromarray(frame).save(place / name)
    return place


def test_a_folder_of_frames_is_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", [f"f{i}.png" for i in range(12)])
    (folder / "notes.txt").write_text("no frame")
    (folder / ".hidden.png").write_bytes(b"")
    assert [f.name for f in frame_files(folder)] == [f"f{i}.png" for i in range(12)]
    # It is a video of data.video.fps frames a second, so fps keeps all of it.
    clip = decoded(VideoRef(folder, sampling=VideoSampling(fps=4, max_frames=6)))
    assert clip.facts.fps == 4
    assert clip.facts.seconds == 3
    assert clip.indices == (0, 2, 4, 6, 8, 10)
    assert greys(clip.frames) == [0, 2, 4, 6, 8, 10]


def test_frames_of_a_folder_that_change_their_size(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", ["a.png", "b.png"], (32, 16))
    Image.new("RGB", (8, 8), (10, 10, 10)).save(folder / "c.png")
    clip = decoded(VideoRef(folder))
    assert clip.frames.shape == (3, 16, 32, 3)
    assert clip.resized


def test_a_folder_without_frames_and_one_with_a_link_out(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="no image in this folder") as error:
        decoded(VideoRef(tmp_path / "empty"))
    assert error.value.kind == "video-missing"
    folder = folder_of(tmp_path / "f", ["a.png"])
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "b.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(VideoError, match="a link that leads out of its folder") as error:
        decoded(VideoRef(folder))
    assert error.value.kind == "video-escapes"
    (folder / "b.png").unlink()
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(VideoError, match=r"b\.png: the frame cannot be decoded"):
        decoded(VideoRef(folder))


# --- damaged and hostile files ------------------------------------------------------------------------


def damaged(place: Path, how: str) -> Path:
    """A video file that is damaged in one way."""
    whole = write_video(place / "whole.ts", [f for _ in range(4) for f in grey(25, (64, 48))]).read_bytes()
    box = bytearray(write_video(place / "whole.mp4", grey(50, (64, 48))).read_bytes())
    start = box.index(b"mdat")
    box[start + 300 : start + 1500] = b"\x55" * 1200
    made = {
        "empty": b"",
        "text": b"this is a text, not a video, and it is long enough to be looked at as a file" * 9,
        "cut head": bytes(box[:200]),
        "cut": write_video(place / "b.mp4", grey(20)).read_bytes()[:900],
        "overwritten": bytes(box),
        "noise": whole[: 188 * 4] + np.random.default_rng(0).bytes(188 * 60),
    }
    path = place / "damaged.mp4"
    path.write_bytes(made[how])
    return path


@pytest.mark.parametrize("how", ["empty", "text", "cut head", "cut", "overwritten", "noise"])
def test_a_damaged_file_is_an_error(tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VideoError, match=r"damaged\.mp4") as error:
        decoded(VideoRef(damaged(tmp_path, how), sampling=EVERY))
    assert error.value.kind in ("video-unreadable", "video-damaged")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_file_that_ends_before_its_last_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", grey(20))
    header = videos._header

    def lies(*args: Any) -> Any:
        facts, fps = header(*args)
        return videos._facts(facts.width, facts.height, 40, fps, EVERY), fps

    monkeypatch.setattr(videos, "_header", lies)
    with pytest.raises(VideoError, match="it ends after 20 of 40 frames"):
        decoded(VideoRef(path, sampling=EVERY))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="has no pictures, only sound"):
        video_facts(VideoRef(path))


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", grey(5, (64, 48)))
    folder = folder_of(tmp_path / "f", ["a.png", "b.png", "c.png"])
    with monkeypatch.context() as patch:
        patch.setattr(videos, "MOST_FRAMES", 2)
        for place in (path, folder):
            with pytest.raises(VideoError, match=r"frames; allowed: 2: ") as error:
                video_facts(VideoRef(place))
            assert error.value.kind == "video-bomb"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="frames of 64 x 48 pixels; allowed: 3071"):
        decoded(VideoRef(path))


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile real.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nreal.mp4\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="x"><Period>'
    "<AdaptationSet><Representation><BaseURL>real.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_opens_no_other_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would follow a playlist to any file or address, whatever its name."""
    write_video(tmp_path / "real.mp4", grey(3))
    path = tmp_path / "a.mp4"
    path.write_text(PLAYLISTS[kind])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="is not a video that PyAV can read"):
        decoded(VideoRef(path))
    if kind == "concat":  # the trick works where no format is forbidden
        with monkeypatch.context() as patch:
            patch.setattr(videos, "CONTAINERS", (*videos.CONTAINERS, "concat"))
            assert decoded(VideoRef(path)).facts.width == 32


def test_without_pyav_the_line_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", grey(3))
    folder = folder_of(tmp_path / "f", ["a.png"])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r'pip install "cwdpo\[video\]"'):
        decoded(VideoRef(path))
    assert decoded(VideoRef(folder)).indices == (0,), "folders of frames are read by Pillow"
