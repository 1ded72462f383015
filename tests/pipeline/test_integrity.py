"""What a resumed run goes on from is what the run left: data, base model, checkpoints and files, or it is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cwdpo.config import parse_recipe
from cwdpo.errors import CwdpoError, FileError, RecipeError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.checksums import damage, refuse_damage, write_checksums
from cwdpo.pipeline import two_stage
from cwdpo.pipeline.export import export
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.rundir import RunDir
from cwdpo.trainer.checkpoints import checkpoint_to_resume
from cwdpo.worlds.shapes import ShapesSettings, materialise


def recipe(place: Path, **changes: Any) -> Any:
    return parse_recipe(
        {
            "data": {
                "path": str(place / "data" / "train.jsonl"),
                "validation_path": str(place / "data" / "validation.jsonl"),
            },
            "model": {"path": str(place / "base"), "device": "cpu", "tune": "lora"},
            "stage1": {"enabled": False},
            "stage2": {"objective": {"name": "dpo"}, "learning_rate": 1e-3, "steps": 4},
            "train": {"batch_size": 4, "save_steps": 2, "logging_steps": 1, "warmup_steps": 0},
            "probes": {"every": 2, "prompts": 4},
            "evaluation": {"prompts": 2, "samples": 1, "max_new_tokens": 4},
            "stop": [],
            **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Data, base and a finished run in ``run``, with checkpoints 2 and 4."""
    place = tmp_path_factory.mktemp("finished")
    materialise(
        ShapesSettings(seed=5, train=16, validation=4, test=0, negatives_per_prompt=1), place / "data"
    )
    put_rows(
        place,
        [{k: row[k] for k in ("id", "images", "prompt", "chosen", "rejected")} for row in rows_of(place)],
    )
    shutil.copytree(model_folder, place / "base")
    train_two_stage(recipe(place), place / "run")
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy, killed after step 4: as if the final model had not been written yet."""
    for name in ("data", "base", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    shutil.rmtree(tmp_path / "run" / "model")
    # The paths are part of the recipe.
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(finished), str(tmp_path)))
    return tmp_path


def resumed(place: Path, *, accept: bool = False) -> RunDir:
    return train_two_stage(recipe(place), place / "run", resume=True, accept_changes=accept)


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "data" / "train.jsonl").read_text().splitlines()]


def put_rows(place: Path, rows: list[dict[str, Any]]) -> None:
    (place / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- data and base --------------------------------------------------------------------------------------


def swapped(place: Path) -> None:
    rows = rows_of(place)
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    put_rows(place, rows)


def other_pictures(place: Path) -> None:
    for path in (place / "data").rglob("*.png"):
        with Image.open(path) as image:
            inverted = Image.eval(image.convert("RGB"), lambda v: 255 - v)
        inverted.save(path)


def scaled(place: Path) -> None:
    path = place / "base" / "model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def other_template(place: Path) -> None:
    path = place / "base" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "swapped": (swapped, "rows of stage2: other texts"),
    "half": (lambda p: put_rows(p, rows_of(p)[:8]), "rows of stage2: 16 -> 8"),
    "reversed": (lambda p: put_rows(p, rows_of(p)[::-1]), "rows of stage2: the same in another order"),
    "pictures": (other_pictures, "rows of stage2: other images"),
    "base": (scaled, "base model: other weights"),
    "template": (other_template, "base model: another template"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_is_named_and_refused(place: Path, what: str) -> None:
    change, said = CHANGES[what]
    change(place)
    before = sorted(p.name for p in (place / "run").iterdir())
    with pytest.raises(RecipeError) as caught:
        resumed(place)
    assert f"\n  {said}" in str(caught.value)
    assert "--accept-changes" in str(caught.value)
    assert sorted(p.name for p in (place / "run").iterdir()) == before


def test_accepted_changes_go_on_and_are_the_new_state(place: Path) -> None:
    put_rows(place, rows_of(place)[::-1])
    resumed(place, accept=True)
    assert (place / "run" / "model" / "adapter_model.safetensors").is_file()
    resumed(place)  # nothing has changed since


def test_an_untouched_run_goes_on_to_the_same_end(place: Path, finished: Path) -> None:
    resumed(place)
    for name in (
        "model/adapter_model.safetensors",
        "model/adapter_config.json",
        "metrics.jsonl",
        "readings.jsonl",
        "inputs.json",
    ):
        one, other = ((p / "run" / name).read_bytes() for p in (place, finished))
        assert one.replace(bytes(place), b"") == other.replace(bytes(finished), b""), name


def test_the_adapters_targets_are_sorted(finished: Path) -> None:
    for folder in ("model", "stage2/checkpoint-4"):
        written = json.loads((finished / "run" / folder / "adapter_config.json").read_text())
        assert len(written["target_modules"]) > 3
        assert written["target_modules"] == sorted(written["target_modules"])


# --- checkpoints ----------------------------------------------------------------------------------------


def flip(path: Path, share: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-5]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "flipped": flip,
    "garbage": lambda p: p.write_bytes(bytes(range(256)) * (p.stat().st_size // 256 + 1)),
}


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"],
)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(
    finished: Path, tmp_path: Path, name: str, how: str
) -> None:
    shutil.copytree(finished / "run" / "stage2", tmp_path / "stage2")
    newest = tmp_path / "stage2" / "checkpoint-4"
    assert checkpoint_to_resume(tmp_path / "stage2") == newest
    DAMAGE[how](newest / name)
    with pytest.raises(FileError) as caught:
        checkpoint_to_resume(tmp_path / "stage2")
    said = str(caught.value)
    assert said.startswith(f"{newest}: damaged: {name} ")
    assert said.endswith("remove the folder, and --resume continues from checkpoint-2, which is not damaged")
    flip(tmp_path / "stage2" / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(
        FileError, match="no older one is undamaged: remove the folder, and --resume starts the stage"
    ):
        checkpoint_to_resume(tmp_path / "stage2")
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "stage2" / "checkpoint-2")
    assert checkpoint_to_resume(tmp_path / "stage2") is None


def test_the_run_says_so_and_goes_on_from_the_one_before(place: Path, finished: Path) -> None:
    newest = place / "run" / "stage2" / "checkpoint-4"
    flip(newest / "optimizer.pt")
    with pytest.raises(
        FileError, match=r"checkpoint-4: damaged: optimizer\.pt was changed: remove the folder"
    ):
        resumed(place)
    shutil.rmtree(newest)
    resumed(place)
    one, other = (load_file(p / "run" / "model" / "adapter_model.safetensors") for p in (place, finished))
    assert all(torch.equal(one[k], other[k]) for k in other)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", b"garbage"),
        ("optimizer.pt", {"state": 3, "param_groups": "many"}),
        ("scheduler.pt", [1, 2]),
        ("rng_state.pth", {"python": "x"}),
        ("trainer_state.json", b"[]"),
        ("trainer_state.json", b'{"global_step": "two"}'),
        ("trainer_state.json", b"{"),
    ],
)
def test_a_checkpoint_of_an_older_version_is_answered_in_words_too(
    place: Path, name: str, content: Any
) -> None:
    """It brings no checksums; what torch and transformers raise is answered."""
    checkpoint = place / "run" / "stage2" / "checkpoint-2"
    shutil.rmtree(place / "run" / "stage2" / "checkpoint-4")
    (checkpoint / CHECKSUMS).unlink()
    if isinstance(content, bytes):
        (checkpoint / name).write_bytes(content)
    else:
        torch.save(content, checkpoint / name)
    with pytest.raises(
        CwdpoError, match=r"checkpoint-2.*: remove the checkpoint's folder, and --resume continues"
    ):
        resumed(place)


# --- files of the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "readings.jsonl", "probes-stage2.jsonl", "samples.jsonl", "inputs.json"]
)
@pytest.mark.parametrize("how", ["cut", "flipped", "garbage", "empty"])
def test_a_damaged_file_of_the_run_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the run went on")

    monkeypatch.setattr(two_stage, "_train", never)
    DAMAGE[how](place / "run" / name)
    with pytest.raises(FileError) as caught:
        resumed(place)
    assert str(caught.value).startswith(f"{place / 'run'}: changed since the run wrote it: {name} ")
    assert "--accept-changes" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "missing"), [("metrics.jsonl", True), ("probes-stage2.jsonl", False), ("samples.jsonl", False)]
)
def test_a_missing_file_is_named_unless_it_is_made_again(place: Path, name: str, missing: bool) -> None:
    (place / "run" / name).unlink()
    assert RunDir(place / "run").changes() == ([f"{name} is missing"] if missing else [])


@pytest.mark.parametrize(("stage", "end"), [("stage1", "stage1/model"), ("stage2", "model")])
def test_a_finished_stage_makes_no_probe_set_again(place: Path, stage: str, end: str) -> None:
    run, name = RunDir(place / "run"), f"probes-{stage}.jsonl"
    shutil.copy(run.path / "metrics.jsonl", run.path / name)
    run.record()
    (run.path / name).unlink()
    assert run.changes() == []
    (run.path / end).mkdir(parents=True)
    assert run.changes() == [f"{name} is missing"]


def test_damaged_checksums_are_named(place: Path) -> None:
    (place / "run" / CHECKSUMS).write_text("{")
    with pytest.raises(
        FileError, match=r"checksums\.json: is not JSON.*: delete it, and the files are used without a check"
    ):
        resumed(place)
    (place / "run" / CHECKSUMS).write_text(
        json.dumps({"../x": {"bytes": 1, "blake2b": ""}, "metrics.jsonl": 3})
    )
    assert RunDir(place / "run").changes() == [
        "checksums.json names '../x', which is not in the folder",
        "checksums.json contains no checksum of metrics.jsonl",
    ]


def test_rows_that_came_later_are_no_damage_and_a_rewrite_is_recorded(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append("metrics.jsonl", [{"stage": "stage1", "step": s} for s in range(5)])
    run.sync()
    run.append("metrics.jsonl", [{"stage": "stage1", "step": 5}])
    assert RunDir(tmp_path).changes() == []
    again = RunDir(tmp_path)
    again.drop_after("stage1", 2)
    assert RunDir(tmp_path).changes() == [], "a kill here is no damage"
    again.append("metrics.jsonl", [{"stage": "stage1", "step": 3}])
    again.record()
    assert RunDir(tmp_path).changes() == []
    flip(tmp_path / "metrics.jsonl")
    assert RunDir(tmp_path).changes() == ["metrics.jsonl was changed"]


def test_a_damaged_model_is_not_exported_and_not_gone_on_from(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", merge=False)
    assert not (tmp_path / "out" / CHECKSUMS).exists()
    flip(tmp_path / "run" / "model" / "adapter_model.safetensors")
    with pytest.raises(
        FileError, match=r"model: damaged: adapter_model\.safetensors was changed: finish the run"
    ):
        export(tmp_path / "run", tmp_path / "out2", merge=True)


def test_a_damaged_first_model_of_a_finished_run_is_named(finished: Path, tmp_path: Path) -> None:
    for name in ("data", "base", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(finished), str(tmp_path)))
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "run" / "stage1" / "model")
    resumed(tmp_path)
    (tmp_path / "run" / "stage1" / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileError, match=r"stage1/model: damaged: adapter_config\.json has 2 bytes.*remove it"
    ):
        resumed(tmp_path)
    shutil.rmtree(tmp_path / "run" / "stage1" / "model")
    resumed(tmp_path)


def test_checksums_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    assert damage(tmp_path) == []
    write_checksums(tmp_path)
    assert set(json.loads((tmp_path / CHECKSUMS).read_text())) == {"a/b"}
    assert damage(tmp_path) == []
    (tmp_path / "new").write_text("more is no damage")
    assert damage(tmp_path) == []
    (tmp_path / "a" / "b").write_text("y")
    with pytest.raises(FileError, match=r"damaged: a/b was changed; and so on: do this"):
        refuse_damage(tmp_path, "do this", ["and so on"])
