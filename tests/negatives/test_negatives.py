from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import cwdpo.negatives.sources
from cwdpo.data.encode.span import differing_span
from cwdpo.errors import DataError, RecipeError, UnknownComponentError
from cwdpo.negatives.base import NEGATIVES, identity, known_true, normalised
from cwdpo.negatives.lexicon import KINDS, load_lexicon
from cwdpo.negatives.mix import attach_negatives
from cwdpo.negatives.sources.dataset import DatasetNegatives
from cwdpo.negatives.sources.other_prompt import OtherPromptNegatives
from cwdpo.negatives.sources.perturb import PerturbNegatives, edits
from cwdpo.negatives.sources.shuffled import ShuffledNegatives
from cwdpo.records import Completion, Example, ImageRef, Message

CAPTIONS = (
    "A brown dog is running on the beach .",
    "Two men in blue shirts sit on a wooden bench.",
    "a small red circle left of a large blue square",
    "The girl wearing a green hat stands in front of a tree",
    "An orange cat sleeps under a table .",
    "Three boys play soccer in a grassy field .",
)


def make(text: str, name: str = "e", references: tuple[str, ...] = (), **more: object) -> Example:
    fields = {
        "images": (ImageRef(path=Path(f"{name}.png")),),
        "prompt": (Message("user", (None, "Describe.")),),
    }
    return Example(id=name, chosen=Completion(text), references=references, **{**fields, **more})  # type: ignore[arg-type]


POOL = [
    make(
        t,
        f"e{i}",
        rejected=(
            Completion(f"wrong {i}", kind="hard"),
            Completion(f"off {i}", kind="easy"),
            Completion(f"said {i}", "on_policy", "on_policy"),
        ),
    )
    for i, t in enumerate(CAPTIONS)
]


def targets(text: str, *references: str, lexicon: str = "") -> set[tuple[str, str]]:
    return {(e.old, e.new) for e in edits(make(text, references=references), load_lexicon(lexicon))}


def one(text: str, *references: str, seed: int = 0, **options: object) -> list[Completion]:
    source = PerturbNegatives(**options)  # type: ignore[arg-type]
    return source.completions(make(text, references=references), [], random.Random(seed))


# --- every source -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEGATIVES.names())
def test_every_source_keeps_the_contract(name: str) -> None:
    source = NEGATIVES.build(name)
    offered = 0
    for item in POOL:
        first = source.completions(item, POOL, random.Random(3))
        assert first == source.completions(item, POOL, random.Random(3))
        assert len(first) == len({identity(c) for c in first})
        assert all((c.images is not None) == source.image_side for c in first)
        texts = {normalised(c.text) for c in first if c.images is None}
        assert not texts & known_true(item)
        assert all(c.kind and c.origin in ("dataset", "perturbed", "on_policy") for c in first)
        assert all(c.made for c in first if c not in item.rejected)
        offered += len(first)
    assert offered >= len(POOL)
    with pytest.raises(RecipeError, match="unknown key 'no_such_setting'"):
        NEGATIVES.build({"name": name, "no_such_setting": 1})


def test_shipped_names() -> None:
    assert {"dataset", "other_prompt", "perturb", "shuffled"} <= set(NEGATIVES.names())
    assert not {"base", "_mix", "_span", "_lexicon", "mix"} & set(NEGATIVES.names())


def test_a_file_dropped_into_the_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty_answer.py").write_text(
        "from cwdpo.negatives.base import NegativeSource\n"
        "from cwdpo.records import Completion\n"
        "class EmptyAnswer(NegativeSource):\n"
        "    text: str = 'nothing'\n"
        "    def completions(self, example, pool, rng):\n"
        "        return [Completion(self.text, 'perturbed', 'easy', {'by': 'me'})]\n"
    )
    assert "empty_answer" not in NEGATIVES.names()
    monkeypatch.setattr(
        cwdpo.negatives.sources, "__path__", [*cwdpo.negatives.sources.__path__, str(tmp_path)]
    )
    monkeypatch.delitem(sys.modules, "cwdpo.negatives.sources.empty_answer", raising=False)
    assert "empty_answer" in NEGATIVES.names()
    kept, counts = attach_negatives(POOL, {"empty_answer": 1}, 1, seed=0)
    assert {c.text for e in kept for c in e.rejected} == {"nothing"}
    assert counts.by_source == {"empty_answer": len(POOL)}


def test_the_sources_import_no_torch() -> None:
    code = "import sys, cwdpo.negatives.mix as m; m.NEGATIVES.build('perturb'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_dataset_gives_what_came_with_the_data() -> None:
    assert DatasetNegatives().completions(POOL[0], POOL, random.Random(0)) == list(POOL[0].rejected)
    assert DatasetNegatives().completions(make("a dog"), POOL, random.Random(0)) == []


def test_other_prompt_takes_another_picture_and_another_text() -> None:
    source = OtherPromptNegatives()
    found = source.completions(POOL[0], POOL, random.Random(0))
    assert found[0].kind == "easy"
    assert found[0].origin == "dataset"
    assert {e.id: e.chosen.text for e in POOL}[found[0].made["of"]] == found[0].text
    item = make("a dog", "x", references=("A  cat",))
    same_picture = make("a horse", "y", images=item.images)
    same_text = make("A Dog", "z")
    a_reference = make("a cat", "w")
    pool = [item, same_picture, same_text, a_reference]
    assert source.completions(item, pool, random.Random(0)) == []
    usable = make("a cow", "v")
    taken = {
        source.completions(item, [*pool * 40, usable], random.Random(seed))[0].made["of"]
        for seed in range(20)
    }
    assert taken == {"v"}
    assert source.completions(item, [], random.Random(0)) == []


def test_other_prompt_without_pictures_wants_another_prompt() -> None:
    item = make("four", "x", images=(), prompt=(Message("user", ("2 + 2?",)),))
    same = make("4", "y", images=(), prompt=(Message("user", ("2 + 2?",)),))
    other = make("five", "z", images=(), prompt=(Message("user", ("2 + 3?",)),))
    source = OtherPromptNegatives()
    assert source.completions(item, [item, same], random.Random(0)) == []
    assert source.completions(item, [item, same, other], random.Random(0))[0].text == "five"


def test_shuffled_keeps_the_words_and_changes_their_order() -> None:
    source = ShuffledNegatives()
    for seed in range(30):
        (found,) = source.completions(make("red ball"), [], random.Random(seed))
        assert found.text == "ball red"
    (found,) = source.completions(POOL[0], [], random.Random(0))
    words = POOL[0].chosen.text.split()
    assert found.text.split() == [words[i] for i in found.made["order"]]
    assert Counter(found.text.split()) == Counter(words)
    assert (found.kind, found.origin) == ("shuffled", "perturbed")
    for text in ("", "dog", "dog dog dog"):
        assert source.completions(make(text), [], random.Random(0)) == []
    assert source.completions(make("red ball", references=("Ball red",)), [], random.Random(0)) == []


# --- perturb ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "old", "new"),
    [
        ("a dog in a red jacket", "colour", "red", "blue"),
        ("a large dog", "size", "large", "small"),
        ("a wooden fence", "material", "wooden", "metal"),
        ("two dogs play", "number", "two", "three"),
        ("two dogs play", "object", "dogs", "cats"),
        ("a man by a truck", "object", "man", "woman"),
        ("he throws a frisbee", "object", "frisbee", "ball"),
        ("a boy behind a tree", "relation", "behind", "in front of"),
        ("a cup on a table", "relation", "on", "under"),
        ("a dog running in the snow", "action", "running", "sleeping"),
        ("a small cyan circle above a large pink ring", "colour", "cyan", "red"),
        ("a small cyan circle above a large pink ring", "object", "circle", "cross"),
        ("a small cyan circle above a large pink ring", "object", "ring", "diamond"),
        ("a small cyan circle above a large pink ring", "relation", "above", "below"),
        ("a red cross left of a blue square", "relation", "left of", "right of"),
        ("a red cross at the top left", "relation", "top", "bottom"),
        ("bottom right", "relation", "right", "left"),
        ("one", "number", "one", "two"),
        ("Yes.", "answer", "Yes", "No"),
    ],
)
def test_kinds_and_their_words(text: str, kind: str, old: str, new: str) -> None:
    found = {(e.kind, e.old, e.new) for e in edits(make(text), load_lexicon())}
    assert (kind, old, new) in found


def test_words_of_another_sense_are_left_alone() -> None:
    assert not any(old == "no" for old, _ in targets("A man with no shirt climbs"))
    assert not any(old == "left" for old, _ in targets("The man left the house"))
    assert not any(old == "cross" for old, _ in targets("People cross the street"))
    assert not any(old == "park" for old, _ in targets("a park bench"))
    assert not any(old == "top" for old, _ in targets("A man in a top hat"))
    assert not any(old == "one" for old, _ in targets("one of the dogs"))
    assert not any(old == "on" for old, _ in targets("a dog on its back"))
    assert not any(old == "run" for old, _ in targets("a dog goes for a run"))
    assert ("man", "woman") in targets("a man and a dog")
    assert ("man", "woman") not in targets("a man and his dog")
    assert not any(old == "black" for old, _ in targets("a black man"))
    assert not any("ball" in new for old, new in targets("a tennis ball") if old == "tennis")


def test_world_edits_stay_in_the_words_of_the_world() -> None:
    words = "red orange yellow green cyan blue purple pink circle square triangle diamond cross ring"
    more = "small large top bottom left right of above below one two three yes no a an"
    world = {*words.split(), *more.split()}
    texts = ["a small red circle left of a large orange square", "a large cyan cross above a small pink ring"]
    texts += ["a small green triangle top left", "yes", "two", "blue", "bottom right", "three"]
    for text in texts:
        found = edits(make(text), load_lexicon())
        assert found, text
        for edit in found:
            assert set(edit.apply(text).split()) <= world, (text, edit)


def test_articles_and_capitals_follow_the_edit() -> None:
    assert ("an orange", "a red") in targets("an orange shirt")
    assert ("An orange", "A red") in targets("An orange shirt")
    assert ("a red", "an orange") in targets("a red shirt")
    assert ("A child", "An adult") in targets("A child runs")
    assert ("Two", "Three") in targets("Two dogs")
    assert ("DOG", "CAT") in targets("A DOG")
    assert ("a backpack", "an umbrella") in targets("with a backpack")
    # An article at the end of another sentence part is not the article of the word.
    assert ("red", "orange") in targets("vitamin a, red shirt")


def test_made_tells_the_edit_exactly() -> None:
    text = "An orange cat sleeps under a table ."
    found = one(text, per_example=50)
    assert len(found) > 8
    for negative in found:
        made = negative.made
        assert text[made["start"] : made["end"]] == made["from"]
        assert text[: made["start"]] + made["to"] + text[made["end"] :] == negative.text
        assert made["edit"] in KINDS
        assert text.split()[made["word"]].lower() in made["from"].lower()
        assert (negative.kind, negative.origin) == ("hard", "perturbed")
    first = [n.made["edit"] for n in found[:3]]
    assert len(set(first)) == 3  # kinds in turns


def test_an_edit_that_a_reference_speaks_for_is_refused() -> None:
    text = "a dog runs"
    assert ("dog", "cat") in targets(text)
    assert ("dog", "cat") not in targets(text, "some cats play")  # another form
    assert ("dog", "cat") not in targets(text, "a Kitten plays")  # may mean the same
    assert ("dog", "fox") in targets(text, "a Kitten plays")
    assert ("large", "small") not in targets("a large dog", "a tiny dog")
    assert ("man", "woman") in targets("a man by a truck", "a man and a dog")
    assert ("man", "woman") not in targets("a man by a truck", "an adult and a dog")  # a wider word
    assert ("boy", "girl") not in targets("a boy", "two people")
    assert ("on", "next to") not in targets("a cup on a table", "a cup near a table")
    assert one(text, "a cat, a fox, a goat and a horse walk or crawl", seed=1) == []


def test_a_result_equal_to_a_reference_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lexicon.yaml"
    file.write_text("object:\n  - [gizmo, ice-pick]\n")
    # The new word is hidden from the word check by the spacing; the text is equal all the same.
    assert one("agizmo gizmo", lexicon=str(file))[0].text == "agizmo ice-pick"
    assert one("agizmo gizmo", "AGIZMO ice - pick", lexicon=str(file)) == []


def test_a_word_is_not_repeated_beside_itself() -> None:
    assert ("black", "white") not in targets("a black and white dog")
    assert ("black", "grey") in targets("a black and white dog")
    assert ("man", "woman") not in targets("a man and a woman")


def test_never_synonyms() -> None:
    for old, new in targets("a large gray dog on top of a sofa near a bike"):
        assert (old, new) not in {("gray", "grey"), ("large", "huge"), ("sofa", "couch"), ("bike", "bicycle")}


def test_kinds_and_per_example() -> None:
    text = "Two brown dogs are running on the beach"
    for kind in ("colour", "object", "action", "number"):
        found = one(text, kinds=(kind,), per_example=3)
        assert len(found) == 3
        assert {n.made["edit"] for n in found} == {kind}
    assert one(text, kinds=("answer",)) == []
    assert len(one(text)) == 1
    assert len({one(text, seed=s)[0].text for s in range(30)}) > 8
    for wrong in ({"kinds": ("hue",)}, {"kinds": ()}, {"per_example": 0}):
        with pytest.raises(ValidationError):
            PerturbNegatives(**wrong)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.integers(0, 9))
@with_example("", 0)
@with_example("An", 0)
@with_example("İ dog", 0)
def test_any_text_is_survived(text: str, seed: int) -> None:
    for found in one(text, seed=seed, per_example=3):
        assert normalised(found.text) != normalised(text)


# --- the lexicon --------------------------------------------------------------------------------------


def test_an_extension_adds_to_the_shipped_lexicon(tmp_path: Path) -> None:
    file = tmp_path / "ct.yaml"
    file.write_text(
        "lists: {organ: [lung, liver]}\n"
        "keep: [dog ear, $organ cat]\n"
        "same: [[nodule/nodules, lump/lumps]]\n"
        "object:\n"
        "  - words: [nodule/nodules, fracture/fractures, lump/lumps]\n"
        "    not_after: [$organ]\n"
        "  - {from: [ward], to: [on], alone: false}\n"
    )
    text = "a nodule and a dog"
    assert ("nodule", "fracture") in targets(text, lexicon=str(file))
    assert ("dog", "cat") in targets(text, lexicon=str(file))
    assert ("nodule", "lump") not in targets(text, lexicon=str(file))
    assert ("nodule", "fracture") not in targets(text)
    assert not targets("lung nodule", lexicon=str(file))
    assert not targets("a dog ear", lexicon=str(file))
    assert not targets("liver cat", lexicon=str(file))
    assert targets("the ward", lexicon=str(file)) == {("ward", "on")}  # a word, not the value true
    assert not targets("ward", lexicon=str(file))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("colours: [[red, blue]]", r"unknown key 'colours'; did you mean 'colour'"),
        ("- red", r"'the file': must be a mapping"),
        ("colour: red", r"key 'colour': must be a list of groups"),
        ("colour: [red]", r"key 'colour\[0\]': must be a mapping"),
        ("colour: [[red, [blue]]]", r"key 'colour\[0\].words': must be a list of words"),
        ("colour: [[red, '']]", r"key 'colour\[0\].words': must be a list of words"),
        ("object: [[dog/dogs, cat]]", r"key 'object\[0\]': entries need the same number of forms"),
        ("object: [{words: [dog, cat], befor: [x]}]", r"unknown key 'befor'; did you mean 'before'"),
        ("object: [{from: [dog]}]", r"key 'object\[0\]': needs either 'words' or both 'from' and 'to'"),
        ("object: [{words: [a, b], alone: 1}]", r"key 'object\[0\].alone': must be true or false"),
        ("object: [{words: [a, b], after: [$dett]}]", r"'\$dett' names no list; did you mean 'det'"),
        ("same: [x]", r"key 'same\[0\]': must be a list of words"),
        ("covers: [a]", r"key 'covers': must be a mapping"),
        ("covers: {a: b}", r"key 'covers.a': must be a list of words"),
        ("lists: {a: b}", r"key 'lists.a': must be a list of words"),
        ("colour: [", r"not valid YAML"),
    ],
)
def test_a_malformed_lexicon_names_file_and_key(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=complaint) as error:
        one("a dog", lexicon=str(file))
    assert str(file) in str(error.value)


def test_a_missing_lexicon_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.yaml: cannot be read"):
        one("a dog", lexicon=str(tmp_path / "nowhere.yaml"))


# --- the mix ------------------------------------------------------------------------------------------

MIX = {"perturb": 0.5, "other_prompt": 0.3, "shuffled": 0.2}


def test_a_mix_does_not_depend_on_order_and_is_reproducible() -> None:
    kept, counts = attach_negatives(POOL, MIX, 3, seed=7)
    again, _ = attach_negatives(POOL[::-1], MIX, 3, seed=7)
    assert kept == again[::-1]
    assert [e.id for e in kept] == [e.id for e in POOL]
    assert attach_negatives(POOL, MIX, 3, seed=8)[0] != kept
    without_pool = {"perturb": 0.5, "shuffled": 0.5}
    alone, _ = attach_negatives(POOL[:1], without_pool, 3, seed=7)
    assert alone[0] == attach_negatives(POOL, without_pool, 3, seed=7)[0][0]
    assert counts.examples == len(POOL)
    assert sum(counts.by_source.values()) == sum(counts.by_kind.values()) == 3 * len(POOL)
    for item in kept:
        texts = [normalised(c.text) for c in item.rejected]
        assert len(set(texts)) == 3
        assert [c.made["draw"] for c in item.rejected] == [0, 1, 2]
        assert {c.made["seed"] for c in item.rejected} == {7}
        assert all(c.made["source"] in MIX for c in item.rejected)


def test_shares_are_met() -> None:
    many = [make(f"{CAPTIONS[i % 6]} number {i}", f"m{i}") for i in range(400)]
    _, counts = attach_negatives(many, MIX, 2, seed=0, gentle="none")
    total = sum(counts.by_source.values())
    assert total == 800
    for name, share in MIX.items():
        assert abs(counts.by_source[name] / total - share) < 0.06  # over three standard deviations
    assert set(counts.by_kind) == {"hard", "easy", "shuffled"}


def test_a_source_that_has_nothing_passes_on_and_the_rest_is_dropped() -> None:
    items = [make("zzz", "a"), make("zzz yyy", "b"), make("a dog", "c")]
    kept, counts = attach_negatives(items, {"perturb": 0.9, "shuffled": 0.1}, 1, seed=0)
    assert [e.id for e in kept] == ["b", "c"]
    assert kept[0].rejected[0].kind == "shuffled"
    assert counts.dropped == 1
    assert counts.without_gentle == 1
    _, counts = attach_negatives(items[1:2], {"perturb": 0.9, "shuffled": 0.1}, 4, seed=0)
    assert counts.short == 1


def test_dataset_alone_keeps_all() -> None:
    kept, counts = attach_negatives([*POOL, make("a dog", "bare")], {"dataset": 1.0}, None, seed=0)
    assert [e.rejected for e in kept] == [e.rejected for e in POOL]
    assert counts.by_source == {"dataset": 18}
    assert counts.by_kind == {"hard": 6, "easy": 6, "on_policy": 6}
    assert counts.dropped == 1
    assert counts.short == 0
    kept, _ = attach_negatives(POOL, {"dataset": 1.0}, 1, seed=0)
    assert all(e.rejected[0] in POOL[i].rejected and len(e.rejected) == 1 for i, e in enumerate(kept))


def test_gentle_negatives() -> None:
    own = make("a dog", "own", gentle=(Completion("a fog", kind="typo"),), rejected=(Completion("no"),))
    bare = make("a large dog", "bare", rejected=(Completion("no"),))
    mix = {"dataset": 1.0}

    def gentle(how: str) -> tuple[list[str], Mapping[str, int], int]:
        kept, counts = attach_negatives([own, bare], mix, None, seed=1, gentle=how)
        edits_made = [e.gentle[0].made.get("edit", "own") if e.gentle else "" for e in kept]
        return edits_made, counts.gentle_by_kind, counts.without_gentle

    made, kinds, without = gentle("auto")
    assert made[0] == "own"
    assert made[1] in ("object", "size")
    assert kinds == {"typo": 1, made[1]: 1}
    assert without == 0
    assert gentle("dataset") == (["own", ""], {"typo": 1}, 1)
    assert "own" not in gentle("perturb")[0]
    assert gentle("none") == (["", ""], {}, 2)
    three = {"perturb": PerturbNegatives(per_example=3)}
    kept, _ = attach_negatives([bare], mix, None, seed=1, gentle="perturb", sources=three)
    assert len(kept[0].gentle) == 3


def test_only_the_first_examples_get_negatives() -> None:
    class Asking(PerturbNegatives):
        def prepare(self, examples: Sequence[Example]) -> None:
            asked.extend(e.id for e in examples)

    asked: list[str] = []
    mix, sources = {"perturb": 1.0}, {"perturb": Asking()}
    every, _ = attach_negatives(POOL, mix, 1, seed=3, gentle="perturb")
    some, counts = attach_negatives(POOL, mix, 1, seed=3, gentle="perturb", sources=sources, first=2)
    assert list(some[:2]) == list(every[:2])
    assert list(some[2:]) == list(POOL[2:])
    assert asked == [e.id for e in POOL[:2]], "a writer is paid for these only"
    assert counts.by_source == {"perturb": 2}
    assert list(attach_negatives(POOL, mix, 1, seed=3, gentle="perturb", first=len(POOL))[0]) == list(every)


@pytest.mark.parametrize(
    ("mix", "per_prompt", "gentle", "complaint"),
    [
        ({"perturb": -0.5}, 1, "auto", r"mix\.perturb: a share must be"),
        ({"perturb": float("nan")}, 1, "auto", r"mix\.perturb: a share must be"),
        ({"perturb": 0.0}, 1, "auto", "positive share"),
        ({}, 1, "auto", "positive share"),
        ({"dataset": 0.5, "perturb": 0.5}, None, "auto", "per_prompt: must be a number"),
        ({"perturb": 1.0}, 0, "auto", "per_prompt: must be at least 1"),
        ({"perturb": 1.0}, 1, "autoo", "did you mean 'auto'"),
    ],
)
def test_a_mix_that_cannot_be(
    mix: dict[str, float], per_prompt: int | None, gentle: str, complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        attach_negatives(POOL, mix, per_prompt, seed=0, gentle=gentle)


def test_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(UnknownComponentError, match="did you mean 'perturb'"):
        attach_negatives(POOL, {"pertrub": 1.0}, 1, seed=0)


# --- the differing span -------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 2), max_size=9)


@pytest.mark.parametrize(
    ("chosen", "rejected", "span"),
    [
        ([1, 2, 3], [1, 9, 3], (1, 2)),
        ([1, 2, 3], [1, 9, 9, 3], (1, 3)),
        ([1, 2, 3, 4], [1, 2, 3, 4], (0, 4)),
        ([1, 2, 3, 4], [1, 4], (1, 2)),  # a deletion: the token after it
        ([1, 2, 3, 4], [1, 2], (1, 2)),  # at the end: the last token
        ([1, 2], [1, 2, 3], (2, 3)),
        ([1, 1], [1, 1, 1], (2, 3)),  # the prefix comes first, nothing is counted twice
        ([1, 1, 1], [1, 1], (1, 2)),
        ([], [5, 6], (0, 2)),
        ([1, 2], [3, 4], (0, 2)),
    ],
)
def test_span_by_hand(chosen: list[int], rejected: list[int], span: tuple[int, int]) -> None:
    assert differing_span(chosen, rejected) == span


def test_span_of_nothing() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        differing_span([1], [])


@given(TOKENS, TOKENS.filter(bool))
def test_span_is_the_smallest_range_that_explains_the_difference(
    chosen: list[int], rejected: list[int]
) -> None:
    start, end = differing_span(chosen, rejected)
    assert 0 <= start < end <= len(rejected)
    if chosen == rejected:
        assert (start, end) == (0, len(rejected))
        return
    prefix, suffix = rejected[:start], rejected[end:]
    assert chosen[: len(prefix)] == prefix
    assert not suffix or chosen[-len(suffix) :] == suffix
    deletion = len(rejected) < len(chosen) and (end - start) == 1
    if not deletion:
        assert len(prefix) + len(suffix) <= len(chosen)
        assert start == len(chosen) or rejected[start] != chosen[start]  # no longer prefix
        left = len(chosen) - len(suffix)
        assert left == start or rejected[end - 1] != chosen[left - 1]  # no longer suffix


@given(TOKENS, st.integers(3, 5), TOKENS, st.integers(6, 8))
def test_span_of_one_replaced_token(before: list[int], old: int, after: list[int], new: int) -> None:
    assert differing_span([*before, old, *after], [*before, new, *after]) == (len(before), len(before) + 1)


# --- real captions ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "CWDPO_PHOTOS" not in os.environ, reason="CWDPO_PHOTOS names no folder with captions.jsonl"
)
def test_real_captions_yield_edits() -> None:
    lines = (Path(os.environ["CWDPO_PHOTOS"]) / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    source = PerturbNegatives()
    asked = made = 0
    for row, line in enumerate(lines):
        captions = json.loads(line)["captions"]
        for i, text in enumerate(captions):
            item = make(text, f"{row}.{i}", references=tuple(captions[:i] + captions[i + 1 :]))
            found = source.completions(item, [], random.Random(item.id))
            asked += 1
            made += len(found)
            assert not {normalised(c.text) for c in found} & {normalised(c) for c in captions}
    assert made >= 0.95 * asked


# --- swaps of two objects' attributes, and negation ------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("A man in a red shirt holds a blue umbrella .", "A man in a blue shirt holds a red umbrella ."),
        ("An orange car behind a red truck", "A red car behind an orange truck"),
        ("Two dogs chase three cats", "Three dogs chase two cats"),
        ("a large dog next to a small cat", "a small dog next to a large cat"),
    ],
)
def test_two_objects_exchange_an_attribute(text: str, changed: str) -> None:
    made = one(text, kinds=("swap",))
    assert [c.text for c in made] == [changed]
    how = made[0].made
    assert text[: how["start"]] + how["to"] + text[how["end"] :] == changed
    assert how["edit"] == "swap"


@pytest.mark.parametrize(
    "text",
    [
        "A black and white dog", "a red shirt and a red hat", "a grey car and a gray truck",
        "red , blue and green shirts",
        "a blue and yellow shirt with a black jacket", "a brown dog on green grass", "one man and two women",
    ],
)  # fmt: skip
def test_no_exchange_where_it_says_the_same_or_nothing_sensible(text: str) -> None:
    assert not one(text, kinds=("swap",))


def test_an_exchange_that_a_reference_speaks_for_is_refused() -> None:
    text = "A man in a red shirt holds a blue umbrella ."
    assert not one(text, "He wears a blue shirt .", kinds=("swap",))
    assert not one(text, "There is a red umbrella .", kinds=("swap",))
    assert one(text, "There is a red car .", kinds=("swap",))


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("The dog is running .", "The dog is not running ."),
        ("There is a dog .", "There is no dog ."),
        ("A man with a hat", "A man without a hat"),
        ("A girl has an umbrella", "A girl has no umbrella"),
        ("A boy wearing a hat", "A boy not wearing a hat"),
        ("Three dogs playing in the snow .", "Three dogs not playing in the snow ."),
    ],
)
def test_negation(text: str, changed: str) -> None:
    assert [c.text for c in one(text, kinds=("negation",))] == [changed]


def test_negation_only_by_name_and_never_of_what_is_denied_already() -> None:
    assert "negation" not in PerturbNegatives().kinds
    assert "swap" in PerturbNegatives().kinds
    assert not one("A man without a hat is running", kinds=("negation",))
    assert not one("The dog is running .", "A dog that is not running", kinds=("negation",))
