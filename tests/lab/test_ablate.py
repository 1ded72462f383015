"""Studies: files, plans, tables, a whole small one, and one of 40 cells that is killed three times."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from cwdpo.config import parse_recipe
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError, RecipeError
from cwdpo.lab import grid, server
from cwdpo.lab.ablate import ablate, at_edge, sweep
from cwdpo.lab.cell import CellJob
from cwdpo.lab.flipped import write_flipped
from cwdpo.lab.grid import CellResult, run_grid
from cwdpo.lab.outcome import figures_of
from cwdpo.lab.plan import asked, checked_tree, plan
from cwdpo.lab.progress import Progress
from cwdpo.lab.spec import (
    RECIPE,
    Study,
    Variant,
    load_chosen,
    load_study,
    overrides_of,
    settings_for,
    shipped,
)
from cwdpo.lab.tables import markdown, to_csv
from cwdpo.objectives.base import OBJECTIVES
from small_study import TINY, study, summary_of

# --- files ----------------------------------------------------------------------------------------------


def test_some_variants_of_a_study_with_what_they_need() -> None:
    methods = load_study("methods")
    assert list(methods.only(["sft"]).variants) == ["sft", "cw_dpo"]
    assert list(methods.only(["madpo"]).variants) == ["dpo", "cw_dpo", "madpo"]
    panel = load_study("learning_rates").only(["cw_dpo_span"])
    assert list(panel.variants) == ["cw_dpo", "cw_dpo_span"]
    assert panel.full in panel.expanded({}).variants
    with pytest.raises(RecipeError, match="no variant 'dpp'; did you mean 'dpop'"):
        methods.only(["dpp"])


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_study_fits_the_recipe(name: str) -> None:
    spec = load_study(name)
    assert spec.name == name
    assert spec.question
    tree = checked_tree(RECIPE)
    whole, chosen = spec.expanded({}), settings_for(spec, None)
    for row in whole.variants:
        overrides = overrides_of(whole, row, chosen)
        for point in whole.variants[row].settings():
            parse_recipe(tree, [*overrides, *point])


def test_studies_are_shipped() -> None:
    assert {"table3", "cooling", "mix", "methods", "methods_best_of", "learning_rates"} <= set(shipped())
    wanted = {
        "ipo",
        "cdpo",
        "robust_dpo",
        "dpop",
        "simpo",
        "hinge",
        "wpo",
        "beta_dpo",
        "madpo",
        "sft",
        "dpo",
        "cw_dpo",
    }
    for name in ("methods", "methods_best_of"):
        spec = load_study(name)
        sizes = {len(v.settings()) for v in spec.variants.values()}
        assert sizes == {8}, "every method has the same budget"
        named = {
            parse_recipe(checked_tree(RECIPE), overrides_of(spec, v, {})).stage2.objective["name"]
            for v in spec.variants
        }
        assert wanted <= named
    assert wanted <= set(OBJECTIVES.names())
    panel = load_study("learning_rates").expanded({"dpo": ("stage2.objective.beta=0.9",)})
    assert panel.full in panel.variants
    assert "stage2.objective.beta=0.9" in panel.variants["dpo-0.0001"].set
    assert sum(name.startswith("cw_dpo-") for name in panel.variants) == 6
    assert {
        "full",
        "no_stage1",
        "plain_sft",
        "hard_constraint",
        "no_cw_dpo",
        "fixed_weight",
        "no_filter",
    } <= set(load_study("table3").variants)


def test_a_study_that_cannot_be_understood(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no study 'tabel3'; did you mean 'table3'\?"):
        load_study("tabel3")
    file = tmp_path / "s.yaml"
    file.write_text("name: s\nfull: a\nvariants: {b: {}}\n")
    with pytest.raises(RecipeError, match="no variant 'a'"):
        load_study(file)
    file.write_text("name: s\nfull: a\nvariantz: {a: {}}\nvariants: {a: {}}\n")
    with pytest.raises(RecipeError, match=r"unknown key 'variantz'; did you mean 'variants'\?"):
        load_study(file)
    file.write_text("name: s\nfull: ../a\nvariants: {../a: {}}\n")
    with pytest.raises(RecipeError, match="names a folder"):
        load_study(file)
    file.write_text("name: s\nfull: a\nvariants: {a: {}}\nmetrics: [cidre]\n")
    with pytest.raises(RecipeError, match=r"unknown metric 'cidre'; did you mean 'cider'\?"):
        load_study(file)
    file.write_text("name: s\nfull: a\nvariants: {a: {}}\nmetrics: [length, {name: cider, tokenizer: ptb}]\n")
    assert load_study(file).metrics == ("length", {"name": "cider", "tokenizer": "ptb"})
    for text in (b"name: s", b"chosen: {a: 'x=1'}", b"\xff"):
        file.write_bytes(text)
        with pytest.raises(RecipeError, match=r"not the chosen\.yaml of a sweep"):
            load_chosen(file)


def test_a_choice_at_the_edge_of_its_grid_is_said() -> None:
    variant = Variant(
        grid={"stage2.learning_rate": (2.5e-5, 5.0e-5, 1.0e-4), "stage2.objective.beta": (0.3, 1.0)}
    )
    at = [at_edge(variant, settings) for settings in variant.settings()[::2]]
    low, high = "stage2.learning_rate=2.5e-05 is the lowest", "stage2.learning_rate=0.0001 is the highest"
    assert at == [[f"{low} that was tried"], [], [f"{high} that was tried"]]


# --- plans ----------------------------------------------------------------------------------------------


def planned(spec: Study, out: Path, seeds: int = 1) -> Any:
    return plan(out, checked_tree(RECIPE), spec, asked(spec, range(seeds), {}), split="test", test=None)


def test_equal_first_stages_are_run_once(tmp_path: Path) -> None:
    spec = study(
        variants={
            "cw_dpo": {"set": ["stage2.objective={name: cw_dpo}"]},
            "dpo": {"set": ["stage2.objective={name: dpo}", "stage2.learning_rate=1.0e-3", "stage2.steps=2"]},
            "plain": {"set": ["stage1.objective={name: sft}"]},
            "without": {"set": ["stage1.enabled=false"]},
            "alone": {"set": ["stage2.enabled=false"]},
        }
    )
    found = planned(spec, tmp_path, seeds=2)
    assert len(found.stage1) == 2 * 2, "two kinds of first stage, two seeds"
    assert len(found.cells) == 2 * 5
    starts = {key: job.recipe.model.path for key, job in found.cells.items()}
    assert starts["cw_dpo-seed0"] == starts["dpo-seed0"] == starts["alone-seed0"] != starts["plain-seed0"]
    assert starts["without-seed0"] == "embedded"
    assert found.cells["alone-seed0"].stage == "base"
    assert starts["dpo-seed0"] != starts["dpo-seed1"]
    data = {job.recipe.data.path for job in found.cells.values()}
    assert len(data) == 2, "all variants of a seed see the same pictures"
    assert len({str(job.test) for job in found.cells.values()}) == 1


@pytest.mark.parametrize(("name", "first"), [("mix", 2), ("rounds", 2), ("table3", 3), ("methods", 2)])
def test_shipped_studies_share_their_first_stages(name: str, first: int, tmp_path: Path) -> None:
    spec = load_study(name).model_copy(update={"common": (*load_study(name).common, *TINY)})
    assert len(planned(spec, tmp_path).stage1) == first


def test_the_test_pictures_are_not_those_of_a_sweep(tmp_path: Path) -> None:
    spec = study()
    wanted = asked(spec, [100], {})
    tuned = plan(tmp_path, checked_tree(RECIPE), spec, wanted, split="validation", test=None)
    final = planned(spec, tmp_path)
    pictures = {
        name: {json.loads(line)["id"] for line in next(iter(p.cells.values())).test.read_text().splitlines()}
        for name, p in (("tuned", tuned), ("final", final))
    }
    assert pictures["tuned"]
    assert not pictures["tuned"] & pictures["final"]
    assert tuned.cells["dpo-seed100"].recipe.data.path != final.cells["dpo-seed0"].recipe.data.path


def test_a_study_may_have_pictures_seeds_and_decodings_of_its_own(tmp_path: Path) -> None:
    spec = study(first_seed=20, held_out_seed=1234, decodings={"temperatures": [0.85], "same_entropy": True})
    wanted = asked(spec, range(20, 22), {})
    assert [one.key for one in wanted] == ["cw_dpo-seed20", "cw_dpo-seed21", "dpo-seed20", "dpo-seed21"]
    fresh = plan(tmp_path, checked_tree(RECIPE), spec, wanted, split="test", test=None)
    usual = planned(study(), tmp_path)
    rows = [next(iter(p.cells.values())).test.read_text() for p in (fresh, usual)]
    assert rows[0] != rows[1], "other test pictures, in a folder of their own"
    assert {job.decodings for job in fresh.cells.values()} == {spec.decodings}
    assert [f.key for f in figures_of(spec, {}) if "@" in f.key] == [
        f"{figure}@{name}"
        for name in ("0.85", "entropy")
        for figure in ("judge_score", "sampled_correct", "ill_formed")
    ] + ["temperature@entropy"]  # fmt: skip


def test_flipped_pairs_are_made_from_the_sampled_ones_once_for_all_variants(tmp_path: Path) -> None:
    spec = study(
        data={"n": 2, "noise": 0.3, "worse": "judge"},
        variants={"cw_dpo": {}, "dpo": {"flipped": 0.2}, "ipo": {"flipped": 0.2}, "sft": {"flipped": 0.4}},
    )
    found = planned(spec, tmp_path)
    data, flipped = [wave for wave in found.waves if wave[0].stage in ("best_of", "flipped")]
    assert len(data) == 1
    assert sorted(job.options["share"] for job in flipped) == [0.2, 0.4]
    assert {job.recipe.data.path for job in flipped} == {found.cells["cw_dpo-seed0"].recipe.data.path}
    assert found.cells["dpo-seed0"].recipe.data.path == found.cells["ipo-seed0"].recipe.data.path


def test_flipped_rows_by_hand(world_folder: Path, tmp_path: Path) -> None:
    source = world_folder / "train.jsonl"
    counts = {
        share: write_flipped(source, tmp_path / str(share), share=share, seed=4)
        for share in (0.0, 0.2, 0.5, 1.0)
    }
    assert [c["flipped"] for c in counts.values()][::3] == [0, 48]
    assert 0 < counts[0.2]["flipped"] < counts[0.5]["flipped"] < 48
    before = read_examples(source).examples
    some, more = (read_examples(tmp_path / share / "train.jsonl").examples for share in ("0.2", "0.5"))
    for was, few, many in zip(before, some, more, strict=True):
        if few.chosen.text != was.chosen.text:
            assert few.chosen.text == was.rejected[0].text
            assert [(c.text, c.kind) for c in few.rejected] == [(was.chosen.text, "flipped")]
            assert many.chosen.text == few.chosen.text, "what is flipped at 0.2 is flipped at 0.5"
        else:
            assert few.rejected == was.rejected
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": "a", "chosen": []}\n')
    with pytest.raises(DataError, match=r"bare\.jsonl, row 1: negatives: there is none"):
        write_flipped(bare, tmp_path / "x", share=1.0, seed=0)


def test_other_data_needs_a_test_set(tmp_path: Path) -> None:
    tree = {"data": {"path": "rows.jsonl"}}
    with pytest.raises(DataError, match="a study needs a test set that is not used for tuning"):
        plan(tmp_path, tree, study(common=()), asked(study(common=()), [0], {}), split="test", test=None)


# --- tables ---------------------------------------------------------------------------------------------


def test_means_differences_and_corrections_by_hand() -> None:
    from scipy import stats

    ours, dpo, sft = [0.5, 0.7, 0.6, 0.8], [0.4, 0.5, 0.55, 0.6], [0.5, 0.71, 0.6, 0.79]
    found = summary_of({"cw_dpo": ours, "dpo": dpo, "sft": sft})
    assert found.row("cw_dpo").figures["judge_score"].mean == pytest.approx(0.65)
    assert found.row("cw_dpo").against == {}
    against = found.row("dpo").against["judge_score"]
    assert against.mean == pytest.approx(-0.1375)
    p = stats.ttest_rel(dpo, ours).pvalue
    assert against.p == pytest.approx(p)
    assert against.p_corrected == pytest.approx(min(1.0, 2 * p)), "the smaller of two p-values counts twice"
    assert found.row("sft").against["judge_score"].word == "no clear difference"
    table = list(csv.DictReader(to_csv(found).splitlines()))
    line = next(r for r in table if (r["variant"], r["figure"]) == ("dpo", "judge_score"))
    assert float(line["difference"]) == against.mean
    assert float(line["p_corrected"]) == against.p_corrected
    text = markdown(found)
    assert "| DPO | -0.137 [" in text.replace("| - ", "")
    assert "corrected (Holm) for the 2 comparisons of a figure" in text


def test_a_word_is_given_only_where_the_corrected_p_allows_it() -> None:
    """By hand: both differences are -0.1 +- 0.01, of three seeds t = 17.32, p = 0.00332; twice that is below 0.05."""
    ours, worse = [0.51, 0.62, 0.73], [0.40, 0.52, 0.64]
    found = summary_of({"cw_dpo": ours, "dpo": worse})
    against = found.row("dpo").against["judge_score"]
    assert (against.p, against.p_corrected, against.word) == (
        pytest.approx(0.00332, abs=1e-5),
        against.p,
        "worse",
    )
    assert summary_of({"cw_dpo": worse, "dpo": ours}).row("dpo").against["judge_score"].word == "better"
    many = summary_of({"cw_dpo": ours, "dpo": worse, **{f"other{i}": ours[::-1] for i in range(15)}})
    assert many.row("dpo").against["judge_score"].p_corrected == pytest.approx(16 * against.p)
    assert many.row("dpo").against["judge_score"].word == "no clear difference"


def test_a_variant_may_be_compared_with_another_than_the_full_one() -> None:
    spec = study(
        variants={
            "cw_dpo": {"label": "CW-DPO"},
            "dpo": {"label": "DPO"},
            "dpo_r3": {"label": "DPO, fresh", "against": "dpo"},
        }
    )
    values = {"cw_dpo": [0.5, 0.7, 0.6], "dpo": [0.4, 0.5, 0.45], "dpo_r3": [0.41, 0.53, 0.49]}
    found = summary_of(values, spec)
    assert found.row("dpo_r3").against["judge_score"].mean == pytest.approx(0.08 / 3)
    assert found.row("dpo").against["judge_score"].mean == pytest.approx(-0.15)
    text = markdown(found).replace("| - ", "")
    assert "| DPO, fresh minus DPO | +0.027 [" in text
    assert "| DPO | -0.150 [" in text
    lines = {r["variant"]: r["against"] for r in csv.DictReader(to_csv(found).splitlines())}
    assert lines == {"cw_dpo": "", "dpo": "cw_dpo", "dpo_r3": "dpo"}
    assert list(spec.only(["dpo_r3"]).variants) == ["cw_dpo", "dpo", "dpo_r3"]
    with pytest.raises(ValueError, match="no variant 'dpp'; did you mean 'dpo'"):
        study(variants={"cw_dpo": {}, "dpo": {"against": "dpp"}})


def test_a_variant_with_more_seeds_is_compared_on_those_of_both() -> None:
    spec = study(variants={"cw_dpo": {"more_seeds": 2}, "dpo": {}})
    assert [a.key for a in asked(spec, [0, 1], {})] == [
        *(f"cw_dpo-seed{i}" for i in range(4)), "dpo-seed0", "dpo-seed1",
    ]  # fmt: skip
    found = summary_of({"cw_dpo": [0.5, 0.7, 0.9, 0.9], "dpo": [0.4, 0.5]}, spec)
    assert found.seeds == (0, 1, 2, 3)
    assert found.row("cw_dpo").figures["judge_score"].mean == pytest.approx(0.75)
    dpo = found.row("dpo")
    assert [c.seed for c in dpo.cells] == [0, 1]
    assert dpo.figures["judge_score"].per_seed == (0.4, 0.5, None, None)
    assert (dpo.against["judge_score"].n, dpo.against["judge_score"].mean) == (2, pytest.approx(-0.15))


def test_scores_stand_in_a_panel() -> None:
    spec = study(
        variants={
            "cw_dpo": {"grid": {"stage2.learning_rate": [1.0e-5, 1.0e-4]}, "label": "CW-DPO"},
            "dpo": {"grid": {"stage2.learning_rate": [1.0e-4]}, "label": "DPO"},
        },
        full="cw_dpo-1.0e-05", panel=True, score={"judge_score": 2.0},
    ).expanded({})  # fmt: skip
    values = {"cw_dpo-1.0e-05": [0.5, 0.7], "cw_dpo-0.0001": [0.4, 0.6], "dpo-0.0001": [0.1, None]}
    found = summary_of(values, spec)
    assert found.panel is not None
    assert found.panel.columns == ("1.0e-05", "0.0001")
    scores = {r.name: r.figures["score"] for r in found.variants}
    ours, dpo = found.panel.rows.values()
    assert [scores[str(name)].per_seed for name in ours] == [(1.0, 1.4), (0.8, 1.2)]
    assert dpo[0] is None, "DPO was not run there"
    assert scores[str(dpo[1])].mean == pytest.approx(0.2)
    assert "| DPO | - | 0.200 |" in markdown(found)
    assert found.variants[1].against["score"].mean == pytest.approx(-0.2)
    assert summary_of({"cw_dpo": [0.5], "dpo": [0.4]}).panel is None


def test_slopes_over_a_panel_of_numbers_by_hand() -> None:
    """Scores fall by 0.2 and 0.4 a unit in two seeds of one row, by 1 and 1 in the other."""
    shares = ("0", "0.5", "1")
    spec = study(
        variants={
            f"{row}-{x}": {"cell": [row.upper(), x]} for row in ("cw", "dpo") for x in shares
        },
        full="cw-0", score={"judge_score": 1.0},
    )  # fmt: skip
    falls = {"cw": (0.2, 0.4), "dpo": (1.0, 1.0)}
    values: dict[str, list[float | None]] = {
        f"{row}-{x}": [0.9 - fall * float(x) for fall in seeds]
        for row, seeds in falls.items()
        for x in shares
    }
    panel = summary_of(values, spec).panel
    assert panel is not None
    assert panel.slopes["CW"].per_seed == pytest.approx((-0.2, -0.4))
    assert panel.slope_differences["DPO"].mean == pytest.approx(-0.7)
    assert "| DPO | -1.000 ±0.000 | -0.700 [" in markdown(summary_of(values, spec))
    values["dpo-0.5"] = [None, 0.4]
    assert summary_of(values, spec).panel.slopes["DPO"].per_seed == (None, pytest.approx(-1.0))  # type: ignore[union-attr]


def test_what_a_study_cannot_say() -> None:
    grid = {"stage2.learning_rate": [1.0e-5]}
    for changes, said in (
        (
            {"panel": True, "variants": {"a": {"grid": grid}, "b": {"grid": grid, "against": "a"}}},
            "not allowed in a panel",
        ),
        ({"variants": {"cw_dpo": {}, "b": {"against": "b"}}}, "against: must be another variant"),
        (
            {"variants": {"cw_dpo": {"cell": ["r", "c"]}, "b": {"cell": ["r", "c"]}}},
            "another variant has the same cell",
        ),
        ({"score": {}}, "at least 1"),
        ({"wins_against": "stf"}, "no variant 'stf'"),
        ({"shown": ["dpo", "cw"]}, "no variant 'cw'"),
    ):
        with pytest.raises(ValueError, match=said):
            study(**changes)
    panel = study(panel=True, full="cw", variants={"cw_dpo": {"grid": grid}})
    with pytest.raises(RecipeError, match=r"'cw' is not a point of the panel.*known: cw_dpo-1.0e-05"):
        panel.expanded({})
    odd = study(panel=True, full="a-_x__y_", variants={"a": {"grid": {"k": [["x", "y"]]}}})
    assert list(odd.expanded({}).variants) == ["a-_x__y_"]


def test_a_factor_multiplies_what_was_set_last() -> None:
    times = {"stage2.learning_rate": 4}
    spec = study(common=("stage2.learning_rate=1e-5",), variants={"cw_dpo": {}, "hot": {"times": times}})
    assert overrides_of(spec, "hot", {})[-1] == "stage2.learning_rate=4.0e-05"
    tuned = {"hot": ("stage2.learning_rate=2.5e-05",)}
    assert overrides_of(spec, "hot", tuned)[-2:] == [
        "stage2.learning_rate=2.5e-05",
        "stage2.learning_rate=0.0001",
    ]
    for common, said in (
        ((), "no override sets 'stage2.learning_rate'"),
        (("stage2.learning_rate=x",), "is not a number"),
    ):
        with pytest.raises(RecipeError, match=said):
            overrides_of(spec.model_copy(update={"common": common}), "hot", {})


def test_variants_of_another_study(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\nfull: cw_dpo\nvariants_of: methods\ngrid: {stage2.steps: [1, 2]}\nvariants: {mine: {}}\n"
    )
    found = load_study(file)
    assert {*load_study("methods").variants, "mine"} == set(found.variants)
    assert {v.settings() == [("stage2.steps=1",), ("stage2.steps=2",)] for v in found.variants.values()} == {
        True
    }
    file.write_text("name: s\nfull: cw_dpo\nvariants_of: learning_rates\n")
    with pytest.raises(RecipeError, match="the study learning_rates does not list variants itself"):
        load_study(file)


def test_settings_of_a_sweep_of_another_study(tmp_path: Path) -> None:
    chosen = {
        "cw_dpo": ("stage2.learning_rate=2e-4",),
        "dpo": ("stage2.learning_rate=5e-5",),
        "ipo": ("x=1",),
    }
    mix = load_study("mix")
    assert overrides_of(mix, "cw_dpo_75", chosen)[-1] == "stage2.learning_rate=2e-4"
    assert overrides_of(mix, "dpo_75", chosen)[-1] == "stage2.learning_rate=5e-5"
    with pytest.raises(
        RecipeError, match=r"settings are for ipo, but the study small uses those of cw_dpo, dpo"
    ):
        ablate(RECIPE, study(), tmp_path / "out", seeds=1, jobs=1, chosen={"ipo": ("x=1",)})


def test_a_failed_cell_is_shown_and_not_averaged_away() -> None:
    found = summary_of({"cw_dpo": [0.5, 0.7], "dpo": [0.4, None]})
    row = found.row("dpo")
    assert row.figures["judge_score"].n == 1
    assert row.against["judge_score"].n == 1
    assert row.against["judge_score"].low is None
    text = markdown(found)
    assert "DPO (1 of 2 cells FAILED)" in text
    assert "- DPO, seed 1: NonFiniteError: planted" in text
    assert (
        next(r for r in csv.DictReader(to_csv(found).splitlines()) if r["variant"] == "dpo")["failed"] == "1"
    )


def test_the_terminal_shows_the_same_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from cwdpo.lab.tables import show

    show(summary_of({"cw_dpo": [0.51, 0.62, 0.73], "dpo": [0.40, 0.52, 0.64], "sft": [0.4, None, 0.5]}))
    text = " ".join(capsys.readouterr().out.split())
    assert "-0.100* " in text
    assert "[-0.125, -0.075]" in text
    assert "SFT (1 of 3" in text
    assert "FAILED SFT, seed 1: NonFiniteError: planted" in text
    assert "corrected (Holm) for the 2 comparisons of a figure" in text


def test_the_page_of_a_study(tmp_path: Path) -> None:
    from cwdpo.report.render import write_report

    variants = {
        "cw_dpo": {"label": "CW-DPO", "cell": ["ours", "0%"]},
        "dpo": {"cell": ["theirs", "0%"]},
        "ipo": {"label": "IPO", "against": "dpo"},
    }
    values = {"cw_dpo": [0.5, 0.7, 0.5], "dpo": [0.4, None, 0.1], "ipo": [0.4, 0.3, 0.2]}
    summary_of(values, study(variants=variants, score={"judge_score": 1.0})).write(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "minus dpo" in page
    assert "theirs" in page
    assert "1 of 3 failed" in page
    assert "NonFiniteError: planted" in page
    assert "<script" not in page
    assert "p = " in page
    assert "corrected (Holm) for the 2 comparisons of a column" in page


# --- the grid -------------------------------------------------------------------------------------------


class FakeWorker:
    """Runs cells at once; ``v1-seed0`` kills its process as often as ``kills`` says."""

    kills = 2
    begun: ClassVar[list[str]] = []

    def __init__(self, ticks: Any) -> None:
        self.read: list[str] = []

    def begin(self, job: CellJob) -> Future[CellResult]:
        FakeWorker.begun.append(job.key)
        self.read.append(grid.data_of(job))
        future: Future[CellResult] = Future()
        if job.key == "v1-seed0" and FakeWorker.begun.count(job.key) <= FakeWorker.kills:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(CellResult(job.key, "done", {"x": 1}, None, 0.0))
        return future

    def end(self) -> None:
        self.read = []


@pytest.mark.parametrize(("kills", "status"), [(1, "done"), (2, "failed")])
def test_a_worker_that_dies_takes_one_cell_with_it(
    kills: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell runs once more when nothing runs beside it; the others are not touched."""
    spec = study(
        variants={f"v{i}": {"set": [f"stage2.learning_rate={1 + i}.0e-5"]} for i in range(3)}, full="v0"
    )
    jobs = list(planned(spec, tmp_path).cells.values())
    monkeypatch.setattr(grid, "Worker", FakeWorker)
    monkeypatch.setattr(server, "start", lambda: None)
    monkeypatch.setattr(FakeWorker, "kills", kills)
    monkeypatch.setattr(FakeWorker, "begun", [])
    results = run_grid([jobs], 2, lambda event: None)
    assert sorted(FakeWorker.begun[:3]) == ["v0-seed0", "v1-seed0", "v2-seed0"]
    assert FakeWorker.begun[3:] == ["v1-seed0"]
    assert {k: r.status for k, r in results.items()} == {
        "v0-seed0": "done",
        "v1-seed0": status,
        "v2-seed0": "done",
    }
    assert ("killed" in str(results["v1-seed0"].error)) == (status == "failed")


def test_a_process_gets_cells_of_the_data_that_it_has_read(tmp_path: Path) -> None:
    spec = study()
    jobs = list(planned(spec, tmp_path, seeds=3).cells.values())
    data = [grid.data_of(next(j for j in jobs if j.key == f"dpo-seed{i}")) for i in range(3)]

    def chosen(read: list[int], busy: list[int]) -> str:
        return grid.next_cell(jobs, [data[i] for i in read], [data[i] for i in busy]).key

    assert chosen([], []) == "cw_dpo-seed0", "the first"
    assert chosen([1, 2], [0]) == "cw_dpo-seed2", "read last, and nobody is at it"
    assert chosen([1], [0]) == "cw_dpo-seed1", "read, and nobody is at it"
    assert chosen([0], [0]) == "cw_dpo-seed1", "better none that another process is at"
    assert chosen([2], [0, 1, 2]) == "cw_dpo-seed2", "all are in use: one that it has read"
    assert chosen([], [0, 1, 2]) == "cw_dpo-seed0"


def test_the_time_left_counts_only_steps_that_were_taken() -> None:
    now = 0.0
    progress = Progress({"a": 100, "b": 100, "c": 0}, now=lambda: now)
    assert (progress.total, progress.cells, progress.left) == (200, 3, "")
    progress.end("a")  # finished in an earlier start
    for _ in range(50):
        progress.step("b")
    now = 100.0
    assert (progress.done, progress.finished) == (150, 1)
    assert progress.seconds_left == pytest.approx(100.0)
    assert progress.left == "about 2 min left"
    progress.end("b")
    assert (progress.done, progress.seconds_left) == (200, 0.0)


@pytest.mark.slow
def test_a_whole_small_study_with_margins_and_a_failure(tmp_path: Path) -> None:
    spec = study(
        data={"n": 3, "noise": 0.2},
        variants={
            "cw_dpo": {"set": ["stage2.objective={name: cw_dpo}"]},
            "dpo": {"set": ["stage2.objective={name: dpo, beta: 0.3}"]},
            "madpo": {"set": ["stage2.objective={name: madpo}"], "margins_from": "dpo"},
            "broken": {
                "set": ["stage2.objective={name: dpo}", "stage2.learning_rate=1.0e+30", "stage2.steps=3"]
            },
        },
    )
    found = ablate(RECIPE, spec, tmp_path / "out", seeds=2, jobs=2)
    assert [c.status for c in found.row("broken").cells] == ["failed", "failed"]
    for name in ("cw_dpo", "dpo", "madpo"):
        assert [c.status for c in found.row(name).cells] == ["done", "done"], found.row(name).cells
        assert found.row(name).figures["judge_score"].n == 2
    made = json.loads(next((tmp_path / "out" / "cells").glob("data-*-seed1/data/best_of.json")).read_text())
    assert (made["n"], made["noise"], made["seed"]) == (3, 0.2, 1)
    margin = next((tmp_path / "out" / "cells").glob("margins-dpo-seed0/train.jsonl")).read_text().splitlines()
    assert all("reward_margin" in n["made"] for line in margin for n in json.loads(line)["negatives"])
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_a_small_sweep_chooses_on_validation(tmp_path: Path) -> None:
    grid_ = {"stage2.learning_rate": [1e-5, 1e-1]}
    spec = study(
        variants={
            "cw_dpo": {"set": ["stage2.objective={name: cw_dpo}"], "grid": grid_},
            "dpo": {"set": ["stage2.objective={name: dpo}"], "grid": grid_},
        },
        common=[*TINY, "stage2.steps=4"],
    )
    found = sweep(RECIPE, spec, tmp_path / "out", finalists=1, jobs=2)
    assert found["chosen"] == {
        "cw_dpo": ["stage2.learning_rate=1.0e-05"],
        "dpo": ["stage2.learning_rate=1.0e-05"],
    }
    assert load_chosen(tmp_path / "out" / "chosen.yaml")["dpo"] == ("stage2.learning_rate=1.0e-05",)
    with pytest.raises(RecipeError, match="must have the same number of points"):
        sweep(RECIPE, study(), tmp_path / "other", finalists=1, jobs=1)


@pytest.mark.slow
def test_a_study_of_40_cells_killed_three_times_ends_with_the_same_table(tmp_path: Path) -> None:
    rates = [f"{i}.0e-5" for i in range(1, 9)]
    tree = {
        "name": "forty", "title": "Forty", "question": "?", "full": "v0", "common": list(TINY),
        "variants": {f"v{i}": {"set": [f"stage2.learning_rate={r}"]} for i, r in enumerate(rates)},
    }  # fmt: skip
    file = tmp_path / "forty.yaml"
    file.write_text(yaml.safe_dump(tree))

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "cwdpo", "ablate", str(RECIPE), "--study", str(file), "--seeds", "5", "--jobs", "2",
            "--out", str(out),
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (tmp_path / "log.txt").open("ab") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def said() -> str:
        return (tmp_path / "log.txt").read_text(errors="replace")[-3000:]

    def finished(out: Path) -> int:
        return sum((f / "figures.json").is_file() for f in (out / "cells").glob("v*-seed*"))

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=1500) == 0, said()
    killed = tmp_path / "killed"
    stopped_at = []
    for goal in (5, 15, 30):
        process = start(killed)
        while finished(killed) < goal:
            assert process.poll() is None, said()
            time.sleep(0.05)  # waits for another process, not for a duration
        os.kill(process.pid, signal.SIGKILL)  # only the parent: its workers must end by themselves
        process.wait()
        stopped_at.append(finished(killed))
    assert 40 > stopped_at[2] >= 30
    last = start(killed)
    assert last.wait(timeout=1500) == 0, said()
    assert finished(killed) == finished(tmp_path / "whole") == 40
    for name in ("table.md", "table.csv"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
