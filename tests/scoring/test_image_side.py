"""Image-side negatives in a batch: against separate forward passes, in plain and in shared rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample
from cwdpo.models.shared_attention import use_scoring
from cwdpo.objectives.mdpo import Mdpo
from cwdpo.scoring.pairs import reference_pass, scored_pairs
from cwdpo.scoring.reference_cache import row_keys
from cwdpo.scoring.score import row_tokens, score
from random_models import FAMILIES, build, example, prompt, ragged


def both_sides(name: str, model: torch.nn.Module) -> list[EncodedExample]:
    """Examples with text-side and image-side negatives; the second has two under one other image, the last has none."""
    one, two, three = ragged(name, model, 2)
    other = prompt(name, model, seed=7)
    images = prompt(name, model, seed=8, images=2, before=9, after=14)

    def under(whole: EncodedExample, its: object, ids: tuple[int, ...]) -> EncodedCompletion:
        return replace(whole.chosen, ids=ids, span=(0, len(ids)), kind="image_crop", prompt=its)

    one = replace(one, negatives=(one.negatives[0], under(one, other, one.chosen.ids), one.negatives[1]))
    two = replace(
        two, negatives=(under(two, images, two.chosen.ids), under(two, images, two.negatives[0].ids))
    )
    return [one, two, three]


def separate(model: torch.nn.Module, batch: PromptBatch) -> list[torch.Tensor]:
    """Token log-probabilities of each completion, one forward pass for each."""
    found = []
    for row, completion in enumerate(batch.completions):
        its = batch.prompts[int(batch.completion_prompt[row])]
        ids = [*its.input_ids, *completion.ids]
        rows = {k: torch.tensor([[*v, *[0] * len(completion.ids)]]) for k, v in its.per_token.items()}
        logits = model(input_ids=torch.tensor([ids]), **its.images, **rows).logits[0]
        logp = logits[len(its.input_ids) - 1 : -1].float().log_softmax(-1)
        found.append(logp[torch.arange(len(completion.ids)), torch.tensor(completion.ids)])
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", ["plain", "shared"])
def test_scores_equal_separate_forward_passes(name: str, rows: str) -> None:
    model = build(name)
    encoded = both_sides(name, model)
    assert encoded[0].negatives[1].ids == encoded[0].chosen.ids
    batch = collate(encoded)
    assert len(batch.prompts) == 5  # the two negatives of one example under the same image share a row
    with torch.no_grad():
        wanted = separate(model, batch)
        use_scoring(model, "shared_prefix" if rows == "shared" else "plain")
        logp = score(model, batch).logp
    for row, own in enumerate(wanted):
        assert torch.allclose(logp[row, : len(own)], own, atol=1e-5)
    first, image = int(batch.chosen[0]), int(batch.rejected[1])
    assert not torch.allclose(logp[first], logp[image], atol=1e-3), "the other image must matter"


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_mdpo_equal_those_of_separate_passes_by_hand(name: str) -> None:
    """The paper's loss from separate passes, term by term, for one text-side and one image-side pair a prompt."""
    model = build(name)
    images = [prompt(name, model, seed=9), prompt(name, model, seed=10, images=2, before=9, after=14)]
    encoded = [
        replace(e, negatives=(e.negatives[0], replace(e.chosen, kind="image_crop", prompt=its)))
        for e, its in zip(ragged(name, model)[:2], images, strict=True)
    ]
    known = reference_pass(model, encoded)
    with torch.no_grad():  # the policy moves away from the reference
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + 0.02 * (-1) ** number)
    batch = collate(known)
    beta = 0.3

    model.zero_grad()
    sums = [logp.sum() for logp in separate(model, batch)]
    shift = torch.stack(sums) - torch.tensor([c.reference_sum_logp for c in batch.completions])
    loss = torch.zeros(())
    for chosen, text, image in ((0, 1, 2), (3, 4, 5)):
        for margin in (shift[chosen] - shift[text], shift[chosen] - shift[image], shift[chosen]):
            loss = loss - torch.nn.functional.logsigmoid(beta * margin) / 2
    loss.backward()
    by_hand = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    use_scoring(model, "shared_prefix")
    model.zero_grad()
    pairs = scored_pairs(batch, score(model, batch))
    assert pairs.image_side is not None
    assert pairs.image_side.tolist() == [False, True, False, True]
    ours = Mdpo(beta=beta)(pairs).loss
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    ours.backward()
    scale = max(float(g.abs().max()) for g in by_hand.values())
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, by_hand[parameter_name], atol=1e-5 * scale)


def test_rows_and_cuts_of_a_batch() -> None:
    model = build(FAMILIES[0])
    encoded = both_sides(FAMILIES[0], model)
    batch = collate(encoded)
    assert row_tokens(batch, shared=True)[0] == sum(sum(e.row_tokens(shared=True)) for e in encoded)
    assert row_tokens(batch, shared=False)[0] == sum(sum(e.row_tokens(shared=False)) for e in encoded)
    assert encoded[1].n_tokens == max(encoded[1].row_tokens(shared=False))

    text_only = batch.keep_pairs([batch.completions[i].prompt is None for i in batch.rejected.tolist()])
    assert text_only.prompts == batch.prompts[:3]
    whole = collate(
        [replace(e, negatives=tuple(c for c in e.negatives if c.prompt is None)) for e in encoded]
    )
    for name in ("completion_prompt", "chosen", "rejected", "pair_prompt"):
        assert torch.equal(getattr(text_only, name), getattr(whole, name)), name
    assert text_only.completions == whole.completions

    first, wanted = batch.first_examples(1), collate(encoded[:1])
    assert first.example_ids == wanted.example_ids
    assert [id(p) for p in first.prompts] == [id(p) for p in wanted.prompts]
    for name in ("completion_prompt", "chosen", "rejected", "pair_prompt"):
        assert torch.equal(getattr(first, name), getattr(wanted, name)), name


def test_stored_reference_values_depend_on_the_image() -> None:
    model = build(FAMILIES[0])
    one = example(FAMILIES[0], model, (9, 5))
    images = [replace(one.prompt, image_digest=d) for d in ("a", "b")]
    keys = [row_keys("reference", replace(one, negatives=(replace(one.chosen, prompt=p),))) for p in images]
    assert keys[0][0] == keys[1][0]
    assert len({keys[0][0], keys[0][1], keys[1][1]}) == 3
