"""`cwdpo sample --engine ray`: what its actors sample equals one process, nothing is sampled twice, errors are lines.

The actor is a plain class, so most tests call it in this process, without ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cwdpo.config import Recipe, parse_recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import CwdpoError, DataError, ModelError, ProcessError, RecipeError
from cwdpo.files.reading import read_jsonl
from cwdpo.onpolicy import on_ray
from cwdpo.onpolicy.on_ray import PolicyActor, RayOptions, RaySampler
from cwdpo.onpolicy.pool import Pool
from cwdpo.onpolicy.sampler import loaded_sampler
from cwdpo.records import Example, ImageRef
from cwdpo.rundir import RunDir
from cwdpo.videos import VideoError
from paths import RECIPES

BATCH, PROMPTS = 3, 7


class Killed(BaseException):
    """Stands in for a kill."""


@pytest.fixture
def recipe(model_folder: Path, world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of a small random model; ray counts as installed."""
    monkeypatch.setattr(on_ray, "optional_package", lambda name, feature, install: SimpleNamespace())
    sampler = {"samples": 2, "batch_size": BATCH, "max_new_tokens": 4}
    tree = {
        "model": {"path": str(model_folder), "device": "cpu"},
        "data": {"path": str(world_folder / "train.jsonl")},
        "negatives": {"on_policy_fraction": 1.0, "sampler": sampler},
    }
    return parse_recipe(tree)


@pytest.fixture
def prompts(examples: list[Example]) -> list[Example]:
    return list(examples[:PROMPTS])


class Actors(RaySampler):
    """Two actors in this process take turns; the batches that they sampled are counted."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, RayOptions(2))
        self.sampled: list[int] = []

    def through_actors(self, work: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        actors = [PolicyActor(self.recipe, 1, os.getcwd()) for _ in range(2)]
        for number, row in enumerate(work):
            self.sampled.append(row["batch"])
            yield actors[number % 2](row)


def pool(recipe: Recipe, encoder: Encoder, folder: Path) -> Pool:
    folder.mkdir(exist_ok=True)
    return Pool(RunDir(folder), recipe, encoder, None)


def test_actors_fill_a_pool_with_the_samples_of_one_process(
    recipe: Recipe, prompts: list[Example], encoder: Encoder, tmp_path: Path
) -> None:
    _, sampler, precision = loaded_sampler(recipe)
    with precision:
        alone = pool(recipe, encoder, tmp_path / "one").fill(prompts, sampler, 0, 0)
    actors = Actors(recipe)
    told: list[tuple[int, int]] = []
    found = pool(recipe, encoder, tmp_path / "ray").fill_by(
        prompts, actors, 0, 0, lambda done, total: told.append((done, total))
    )
    assert found == alone
    assert sorted(found) == sorted(e.id for e in prompts)
    assert actors.sampled == [2, 1, 0], "the longest prompts first"
    assert told == [(0, 14), (2, 14), (8, 14), (14, 14)]
    rows = {name: read_jsonl(tmp_path / name / "pool.jsonl") for name in ("one", "ray")}
    assert [row["id"] for row in rows["one"]] != [row["id"] for row in rows["ray"]]
    assert sorted(map(str, rows["one"])) == sorted(map(str, rows["ray"]))


def test_what_is_stored_is_not_sampled_again_by_either_engine(
    recipe: Recipe, prompts: list[Example], encoder: Encoder, tmp_path: Path
) -> None:
    whole = pool(recipe, encoder, tmp_path / "whole").fill_by(prompts, Actors(recipe), 0, 0)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise Killed

    first, second, third = (Actors(recipe) for _ in range(3))
    with pytest.raises(Killed):
        pool(recipe, encoder, tmp_path / "a").fill_by(prompts, first, 0, 0, stop)
    assert pool(recipe, encoder, tmp_path / "a").fill_by(prompts, second, 0, 0) == whole
    assert (first.sampled, second.sampled) == ([2, 1], [0])
    assert pool(recipe, encoder, tmp_path / "a").fill_by(prompts, third, 0, 0) == whole
    assert third.sampled == []
    nobody: Any = SimpleNamespace(together=True, at_work=contextlib.nullcontext)
    assert pool(recipe, encoder, tmp_path / "a").fill(prompts, nobody, 0, 0) == whole


def problem(sampler: RaySampler, batch: Sequence[Example]) -> CwdpoError:
    with pytest.raises(CwdpoError) as caught:
        list(sampler.drawn([batch], 0, 0))
    assert f"(an actor on {os.uname().nodename}, in the batch of row {batch[0].id})" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_image_that_an_actor_cannot_read_is_one_line_with_its_row(
    recipe: Recipe, prompts: list[Example], tmp_path: Path
) -> None:
    bad = replace(prompts[1], images=(ImageRef(tmp_path / "gone.png"),))
    error = problem(Actors(recipe), [prompts[0], bad])
    assert isinstance(error, DataError)
    assert bad.where in str(error)
    assert "gone.png" in str(error)


def test_a_model_that_an_actor_cannot_load_is_one_line(
    recipe: Recipe, prompts: list[Example], tmp_path: Path
) -> None:
    changed = recipe.model.model_copy(update={"path": str(tmp_path / "none")})
    error = problem(Actors(recipe.model_copy(update={"model": changed})), prompts)
    assert isinstance(error, ModelError)
    assert str(tmp_path / "none") in str(error)


def test_another_error_of_an_actor_is_its_last_line_with_the_traceback_behind_it(
    recipe: Recipe, prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(recipe: Recipe) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(on_ray, "loaded_sampler", out_of_memory)
    error = problem(Actors(recipe), prompts)
    assert isinstance(error, ProcessError)
    assert str(error).startswith("MemoryError: no room (")
    assert "in out_of_memory" in str(error.__cause__)


def test_an_error_of_ours_that_another_room_defines_is_of_its_general_kind(
    recipe: Recipe, prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_video(recipe: Recipe) -> Any:
        raise VideoError("image", "clip.mp4: no frames")

    monkeypatch.setattr(on_ray, "loaded_sampler", no_video)
    error = problem(Actors(recipe), prompts)
    assert type(error) is DataError
    assert str(error).startswith("clip.mp4: no frames: fetch the file again")


class FakeRay:
    """As much of ray as tells what a cluster has."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self.resources


@pytest.mark.parametrize(
    ("device", "resources", "asked", "room"),
    [
        ("auto", {"CPU": 8.0, "GPU": 4.0}, None, (4, 1)),
        ("auto", {"CPU": 8.0, "GPU": 4.0}, 2, (2, 1)),
        ("auto", {"CPU": 8.0, "GPU": 4.0}, 5, "takes a GPU, and Ray (local) has 4 of them"),
        ("cpu", {"CPU": 8.0, "GPU": 4.0}, 5, (5, 0)),
        ("auto", {"CPU": 8.0}, None, (1, 0)),
        ("auto", {"CPU": 8.0}, 9, "takes a CPU, and Ray (local) has 8 of them"),
    ],
)
def test_actors_by_what_the_cluster_has(
    recipe: Recipe, device: Any, resources: dict[str, float], asked: int | None, room: Any
) -> None:
    model = recipe.model.model_copy(update={"device": device})
    sampler = RaySampler(recipe.model_copy(update={"model": model}), RayOptions(asked))
    sampler.ray = FakeRay(**resources)
    if isinstance(room, tuple):
        assert sampler._room() == room
    else:
        with pytest.raises(RecipeError) as caught:
            sampler._room()
        assert f"--actors {asked}: each {room}" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:x"])
def test_an_address_without_ray_is_said_at_once(recipe: Recipe, address: str) -> None:
    sampler = RaySampler(recipe, RayOptions(1, address))
    sampler.ray = SimpleNamespace(is_initialized=lambda: False)  # init is not called
    with pytest.raises(CwdpoError, match=rf"--ray-address {address}: no Ray is reached .*HOST:PORT"):
        list(sampler.through_actors([{}]))


def test_what_does_not_go_together_is_refused(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*more: str) -> str:
        done = run("sample", RECIPES / "tiny.yaml", "--out", tmp_path / "p.jsonl", *more)
        assert done.code, done.out
        return str(done.err)

    served = sample("--engine", "ray", "--base-url", "http://127.0.0.1:1/v1")
    assert "negatives.sampler.server (--base-url) names a server" in served
    assert "is for --engine ray" in sample("--actors", "2")
    assert "is for --engine ray" in sample("--ray-address", "auto")
    with monkeypatch.context() as launched:
        launched.setattr(on_ray, "several", lambda: True)
        assert "start cwdpo sample once, without a launcher" in sample("--engine", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    lacking = sample("--engine", "ray")
    assert "--engine ray needs the package 'ray', which is not installed: pip install 'cwdpo[ray]'" in lacking
    assert not any(tmp_path.iterdir())


# --- with ray -------------------------------------------------------------------------------------------


def below(process: int) -> dict[int, str]:
    """The processes that a process started, and those that they started, with their titles."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [
        (int(pid), int(parent), args)
        for pid, parent, args in (x.split(None, 2) for x in lines.splitlines()[1:])
    ]
    found: dict[int, str] = {}
    while new := {p: args for p, parent, args in rows if parent in (process, *found) and p not in found}:
        found |= new
    return found


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_actors_and_a_killed_command_leave_the_file_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the ray extra is not installed: pip install 'cwdpo[ray]'")
    command = [
        sys.executable, "-m", "cwdpo", "sample", str(RECIPES / "tiny.yaml"), "data.world.train=240",
        "negatives.sampler.batch_size=4", "negatives.sampler.samples=3",
    ]  # fmt: skip

    def start(name: str, *more: str) -> subprocess.Popen[bytes]:
        (tmp_path / name).mkdir(exist_ok=True)
        return subprocess.Popen([*command, *more, "--out", str(tmp_path / name / "pairs.jsonl")])

    def stored() -> int:
        file = tmp_path / "ray" / ".pairs.jsonl.work" / "pool.jsonl"
        return len(file.read_bytes().splitlines()) if file.is_file() else 0

    def kill_an_actor(process: int) -> None:
        actors = [pid for pid, title in below(process).items() if title.startswith("ray::MapWorker")]
        os.kill(actors[-1], signal.SIGKILL)

    on_two = ("--engine", "ray", "--actors", "2")
    assert start("one").wait() == 0
    first = start("ray", *on_two)
    wait_for(lambda: stored() >= 20, "samples")
    kill_an_actor(first.pid)
    before = stored()
    wait_for(lambda: stored() >= before + 40, "samples after an actor was killed")
    started = below(first.pid)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "the end of Ray's processes")
    before = stored()
    second = start("ray", *on_two)
    wait_for(lambda: stored() >= before + 20, "samples of the second start")
    kill_an_actor(second.pid)
    rows = tmp_path / "rows.jsonl"
    os.link(tmp_path / "ray" / ".pairs.jsonl.work" / "pool.jsonl", rows)  # the folder is removed at the end
    assert second.wait() == 0
    ids = [row["id"] for row in read_jsonl(rows)]
    assert len(ids) == len(set(ids)) == 240
    one, ray = ((tmp_path / name / "pairs.jsonl").read_bytes() for name in ("one", "ray"))
    assert one == ray
