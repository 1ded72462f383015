"""Checkpoints that are whole or absent: written aside, synced, renamed; older ones go afterwards."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cwdpo.errors import FileError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.checksums import damage, refuse_damage, write_checksums
from cwdpo.files.reading import read_object
from cwdpo.files.writing import discard, replace_folder, sync_tree, temporary_name

UNREADABLE = (
    "remove the checkpoint's folder, and --resume goes on from the one before, or begins the stage again"
)
_NAME = re.compile(r"checkpoint-[0-9]{1,18}")


@contextlib.contextmanager
def readable(checkpoint: Any, what: str) -> Iterator[None]:
    """Answer whatever torch, accelerate and transformers raise when a part of a checkpoint is not what it should be."""
    try:
        yield
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FileError(f"{checkpoint}: {what} cannot be loaded ({said}): {UNREADABLE}") from error


class CompleteCheckpoints(Trainer):  # type: ignore[misc]
    """A Trainer whose ``checkpoint-N`` exists under that name only when everything of it is on disk.

    transformers writes into ``checkpoint-N`` file by file and knows of no half-written one. Here it writes
    into ``.checkpoint-N.<random>.tmp``, which is renamed at the end, and older checkpoints are deleted after that:
    a kill at any instant leaves the last complete checkpoint.

    Attributes:
        before_checkpoint: called on the process that saves, before the new name appears, to have everything on disk
            that a resumed run expects beside the checkpoint (logged rows).
        add_to_checkpoint: called on every process with the folder that is being written, to add files to it.
    """

    before_checkpoint: Callable[[], None] = staticmethod(lambda: None)
    add_to_checkpoint: Callable[[Path], None] = staticmethod(lambda folder: None)
    _writing: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Close the averaging window of the log at every checkpoint.

        A window that spans a checkpoint could not be averaged again by a resumed run, which sees its second
        part only.
        """
        if self.control.should_save:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # Every process writes its part there.
        aside = Path(broadcast_object_list([str(temporary_name(folder / name))])[0])
        self._writing = aside
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(aside / name, folder / name)
            self.add_to_checkpoint(aside / name)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # on a full disk it would be in the way
            raise
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            self.before_checkpoint()
            write_checksums(aside / name)
            sync_tree(aside)
            replace_folder(aside / name, folder / name)
            aside.rmdir()
            self._delete_old(folder / name)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(folder / name))
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with readable(checkpoint, "the state of the optimizer or of the schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with readable(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _name_best(self, written: Path, final: Path) -> None:
        """The best checkpoint under the name that it will have, in the stored state too."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push once the checkpoint has its name: transformers pushes while it is being written."""
        if self._writing is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _delete_old(self, newest: Path) -> None:
        """Keep ``save_total_limit`` checkpoints by time of writing.

        The newest stays whatever the clock says, and the best one where it is loaded at the end.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        kept = {newest, Path(best)} if best else {newest}
        others = [p for p in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p not in kept and p.is_dir()]
        limit = max(limit, len(kept))
        others.sort(key=_written_at)
        for old in others[: max(len(others) - (limit - len(kept)), 0)]:
            discard(old)


def _written_at(checkpoint: Path) -> tuple[int, str]:
    state = checkpoint / "trainer_state.json"
    return (state.stat().st_mtime_ns if state.is_file() else 0, checkpoint.name)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest ``checkpoint-N`` of a stage; a checkpoint has its name only when it is complete."""
    return max(_checkpoints(folder), key=_number, default=None)


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The newest checkpoint of a stage, every file of it as it was written; all processes call this together.

    Raises:
        FileError: it is damaged. The message names what is wrong, and the newest checkpoint that is whole.
    """
    error: list[str] = [""]
    newest = last_checkpoint(folder)
    if newest is not None and PartialState().is_main_process:
        try:
            _refuse_damaged(newest)
        except FileError as problem:
            error = [str(problem)]
    (said,) = broadcast_object_list(error)
    if said:
        raise FileError(said)
    return newest


def _refuse_damaged(newest: Path) -> None:
    problems = damage(newest) or _lacking(newest)
    if not problems:
        return
    older = sorted((p for p in _checkpoints(newest.parent) if p != newest), key=_number, reverse=True)
    whole = next((p for p in older if not (damage(p) or _lacking(p))), None)
    remedy = (
        f"remove the folder, and --resume goes on from {whole.name}, which is whole"
        if whole is not None
        else "no older one is whole: remove the folder, and --resume begins the stage again"
    )
    refuse_damage(newest, remedy, () if damage(newest) else problems)


def _lacking(checkpoint: Path) -> list[str]:
    """What a checkpoint must hold, for those of older versions, which wrote no checksums."""
    if (checkpoint / CHECKSUMS).is_file():
        return []
    if any(checkpoint.glob("*fsdp*")) or any(checkpoint.glob("global_step*")):  # sharded: under other names
        return []
    needed = (TRAINER_STATE_NAME, "optimizer.pt", "scheduler.pt")
    return [f"{name} is missing" for name in needed if not (checkpoint / name).is_file()]


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoint_step(checkpoint: Path | None) -> int:
    """Step of a checkpoint; -1 for none.

    Raises:
        FileError: its trainer state cannot be read.
    """
    if checkpoint is None:
        return -1
    with readable(checkpoint, TRAINER_STATE_NAME):
        return int(read_object(checkpoint / TRAINER_STATE_NAME)["global_step"])
