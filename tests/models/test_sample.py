"""The sampler: the same tokens as transformers' greedy generate, draws that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from cwdpo.models.sample import Decoding, _inverted, sample, sample_batch, shared_prefill
from random_models import FAMILIES, build, prompt

GREEDY = Decoding(temperature=0, max_new_tokens=16)


def one_by_one(model, p) -> list[int]:
    inputs = {"input_ids": torch.tensor([p.input_ids]), **p.images}
    inputs |= {name: torch.tensor([row]) for name, row in p.per_token.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    out = model.generate(**inputs, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
    return out[0, len(p.input_ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate_in_every_family(family: str) -> None:
    model = build(family)
    prompts = [
        prompt(family, model, seed=seed, before=before, after=4 + seed)
        for seed, before in ((1, 5), (2, 9), (3, 2))
    ]
    expected = [one_by_one(model, p) for p in prompts]
    assert len({tuple(e) for e in expected}) == 3, "the pictures and prompts make a difference"
    draws = [str(i) for i in range(9)]
    got = shared_prefill(model, prompts, 3, GREEDY, draws, end_ids=frozenset({511}), pad=0)
    assert [ids for ids, _ in got] == [e for e in expected for _ in range(3)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_rows_that_end_leave_the_others_as_they_are(family: str) -> None:
    """An end token early in some rows: the batch shrinks, the other rows' tokens stay."""
    model = build(family)
    prompts = [prompt(family, model, seed=seed) for seed in range(4)]
    expected = [one_by_one(model, p) for p in prompts]
    end = expected[0][3]
    cut = [row[: row.index(end) + 1] if end in row else row for row in expected]
    got = shared_prefill(model, prompts, 2, GREEDY, [""] * 8, end_ids=frozenset({end}), pad=0)
    assert [ids for ids, _ in got] == [row for row in cut for _ in range(2)]
    assert len({len(row) for row in cut}) > 1


def test_draws_do_not_depend_on_batches_nor_on_order(model, encoder, examples) -> None:
    some = list(examples[:7])
    whole = sample(model, encoder, some, max_new_tokens=12, batch_size=7, seed=3)
    single = sample(model, encoder, some[::-1], max_new_tokens=12, batch_size=2, seed=3)[::-1]
    assert [s.text for s in whole] == [s.text for s in single]
    assert [s.mean_logp for s in whole] == pytest.approx([s.mean_logp for s in single], abs=1e-5)
    other = sample(model, encoder, some, max_new_tokens=12, seed=4)
    assert [s.text for s in whole] != [s.text for s in other]


def test_an_example_asked_twice_gets_two_draws_and_the_global_generator_is_left_alone(
    model, encoder, examples
) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a, b = sample(model.train(), encoder, [examples[0]] * 2, max_new_tokens=12)
    assert a.text != b.text
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training


def test_mean_logp_is_what_scoring_says(model, encoder, examples) -> None:
    """The sampler's log-probabilities against a full forward over prompt and response."""
    from cwdpo.data.encode.encoder import EncodedPrompt

    p: EncodedPrompt = encoder.prompt(examples[0])
    decoding = Decoding(0.7, 0.9, 10)
    (ids, logps), *_ = shared_prefill(
        model, [p], 2, decoding, ["a", "b"], end_ids=encoder.end_ids, pad=encoder.tokenizer.pad_token_id
    )
    row = torch.tensor([[*p.input_ids, *ids]])
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), **p.images).logits[0]
    full = logits.log_softmax(-1)[len(p.input_ids) - 1 : -1]
    assert logps == pytest.approx(full[range(len(ids)), ids].tolist(), abs=1e-5)


def test_n_samples_of_one_prompt_differ_and_have_their_own_numbers(model, encoder, examples) -> None:
    decoding = Decoding(1.0, 1.0, 12)
    four = sample_batch(model, encoder, [encoder.prompt(examples[0])], 4, decoding, 0, ["x"])[0]
    two = sample_batch(model, encoder, [encoder.prompt(examples[0])], 2, decoding, 0, ["x"])[0]
    assert [s.text for s in four[:2]] == [s.text for s in two]
    assert len({s.text for s in four}) == 4


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = _inverted(p.expand(len(u), -1), 1.0, u).bincount(minlength=4)
    assert chisquare(counts.numpy(), (p * len(u)).numpy()).pvalue > 0.01
    nucleus = _inverted(p[[3, 0, 2, 1]].expand(len(u), -1), 0.8, u).bincount(minlength=4)
    assert nucleus[[0, 2]].tolist() == [0, 0], "0.5 and 0.3 alone make up 0.8"
    assert chisquare(nucleus[[1, 3]].numpy(), [len(u) * 5 / 8, len(u) * 3 / 8]).pvalue > 0.01
