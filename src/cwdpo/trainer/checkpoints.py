"""Checkpoints that are whole or absent: written aside, synced, renamed; older ones go afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cwdpo.files.writing import discard, replace_folder, sync_tree, temporary_name


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
            sync_tree(aside)
            replace_folder(aside / name, folder / name)
            aside.rmdir()
            self._delete_old(folder / name)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(folder / name))
        self.accelerator.wait_for_everyone()

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
    """The newest complete ``checkpoint-N`` of a stage (its trainer state is written last)."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Step of a checkpoint; -1 for none."""
    if checkpoint is None:
        return -1
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])
