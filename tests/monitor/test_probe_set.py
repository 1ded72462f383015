"""Probe sets: response types with their provenance, on disk and back, within a budget; and exact in one pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo.config import parse_recipe
from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.encode.encoding import encode_rows
from cwdpo.dynamics.settings import TYPES, ProbeSettings
from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.models.load import Policy
from cwdpo.models.sample import by_length
from cwdpo.monitor.instruments import instruments
from cwdpo.monitor.probe_pass import ProbeSet
from cwdpo.monitor.probe_set import (
    FEWEST,
    FEWEST_PROMPTS,
    FORWARD_BACKWARD,
    Load,
    build_prompts,
    make_responses,
    within_budget,
)
from cwdpo.monitor.responses import read_probe_file, stored_responses, to_jsonl
from cwdpo.negatives.base import normalised
from cwdpo.objectives.base import Scale
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.probes.base import PROBES
from cwdpo.probes.repetition import repeated
from cwdpo.records import Completion, Example, Message
from cwdpo.rundir import RunDir
from cwdpo.scoring import plain
from cwdpo.stage.calibration import draw as draw_for_calibration
from cwdpo.stage.stage import Stage
from cwdpo.worlds.shapes import Scene, judge, paraphrases, parse
from random_models import distributions

NO_OTHERS: dict[str, list[Example]] = {"other_train": [], "other_test": []}
RICH = Load(tokens=1e9, steps=100, shared=False)


def echo(asked: Sequence[Example]) -> list[str]:
    return [f"a small red circle top left and a large blue ring {e.id}" for e in asked]


def stage_of(
    encoder, examples, folder: Path, probes: Any = None, *, cut: int = 12, seed: int = 4, resume: bool = False
) -> Stage:
    """Stage 2 whose held-out examples are the first ``cut``; without a model, which no test of texts needs."""
    probes = probes or {"prompts": 8, "types": list(TYPES[:-1])}
    recipe = parse_recipe({"data": {"path": "x"}, "seed": seed, "probes": probes})
    policy = Policy(None, encoder.processor, "")
    return Stage(
        "stage2", recipe, policy, encoder, RunDir(folder), examples[cut:], examples[:cut], resume=resume
    )


@pytest.fixture
def built(encoder, examples, tmp_path):
    return build_prompts(stage_of(encoder, examples, tmp_path), RICH, echo)


def by_type(built, kind: str) -> dict[str, Any]:
    return {i: r for i, own in built.responses.items() for r in own if r.type == kind}


# --- response types -------------------------------------------------------------------------------------


def test_every_type_is_what_its_name_says_and_says_where_it_is_from(built, examples) -> None:
    of = {e.id: e for e in examples}
    assert len(built.examples) == 8
    for kind in TYPES[:-1]:
        assert by_type(built, kind), kind
    for i, r in by_type(built, "shuffled").items():
        assert sorted(r.text.split()) == sorted(of[i].chosen.text.split())
        assert not any(c.kind == "shuffled" for c in of[i].rejected)
    held = {e.id for e in examples[:12]}
    for kind, inside in (("other_train", False), ("other_test", True)):
        for i, r in by_type(built, kind).items():
            source = r.provenance.removeprefix("chosen of ")
            assert (source in held) is inside
            assert source != i
            assert of[source].chosen.text == r.text
    for i, r in by_type(built, "chosen_paraphrase").items():
        assert normalised(r.text) != normalised(of[i].chosen.text)
        assert judge(r.text, Scene.from_json(of[i].extra["scene"])).all_correct
    for i, r in by_type(built, "rejected_paraphrase").items():
        scene, text = Scene.from_json(of[i].extra["scene"]), of[i].rejected[0].text
        assert normalised(r.text) != normalised(text)
        assert judge(r.text, scene) == judge(text, scene)
    assert all("line" in r.provenance for r in by_type(built, "unrelated").values())
    assert all("start of the stage" in r.provenance for r in by_type(built, "chosen_initial").values())


def test_a_paraphrase_states_the_same_facts() -> None:
    text = "there is a small red circle top left and a large blue ring bottom right ."
    said = paraphrases(text)
    assert len(said) == 4 * 2 - 1
    facts = set(parse(text).objects)
    assert all(set(parse(t).objects) == facts for t in said)
    related = "a small red circle left of a large blue ring ."
    assert {parse(t).relations for t in paraphrases(related)} == {("left of",)}
    assert all(parse(t).objects == parse(related).objects for t in paraphrases(related))
    assert paraphrases("no sentence at all") == []


def test_other_data_gets_another_writers_caption_and_nothing_is_invented() -> None:
    prompt = (Message("user", (None, "Describe.")),)
    example = Example(
        "a", (), prompt, Completion("a cat"), (Completion("a dog"),), references=("a cat", "one small cat")
    )
    found = make_responses([example], NO_OTHERS, TYPES[:-1], {}, lambda asked: ["a bird" for _ in asked], 0)[
        "a"
    ]
    kinds = {r.type: r for r in found}
    assert kinds["chosen_paraphrase"].text == "one small cat"
    assert "reference 1" in kinds["chosen_paraphrase"].provenance
    assert not {"rejected_paraphrase", "other_train", "other_test"} & set(kinds)
    assert kinds["chosen_initial"].text == "a bird"
    alone = Example("b", (), prompt, Completion("cat"))
    found = make_responses([alone], NO_OTHERS, TYPES[:-1], {}, lambda asked: [" " for _ in asked], 0)["b"]
    assert {r.type for r in found} == {"unrelated"}


def test_responses_depend_on_the_seed_and_the_id_not_on_the_order(encoder, examples) -> None:
    def make(order: list[Example], seed: int) -> dict[str, Any]:
        return make_responses(
            order, {"other_train": examples, "other_test": examples}, TYPES[1:-1], {}, echo, seed
        )

    assert make(examples[:5], 1) == make(examples[:5][::-1], 1)
    assert make(examples[:5], 1) != make(examples[:5], 2)


# --- on disk --------------------------------------------------------------------------------------------


def test_a_stored_set_is_read_back_and_taken_on_resume(built, encoder, examples, tmp_path) -> None:
    path = tmp_path / "probes-stage2.jsonl"
    rows = read_jsonl(path)
    assert stored_responses(rows) == {e.id: built.responses.get(e.id, []) for e in built.examples}
    assert all(set(row["provenance"]) >= {"chosen", "negatives"} for row in rows)

    def refuse(asked: Sequence[Example]) -> list[str]:
        raise AssertionError("sampled again")

    again = build_prompts(stage_of(encoder, examples, tmp_path, seed=99, resume=True), RICH, refuse)
    assert again.responses == {e.id: built.responses.get(e.id, []) for e in built.examples}
    assert again.extras == built.extras


def test_rens_format_is_read_with_its_own_names(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "Say hello.", "chosen": "hello", "rejected": "no", "chosen_initial": "hi", "irr_train": "x y",
            "irr_test": "y z", "irr_hum": "the sea", "random_permute": "z", "chosen_gptsemantic": "hey",
            "chosen_gptformat": "Hello!", "reject_gptformat": "nope", "random_nonhum": "qwe rty",
        },
        {"prompt": "Again.", "chosen": "so", "rejected": "or", "provenance": {"shuffled": "by hand"}, "shuffled": "os"},
    ]  # fmt: skip
    path = tmp_path / "ren.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    examples, found = read_probe_file(path)
    first, second = (found[e.id] for e in examples)
    assert {(r.type, r.text) for r in first} == {
        ("chosen_initial", "hi"), ("other_train", "x y"), ("other_test", "y z"), ("unrelated", "the sea"),
        ("shuffled", "z"), ("chosen_paraphrase", "hey"), ("chosen_paraphrase", "Hello!"),
        ("rejected_paraphrase", "nope"), ("random_nonhum", "qwe rty"),
    }  # fmt: skip
    assert next(r for r in first if r.type == "unrelated").provenance == f"{path}, key 'irr_hum'"
    assert [(r.type, r.provenance) for r in second] == [("shuffled", "by hand")]
    # written again and read again, nothing is lost
    (tmp_path / "again.jsonl").write_text(to_jsonl(examples, found))
    examples_again, again = read_probe_file(tmp_path / "again.jsonl")
    assert [e.chosen.text for e in examples_again] == ["hello", "so"]
    assert {(r.type, r.text, r.provenance) for r in again[examples_again[0].id]} == {
        (r.type, r.text, r.provenance) for r in first
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [({"irr_train": 5}, "irr_train: must be a text"), ({"provenance": "me"}, "provenance: must map")],
)
def test_a_file_that_is_wrong_is_named_with_row_and_key(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", **more}) + "\n")
    with pytest.raises(DataError, match=rf"p\.jsonl:1.*{said}"):
        read_probe_file(path)


def test_unknown_types_are_refused_in_the_recipe() -> None:
    from cwdpo.errors import RecipeError

    with pytest.raises(RecipeError, match="did you mean 'shuffled'"):
        parse_recipe({"data": {"path": "x"}, "probes": {"types": ["shufled"]}})


def test_a_resumed_set_has_the_stored_prompts_whatever_the_budget_would_be_now(
    encoder, examples, tmp_path
) -> None:
    probes = {"prompts": 24, "types": ["shuffled", "on_policy"]}

    def build(load: Load, *, resume: bool) -> Any:
        return build_prompts(stage_of(encoder, examples, tmp_path, probes, cut=24, resume=resume), load, echo)

    poor = Load(tokens=1, steps=100, shared=True)
    first = build(poor, resume=False)
    assert len(first.encoded) == FEWEST_PROMPTS
    assert len(first.responses) == FEWEST
    assert build(poor, resume=True) == first
    longer = build(RICH, resume=True)
    assert (longer.examples, longer.extras) == (first.examples, first.extras)


# --- the budget -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_the_budget_decides_how_many_prompts_are_probed_and_have_every_type(
    encoder, examples, shared
) -> None:
    encoded = encoder.encode_all(examples[:20], "rejected", require_negative=False)[0]
    settings = ProbeSettings(every=10, types=("shuffled", "other_test"), budget=0.1)
    prompts = [len(e.prompt.input_ids) for e in encoded]
    chosen = [len(e.chosen.ids) for e in encoded]
    rejected = [[len(c.ids) for c in e.negatives] for e in encoded]
    pairs = [
        (1 if shared else 1 + len(r)) * p + c + sum(r)
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]
    typed = [2 * ((0 if shared else p) + c) for p, c in zip(prompts, chosen, strict=True)]
    passes = 100 / 10 + 3

    def load_for(tokens: float) -> Load:
        return Load(tokens * passes / (0.1 * FORWARD_BACKWARD * 100), 100, shared)

    assert within_budget(encoded, load_for(sum(pairs) + sum(typed[:9]) + 1), settings) == (20, 9)
    assert within_budget(encoded, load_for(sum(pairs) + sum(typed[:FEWEST]) + 1), settings) == (20, FEWEST)
    assert within_budget(encoded, load_for(sum(pairs[:18]) + sum(typed[:FEWEST]) + 1), settings) == (
        18,
        FEWEST,
    )
    assert within_budget(encoded, load_for(1), settings) == (FEWEST_PROMPTS, FEWEST)
    assert within_budget(encoded[:3], load_for(1), settings) == (3, 3)
    rich = Load(1e9, 100, shared)
    assert within_budget(encoded, rich, settings) == (20, 20)
    assert within_budget(encoded, rich, ProbeSettings(types=())) == (20, 0)


# --- one pass is exact ----------------------------------------------------------------------------------


def test_readings_equal_an_independent_plain_computation(model, encoder, examples, built) -> None:
    """Every response on its own, through the model's own logits; 1e-5 nats per token."""

    def mean_logps(example: EncodedExample, ids: Sequence[int]) -> float:
        alone = collate(
            [EncodedExample(example.id, example.prompt, type(example.chosen)(tuple(ids), span=(0, len(ids))))]
        )
        inputs, _ = plain.lay_out(model, alone)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0].double()
        first = len(example.prompt.input_ids)
        logp = logits[first - 1 : first - 1 + len(ids)].log_softmax(-1)
        return float(logp.gather(-1, torch.tensor(ids)[:, None]).mean())

    everything = [
        (kind, e, c.ids)
        for e in built.encoded
        for kind, c in [("chosen", e.chosen), *((c.kind, c) for c in (*e.negatives, *built.extras[e.id]))]
    ]
    probes = ProbeSet(built.encoded, model, batch_size=3, extras=built.extras)
    before = [mean_logps(e, ids) for _, e, ids in everything]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = [mean_logps(e, ids) for _, e, ids in everything]
    held = probes.measure(model, 5, Scale(beta=0.3))
    readings = {r.name: r for r in PROBES.build("delta_logp")(held)}
    for kind in {k for k, _, _ in everything}:
        moved = [a - b for (k, _, _), a, b in zip(everything, after, before, strict=True) if k == kind]
        found = readings[f"delta_logp/{kind}"]
        assert found.n == len(moved), kind
        assert found.value == pytest.approx(sum(moved) / len(moved), abs=1e-5), kind
        if len(moved) > 1:
            from scipy import stats

            low, high = stats.t.interval(0.95, len(moved) - 1, sum(moved) / len(moved), stats.sem(moved))
            assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    # the starting policy's own samples: distributions of exactly those tokens, from the same pass
    initial = [
        EncodedExample(e.id, e.prompt, c)
        for e in built.encoded
        for c in built.extras[e.id]
        if c.kind == "chosen_initial"
    ]
    expected = torch.cat([distributions(model, collate([e])) for e in initial])
    assert torch.allclose(held.own["chosen_initial"][0], expected, atol=1e-4)
    assert not torch.allclose(held.own["chosen_initial"][1], expected, atol=1e-4)
    # margins are those of the data's pairs: further responses make none
    assert readings["margin"].n == sum(len(e.negatives) for e in built.encoded)


def test_a_pass_without_gradient_takes_no_more_prompts_than_evaluation(
    model, encoder, examples, tmp_path, monkeypatch
) -> None:
    recipe = parse_recipe(
        {"data": {"path": "x"}, "probes": {"prompts": 6, "types": ["on_policy"], "max_new_tokens": 4},
         "calibration": {"samples": 5, "per_prompt": 1, "max_new_tokens": 4}, "stage2": {"objective": "sft"},
         "evaluation": {"batch_size": 2}}
    )  # fmt: skip
    encoded = encode_rows(encoder, examples[6:20], "rejected", require_negative=False)[0]
    policy = Policy(model, encoder.processor, "")
    stage = Stage("stage2", recipe, policy, encoder, RunDir(tmp_path), examples[6:20], examples[:6])
    sizes: list[int] = []

    def seen(*arguments: Any) -> list[list[int]]:
        made = by_length(*arguments)
        sizes.extend(map(len, made))
        return made

    monkeypatch.setattr("cwdpo.models.sample.by_length", seen)
    draw_for_calibration(stage, examples[6:20], CwDpo().calibrated)
    assert sizes == [2, 2, 1]
    found = instruments(stage, encoded)
    assert found is not None
    found.measure(model, 0)
    assert sum(sizes[3:]) > 0
    assert max(sizes) == 2
    parts = [len(part.batch.prompts) for part in found.probes._batches]
    assert sum(parts) == 6
    assert max(parts) == 2


def test_fresh_samples_are_measured_against_the_starting_weights(model, encoder, examples, tmp_path) -> None:
    recipe = parse_recipe(
        {"data": {"path": "x"}, "probes": {"prompts": 6, "types": ["on_policy", "shuffled"], "influence": 2,
         "max_new_tokens": 6}, "stage2": {"objective": "sft"}}
    )  # fmt: skip
    encoded = encode_rows(encoder, examples[6:20], "rejected", require_negative=False)[0]
    policy = Policy(model, encoder.processor, "")
    stage = Stage("stage2", recipe, policy, encoder, RunDir(tmp_path), examples[6:20], examples[:6])
    found = instruments(stage, encoded)
    assert found is not None
    at_start = {r.name: r for n in PROBES.names() for r in PROBES.build(n)(found.measure(model, 0))}
    assert at_start["delta_logp/on_policy"].value == pytest.approx(0, abs=1e-6)
    assert at_start["kl/on_policy"].value == pytest.approx(0, abs=1e-6)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    held = found.measure(model, 5)
    assert all(torch.equal(moved[n], p) for n, p in model.named_parameters())
    readings = {r.name: r for n in PROBES.names() for r in PROBES.build(n)(held)}
    own = [i for i, k in enumerate(held.kinds) if k == "on_policy"]
    assert len(own) == len(held.sampled["on_policy"]) == FEWEST
    assert readings["kl/on_policy"].value > 1e-4
    assert readings["influence/sign"].value >= 0.9
    # the start's values are the start's: put its weights back and score the same texts
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(weights[n])
    asked = [e for e in found.prompts.examples if e.id in found.prompts.responses]
    from cwdpo.monitor.probe_set import as_chosen

    again = as_chosen(encoder, asked, [text for text, _ in held.sampled["on_policy"]], "on_policy")
    with torch.no_grad():
        expected = sorted(float(plain.score(model, collate([e])).logp.sum()) for e in again)
    assert sorted(held.start_sum_logp[own].tolist()) == pytest.approx(expected, abs=1e-3)


def test_seq_rep_by_hand() -> None:
    assert repeated("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated("a a a a a a") == pytest.approx(2 / 3)
    assert repeated("a b c") == 0.0
