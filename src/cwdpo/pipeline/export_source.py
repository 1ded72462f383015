"""What an export is made of: a run's final model, one of its checkpoints, or the mean of several."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cwdpo.config import stored_model
from cwdpo.errors import RunDirError
from cwdpo.files.checksums import refuse_damage
from cwdpo.files.reading import read_object
from cwdpo.files.writing import temporary_name
from cwdpo.models.load import load_policy
from cwdpo.models.write import save_weights
from cwdpo.rundir import RunDir
from cwdpo.trainer.checkpoints import checkpoints, readable, step_named
from cwdpo.trainer.plain_reading import refuse_pickles
from cwdpo.trainer.sharded import load_checkpoint

if TYPE_CHECKING:
    import torch

    from cwdpo.models.settings import ModelSettings

STAGES = ("stage1", "stage2")


def run_of(folder: Path) -> tuple[Path, Path | None]:
    """The run of a folder, and the folder if it is a checkpoint of the run."""
    if folder.parent.name in STAGES and folder.name.startswith("checkpoint-"):
        return folder.parent.parent, folder
    return folder, None


@contextmanager
def model_of(
    run: RunDir, chosen: Sequence[Path], out: Path, code: Sequence[str]
) -> Iterator[tuple[Path, ModelSettings]]:
    """The folder of the final model, or one beside ``out`` with the mean of checkpoints, which is removed again.

    Raises:
        RunDirError: there is none.
        FileError: it is damaged.
    """
    model = run.path / "model"
    if not chosen:
        if not model.is_dir():
            raise RunDirError(
                f"{run.path}: no final model yet: finish the run with cwdpo train --resume, or give one of its "
                f"checkpoints ({_names(run) or 'there is none'})"
            )
        refuse_damage(model, "finish the run again: remove the folder, then cwdpo train --resume")
        yield model, stored_model(run.path / "recipe.yaml", code)
        return
    for checkpoint in chosen:
        if not checkpoint.is_dir():
            raise RunDirError(f"{checkpoint}: no such checkpoint; there are {_names(run) or 'none'}")
        refuse_damage(checkpoint, "export another one")
    settings = stored_model(run.path / "recipe.yaml", code)
    beside = temporary_name(out)  # the next export removes what a kill leaves of it
    beside.mkdir()
    try:
        _write_mean(run, chosen, settings, beside)
        yield beside, settings
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _names(run: RunDir) -> str:
    """All checkpoints of a run, for error messages."""
    return ", ".join(str(path) for stage in STAGES for path in checkpoints(run.path / stage))


def checkpoints_of(folder: Path, average: int | None) -> list[Path]:
    """The checkpoints that are asked for: the one that ``folder`` names, the latest ``average`` of a run, or none.

    Raises:
        RunDirError: both are asked for, or there are not so many.
    """
    run, checkpoint = run_of(folder)
    if checkpoint is not None and average is not None:
        raise RunDirError(f"{folder}: the mean of checkpoints is a run's: name the run, not one of them")
    if average is not None:
        return _latest(RunDir.open(run), average)
    return [] if checkpoint is None else [checkpoint]


def _latest(run: RunDir, n: int) -> list[Path]:
    """The last ``n`` checkpoints of the run's last stage, without those that a stop rule went back from.

    Raises:
        RunDirError: there are not so many.
    """
    for stage in reversed(STAGES):
        kept = checkpoints(run.path / stage)
        if not kept:
            continue
        stopped = run.path / f"stopped-{stage}.json"
        if stopped.is_file():
            last = int(read_object(stopped)["rolled_back_to"])
            kept = [path for path in kept if step_named(path) <= last]
        if n < 1 or n > len(kept):
            raise RunDirError(
                f"{run.path}: {stage} has {len(kept)} checkpoints to average, {n} were asked for; allowed: 1 to "
                f"{len(kept)}. train.save_steps says how often one is written, train.save_total_limit how many stay"
            )
        return kept[-n:]
    raise RunDirError(f"{run.path}: no checkpoints to average: set train.save_steps when training")


def _write_mean(run: RunDir, chosen: Sequence[Path], settings: ModelSettings, folder: Path) -> None:
    """Write the mean of checkpoints, also of ones in parts, as a final model is written."""
    base = str(run.path / "init") if settings.path == "init" else settings.path
    policy = load_policy(settings.model_copy(update={"path": base, "device": "cpu"}))
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    total: dict[str, torch.Tensor] = {}
    for checkpoint in chosen:
        with readable(checkpoint, "what DeepSpeed wrote"):
            refuse_pickles(checkpoint)
        load_checkpoint(policy.model, checkpoint)
        if len(chosen) > 1:
            for name, parameter in trained.items():
                value = parameter.detach().double()
                total[name] = total[name] + value if name in total else value
    for name, value in total.items():
        trained[name].data.copy_(value / len(chosen))
    save_weights(policy.model, folder)
    policy.processor.save_pretrained(folder)
