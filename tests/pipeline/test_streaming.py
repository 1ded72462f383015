"""A run whose rows are streamed: equal to one that is not where it can be, to itself after a kill, and flat on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cwdpo.config import parse_recipe
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.read.stream import Place
from cwdpo.errors import CwdpoError, DataError, FileError, RecipeError
from cwdpo.files.reading import read_jsonl
from cwdpo.onpolicy.preferences import make_preferences
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.pipeline.windows import Windows
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.stage.splits import prepare_data
from launch import launch

ROWS, WINDOW, STEP = 60, 12, 4
TREE: dict[str, Any] = {
    "name": "streamed",
    "model": {"path": "embedded", "device": "cpu", "freeze": ["vision"]},
    "data": {"streaming": {"window": WINDOW + 2}, "stage1_fraction": 0.4},
    "stage1": {"objective": {"name": "sft"}, "learning_rate": 1e-4, "steps": 4},
    "stage2": {"objective": {"name": "cw_dpo", "beta": 0.3}, "learning_rate": 1e-3, "steps": 14},
    "train": {"batch_size": STEP, "logging_steps": 1, "save_steps": 4, "warmup_steps": 2},
    "calibration": {"samples": 12, "max_new_tokens": 30},
    "probes": {"every": 7, "prompts": 8},
    "evaluation": {"prompts": 0},
    "stop": [],
}
SAME = ("windows.jsonl", "metrics.jsonl", "readings.jsonl", "calibration.json", "model/model.safetensors")


class Killed(BaseException):
    """Stands in for a kill."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cwdpo.worlds.shapes import ShapesSettings, materialise

    folder = tmp_path_factory.mktemp("world")
    materialise(ShapesSettings(seed=5, train=ROWS, validation=12, test=0, negatives_per_prompt=2), folder)
    return folder


def recipe(world: Path, **changes: Any) -> Any:
    tree = json.loads(json.dumps(TREE))
    tree["data"] |= {"path": str(world / "train.jsonl"), "validation_path": str(world / "validation.jsonl")}
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_recipe(tree)


def killer(stage: str, at: int) -> Listener:
    def step(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, at):
            raise Killed

    return Listener(step=step)


def same(folder: Path, whole: Path) -> None:
    for name in SAME:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"stage2": {"steps": None}},
            r"stage2\.steps: with data.streaming the number of rows is not known, so epochs",
        ),
        (
            {"data": {"world": {}, "path": None}},
            "world: it is generated as a whole: leave out data.streaming",
        ),
        ({"data": {"sources": [{"path": "a"}], "path": None}}, "sources: 'a': .*each source has a 'weight'"),
        ({"data": {"limit": 5}}, "limit: not with data.streaming, the stages' steps say how much is read"),
        ({"data": {"validation_fraction": 0.2}}, "validation_fraction: .*set data.streaming.validation"),
        ({"train": {"max_tokens_per_batch": 99}}, "train.max_tokens_per_batch: .*not known before it begins"),
        (
            {"negatives": {"on_policy_fraction": 0.5}},
            "negatives.on_policy_fraction: rounds choose their prompts",
        ),
        ({"data": {"streaming": 7}}, "data.streaming"),
    ],
)
def test_what_cannot_be_streamed_is_said_in_a_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipe(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_true_is_the_defaults_and_false_is_none(tmp_path: Path) -> None:
    on, off = (recipe(tmp_path, data={"streaming": value}) for value in (True, False))
    assert (on.data.streaming.window, off.data.streaming) == (10_000, None)
    assert parse_recipe(json.loads(on.model_dump_json())) == on


def test_a_window_below_a_step_and_a_file_of_samples_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"data.streaming.window = 3: .*one takes 4 rows: set it to 4 or more"
    ):
        prepare_data(recipe(world, data={"streaming": {"window": 3}}), RunDir(tmp_path))
    with pytest.raises(DataError, match=r"data.streaming: a file is made of all rows"):
        make_preferences(recipe(world), tmp_path / "made.jsonl")


# --- which rows -----------------------------------------------------------------------------------------


def test_the_first_rows_are_held_out_and_no_image_is_in_two_parts(world: Path, tmp_path: Path) -> None:
    from cwdpo.data.contents import image_content

    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    rows += [{**row, "id": f"again{i}"} for i, row in enumerate(rows)]  # every image twice
    file = world / "twice.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = recipe(
        world,
        data={"path": str(file), "validation_path": None, "streaming": {"window": 200, "validation": 9}},
    )
    splits = prepare_data(settings, RunDir(tmp_path))
    assert sorted(e.id for e in splits.validation) == sorted(row["id"] for row in rows[:9])
    parts = [
        {image_content(i).digest for e in part for i in e.images}
        for part in (splits.stage1, splits.stage2, splits.validation)
    ]
    assert len(set.union(*parts)) == sum(map(len, parts)) == ROWS
    assert (len(splits.stage1) + len(splits.stage2)) / 2 == ROWS - 9
    assert all(stream.ended for stream in splits.streams.values())
    assert any("18 left out: has an image that is held out" in note for note in splits.notes)


def test_rows_without_a_negative_take_no_place_in_a_window(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row |= {"rejected": None, "negatives": None}
    file = world / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = prepare_data(
        recipe(world, data={"path": str(file)}, stage1={"enabled": False}), RunDir(tmp_path)
    )
    assert [e.id for e in splits.stage2] == [row["id"] for row in rows[1 : 2 * WINDOW : 2]]


def test_too_many_bad_rows_stop_it(world: Path, tmp_path: Path) -> None:
    lines = (world / "train.jsonl").read_text().splitlines()
    file = world / "bad.jsonl"
    file.write_text("\n".join([*lines[:3], "{", *lines[3:]]))
    settings = recipe(world, data={"path": str(file), "max_bad_fraction": 0.001})
    with pytest.raises(
        DataError, match=r"1 of \d+ rows so far are bad, more than data.max_bad_fraction = 0.001"
    ):
        prepare_data(settings, RunDir(tmp_path))


def mixture(world: Path, **changes: Any) -> Any:
    """A recipe of two files: three quarters of a window are of the first one."""
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    (world / "some.jsonl").write_text("".join(lines[:45]))
    (world / "rest.jsonl").write_text("".join(lines[45:]))
    sources = [
        {"path": str(world / "some.jsonl"), "weight": 3},
        {"path": str(world / "rest.jsonl"), "weight": 1},
    ]
    data = {"path": None, "sources": sources, **changes.pop("data", {})}
    return recipe(world, data=data, stage1={"enabled": False}, **changes)


def test_every_window_has_the_shares_of_a_mixture(world: Path, tmp_path: Path) -> None:
    settings = mixture(world)
    splits = prepare_data(settings, RunDir(tmp_path))
    stream = splits.streams["stage2"]
    assert not stream.ended
    windows = [stream.first]
    for _ in range(5):
        windows.append(stream.read([part.end for part in windows[-1].parts]))
    found: dict[str, list[str]] = {"some": [], "rest": []}
    for window in windows:
        assert [e.source for e in window.examples] == ["some"] * 9 + ["rest"] * 3
        for e in window.examples:
            found[e.source].append(e.id.removeprefix(f"{e.source}/"))
    ids = [json.loads(line)["id"] for line in (world / "train.jsonl").read_text().splitlines()]
    assert found["some"] == [*ids[:45], *ids[:9]]
    assert found["rest"] == [*ids[45:], *ids[45:48]]
    with pytest.raises(
        DataError, match=r"some.jsonl: 45 rows have fewer than 90 examples .* lower data.streaming.window"
    ):
        prepare_data(mixture(world, data={"streaming": {"window": 120}}), RunDir(tmp_path))
    held = prepare_data(
        mixture(world, data={"validation_path": None, "streaming": {"validation": 8, "window": 4}}),
        RunDir(tmp_path),
    )
    assert {e.id for e in held.validation} == {
        *(f"some/{i}" for i in ids[:6]),
        *(f"rest/{i}" for i in ids[45:47]),
    }
    assert held.stage2[0].id == f"some/{ids[6]}"


# --- runs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_source_that_fits_a_window_is_trained_on_as_without_streaming(world: Path, tmp_path: Path) -> None:
    alone = {"stage1": {"enabled": False}, "stage2": {"steps": 20}}
    for name, streaming in (("whole", False), ("streamed", {"window": ROWS + 3})):
        train_two_stage(recipe(world, **alone, data={"streaming": streaming}), tmp_path / name)
    for name in SAME[1:]:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_the_first_window_is_trained_on_as_its_rows_alone(world: Path, tmp_path: Path) -> None:
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    first = world / "first.jsonl"
    first.write_text("".join(lines[:WINDOW]))
    alone = {"stage1": {"enabled": False}, "stage2": {"steps": WINDOW // STEP}}
    train_two_stage(recipe(world, **alone), tmp_path / "streamed")
    whole = recipe(world, **alone, data={"streaming": False, "path": str(first)})
    train_two_stage(whole, tmp_path / "whole")
    for name in SAME[1:]:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


Filled = dict[tuple[str, int], list[EncodedExample]]


@pytest.fixture(scope="module")
def filled(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Filled, list[str]]:
    """A whole run, what each window held, and the notes."""
    found: Filled = {}
    notes: list[str] = []
    begin = Windows.begin

    def begun(self: Windows, number: int) -> None:
        begin(self, number)
        found[self.stage.name, number] = list(self.data)

    folder = tmp_path_factory.mktemp("streamed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Windows, "begin", begun)
        train_two_stage(recipe(world), folder, listener=Listener(note=notes.append))
    return folder, found, notes


@pytest.mark.slow
def test_every_row_is_in_one_window_of_a_turn(filled: tuple[Path, Filled, list[str]], world: Path) -> None:
    folder, found, notes = filled
    ids = [json.loads(line)["id"] for line in (world / "train.jsonl").read_text().splitlines()]
    stage2 = [row.id for number in range(5) for row in found["stage2", number]]
    assert len(stage2) == 5 * WINDOW
    turn = stage2[: len(set(stage2))]
    assert stage2 == (turn * 3)[: len(stage2)]
    assert turn == sorted(turn, key=ids.index)
    stage1 = {row.id for number in range(2) for row in found["stage1", number]}
    assert not stage1 & set(stage2)
    windows = [row for row in read_jsonl(folder / "windows.jsonl") if row["stage"] == "stage2"]
    assert [row["step"] for row in windows] == [0, 3, 6, 9, 12]
    (said,) = (note for note in notes if "it goes on with the first ones" in note)
    assert said.startswith(f"{world / 'train.jsonl'}: stage2: all rows were read before step 9:")
    assert not list((folder / "encoded").glob("*")) if (folder / "encoded").exists() else True
    assert len(list((folder / "reference" / "window").glob("*.arrow"))) == 1  # of the last window


@pytest.mark.slow
def test_every_window_has_the_reference_of_the_stages_start(filled: tuple[Path, Filled, list[str]]) -> None:
    from transformers import AutoModelForImageTextToText

    from cwdpo.models.shared_attention import use_scoring
    from cwdpo.scoring.pairs import reference_pass

    folder, found, _ = filled
    model = AutoModelForImageTextToText.from_pretrained(folder / "stage1" / "model").eval()
    use_scoring(model, "auto")
    for number in (1, 4):
        rows = found["stage2", number]
        fresh = reference_pass(model, rows, batch_size=4)
        for row, now in zip(rows, fresh, strict=True):
            old = [c.reference_sum_logp for c in row.completions]
            assert old == pytest.approx([c.reference_sum_logp for c in now.completions], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("stage1", 4), ("stage2", 5), ("stage2", 9), ("stage2", 13)])
def test_a_kill_changes_nothing(
    stage: str, step: int, filled: tuple[Path, Filled, list[str]], world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train_two_stage(recipe(world), folder, listener=killer(stage, step))
    train_two_stage(recipe(world), folder, resume=True)
    same(folder, filled[0])


@pytest.mark.slow
def test_a_kill_changes_nothing_in_a_mixture(world: Path, tmp_path: Path) -> None:
    settings = mixture(world)
    train_two_stage(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        train_two_stage(settings, tmp_path / "run", listener=killer("stage2", 9))
    train_two_stage(settings, tmp_path / "run", resume=True)
    same(tmp_path / "run", tmp_path / "whole")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert {f"source/{name}/share" for name in ("some", "rest")} <= set().union(*rows)


@pytest.mark.slow
def test_changed_rows_behind_the_resume_point_are_refused(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    folder, data = tmp_path / "run", copy / "train.jsonl"
    with pytest.raises(Killed):
        train_two_stage(recipe(copy), folder, listener=killer("stage2", 9))
    windows = [row for row in read_jsonl(folder / "windows.jsonl") if row["stage"] == "stage2"]
    assert [row["window"] for row in windows] == [0, 1, 2]  # the checkpoint is of step 8, in window 2
    lines = data.read_text().splitlines(keepends=True)
    ids = [json.loads(line)["id"] for line in lines]
    stream = prepare_data(recipe(copy), RunDir(tmp_path)).streams["stage2"]
    first = [stream.read([Place(*row["begin"][0])]).examples[0].id for row in windows]
    _, second, third = (row["begin"][0][1] for row in windows)

    def change(number: int) -> None:
        place = ids.index(first[number])
        row = json.loads(lines[place])
        changed = json.dumps({**row, "chosen": f"{row['chosen']} now"}) + "\n"
        data.write_text("".join([*lines[:place], changed, *lines[place + 1 :]]))

    def refused(number: int, error: type[CwdpoError], said: str) -> None:
        change(number)
        with pytest.raises(error, match=said):
            train_two_stage(recipe(copy), folder, resume=True)
        data.write_text("".join(lines))

    refused(0, RecipeError, "rows of stage2: other texts")
    refused(1, DataError, rf"train.jsonl: rows {second + 1} to {third} are not those that this run has read")
    refused(2, DataError, rf"train.jsonl: rows {third + 1} to .*, or their images, are not those of window 2")
    (folder / "windows.jsonl").rename(tmp_path / "kept")
    with pytest.raises(FileError, match=r"windows\.jsonl"):
        train_two_stage(recipe(copy), folder, resume=True)
    (tmp_path / "kept").rename(folder / "windows.jsonl")
    change(1)
    train_two_stage(recipe(copy), folder, resume=True, accept_changes=True)
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r][-1] == 14


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_read_and_train_as_one(mode: str, world: Path, tmp_path: Path) -> None:
    calm = {"objective": {"name": "cw_dpo", "beta": 0.3}, "learning_rate": 1e-5, "steps": 9}
    common: dict[str, Any] = {"stage1": {"enabled": False}, "stage2": calm, "probes": {"every": 50}}
    train_two_stage(recipe(world, **common), tmp_path / "one")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(world, **common, train={"batch_size": STEP // 2}).to_yaml())
    launch(tmp_path / "two", file, 2, mode)
    windows = [read_jsonl(tmp_path / name / "windows.jsonl") for name in ("one", "two")]
    assert len(windows[0]) == 3
    assert windows[0] == windows[1]
    rows = [
        [r for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in r] for name in ("one", "two")
    ]
    assert len(rows[0]) == 9
    for one, two in zip(*rows, strict=True):
        names = ("loss", "logps_mean/chosen", "logps_mean/rejected", "cooling/weight_mean")
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], abs=1e-4)
