"""Writes checkpoints atomically: to a temporary folder, which is synced and renamed; then deletes older ones."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cwdpo.clock import spent_on
from cwdpo.errors import FileError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.checksums import damage, refuse, write_checksums
from cwdpo.files.reading import read_object
from cwdpo.files.writing import discard, replace_folder, sync_tree, temporary_name
from cwdpo.trainer.plain_reading import deepspeed_parts, refuse_pickles
from cwdpo.waiting import from_first, wait_for_all

UNREADABLE = (
    "remove the checkpoint's folder, and --resume continues from the one before, or starts the stage again"
)
_NAME = re.compile(r"checkpoint-[0-9]{1,18}")


@contextlib.contextmanager
def readable(checkpoint: Any, what: str) -> Iterator[None]:
    """Turn any error of torch, accelerate and transformers while loading a checkpoint into a FileError."""
    try:
        yield
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FileError(f"{checkpoint}: {what} cannot be loaded ({said}): {UNREADABLE}") from error


class CompleteCheckpoints(Trainer):  # type: ignore[misc]
    """A Trainer whose ``checkpoint-N`` has this name only when all its files are on disk.

    transformers writes into ``checkpoint-N`` file by file and cannot detect an incomplete one. Here it writes into
    ``.checkpoint-N.<random>.tmp``, which is renamed at the end; older checkpoints are deleted after that. So after a
    kill at any time, the last complete checkpoint exists.

    Attributes:
        before_checkpoint: called on the process that saves, before the folder is renamed, to sync other files that a
            resumed run needs (logged rows).
        add_to_checkpoint: called on every process with the temporary folder, to add files to it, or to fetch those that
            other processes wrote on another disk.
    """

    before_checkpoint: Callable[[], None] = staticmethod(lambda: None)
    add_to_checkpoint: Callable[[Path], None] = staticmethod(lambda folder: None)
    _writing: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Write a log row at every checkpoint.

        Logged values are averages since the last row. A run resumed from a checkpoint could not compute an average
        that began before the checkpoint.
        """
        if self.control.should_save:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    @spent_on("checkpoints")
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # All processes write to the same temporary folder; without a shared disk, each to its own of that name.
        aside = folder / from_first(temporary_name(folder / name).name, "beginning a checkpoint")
        self._writing = aside
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(aside / name, folder / name)
            self.add_to_checkpoint(aside / name)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # free the space: the disk may be full
            raise
        finally:
            self._writing = None
        wait_for_all("writing a checkpoint")  # every process has written its part
        if self.args.should_save:
            self.before_checkpoint()
            write_checksums(aside / name)
            sync_tree(aside)
            replace_folder(aside / name, folder / name)
            aside.rmdir()
            self.delete_old(folder / name)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(folder / name))
        wait_for_all("finishing a checkpoint")
        if not self.args.should_save:
            # One of its own, without a shared disk: the first process fetched what it needs.
            shutil.rmtree(aside, ignore_errors=True)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with readable(checkpoint, "the state of the optimizer or of the learning rate schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with readable(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _name_best(self, written: Path, final: Path) -> None:
        """Store the best checkpoint's final name in the trainer state, not the temporary one."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push to the hub after the checkpoint is renamed; transformers would push while it is written."""
        if self._writing is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def delete_old(self, newest: Path) -> None:
        """Keep the ``save_total_limit`` newest checkpoints by time of writing.

        ``newest`` is always kept, even if the clock was changed; the best one too if it is loaded at the end.
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
    """The newest complete ``checkpoint-N`` of a stage; ``None`` if there is none."""
    return next(reversed(checkpoints(folder)), None)


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The newest checkpoint of a stage, after a check of its checksums and pickles. All processes call this together.

    Raises:
        FileError: it is damaged: the message names the newest undamaged checkpoint; or a pickle names what it need not.
    """
    error = ""
    newest = last_checkpoint(folder)
    if newest is not None and PartialState().is_main_process:
        try:
            _refuse_damaged(newest)
            with readable(newest, "what DeepSpeed wrote"):
                refuse_pickles(newest)
        except FileError as problem:
            error = str(problem)
    said = from_first(error, "checking a checkpoint")
    if said:
        raise FileError(said)
    return newest


def _refuse_damaged(newest: Path) -> None:
    problems = damage(newest) or _lacking(newest)
    if not problems:
        return
    older = (p for p in reversed(checkpoints(newest.parent)) if p != newest)
    whole = next((p for p in older if not (damage(p) or _lacking(p))), None)
    remedy = (
        f"remove the folder, and --resume continues from {whole.name}, which is not damaged"
        if whole is not None
        else "no older one is undamaged: remove the folder, and --resume starts the stage again"
    )
    refuse(newest, problems, remedy)


def _lacking(checkpoint: Path) -> list[str]:
    """Missing files of a checkpoint without checksums, written by an older version."""
    if (checkpoint / CHECKSUMS).is_file():
        return []
    if any(checkpoint.glob("*fsdp*")) or deepspeed_parts(checkpoint):  # sharded: under other names
        return []
    needed = (TRAINER_STATE_NAME, "optimizer.pt", "scheduler.pt")
    return [f"{name} is missing" for name in needed if not (checkpoint / name).is_file()]


def checkpoints(folder: Path) -> list[Path]:
    """The complete ``checkpoint-N`` of a stage, by their steps."""
    found = (p for p in folder.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name))
    return sorted(found, key=step_named)


def step_named(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def checkpoint_step(checkpoint: Path | None) -> int:
    """The optimizer step of a checkpoint; -1 for ``None``.

    Raises:
        FileError: its trainer state cannot be read.
    """
    if checkpoint is None:
        return -1
    with readable(checkpoint, TRAINER_STATE_NAME):
        return int(read_object(checkpoint / TRAINER_STATE_NAME)["global_step"])
