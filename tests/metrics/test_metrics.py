"""Metrics against pycocoevalcap's own pipeline, torchmetrics and hand counts; intervals against the truth."""

from __future__ import annotations

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from cwdpo.errors import DataError, MissingPackageError, RecipeError
from cwdpo.evaluation.paired import conclusion, holm, paired_difference, two_way_interval
from cwdpo.evaluation.run import parse_specs
from cwdpo.metrics import _coco
from cwdpo.metrics._coco import simple_tokens
from cwdpo.metrics.base import METRICS, Answer, Measured, by_prompt, difference, mean_of, ratio, reliability
from cwdpo.metrics.chair import mentioned
from cwdpo.metrics.multiple_choice import parsed, spelled
from cwdpo.records import Completion, Example, Message

java = pytest.mark.skipif(shutil.which("java") is None, reason="pycocoevalcap's own tokenizer starts Java")

REFERENCES = [
    [
        "A man riding a wave on top of a surfboard.",
        "A surfer rides a large wave.",
        "The man's on a blue board!",
    ],
    ["Two dogs are playing in the snow.", "A brown dog and a white dog run, don't they?"],
    ["A plate of food with broccoli and rice.", "Rice and broccoli on a plate."],
    ["A red double-decker bus drives down the street.", "The bus isn't moving."],
]
RESPONSES = [
    "a man rides a wave on a surfboard",
    "two dogs play in snow.",
    "a plate of rice",
    "a red bus on the street",
]


def example(number: int, chosen: str = "yes", references: list[str] | None = None, **extra: Any) -> Example:
    prompt = (Message("user", (None, "What is it?")),)
    return Example(
        str(number),
        (),
        prompt,
        Completion(chosen),
        references=tuple(references or ()),
        where=f"d.jsonl:{number}",
        extra=extra,
    )


def answered(texts: list[str], chosen: list[str]) -> list[Answer]:
    return [Answer(example(i, c), t) for i, (t, c) in enumerate(zip(texts, chosen, strict=True))]


def values(name: str | dict[str, Any], answers: list[Answer]) -> dict[str, float | None]:
    return {m.name: m.value for m in METRICS.build(name)(answers)}


CAPTIONED = [
    Answer(example(i, references=r), t) for i, (r, t) in enumerate(zip(REFERENCES, RESPONSES, strict=True))
]


# --- captions -------------------------------------------------------------------------------------------


def own_pipeline(references: dict[int, list[str]], responses: dict[int, list[str]]) -> tuple[float, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(references, responses)[0], Bleu(4).compute_score(
        references, responses, verbose=0
    )[0][3]


@java
def test_cider_and_bleu_equal_pycocoevalcaps_pipeline_with_its_tokenizer() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    references = tokenizer.tokenize({i: [{"caption": t} for t in r] for i, r in enumerate(REFERENCES)})
    responses = tokenizer.tokenize({i: [{"caption": t}] for i, t in enumerate(RESPONSES)})
    cider, bleu = own_pipeline(references, responses)
    found = values({"name": "cider", "tokenizer": "ptb"}, CAPTIONED) | values(
        {"name": "bleu4", "tokenizer": "ptb"}, CAPTIONED
    )
    assert found["cider"] == pytest.approx(100 * cider, rel=1e-12)
    assert found["bleu4"] == pytest.approx(100 * bleu, rel=1e-12)
    # The tokens without Java are the same ones here, contractions and hyphens included.
    assert {i: [simple_tokens(t) for t in r] for i, r in enumerate(REFERENCES)} == references


def test_cider_and_bleu_equal_pycocoevalcap_on_the_same_tokens() -> None:
    references = {i: [simple_tokens(t) for t in r] for i, r in enumerate(REFERENCES)}
    cider, bleu = own_pipeline(references, {i: [simple_tokens(t)] for i, t in enumerate(RESPONSES)})
    assert values("cider", CAPTIONED)["cider"] == pytest.approx(100 * cider, rel=1e-12)
    assert values("bleu4", CAPTIONED)["bleu4"] == pytest.approx(100 * bleu, rel=1e-12)
    assert 0 < bleu < 1
    assert cider > 0.5


def test_bleu_of_random_sets_equals_pycocoevalcaps() -> None:
    rng = np.random.default_rng(0)
    words = list("abcdefg")
    for _ in range(20):
        sets = [
            [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(rng.integers(1, 4))]
            for _ in range(6)
        ]
        texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(6)]
        answers = [
            Answer(example(i, references=r), t) for i, (r, t) in enumerate(zip(sets, texts, strict=True))
        ]
        cider, bleu = own_pipeline(dict(enumerate(sets)), {i: [t] for i, t in enumerate(texts)})
        assert values("bleu4", answers)["bleu4"] == pytest.approx(100 * bleu, rel=1e-9)
        assert values("cider", answers)["cider"] == pytest.approx(100 * cider, rel=1e-9)


@pytest.mark.slow
@java
def test_meteor_is_pycocoevalcaps() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    references = {i: [simple_tokens(t) for t in r] for i, r in enumerate(REFERENCES)}
    program = Meteor()
    _, scores = program.compute_score(references, {i: [simple_tokens(t)] for i, t in enumerate(RESPONSES)})
    program.meteor_p.stdout.close()
    program.meteor_p.stderr.close()
    assert values("meteor", CAPTIONED)["meteor"] == pytest.approx(100 * sum(scores) / 4, rel=1e-9)


@pytest.mark.parametrize("name", ["meteor", "spice", "cider"])
def test_without_java_the_feature_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_coco.shutil, "which", lambda program: None)
    spec = {"name": name, "tokenizer": "ptb"}
    with pytest.raises(MissingPackageError, match=rf"metric {name}.* Java .*default-jre-headless"):
        METRICS.build(spec)(CAPTIONED)


def test_without_the_package_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(
        MissingPackageError, match=r"metric cider needs the package .*pip install 'cwdpo\[captions\]'"
    ):
        METRICS.build("cider")(CAPTIONED)


def test_length_and_diversity_by_hand() -> None:
    answers = answered(["a red dog", "a red dog", "a cat"], ["x"] * 3)
    assert values("length", answers) == {"words": pytest.approx(8 / 3)}
    found = values("diversity", answers)
    assert found == {
        "distinct_1": pytest.approx(4 / 8), "distinct_2": pytest.approx(3 / 5),
        "distinct_responses": pytest.approx(2 / 3),
    }  # fmt: skip
    assert METRICS.build("diversity")(answers)[0].interval() is None


# --- hallucination --------------------------------------------------------------------------------------


def test_pope_by_hand() -> None:
    chosen = ["yes", "yes", "yes", "no", "no", "no", "no"]
    given = ["Yes, there is.", "no", "a dog", "No.", "There is not one", "yes", "hm"]
    # tp 1, fn 2 (one unread), tn 2, fp 2 (one unread)
    found = values("pope", answered(given, chosen))
    assert found["pope_accuracy"] == pytest.approx(3 / 7)
    assert found["pope_precision"] == pytest.approx(1 / 3)
    assert found["pope_recall"] == pytest.approx(1 / 3)
    assert found["pope_f1"] == pytest.approx(1 / 3)
    assert found["pope_yes_share"] == pytest.approx(3 / 7)
    assert found["pope_unread"] == pytest.approx(2 / 7)


def test_pope_equals_torchmetrics_where_everything_is_read() -> None:
    from torchmetrics.functional.classification import (
        binary_accuracy,
        binary_f1_score,
        binary_precision,
        binary_recall,
    )

    rng = np.random.default_rng(1)
    right, given = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    word = {0: "no", 1: "yes"}
    found = values("pope", answered([word[g] for g in given], [word[r] for r in right]))
    tensors = torch.tensor(given), torch.tensor(right)
    for name, theirs in {
        "accuracy": binary_accuracy,
        "precision": binary_precision,
        "recall": binary_recall,
        "f1": binary_f1_score,
    }.items():
        assert found[f"pope_{name}"] == pytest.approx(float(theirs(*tensors)), rel=1e-6)


def test_pope_wants_yes_or_no() -> None:
    with pytest.raises(DataError, match=r"d.jsonl:0: chosen: a POPE answer is yes or no, got 'a dog'"):
        values("pope", answered(["yes"], ["a dog"]))


def test_chair_by_hand() -> None:
    captions = ["a man with two dogs and a hot dog", "a cat on the couches", "an empty table"]
    objects = [["person", "dog"], ["cat", "tv"], ["dining table"]]
    answers = [
        Answer(example(i, objects=o), t) for i, (o, t) in enumerate(zip(objects, captions, strict=True))
    ]
    # named: person, dog, hot dog | cat, couch | nothing. Wrong: hot dog | couch
    assert values("chair", answers) == {
        "chair_i": pytest.approx(2 / 5), "chair_s": pytest.approx(2 / 3), "chair_recall": pytest.approx(3 / 5)
    }  # fmt: skip
    assert mentioned("a hot dog", {"hot dog": "hot dog", "dog": "dog"}) == {"hot dog"}
    with pytest.raises(DataError, match=r"d.jsonl:0: objects: CHAIR needs a list"):
        values("chair", [Answer(example(0), "a dog")])


def test_chair_with_a_file_of_words(tmp_path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("ring, circle, hoop\nsquare, box\n")
    answers = [Answer(example(0, objects=["ring"]), "a hoop and a box")]
    assert values({"name": "chair", "synonyms": str(file)}, answers)["chair_i"] == pytest.approx(1 / 2)


# --- multiple choice and calibration --------------------------------------------------------------------

OPTIONS = ["a cat", "a dog", "two dogs"]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1), ("(C)", 2), ("A. a cat", 0), ("The answer is B.", 1), ("Answer: (A)", 0), ("a dog", 1), ("A dog.", 1),
        ("I see two dogs here", 2), ("a cow", None), ("Dogs", None), ("", None), ("a cat or a dog", None),
    ],
)  # fmt: skip
def test_answers_are_read(text: str, index: int | None) -> None:
    assert parsed(text, OPTIONS) == index


def test_multiple_choice_by_hand() -> None:
    answers = [
        Answer(example(0, "a cat", options=OPTIONS), "a cat", (-1.0, -2.0, -4.0), (2, 2, 8)),
        Answer(example(1, "a cat", options=OPTIONS), "B", (-3.0, -2.0, -4.0), (2, 2, 8)),
        Answer(example(2, "two dogs", options=OPTIONS), "a bird", (-1.0, -2.0, -4.0), (2, 2, 8)),
    ]
    confidence = [
        math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-4)),
        math.exp(-2) / (math.exp(-3) + math.exp(-2) + math.exp(-4)),
    ]
    found = values({"name": "multiple_choice", "bins": 2}, answers)
    assert found["mc_likelihood"] == pytest.approx(1 / 3)
    assert found["mc_answer"] == pytest.approx(1 / 3)
    assert found["mc_unread"] == pytest.approx(1 / 3)
    # All three confidences lie in the upper bin; one of the three is right.
    assert found["answer_ece"] == pytest.approx(abs(2 * confidence[0] + confidence[1] - 1) / 3)
    by_mean = values({"name": "multiple_choice", "score": "mean"}, answers)
    # Per token the third option wins in all: -0.5 against -0.5 and -1.0 (the first of two equals), then -1.0
    assert by_mean["mc_likelihood"] == pytest.approx(2 / 3) or by_mean["mc_likelihood"] == pytest.approx(
        1 / 3
    )


def test_letters_are_scored_where_chosen_is_a_letter() -> None:
    assert spelled(Answer(example(0, "B", options=OPTIONS))) == ["A", "B", "C"]
    assert spelled(Answer(example(0, "(B)", options=OPTIONS))) == ["(A)", "(B)", "(C)"]
    assert spelled(Answer(example(0, "a dog", options=OPTIONS))) == OPTIONS
    with pytest.raises(DataError, match=r"chosen: 'a cow' is neither one of the options"):
        values("multiple_choice", [Answer(example(0, "a cow", options=OPTIONS), "", (0, 0, 0), (1, 1, 1))])
    with pytest.raises(DataError, match="options: a list of at least two texts"):
        values("multiple_choice", [Answer(example(0, "a cow"), "")])


def test_ece_equals_torchmetrics() -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(2)
    answers, everything = [], []
    for i in range(40):
        top1 = rng.random(rng.integers(1, 9)).astype(np.float32)
        correct = rng.random(len(top1)) < top1**2
        answers.append(Answer(example(i), top1=tuple(map(float, top1)), correct=tuple(map(bool, correct))))
        everything += zip(top1, correct, strict=True)
    confidence, correct = (torch.tensor(np.array(x)) for x in zip(*everything, strict=True))
    for bins in (5, 15):
        theirs = float(binary_calibration_error(confidence, correct.long(), n_bins=bins))
        assert values({"name": "token_ece", "bins": bins}, answers)["token_ece"] == pytest.approx(
            theirs, abs=1e-6
        )
    assert METRICS.build("token_ece")(answers)[0].n == len(everything)


def test_reliability_rows_are_the_bins_of_the_ece() -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator)
    correct = torch.rand(500, generator=generator) < confidence**2
    tokens = [(0, 200), (200, 500)]  # of two prompts
    answers = [
        Answer(example(i), top1=tuple(confidence[a:b].tolist()), correct=tuple(correct[a:b].tolist()))
        for i, (a, b) in enumerate(tokens)
    ]
    rows = reliability(METRICS.build("token_ece")(answers)[0])
    assert sum(r["n"] for r in rows) == 500
    ece = sum(r["n"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / 500
    assert ece == pytest.approx(
        float(binary_calibration_error(confidence, correct.long(), n_bins=15)), abs=1e-6
    )


# --- every metric ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in METRICS.names() if n not in ("spice", "meteor")])
def test_the_mean_of_nothing_is_missing(name: str) -> None:
    for measured in METRICS.build(name)([]):
        assert measured.value is None, measured.name
        assert measured.n == 0
        assert measured.interval() is None


def test_an_unknown_metric_or_setting_is_refused() -> None:
    with pytest.raises(LookupError, match=r"unknown metric 'cidr'; did you mean 'cider'\?"):
        METRICS.get("cidr")
    with pytest.raises(
        RecipeError, match=r"metric cider: unknown key 'tokeniser'; did you mean 'tokenizer'\?"
    ):
        METRICS.build({"name": "cider", "tokeniser": "ptb"})
    assert parse_specs(["cider, length", "{name: bleu4, tokenizer: ptb}"])[2] == {
        "name": "bleu4",
        "tokenizer": "ptb",
    }


# --- intervals ------------------------------------------------------------------------------------------


def test_samples_of_a_prompt_count_as_one_prompt() -> None:
    answers = [Answer(example(i // 4), "") for i in range(80)]
    once = [Answer(example(i), "") for i in range(20)]
    draws = np.random.default_rng(0).random(20)
    four = mean_of("x", answers, np.repeat(draws, 4).tolist())
    one = mean_of("x", once, draws.tolist())
    assert four.value == pytest.approx(one.value)
    assert four.interval() == pytest.approx(one.interval())
    assert (four.n, len(four.parts)) == (80, 20)


def test_the_interval_of_a_mean_equals_scipys() -> None:
    from scipy import stats

    draws = np.random.default_rng(1).random(50)
    measured = mean_of("x", [Answer(example(i), "") for i in range(50)], draws.tolist())
    theirs = stats.bootstrap(
        (draws,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0), batch=200
    ).confidence_interval
    assert measured.interval() == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def covered(statistic: str, trials: int, seed: int) -> float:
    """Share of intervals that hold the truth: 200 prompts of two samples each, correlated within the prompt."""
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(trials):
        skill = rng.beta(2, 2, 200)
        rows = (rng.random((200, 2)) < skill[:, None]).astype(float)
        answers = [Answer(example(i // 2), "") for i in range(400)]
        if statistic == "mean":
            measured, truth = mean_of("x", answers, rows.reshape(-1).tolist()), 0.5
        else:  # a ratio of sums: precision among answers that say yes
            yes = (rng.random(400) < 0.6).astype(float)
            parts, prompts = by_prompt(answers, list(zip(yes * rows.reshape(-1), yes, strict=True)))
            measured, truth = Measured("x", parts, prompts, 400, ratio), 0.5
        low, high = measured.interval(seed=int(rng.integers(1 << 30))) or (1, 0)
        hits += low <= truth <= high
    return hits / trials


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["mean", "ratio"])
def test_intervals_cover_the_truth(statistic: str) -> None:
    assert 0.93 <= covered(statistic, 1500, seed=5) <= 0.97


def test_a_difference_is_paired() -> None:
    """Hard prompts are hard for both: paired, a small difference shows that unpaired intervals would hide."""
    rng = np.random.default_rng(3)
    level = rng.random(60) * 10
    answers = [Answer(example(i), "") for i in range(60)]
    ours = mean_of("x", answers, (level + 0.2 + 0.1 * rng.standard_normal(60)).tolist())
    theirs = mean_of("x", answers, level.tolist())
    found = difference(ours, theirs)
    assert found["low"] < 0.2 < found["high"]
    assert found["high"] - found["low"] < 0.1
    assert found["p"] < 0.01
    low, high = ours.interval() or (0, 0)
    assert high - low > 1
    same = difference(theirs, theirs)
    assert (same["value"], same["p"]) == (0, 1.0)


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    rng = np.random.default_rng(4)
    answers = [Answer(example(i), "") for i in range(40)]
    alarms = 0
    for _ in range(200):
        both = rng.integers(0, 2, (2, 40)).astype(float)
        alarms += (
            difference(mean_of("x", answers, both[0].tolist()), mean_of("x", answers, both[1].tolist()))["p"]
            < 0.05
        )
    assert alarms / 200 <= 0.09


def test_different_prompts_are_not_paired() -> None:
    a = mean_of("x", [Answer(example(i), "") for i in range(3)], [1.0, 2.0, 3.0])
    b = mean_of("x", [Answer(example(i), "") for i in range(4)], [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(DataError, match=r"x: the two runs answer different prompts \(3 and 4\)"):
        difference(a, b)


# --- differences over seeds -----------------------------------------------------------------------------


def test_a_two_way_interval_holds_for_other_seeds_and_other_pictures() -> None:
    """Its variance is that of seeds plus that of pictures: exact where every cell is the sum of two effects."""
    rng = np.random.default_rng(3)
    seeds, pictures = rng.normal(0, 0.3, 12), rng.normal(0, 1.0, 200)
    differences = 0.1 + seeds[:, None] + pictures[None]
    low, high = two_way_interval([*differences, None], [*np.zeros((12, 200)), [0.0] * 200], resamples=4000)
    half = 1.96 * math.sqrt(seeds.var() / 12 + pictures.var() / 200)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(differences.mean(), abs=0.02)
    assert two_way_interval([[1.0, 1.0]], [[0.5, 0.5]]) == (0.5, 0.5)
    assert two_way_interval([None], [[1.0]]) is None


def test_paired_difference_equals_scipys_paired_t_test() -> None:
    from scipy import stats

    rng = np.random.default_rng(6)
    ours, theirs = rng.random(8).tolist(), rng.random(8).tolist()
    expected = stats.ttest_rel(ours, theirs)
    found = paired_difference([*ours, None], [*theirs, 1.0])
    assert found["n"] == 8
    assert found["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert paired_difference([1.0, 2.0], [0.0, 1.0])["p"] is None, "equal differences leave nothing to go by"
    assert paired_difference([None], [1.0])["mean"] is None


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02], nan_ok=True)
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_keeps_the_family_wise_error() -> None:
    rng = np.random.default_rng(7)
    false = sum(min(p for p in holm(rng.random(7).tolist()) if p is not None) < 0.05 for _ in range(2000))
    assert 0.03 < false / 2000 < 0.07


def test_words_need_a_corrected_p() -> None:
    assert conclusion({"mean": 0.1}, "higher", 0.01) == "better"
    assert conclusion({"mean": 0.1}, "lower", 0.01) == "worse"
    assert conclusion({"mean": 0.1}, "higher", 0.05) == "no clear difference"
    assert conclusion({"mean": 0.1}, "none", 0.01) == "differs"
    assert conclusion({"mean": 0.1}, "none", None) == "no clear difference"
    assert conclusion({"mean": None}, "higher", None) == "not measured"
