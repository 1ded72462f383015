"""What each experiment tracker needs to continue a run, and what it can show beside numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from cwdpo.records import ImageRef

IMAGES = 16
"""Number of samples that are sent with their picture."""
EDGE = 224
"""Longest edge in pixels of pictures that are sent."""


@dataclass(frozen=True)
class Result:
    """What a reader of a finished run wants to see.

    Attributes:
        figures: final numbers by name.
        samples: rows of ``samples.jsonl``.
        findings: of the diagnosis, as text.
        files: the report, the summary, the model card, the samples.
    """

    figures: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]
    findings: Sequence[str]
    files: Sequence[Path]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of the samples as a table: id, prompt, chosen response, and one column a decoding."""
        draws = [str(r["temperature"]) for r in self.samples[0]["responses"]] if self.samples else []
        columns = ["id", "prompt", "chosen", *(f"{i}: temperature {t}" for i, t in enumerate(draws))]
        return columns, [
            [str(row[key]) for key in ("id", "prompt", "chosen")] + [r["text"] for r in row["responses"]]
            for row in self.samples
        ]

    def pictures(self) -> list[Image.Image]:
        """The pictures of the first samples, small; those that cannot be opened are left out."""
        found = []
        for row in self.samples[:IMAGES]:
            if row["image"] is None:
                continue
            with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
                image = ImageRef(path=Path(row["image"])).open()
                image.thumbnail((EDGE, EDGE))
                found.append(image)
        return found


def as_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with lists and mappings as JSON: trackers take numbers and texts."""
    return {
        name: value if isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }


@dataclass
class Tracked:
    """A tracker of accelerate, started; this class knows what all of them can do."""

    name: str
    tracker: Any
    keeps: ClassVar[bool] = False
    """Whether what was sent before a kill is in its store for good: it is not sent again."""

    @property
    def given_id(self) -> str | None:
        """The id that the tracker gave the run, if it gives one."""
        return None

    @classmethod
    def start(
        cls, name: str, *, run: Path, ids: Mapping[str, str], project: str, settings: Mapping[str, Any]
    ) -> Self:
        """Start the tracker.

        Args:
            name: of the tracker.
            run: the run folder; its name and the run's id name the run in the tracker.
            ids: the run's own id, and the id that the tracker gave it when it was started first.
            project: name of the project or experiment.
            settings: further arguments of the tracker's own start.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        arguments = cls.arguments(f"{run.resolve().name}-{ids['id']}", run, ids)
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **(arguments | dict(settings)))
        tracker.start()
        return cls(name, tracker)

    @classmethod
    def arguments(cls, title: str, run: Path, ids: Mapping[str, str]) -> dict[str, Any]:
        """The arguments that name the run, and continue it if there is one."""
        return {}

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Store parameters of the run."""
        self.tracker.store_init_configuration(dict(values))

    def show(self, result: Result, step: int) -> None:
        """Show the result."""
        self.tracker.log(dict(result.figures), step=step)

    def finish(self, error: BaseException | None) -> None:
        """End the run."""
        self.tracker.finish()


class TensorBoard(Tracked):
    """One folder of event files in the run folder: ``RUN/tensorboard``."""

    keeps = True

    @classmethod
    def arguments(cls, title: str, run: Path, ids: Mapping[str, str]) -> dict[str, Any]:
        """See :class:`Tracked`."""
        return {"run_name": "tensorboard", "logging_dir": str(run)}

    @classmethod
    def start(
        cls, name: str, *, run: Path, ids: Mapping[str, str], project: str, settings: Mapping[str, Any]
    ) -> Self:
        """See :class:`Tracked`; there is no project."""
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker(**(cls.arguments("", run, ids) | dict(settings)))
        tracker.start()
        return cls(name, tracker)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """See :class:`Tracked`. accelerate would make a folder of its own for them, which is shown as another run."""
        self.tracker.tracker.add_hparams(dict(values), {}, run_name=".")
        self.tracker.tracker.flush()

    def show(self, result: Result, step: int) -> None:
        """See :class:`Tracked`."""
        super().show(result, step)
        writer = self.tracker.tracker
        writer.add_text("findings", _listed(result.findings), step)
        writer.add_text("samples", _markdown(*result.rows()), step)
        for number, picture in enumerate(result.pictures()):
            writer.add_image(f"samples/{number}", np.asarray(picture), step, dataformats="HWC")
        writer.flush()


class WandB(Tracked):
    """Weights & Biases; with ``WANDB_MODE=offline`` the files lie in the run folder. Its steps only go up."""

    @classmethod
    def arguments(cls, title: str, run: Path, ids: Mapping[str, str]) -> dict[str, Any]:
        """See :class:`Tracked`."""
        return {"name": title, "id": ids["id"], "resume": "allow", "dir": str(run)}

    def show(self, result: Result, step: int) -> None:
        """See :class:`Tracked`."""
        super().show(result, step)
        columns, rows = result.rows()
        self.tracker.log_table("samples", columns=columns, data=rows, step=step)
        self.tracker.log_images({"pictures": result.pictures()}, step=step)
        self.tracker.tracker.summary["findings"] = list(result.findings)
        for file in result.files:
            self.tracker.tracker.save(str(file), base_path=str(file.parent), policy="now")

    def finish(self, error: BaseException | None) -> None:
        """See :class:`Tracked`."""
        self.tracker.tracker.finish(exit_code=0 if error is None else 1)


class MLflow(Tracked):
    """MLflow; where it stores is ``MLFLOW_TRACKING_URI``. It gives a run its id."""

    keeps = True

    @classmethod
    def arguments(cls, title: str, run: Path, ids: Mapping[str, str]) -> dict[str, Any]:
        """See :class:`Tracked`."""
        return {"run_id": ids["mlflow"]} if "mlflow" in ids else {"run_name": title}

    @property
    def given_id(self) -> str:
        """See :class:`Tracked`."""
        return str(self.tracker.tracker.info.run_id)

    def show(self, result: Result, step: int) -> None:
        """See :class:`Tracked`."""
        import mlflow

        super().show(result, step)
        mlflow.set_tag("findings", "\n".join(result.findings)[:5000])
        for file in result.files:
            self.tracker.log_artifact(str(file))
        for number, picture in enumerate(result.pictures()):
            mlflow.log_image(picture, f"samples/{number}.png")

    def finish(self, error: BaseException | None) -> None:
        """See :class:`Tracked`."""
        import mlflow

        ended = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        mlflow.end_run(status=ended)


class Trackio(Tracked):
    """trackio; it knows a run by its name. ``TRACKIO_DIR`` is where it stores."""

    @classmethod
    def arguments(cls, title: str, run: Path, ids: Mapping[str, str]) -> dict[str, Any]:
        """See :class:`Tracked`."""
        return {"name": title, "resume": "allow", "embed": False}

    def show(self, result: Result, step: int) -> None:
        """See :class:`Tracked`."""
        import trackio

        super().show(result, step)
        columns, rows = result.rows()
        self.tracker.log(
            {
                "samples": trackio.Table(columns=columns, data=rows),
                "findings": trackio.Markdown(_listed(result.findings)),
                **{f"pictures/{i}": trackio.Image(p) for i, p in enumerate(result.pictures())},
            },
            step=step,
        )
        for file in result.files:
            trackio.log_artifact(file)


KINDS: Mapping[str, type[Tracked]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""The trackers that get more than numbers, and whose runs are continued."""


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
