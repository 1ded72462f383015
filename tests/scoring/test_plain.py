"""Plain scoring against the model's own full logits, one completion at a time."""

from __future__ import annotations

import pytest
import torch

from cwdpo.data.encode.collate import collate
from cwdpo.models.inputs import cat_rows
from cwdpo.scoring import plain, token_logp
from cwdpo.scoring.pairs import reference_pass, scored_pairs, span_mask
from cwdpo.scoring.token_stats import DETAILS


def naive(model, encoded, completion) -> torch.Tensor:
    """Per-token log-probabilities from full logits of one unpadded sequence."""
    prompt, ids = list(encoded.prompt.input_ids), list(completion.ids)
    inputs = {"input_ids": torch.tensor([prompt + ids]), **encoded.prompt.images}
    logits = model(**inputs).logits[0].double()
    logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logp[torch.arange(len(ids)), torch.tensor(ids)]


@pytest.fixture
def encoded(encoder, examples):
    return encoder.encode_all(examples[:6], "rejected", require_negative=False)[0]


def test_equals_full_logits_in_ragged_batches(model, encoded) -> None:
    batch = collate(encoded)
    scores = plain.score(model, batch, stats=["uniform", *DETAILS])
    lengths = [len(c.ids) for c in batch.completions]
    assert len({*lengths}) > 2, "the batch must be ragged for this test to mean anything"
    for row, completion in enumerate(batch.completions):
        wanted = naive(model, encoded[int(batch.completion_prompt[row])], completion)
        assert torch.allclose(scores.logp[row, : len(wanted)].double(), wanted, atol=1e-5)
        assert scores.mask[row].sum() == len(wanted)
        assert (scores.logp[row, len(wanted) :] == 0).all()


def test_details_are_those_of_the_distribution(model, encoded) -> None:
    batch = collate(encoded[:1])
    scores = plain.score(model, batch, stats=["uniform", *DETAILS])
    example, completion = encoded[0], batch.completions[0]
    sequence = torch.tensor([[*example.prompt.input_ids, *completion.ids]])
    logits = model(input_ids=sequence, **example.prompt.images).logits[
        0, len(example.prompt.input_ids) - 1 : -1
    ]
    p = logits.double().softmax(-1)
    n = len(completion.ids)
    assert torch.allclose(scores.stats["entropy"][0, :n].double(), -(p * p.log()).sum(-1), atol=1e-5)
    assert torch.allclose(scores.stats["top1"][0, :n].double(), p.max(-1).values, atol=1e-6)
    assert torch.equal(scores.stats["correct"][0, :n].bool(), p.argmax(-1) == torch.tensor(completion.ids))
    assert torch.allclose(scores.stats["uniform"][0, :n].double(), p.log().mean(-1), atol=1e-5)


def test_chunks_do_not_change_values_or_gradients(model, encoded, monkeypatch) -> None:
    batch = collate(encoded)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logp = plain.score(model, batch).logp
        (logp.sum() / 7).backward()
        return logp.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, gradients = run()
    monkeypatch.setattr(token_logp, "CHUNK_VALUES", 400 * 5)  # five tokens a chunk
    pieces, chunked = run()
    assert torch.allclose(whole, pieces, atol=1e-6)
    assert gradients.keys() == chunked.keys()
    assert "model.language_model.embed_tokens.weight" in gradients
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, chunked[name], atol=1e-6), name


def test_logits_of_the_whole_batch_never_exist(model, encoded) -> None:
    """No tensor saved for backward, and none made by the head, has rows x length x vocabulary values."""
    batch = collate(encoded)
    longest = max(len(e.prompt.input_ids) for e in encoded) + max(len(c.ids) for c in batch.completions)
    head = model.get_output_embeddings()
    tokens = sum(len(c.ids) for c in batch.completions)
    made = []
    head.register_forward_hook(lambda module, args, output: made.append(tuple(output.shape)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        plain.score(model, batch)
    vocabulary = head.out_features
    assert max(saved) < len(batch.completions) * longest * vocabulary / 2
    assert made == [(tokens, 1)]


def test_the_head_is_itself_again_after_scoring_and_after_an_error(model, encoded) -> None:
    batch = collate(encoded[:1])
    plain.score(model, batch)
    assert "forward" not in vars(model.get_output_embeddings())
    request = token_logp.HeadRequest(torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(RuntimeError, match="inside"), token_logp.scoring_head(model, request):
        raise RuntimeError("inside")
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_head_with_softcapping_is_refused(model) -> None:
    from cwdpo.errors import ModelError

    model.config.get_text_config().final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        token_logp.output_head(model)


def test_text_only_rows_mix_with_image_rows(model, encoder, examples) -> None:
    from dataclasses import replace

    from cwdpo.records import Message

    bare = replace(examples[0], id="bare", images=(), prompt=(Message("user", ("how many ?",)),))
    encoded, problems = encoder.encode_all([bare, examples[1]], "rejected", require_negative=False)
    assert not problems
    together = plain.score(model, collate(encoded)).logp.sum(1)
    apart = torch.cat([plain.score(model, collate([e])).logp.sum(1) for e in encoded])
    assert torch.allclose(together, apart, atol=1e-4)


def test_reference_pass_keeps_order_and_equals_scoring(model, encoded) -> None:
    done = reference_pass(model, encoded, batch_size=2)
    assert [e.id for e in done] == [e.id for e in encoded]
    for before, after in zip(encoded, done, strict=True):
        batch = collate([before])
        scores = plain.score(model, batch)
        sums = scores.logp.sum(1).tolist()
        spans = (scores.logp * span_mask(batch, scores)).sum(1).tolist()
        completions = (after.chosen, *after.negatives)
        assert [c.reference_sum_logp for c in completions] == pytest.approx(sums, abs=1e-4)
        assert [c.reference_span_sum_logp for c in completions] == pytest.approx(spans, abs=1e-4)


def test_pairs_are_told_apart_by_index(model, encoded) -> None:
    """At the reference every shift is zero, and each pair points at its own prompt's chosen response."""
    done = reference_pass(model, encoded)
    batch = collate(done)
    pairs = scored_pairs(batch, plain.score(model, batch))
    assert torch.allclose(pairs.chosen.shift, torch.zeros(len(done)), atol=1e-4)
    assert torch.allclose(pairs.rejected.shift, torch.zeros(len(pairs.prompt)), atol=1e-4)
    expected = [i for i, e in enumerate(done) for _ in e.negatives]
    assert pairs.prompt.tolist() == expected
    lengths = [len(c.ids) for e in done for c in e.negatives]
    assert pairs.rejected.n_tokens.tolist() == lengths


def test_images_of_different_sizes_are_padded() -> None:
    pieces = [torch.ones(1, 2, 3), torch.ones(2, 1, 3)]
    out = cat_rows(pieces)
    assert out.shape == (3, 2, 3)
    assert out[1:, 1].sum() == 0
    assert out[0].sum() == 6
