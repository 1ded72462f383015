"""Cells of one process share what they read and computed, and have the same figures as alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cwdpo.lab import warm
from cwdpo.lab.cell import CellJob, run_cell
from cwdpo.lab.plan import asked, checked_tree, plan
from cwdpo.lab.spec import RECIPE
from cwdpo.rundir import RunDir
from small_study import TINY, study


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    warm.forget()
    yield
    warm.forget()


def test_the_value_that_was_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MOST", 2)
    made: list[str] = []

    def use(key: str) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return warm.kept("letters", key, make)

    assert [use(key) for key in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c", "b"]


def jobs_of(out: Path) -> list[CellJob]:
    spec = study(
        common=(*TINY, "stage1.steps=2", "stage2.steps=3", "train.warmup_steps=0"),
        variants={
            "sft": {"set": ["stage2.objective={name: sft}"]},
            "dpo": {"set": ["stage2.objective={name: dpo}"]},
            "hot": {"set": ["stage2.objective={name: dpo}", "stage2.learning_rate=1.0e-3"]},
            "cw_dpo": {"set": ["stage2.objective={name: cw_dpo}"]},
        },
    )  # fmt: skip
    planned = plan(out, checked_tree(RECIPE), spec, asked(spec, [0], {}), split="test", test=None)
    return [job for wave in planned.waves for job in wave]


def without_times(folder: Path) -> tuple[Any, Any]:
    run = RunDir(folder)
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in run.metrics()], run.readings()


@pytest.mark.slow
def test_a_cell_after_others_has_the_figures_of_one_alone(tmp_path: Path) -> None:
    """To the last bit, with its metrics and readings; and what is shared is really computed once."""
    found: dict[str, dict[str, Any]] = {}
    for how in ("together", "alone"):
        for job in jobs_of(tmp_path / how):
            if how == "alone":
                warm.forget()
                warm_reference = job.first and job.first / "reference"
                for file in warm_reference.glob("*") if warm_reference else ():
                    file.unlink()
            job.folder.mkdir(parents=True)
            figures = run_cell(job, lambda stage, step, steps: None)
            found.setdefault(job.key.split("-")[0], {})[how] = (figures, *without_times(job.folder))
        if how == "together":
            stored = list((tmp_path / how).glob("cells/*/reference/*.arrow"))
            assert len(stored) == 1, (
                "dpo, hot and cw_dpo have one reference, and the first of them stored its values"
            )
    assert set(found) == {"stage1", "sft", "dpo", "hot", "cw_dpo"}
    for name, both in found.items():
        assert both["together"] == both["alone"], name
    assert found["dpo"]["together"] != found["hot"]["together"]


def test_notes_on_the_data_are_in_every_cell(tmp_path: Path) -> None:
    job = jobs_of(tmp_path)[-1]
    rows = Path(str(job.recipe.data.path))
    rows.write_text(rows.read_text().replace('"rejected":', '"reject":', 1))
    folders = [tmp_path / name for name in ("first", "second")]
    splits = []
    for folder in folders:
        folder.mkdir()
        splits.append(warm.splits_of(job.recipe, RunDir(folder)))
    assert splits[0] is splits[1]
    texts = [sorted((f.name, f.read_text()) for f in folder.iterdir()) for folder in folders]
    assert texts[0] == texts[1]
    assert texts[0], "the unread column is noted"
    rows.write_text(rows.read_text() + "\n")
    (tmp_path / "third").mkdir()
    assert warm.splits_of(job.recipe, RunDir(tmp_path / "third")) is not splits[0], "the file was changed"


def test_without_a_first_stage_there_is_no_shared_reference(tmp_path: Path) -> None:
    recipe = jobs_of(tmp_path)[-1].recipe
    assert warm.with_shared_reference(recipe, None) is recipe
    shared = warm.with_shared_reference(recipe, tmp_path / "first")
    assert shared.train.reference_cache == str(tmp_path / "first" / "reference")
    assert warm.with_shared_reference(shared, tmp_path / "second") is shared, "the recipe's own goes first"
