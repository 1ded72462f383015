"""What a resumed run relies on: whole checkpoints, cleared leftovers, the lock, stored reference values, changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from cwdpo.cli import main as cli
from cwdpo.config import parse_recipe
from cwdpo.errors import RecipeError, RunDirError
from cwdpo.files import writing
from cwdpo.files.writing import discard, replace_folder
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.pipeline.resume import start_run
from cwdpo.pipeline.run_stage import _train_from
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.rundir import RunDir
from cwdpo.scoring.reference_cache import read_file
from cwdpo.stage.listener import Listener
from cwdpo.trainer import checkpoints
from cwdpo.trainer.checkpoints import last_checkpoint
from cwdpo.trainer.trainer import PreferenceTrainer


class Killed(BaseException):
    """Stands in for a kill: nothing may catch it to tidy up what a kill would leave."""


# --- the lock -------------------------------------------------------------------------------------------


def test_a_locked_folder_refuses_and_names_the_holder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.lock()
    with pytest.raises(
        RunDirError, match=rf"run: in use by process {os.getpid()} on .+: wait for it or stop it"
    ):
        RunDir(tmp_path / "run").lock()
    assert f"process {os.getpid()} on" in (tmp_path / "run" / ".lock").read_text()
    run.unlock()
    again = RunDir(tmp_path / "run")
    again.lock()
    again.unlock()


def test_the_kernel_lets_go_of_a_killed_holders_lock(tmp_path: Path) -> None:
    hold = (
        "import sys; from cwdpo.rundir import RunDir\n"
        "run = RunDir(sys.argv[1]); run.lock(); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(RunDirError, match=f"in use by process {holder.pid} on"):
            RunDir(tmp_path).lock()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        run = RunDir(tmp_path)
        run.lock()
        run.unlock()


def test_what_a_killed_holder_was_just_starting_is_waited_for(tmp_path: Path) -> None:
    """Between fork and exec a child has the lock of its parent; here for a second, and the parent is killed."""
    hold = (
        "import os, sys, time; from cwdpo.rundir import RunDir\n"
        "run = RunDir(sys.argv[1]); run.lock()\n"
        "if os.fork() == 0: time.sleep(1); os._exit(0)\n"
        "print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        run = RunDir(tmp_path)
        run.lock()
        run.unlock()


def test_a_refused_start_lets_go_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: other\n")
    (tmp_path / "metrics.jsonl").write_text("")
    recipe = parse_recipe({"data": {"path": "x.jsonl"}})
    with pytest.raises(RunDirError, match="already contains a run"):
        start_run(RunDir(tmp_path), recipe)
    run = RunDir(tmp_path)
    run.lock()
    run.unlock()
    assert (tmp_path / "recipe.yaml").read_text() == "name: other\n"


def test_a_process_that_does_not_write_locks_and_writes_nothing(tmp_path: Path) -> None:
    start_run(RunDir(tmp_path / "run", writes=False), parse_recipe({"data": {"path": "x.jsonl"}}))
    assert not (tmp_path / "run").exists()


# --- a changed recipe -----------------------------------------------------------------------------------


def started(folder: Path, **changes: Any) -> RunDir:
    run = RunDir(folder)
    start_run(run, recipe_of(**changes))
    run.unlock()
    return run


def recipe_of(*, beta: float = 0.3, **changes: Any) -> Any:
    stage2 = {"objective": {"name": "cw_dpo", "beta": beta}, "learning_rate": 1e-5}
    return parse_recipe({"data": {"path": "x.jsonl"}, "stage2": stage2, **changes})


def test_changed_keys_are_named_and_refused(tmp_path: Path) -> None:
    run = started(tmp_path)
    before = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(RecipeError) as caught:
        start_run(run, recipe_of(beta=0.5, seed=4), resume=True)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  seed: 0 -> 4", "  stage2.objective.beta: 0.3 -> 0.5"]
    assert "--accept-changes" in lines[3]
    assert "recipe.1.yaml" in lines[3]
    assert (tmp_path / "recipe.yaml").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "environment.json", "recipe.yaml"]


def test_an_unchanged_recipe_needs_no_consent_whatever_its_layout(tmp_path: Path) -> None:
    run = started(tmp_path)
    # An older version knew fewer keys: those it lacks have their defaults.
    (tmp_path / "recipe.yaml").write_text(
        "data: {path: x.jsonl}\nstage2: {objective: cw_dpo, learning_rate: 1e-5}\n"
    )
    with pytest.raises(RecipeError, match=r"stage2\.objective\.beta: \(absent\) -> 0\.3"):
        start_run(run, recipe_of(), resume=True)
    (tmp_path / "recipe.yaml").write_text(
        "data: {path: x.jsonl}\nstage2: {objective: {name: cw_dpo, beta: 0.3}, learning_rate: 1.0e-5}\n"
    )
    start_run(run, recipe_of(), resume=True)
    run.unlock()
    assert not (tmp_path / "recipe.1.yaml").exists()


def test_accepted_changes_keep_what_the_old_recipe_made(tmp_path: Path) -> None:
    run = started(tmp_path)
    old = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "model").mkdir()
    (tmp_path / "samples.jsonl").write_text("{}\n")
    start_run(run, recipe_of(evaluation={"samples": 3}), resume=True, accept_changes=True)
    run.unlock()
    assert (tmp_path / "recipe.1.yaml").read_text() == old
    assert (tmp_path / "model").is_dir(), "evaluation does not change the model"
    assert (tmp_path / "samples.1.jsonl").is_file()
    start_run(run, recipe_of(beta=0.5), resume=True, accept_changes=True)
    run.unlock()
    assert "samples: 3" in (tmp_path / "recipe.2.yaml").read_text()
    assert "beta: 0.5" in (tmp_path / "recipe.yaml").read_text()
    assert (tmp_path / "model.2").is_dir()
    assert not (tmp_path / "model").exists()


def test_the_command_line_wants_both_options(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {path: x.jsonl}\n")
    done = CliRunner().invoke(cli.app, ["train", str(recipe), "--out", str(tmp_path), "--accept-changes"])
    assert done.exit_code == 2
    assert "--resume" in done.output


# --- leftovers ------------------------------------------------------------------------------------------


def folder_with(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "a").write_text(text)
    return path


def test_leftovers_are_cleared_and_a_whole_old_folder_returns(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    folder_with(tmp_path / ".model.tmp", "half")
    folder_with(tmp_path / ".model.old", "whole")
    folder_with(tmp_path / "stage1" / ".model.old", "older")
    folder_with(tmp_path / "stage1" / "model", "newer")
    folder_with(tmp_path / "stage2" / ".checkpoint-4.tmp" / "checkpoint-4", "half")
    (tmp_path / ".summary.json.tmp").write_text("{")
    (tmp_path / "samples.jsonl").write_text('{"key": "a"}\n{"key": "b"')
    (tmp_path / "mine.txt").write_text("kept")
    run.recover()
    assert (tmp_path / "model" / "a").read_text() == "whole"
    assert (tmp_path / "stage1" / "model" / "a").read_text() == "newer"
    assert (tmp_path / "samples.jsonl").read_text() == '{"key": "a"}\n'
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["mine.txt", "model/a", "samples.jsonl", "stage1/model/a"]


@pytest.mark.parametrize("calls", range(5))
def test_a_folder_is_replaced_or_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """A kill before the first, second, ... change of the disk."""
    run = RunDir(tmp_path)
    folder_with(tmp_path / "model", "old")
    folder_with(tmp_path / ".model.tmp", "new")
    left = calls

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(writing.os, "rename", counted(os.rename))
        patched.setattr(writing.shutil, "rmtree", counted(writing.shutil.rmtree))
        try:
            replace_folder(tmp_path / ".model.tmp", tmp_path / "model")
        except Killed:
            assert calls < 4
        else:
            assert calls == 4
    run.recover()
    assert (tmp_path / "model" / "a").read_text() == ("old" if calls < 3 else "new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_discarded_folder_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "checkpoint-2", "x")
    seen = []
    real = writing.shutil.rmtree
    monkeypatch.setattr(
        writing.shutil,
        "rmtree",
        lambda p, **n: (seen.append((tmp_path / "checkpoint-2").exists()), real(p, **n)),
    )
    discard(tmp_path / "checkpoint-2")
    assert seen == [False]
    assert list(tmp_path.iterdir()) == []


# --- checkpoints ----------------------------------------------------------------------------------------


def trainer_of(model: Any, encoder: Any, examples: Any, folder: Path, **changes: Any) -> PreferenceTrainer:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 5, "save_steps": 1,
        "save_strategy": "steps", "save_total_limit": 2, "report_to": "none", "use_cpu": True, "logging_steps": 3,
        "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-3, **changes,
    }  # fmt: skip
    encoded, _ = encoder.encode_all(examples[:8], "rejected", require_negative=True)
    return PreferenceTrainer(
        model, TrainingArguments(**settings), OBJECTIVES.build({"name": "sft"}), encoded,
        processing_class=encoder.processor,
    )  # fmt: skip


def test_old_checkpoints_go_only_when_the_new_one_is_whole(
    model: Any, encoder: Any, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[list[str], bool]] = []
    real = checkpoints.replace_folder

    def watched(new: Path, folder: Path) -> None:
        names = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
        held.append((names, (new / "trainer_state.json").is_file() and (new / "optimizer.pt").is_file()))
        real(new, folder)

    monkeypatch.setattr(checkpoints, "replace_folder", watched)
    trainer = trainer_of(model, encoder, examples, tmp_path)
    synced: list[int] = []
    trainer.before_checkpoint = lambda: synced.append(trainer.state.global_step)
    trainer.train()
    assert held[0] == ([], True)
    assert held[-1] == (["checkpoint-3", "checkpoint-4"], True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    assert synced == [1, 2, 3, 4, 5]
    # A kill between the last checkpoint and the deletion of an old one: the resumed run has no step left.
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-3")
    resumed = trainer_of(model, encoder, examples, tmp_path)
    _train_from(SimpleNamespace(policy=SimpleNamespace(model=model)), tmp_path / "checkpoint-5", resumed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    assert len(held) == 5


@pytest.mark.parametrize("where", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_stop_while_saving_leaves_the_checkpoint_before(
    where: str, model: Any, encoder: Any, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(model, encoder, examples, tmp_path)
    real = getattr(Trainer, where)

    def stop(self: Trainer, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        if self.state.global_step == 3:
            raise Killed

    monkeypatch.setattr(Trainer, where, stop)
    # What a kill leaves, a stop that tidies up would not show.
    monkeypatch.setattr(checkpoints, "temporary_name", lambda path: path.with_name(f".{path.name}.tmp"))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *a, **n: None)
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()
    assert (tmp_path / ".checkpoint-3.tmp" / "checkpoint-3" / "model.safetensors").is_file()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_log_row_stands_at_every_checkpoint(
    model: Any, encoder: Any, examples: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(model, encoder, examples, tmp_path, save_steps=2, logging_first_step=True)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4, 5]


# --- whole runs -----------------------------------------------------------------------------------------


def small(world: Path, model: Path, **changes: Any) -> Any:
    tree = {
        "model": {"path": str(model), "device": "cpu"},
        "data": {"path": str(world / "train.jsonl"), "validation_path": str(world / "validation.jsonl"),
                 "stage1_fraction": 0.5},
        "stage1": {"objective": "sft", "learning_rate": 1e-3, "steps": 3},
        "stage2": {"objective": {"name": "cw_dpo", "floor": -6.0, "tau": 0.5}, "learning_rate": 1e-3, "steps": 4},
        "train": {"batch_size": 4, "logging_steps": 3, "save_steps": 2, "warmup_steps": 0},
        "probes": {"every": 2, "prompts": 4},
        "evaluation": {"prompts": 3, "samples": 2, "max_new_tokens": 5},
    }  # fmt: skip
    return parse_recipe({**tree, **changes})


def stored_values(folder: Path) -> dict[bytes, tuple[float, float]]:
    """The reference's values, whatever files they lie in."""
    batches = [batch for path in (folder / "reference").glob("*.arrow") for batch in read_file(path)]
    return {key: value for batch in batches for key, value in zip(*batch, strict=True)}


def content(folder: Path) -> dict[str, bytes]:
    """Everything that training and evaluation made."""
    names = ["metrics.jsonl", "readings.jsonl", "samples.jsonl", "summary.json"]
    found = {name: (folder / name).read_bytes() for name in names}
    found["reference"] = repr(sorted(stored_values(folder).items())).encode()
    for path in sorted(folder.rglob("*.safetensors")):
        found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, world_folder: Path, model_folder: Path) -> RunDir:
    return train_two_stage(small(world_folder, model_folder), tmp_path_factory.mktemp("runs") / "small")


def test_a_finished_run_resumed_ends_alike(finished: RunDir, world_folder: Path, model_folder: Path) -> None:
    before = content(finished.path)
    steps: list[int] = []
    listener = Listener(step=lambda stage, step, total: steps.append(step))
    train_two_stage(small(world_folder, model_folder), finished.path, resume=True, listener=listener)
    assert content(finished.path) == before
    assert steps == []


@pytest.mark.parametrize("gone", ["model", "stage1/model"])
def test_a_stage_whose_last_checkpoint_is_whole_takes_no_step_more(
    gone: str, finished: RunDir, world_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Killed behind the last checkpoint and before the model's folder; 3 steps are half an epoch."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    shutil.rmtree(run / "model")
    if gone == "stage1/model":
        for name in ("stage1/model", "stage2"):
            shutil.rmtree(run / name)
        for name in ("metrics.jsonl", "readings.jsonl"):
            RunDir(run).drop_stages(name, {"stage2"})
    steps: list[tuple[str, int]] = []
    listener = Listener(step=lambda stage, step, total: steps.append((stage, step)))
    train_two_stage(small(world_folder, model_folder), run, resume=True, listener=listener)
    assert steps == ([] if gone == "model" else [("stage2", n) for n in (1, 2, 3, 4)])
    assert content(run) == content(finished.path)


def test_samples_go_on_behind_the_last_whole_draw(
    finished: RunDir, world_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cwdpo.pipeline import finish as evaluate

    before = content(finished.path)
    rows = finished.samples()
    assert [len(r["responses"]) for r in rows] == [3, 3, 3]
    cut = [{**r, "responses": r["responses"][:2]} for r in rows]
    finished.write_text("samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in cut))
    draws: list[int] = []
    real = evaluate.sample
    monkeypatch.setattr(evaluate, "sample", lambda *a, **n: (draws.append(n["seed"]), real(*a, **n))[1])
    train_two_stage(small(world_folder, model_folder), finished.path, resume=True)
    assert draws == [2]
    assert content(finished.path) == before


@pytest.mark.slow
def test_more_steps_go_on_from_the_last_checkpoint(
    finished: RunDir, world_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    longer = small(world_folder, model_folder, stage2={"objective": {"name": "cw_dpo", "floor": -6.0, "tau": 0.5},
                                                       "learning_rate": 1e-3, "steps": 6})  # fmt: skip
    with pytest.raises(RecipeError, match=r"stage2\.steps: 4 -> 6"):
        train_two_stage(longer, run, resume=True)
    steps: list[tuple[str, int]] = []
    listener = Listener(step=lambda stage, step, total: steps.append((stage, step)))
    train_two_stage(longer, run, resume=True, accept_changes=True, listener=listener)
    assert steps == [("stage2", 5), ("stage2", 6)]
    kept = (run / "model.1" / "model.safetensors").read_bytes()
    assert kept == (finished.path / "model" / "model.safetensors").read_bytes()
    straight = train_two_stage(longer, tmp_path / "straight")
    for name in ("model/model.safetensors", "metrics.jsonl", "readings.jsonl", "samples.jsonl"):
        assert (run / name).read_bytes() == (straight.path / name).read_bytes(), name
