"""Findings from series by hand, the rules as data, `cwdpo diagnose` and `cwdpo watch`."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from cwdpo.dynamics.diagnose import Condition, FindingRule, apply, diagnose_rows, load_rules, to_json
from cwdpo.dynamics.rules import parse_rule
from cwdpo.dynamics.series import Series
from cwdpo.errors import RecipeError, RunDirError
from cwdpo.report.render import render_report
from cwdpo.report.watch import serve
from cwdpo.rundir import RunDir
from paths import ROOT


def readings(
    name: str, values: dict[int, float | None], stage: str = "stage2", **more: Any
) -> list[dict[str, Any]]:
    return [{"stage": stage, "name": name, "step": s, "value": v, "n": 32, **more} for s, v in values.items()]


def metrics(name: str, values: list[float], stage: str = "stage2") -> list[dict[str, Any]]:
    return [{"stage": stage, "step": i + 1, name: v} for i, v in enumerate(values)]


def rule(*when: dict[str, Any], **more: Any) -> FindingRule:
    said = {"name": "x", "title": "X", "severity": "warning", "source": "s", "advice": "a", "when": when}
    return FindingRule.model_validate({**said, **more})


# --- series ---------------------------------------------------------------------------------------------


def test_views_of_a_series_by_hand() -> None:
    series = Series(
        readings("kl", {0: 1.0, 10: 3.0, 20: 2.0, 30: None}, low=0.5, high=1.5), metrics("loss", [4, 2, 3])
    )
    assert series.viewed("stage2", "kl") == [(0, 1.0), (10, 3.0), (20, 2.0)]
    assert series.viewed("stage2", "kl", "change") == [(0, 0.0), (10, 2.0), (20, 1.0)]
    assert series.viewed("stage2", "kl", "fall") == [(0, 0.0), (10, 0.0), (20, 1.0)]
    assert series.viewed("stage2", "kl", "rise") == [(0, 0.0), (10, 2.0), (20, 1.0)]
    assert series.viewed("stage2", "kl", "width") == [(0, 0.5), (10, 0.5), (20, 0.5)]
    assert series.viewed("stage2", "kl", "n") == [(0, 32.0), (10, 32.0), (20, 32.0)]
    assert series.viewed("stage2", "train/loss", window=2) == [(2, 3.0), (3, 2.5)]
    assert series.viewed("stage1", "kl") == []
    assert (series.last_step("stage2"), series.last_step("stage1")) == (20, 0)


def test_what_is_no_finite_number_is_no_evidence() -> None:
    rows = [
        *readings("kl", {0: float("nan"), 1: float("inf")}),
        {"stage": "stage2", "name": "kl", "step": True, "value": 1},
    ]
    assert Series(rows, [{"stage": "stage2", "step": 1, "loss": "x"}]).names("stage2") == []


# --- rules ----------------------------------------------------------------------------------------------


def test_all_conditions_must_hold_at_one_step() -> None:
    two = rule({"series": "kl", "above": 0.1}, {"series": "train/loss", "below": 1.0})
    series = Series(readings("kl", {0: 0.0, 2: 0.2, 3: 0.0}), metrics("loss", [2.0, 2.0, 0.5, 0.5]))
    assert apply(two, series) is None  # the loss is low from step 3 on, kl high at step 2 alone
    series = Series(readings("kl", {0: 0.0, 2: 0.2, 5: 0.3}), metrics("loss", [2.0, 2.0, 0.5, 0.5]))
    found = apply(two, series)
    assert found is not None
    assert (found.first_step, found.last_step) == (3, 5)
    assert found.evidence == (
        "kl: 0.2 at step 2, above 0.1",
        "train/loss: 0.5 at step 3, below 1",
    )


def test_a_series_that_was_not_recorded_meets_nothing() -> None:
    assert apply(rule({"series": "kl", "below": 1.0}), Series([], [])) is None


def test_after_counts_from_a_share_of_the_stage() -> None:
    late = rule({"series": "kl", "above": 0.1, "after": 0.5})
    assert apply(late, Series(readings("kl", {0: 0.2, 4: 0.2, 10: 0.0}), [])) is None
    found = apply(late, Series(readings("kl", {0: 0.2, 5: 0.2, 10: 0.0}), []))
    assert found is not None
    assert found.first_step == 5


def test_thresholds_can_be_moved_and_only_the_tuned_ones() -> None:
    two = rule({"series": "kl", "above": 0.1}, {"series": "margin", "above": 1.0}, tuned=[0])
    assert [c.above for c in two.scaled(2).when] == [0.2, 1.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"when": [{"series": "kl"}]}, "exactly one of"),
        ({"when": [{"series": "kl", "above": 1, "below": 2}]}, "exactly one of"),
        ({"severity": "bad"}, "severity"),
        ({"advise": "x"}, "did you mean 'advice'"),
        ({"when": []}, "when"),
    ],
)
def test_a_rule_that_is_none_is_refused(change: dict[str, Any], said: str) -> None:
    import yaml

    good = {
        "name": "x",
        "title": "X",
        "severity": "note",
        "source": "s",
        "advice": "a",
        "when": [{"series": "kl", "above": 1}],
    }
    with pytest.raises(RecipeError, match=said):
        load_rules(yaml.safe_dump([{**good, **change}]))


def test_the_shipped_rules_cover_the_list_and_read_what_exists() -> None:
    rules = load_rules()
    asked = {
        "likelihood_displacement", "squeezing", "too_hot", "everything_cooled", "nothing_cooled",
        "easy_negatives_carry_the_gradient", "reference_drift", "length_bias", "repetition_or_ill_formed",
        "stage1_too_strong", "saturated_loss", "stale_negatives", "pairs_nearly_equal", "overfitting", "noisy_probes",
    }  # fmt: skip
    assert asked <= {r.name for r in rules}
    from cwdpo.onpolicy.agreement import APART, GAP
    from cwdpo.trainer.gradient import gradient_metrics

    ones = dict.fromkeys(
        ("push/chosen", "push/rejected", "push/easy", "residual/chosen", "residual/rejected", "tokens/chosen",
         "tokens/rejected", "pairs", "easy", "judged", "vulnerable", "saturated"), 1.0,
    )  # fmt: skip
    trained = {f"train/{n}" for n in gradient_metrics(ones)} | {
        "train/cooling/weight_p10", "train/cooling/weight_p90", "train/cooling/weight_mean",
        "train/cooling/fraction_between", "train/logps_mean/chosen", "train/rewards/accuracies",
        "train/updates/kept", GAP, APART,
    }  # fmt: skip
    for r in rules:
        assert all(text.strip() for text in (r.title, r.advice, r.source)), r.name
        for c in r.when:
            assert c.series in trained or parse_rule(f"{c.series} < 0"), f"{r.name}: nothing writes it"


def test_the_docs_name_every_finding() -> None:
    page = (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    for r in load_rules():
        assert f"| `{r.name}` | {r.severity} |" in page


# --- findings on runs whose numbers are known ------------------------------------------------------------


def squeezed() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    steps = range(0, 60, 10)
    rows = readings("delta_logp/chosen", {s: -0.002 * s for s in steps})
    rows += readings("rejected_shift", {s: -0.3 * s for s in steps})
    rows += readings("argmax_logp", {s: -0.2 + 0.001 * s for s in steps})
    rows += readings("kl", {s: 0.0005 * s for s in steps})
    return rows, metrics("gradient/rejected_share", [0.7] * 50)


def test_a_squeezed_run_is_named_from_the_step_where_it_began() -> None:
    found = {f.name: f for f in diagnose_rows(*squeezed())}
    assert found["squeezing"].first_step == 20
    assert found["likelihood_displacement"].first_step == 20
    assert "too_hot" not in found
    # the same numbers under an objective without a rejected side (SFT) are neither
    assert diagnose_rows(squeezed()[0], metrics("gradient/rejected_share", [0.0] * 50)) == []
    healthy = readings("delta_logp/chosen", {0: 0.0, 10: 0.01}) + readings("kl", {0: 0.0, 10: 0.01})
    assert diagnose_rows(healthy, []) == []
    assert to_json([]) == {"findings": [], "healthy": True}


def test_a_drift_that_few_tokens_carry_is_none() -> None:
    kl = {0: 0.0, 10: 0.05}
    assert diagnose_rows(readings("kl", kl, low=0.01, high=0.09), []) == []
    (found,) = diagnose_rows(readings("kl", kl, low=0.03, high=0.07), [])
    assert (found.name, found.first_step) == ("reference_drift", 10)
    assert found.evidence[1] == (
        "kl (lower end of its 95% interval): 0.03 at step 10, above 0.0201 (0.067 of the entropy)"
    )


def test_what_is_drift_is_a_share_of_the_entropy_at_the_start() -> None:
    moved = readings("kl", {0: 0.0, 10: 0.3}, low=0.2, high=0.4)
    fallen = readings("delta_logp/chosen", {0: 0.0, 10: -0.1})
    trained = metrics("gradient/rejected_share", [0.5] * 20)

    def names(entropy: dict[int, float]) -> set[str]:
        return {f.name for f in diagnose_rows([*moved, *fallen, *readings("entropy", entropy)], trained)}

    assert names({}) == names({0: 0.3}) == names({0: 0.1}) == {"likelihood_displacement", "reference_drift"}
    assert names({0: 1.4, 10: 5.0}) == {"likelihood_displacement", "reference_drift"}  # 0.067 of 1.4 is 0.094
    assert names({0: 2.0, 10: 0.1}) == {"reference_drift"}  # 0.133 of 2.0 is 0.266
    assert names({0: 2.4, 10: 0.1}) == set()


@pytest.mark.parametrize(
    ("p10", "mean", "p90", "between", "name"),
    [
        (0.0, 0.01, 0.02, 0.0, "everything_cooled"),
        (0.95, 0.97, 1.0, 0.0, "nothing_cooled"),
        (0.49, 0.5, 0.51, 1.0, "nothing_cooled"),
        (0.0, 0.4, 1.0, 0.01, "cooling_is_a_switch"),
    ],
)
def test_the_cooling_is_judged_by_its_weights(
    p10: float, mean: float, p90: float, between: float, name: str
) -> None:
    weights = {"weight_p10": p10, "weight_mean": mean, "weight_p90": p90, "fraction_between": between}
    row = {f"cooling/{k}": v for k, v in weights.items()}
    assert [
        f.name for f in diagnose_rows([], [{"stage": "stage2", "step": i, **row} for i in range(1, 25)])
    ] == [name]
    healthy = {
        "cooling/weight_p10": 0.0,
        "cooling/weight_mean": 0.2,
        "cooling/weight_p90": 0.5,
        "cooling/fraction_between": 0.3,
    }
    assert diagnose_rows([], [{"stage": "stage2", "step": i, **healthy} for i in range(1, 25)]) == []


# --- the commands ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "recipe.yaml").write_text("name: demo\n")
    rows, steps = squeezed()
    run.append("readings.jsonl", rows)
    run.append("metrics.jsonl", steps)
    return run.path


def test_diagnose_says_what_where_and_what_to_change(run, folder) -> None:
    said = run("diagnose", folder)
    assert said.code == 3
    assert "critical: squeezing:" in said.out
    assert "from step 20" in said.out
    assert "seen    delta_logp/chosen: -0.04 at step 20, below -0.02" in said.out
    assert "change  " in said.out
    said = run("diagnose", folder, "--json")
    assert said.code == 3
    found = json.loads(said.out)
    assert found["healthy"] is False
    assert {"name", "severity", "first_step", "evidence", "advice"} <= set(found["findings"][0])


def test_diagnose_of_a_healthy_run_and_of_none(run, tmp_path: Path) -> None:
    healthy = RunDir(tmp_path / "run")
    healthy.path.mkdir()
    (healthy.path / "recipe.yaml").write_text("name: demo\n")
    said = run("diagnose", healthy.path)
    assert (said.code, said.out.strip().endswith("there are no readings yet")) == (0, True)
    healthy.append("readings.jsonl", readings("delta_logp/chosen", {0: 0.0, 10: 0.01}))
    said = run("diagnose", healthy.path)
    assert (said.code, "healthy (2 readings up to step 10)" in said.out) == (0, True)
    assert json.loads(run("diagnose", healthy.path, "--json").out) == {"findings": [], "healthy": True}
    said = run("diagnose", tmp_path / "absent")
    assert said.code == 1
    assert "no run here" in said.err


def test_the_page_says_it_at_the_top(folder) -> None:
    page = render_report(folder)
    assert page.index("findings</b>") < page.index('id="headline"')
    assert "Probability moves from the responses" in page
    assert 'class="beyond"' in page
    assert 'http-equiv="refresh"' not in page


def test_watch_serves_the_run_as_it_grows_and_nothing_else(folder) -> None:
    before = sorted(p.name for p in folder.rglob("*"))
    with serve(folder, 0, 7, rest=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            assert server.server_address[0] == "127.0.0.1"

            def get(path: str, method: str = "GET", host: str | None = None) -> tuple[int, str]:
                connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
                connection.request(method, path, headers={} if host is None else {"Host": host})
                answer = connection.getresponse()
                body = answer.read().decode()
                connection.close()
                return answer.status, body

            status, page = get("/")
            assert status == 200
            assert '<meta http-equiv="refresh" content="7">' in page
            assert "<script" not in page
            assert "Probability moves" in page
            assert "The policy leaves its reference" not in page
            RunDir(folder).append("readings.jsonl", readings("kl", {99: 5.0}, low=4.0, high=6.0))
            assert "The policy leaves its reference" in get("/")[1]
            assert get("/recipe.yaml")[0] == 404
            assert get("/../recipe.yaml")[0] == 404
            assert get("/", host="elsewhere.example")[0] == 403
            assert get("/", method="POST")[0] == 501
        finally:
            server.shutdown()
            thread.join()
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_a_taken_port_is_said(folder) -> None:
    with serve(folder, 0, 5) as server, pytest.raises(RunDirError, match="choose another --port"):
        serve(folder, server.server_port, 5)


def test_conditions_need_one_bound() -> None:
    assert Condition(series="kl", above=0.5).holds(0.6)
    assert not Condition(series="kl", below=0.5).holds(0.6)
