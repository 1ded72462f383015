"""The encoded rows of a stage are written once, and opened again by a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cwdpo.config import parse_recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.models.load import Policy
from cwdpo.records import Completion, Example
from cwdpo.rundir import RunDir
from cwdpo.stage.encoded import forget_rows, stored_rows
from cwdpo.stage.stage import Stage


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CHANGES: dict[str, tuple[bool, Callable[[Stage, RunDir], Any]]] = {
    "nothing": (True, lambda stage, run: None),
    "a byte": (False, lambda stage, run: damage(run.path / "encoded" / "stage2.arrow")),
    "the note": (False, lambda stage, run: (run.path / "encoded" / "stage2.json").write_text("{")),
    "a problem": (False, lambda stage, run: edit(run.path / "encoded" / "stage2.json", problems=["x"])),
    "no problems": (False, lambda stage, run: edit(run.path / "encoded" / "stage2.json", problems=3)),
    "another file": (False, lambda stage, run: edit(run.path / "encoded" / "stage2.json", file=[])),
    "lost": (False, lambda stage, run: (run.path / "encoded" / "stage2.arrow").unlink()),
    "other rows": (False, lambda stage, run: run.write_json("inputs.json", {"stage2": {}, "model": {}})),
    "another limit": (False, lambda stage, run: setattr(stage.encoder, "max_length", 999)),
    "a new start": (False, lambda stage, run: setattr(stage, "resume", False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_opens_what_is_still_right(
    change: str,
    model: Any,
    processor: Any,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, changed = CHANGES[change]
    own = [*examples[:5], replace(examples[5], chosen=Completion(""))]
    run, recipe = RunDir(tmp_path), parse_recipe({"data": {"path": "x"}, "stage2": {"objective": "dpo"}})
    run.write_json("inputs.json", {"stage2": {"texts": "a"}, "model": {"weights": "b", "tokenizer": "c"}})

    def stage(*, resume: bool) -> Stage:
        policy = Policy(model, processor, "")
        return Stage("stage2", recipe, policy, Encoder(processor), run, own, resume=resume)

    rows, problems = stored_rows(stage(resume=False), require_negative=True)
    assert (len(rows), len(problems)) == (5, 1)
    first = list(rows)
    again = stage(resume=True)
    changed(again, run)
    calls: list[str] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, e, n: calls.append(e.id) or encode(self, e, n))
    found, same = stored_rows(again, require_negative=True)
    assert list(found) == first
    assert same == problems
    assert len(calls) == (0 if kept else 6)
    assert sorted(p.name for p in (tmp_path / "encoded").iterdir()) == ["stage2.arrow", "stage2.json"]
    forget_rows(again)
    assert not (tmp_path / "encoded").exists()
    assert list(found) == first  # the file is still mapped
    forget_rows(again)  # a second time: nothing is there
