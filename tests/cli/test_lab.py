"""The laboratory's commands: what they hand to it, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cwdpo.lab.bench.setting import Setting
from cwdpo.lab.spec import RECIPE
from cwdpo.report.summary import Figure, Mean, Row, Summary


def summary() -> Summary:
    mean = Mean(0.5, 0.4, 0.6, 3, (0.4, 0.5, 0.6))
    row = Row("a", "A", (), {"x": mean}, None, {}, {}, ())
    provenance = {"settings": "as they are", "probes": "9% of training"}
    return Summary(
        "T",
        "",
        "a",
        (0, 1, 2),
        (Figure("x", "x", "higher", main=True),),
        (row,),
        None,
        {},
        {},
        (),
        (),
        provenance,
    )


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ablate` is called with; nothing is trained."""
    found: dict[str, Any] = {}

    def ablate(recipe: Path, study: Any, out: Path, **options: Any) -> Summary:
        found.update(recipe=recipe, study=study, out=out, **options)
        if study.analysis:
            out.mkdir(parents=True)
            (out / f"{study.analysis}.md").write_text("| scenario | found |")
        return summary()

    monkeypatch.setattr("cwdpo.lab.ablate.ablate", ablate)
    return found


def test_the_demo_is_a_study_at_three_seeds(run, given: dict[str, Any], tmp_path: Path) -> None:
    done = run("demo", "--out", tmp_path, "--workers", 1)
    assert done.code == 0, done.err
    assert (given["recipe"], given["study"].name, given["seeds"], given["jobs"]) == (RECIPE, "demo", 3, 1)
    assert given["chosen"]["dpo"] == ("stage2.learning_rate=5.0e-05", "stage2.objective.beta=0.3")
    assert "0.500 ±0.100" in done.out
    assert "Held-out probes: 9% of training." in done.out


def test_a_study_takes_its_recipe_its_settings_and_its_variants(
    run, given: dict[str, Any], tmp_path: Path
) -> None:
    tuned = tmp_path / "chosen.yaml"
    tuned.write_text("chosen: {sft: [stage2.steps=3]}")
    options = ("--tuned", tuned, "--only", "sft", "--seeds", 2, "--out", tmp_path / "o")
    done = run("ablate", "mine.yaml", "--study", "methods", *options)
    assert done.code == 0, done.err
    assert (given["recipe"], given["out"]) == (Path("mine.yaml"), tmp_path / "o")
    assert given["chosen"] == {"sft": ("stage2.steps=3",)}
    assert list(given["study"].variants) == ["sft", "cw_dpo"]
    assert run("ablate", "--study", "methods").code == 0
    assert (given["recipe"], given["chosen"], given["out"]) == (RECIPE, {}, Path("runs/methods"))
    assert run("ablate", "--study", "findngs").err.startswith(
        "cwdpo: no study 'findngs'; did you mean 'findings'?"
    )


def test_an_analysis_is_printed(run, given: dict[str, Any], tmp_path: Path) -> None:
    done = run("ablate", "--study", "findings", "--out", tmp_path / "f")
    assert "| scenario | found |" in done.out
    assert given["chosen"]["cw_dpo"][0] == "stage2.learning_rate=2.5e-05", "the demo's swept settings"


def test_a_sweep_says_what_it_chose_and_what_lies_at_an_edge(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {
        "chosen": {"dpo": ["stage2.steps=3"]},
        "edges": {"dpo": ["steps=3 is the lowest that was tried"]},
    }
    monkeypatch.setattr("cwdpo.lab.ablate.sweep", lambda *_, **__: found)
    done = run("sweep", "--study", "demo", "--out", tmp_path)
    assert "dpo: stage2.steps=3" in done.out
    assert done.err == "dpo: steps=3 is the lowest that was tried: widen its grid\n"


def test_both_benchmarks_are_given_the_same_options(run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[tuple[Setting, int, int]] = []

    def report(setting: Setting, repeats: int, threads: int, say: Any = None, **_: Any) -> list[Any]:
        settings.append((setting, repeats, threads))
        return []

    monkeypatch.setattr("cwdpo.lab.bench.measure.step_report", report)
    monkeypatch.setattr("cwdpo.lab.bench.measure.scale_report", report)
    shared = (
        "--prompt-tokens",
        64,
        "--tune",
        "full",
        "--shape",
        "3b",
        "--cuda",
        "--grad-checkpointing",
        "--threads",
        2,
    )
    own = ("--negatives", 3, "--reference", "live", "--vision-cache", "--repeats", 7)
    assert run("bench", "scale", *shared, "--json").code == 0
    assert run("bench", "step", *shared, *own, "--json").code == 0
    both = {
        "prompt_tokens": 64, "tune": "full", "shape": "3b", "dtype": "bfloat16", "device": "cuda",
        "grad_checkpointing": True,
    }  # fmt: skip
    assert settings == [
        (Setting(**both), 5, 2),
        (Setting(**both, negatives=3, reference="live", vision_cache=True), 7, 2),
    ]
    assert run("bench", "scale", "--negatives", 2).code == 2, "scale varies the number of negatives itself"
    assert run("bench", "step", "--prompt-tokens", 8).code == 2
