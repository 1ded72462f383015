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

if TYPE_CHECKING:
    import torch

    from cwdpo.models.settings import ModelSettings


def run_of(folder: Path) -> tuple[Path, Path | None]:
    """The run of a folder, and the folder if it is a checkpoint of the run."""
    if folder.parent.name in ("stage1", "stage2") and folder.name.startswith("checkpoint-"):
        return folder.parent.parent, folder
    return folder, None


@contextmanager
def model_of(
    run: RunDir, checkpoints: Sequence[Path], out: Path, code: Sequence[str]
) -> Iterator[tuple[Path, ModelSettings]]:
    """The folder of the final model, or one beside ``out`` with the mean of checkpoints, which is removed again.

    Raises:
        RunDirError: there is none.
        FileError: it is damaged.
    """
    model = run.path / "model"
    if not checkpoints:
        if not model.is_dir():
            raise RunDirError(
                f"{run.path}: no final model yet: finish the run with cwdpo train --resume, or give one of its "
                f"checkpoints ({', '.join(_checkpoints(run)) or 'there is none'})"
            )
        refuse_damage(model, "finish the run again: remove the folder, then cwdpo train --resume")
        yield model, stored_model(run.path / "recipe.yaml", code)
        return
    for checkpoint in checkpoints:
        if not checkpoint.is_dir():
            raise RunDirError(
                f"{checkpoint}: no such checkpoint; there are {', '.join(_checkpoints(run)) or 'none'}"
            )
        refuse_damage(checkpoint, "export another one")
    settings = stored_model(run.path / "recipe.yaml", code)
    beside = temporary_name(out)  # the next export removes what a kill leaves of it
    beside.mkdir()
    try:
        _write_checkpoints(run, checkpoints, settings, beside)
        yield beside, settings
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _checkpoints(run: RunDir) -> list[str]:
    return sorted(str(path) for path in run.path.glob("stage[12]/checkpoint-*"))


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
    for stage in ("stage2", "stage1"):
        found = {int(path.name.rpartition("-")[2]): path for path in run.path.glob(f"{stage}/checkpoint-*")}
        if not found:
            continue
        stopped = run.path / f"stopped-{stage}.json"
        last = int(read_object(stopped)["rolled_back_to"]) if stopped.is_file() else max(found)
        kept = [found[step] for step in sorted(found) if step <= last]
        if n < 1 or n > len(kept):
            raise RunDirError(
                f"{run.path}: {stage} has {len(kept)} checkpoints to average, {n} were asked for; allowed: 1 to "
                f"{len(kept)}. train.save_steps says how often one is written, train.save_total_limit how many stay"
            )
        return kept[-n:]
    raise RunDirError(f"{run.path}: no checkpoints to average: set train.save_steps when training")


def _write_checkpoints(
    run: RunDir, checkpoints: Sequence[Path], settings: ModelSettings, folder: Path
) -> None:
    """Write the mean of checkpoints, also of ones in parts, as a final model is written."""

    from cwdpo.trainer.checkpoints import readable
    from cwdpo.trainer.plain_reading import refuse_pickles
    from cwdpo.trainer.sharded import load_checkpoint

    base = str(run.path / "init") if settings.path == "init" else settings.path
    policy = load_policy(settings.model_copy(update={"path": base, "device": "cpu"}))
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    total: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        with readable(checkpoint, "what DeepSpeed wrote"):
            refuse_pickles(checkpoint)
        load_checkpoint(policy.model, checkpoint)
        if len(checkpoints) > 1:
            for name, parameter in trained.items():
                value = parameter.detach().double()
                total[name] = total[name] + value if name in total else value
    for name, value in total.items():
        trained[name].data.copy_(value / len(checkpoints))
    save_weights(policy.model, folder)
    policy.processor.save_pretrained(folder)
