"""Shared-prefix scoring against plain scoring, and plain scoring against full logits, on every known family.

Below them the traps: each test fails when the guard that it names is taken out.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from cwdpo.data.encode.collate import collate
from cwdpo.errors import ModelError
from cwdpo.models import shared_attention
from cwdpo.models.families import family_names, family_of
from cwdpo.models.shared_attention import NAME, shares_prefix, use_scoring
from cwdpo.scoring import plain, shared_prefix
from cwdpo.scoring.score import row_tokens, score
from cwdpo.scoring.token_stats import DETAILS
from random_models import FAMILIES, IMAGE, build, distributions, example, ragged

LORA = r".*(language_model|text_model).*\.(q_proj|v_proj|down_proj)"


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def weighted(logp: torch.Tensor) -> torch.Tensor:
    """A loss in which every token of every completion has a weight of its own."""
    return (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum()


def assert_same_gradients(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert scale > 1e-3
    worst = max(float((ours[n] - wanted[n]).abs().max()) for n in wanted)
    assert worst <= 1e-5 * scale


def naive(model, encoded, completion) -> torch.Tensor:
    """Log-probabilities from the full logits of one unpadded sequence."""
    prompt, ids = list(encoded.prompt.input_ids), list(completion.ids)
    rows = {name: torch.tensor([[*row, *[0] * len(ids)]]) for name, row in encoded.prompt.per_token.items()}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids]), **encoded.prompt.images, **rows).logits[0]
    logp = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return logp[torch.arange(len(ids)), torch.tensor(ids)]


def test_these_families_are_known() -> None:
    """All known ones are tested with their real processors in `tests/families`."""
    assert set(FAMILIES) <= set(family_names())


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_scoring_equals_full_logits(name) -> None:
    model = build(name)
    encoded = ragged(name, model, 3)
    batch = collate(encoded)
    with torch.no_grad():
        logp = plain.score(model, batch).logp
    for row, completion in enumerate(batch.completions):
        wanted = naive(model, encoded[int(batch.completion_prompt[row])], completion)
        assert torch.allclose(logp[row, : len(wanted)], wanted, atol=1e-5)


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_prefix_equals_plain(name, lora, checkpointing, negatives) -> None:
    """Values and gradients within 1e-5, over ragged rows with two pictures, one and none."""
    model = build(name)
    batch = collate(ragged(name, model, negatives))
    if lora:
        model = _with_lora(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    model.train()
    wanted = plain.score(model, batch)
    wanted_gradients = gradients(model, weighted(wanted.logp))
    assert use_scoring(model, "shared_prefix")
    ours = score(model, batch)
    ours_gradients = gradients(model, weighted(ours.logp))
    assert torch.equal(ours.mask, wanted.mask)
    assert float((ours.logp - wanted.logp).detach().abs().max()) <= 1e-5
    assert_same_gradients(ours_gradients, wanted_gradients)


def _with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=LORA, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    return wrapped


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_as_far_from_plain_as_plain_is_from_fp32(name) -> None:
    model = build(name)
    batch = collate(ragged(name, model, 3))
    with torch.no_grad():
        exact = plain.score(model, batch).logp
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = plain.score(model, batch).logp
            use_scoring(model, "shared_prefix")
            ours = score(model, batch).logp
    noise = float((rounded - exact).abs().max())
    assert noise > 1e-3, "bf16 must show for this test to mean anything"
    assert float((ours - exact).abs().mean()) <= 1.5 * float((rounded - exact).abs().mean())
    assert float((ours - exact).abs().max()) <= 2 * noise


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_details_and_distributions_are_the_same(name) -> None:
    model = build(name)
    batch = collate(ragged(name, model, 2))
    with torch.no_grad():
        wanted = score(model, batch, stats=["uniform", *DETAILS])
        wanted_all = distributions(model, batch)
        use_scoring(model, "shared_prefix")
        ours = score(model, batch, stats=["uniform", *DETAILS])
        ours_all = distributions(model, batch)
    assert torch.allclose(ours.logp, wanted.logp, atol=1e-5)
    for name, values in wanted.stats.items():
        assert torch.allclose(ours.stats[name], values, atol=1e-5), name
    assert torch.allclose(ours_all, wanted_all, atol=1e-4)


def test_a_pair_in_any_order_of_completions(encoder, examples, model) -> None:
    """Completions find their prompt by index: interleaved, they score as when they stand together."""
    use_scoring(model, "shared_prefix")
    batch = collate(encoder.encode_all(examples[:4], "rejected", require_negative=False)[0])
    order = torch.randperm(len(batch.completions), generator=torch.Generator().manual_seed(0))
    mixed = replace(
        batch,
        completions=tuple(batch.completions[i] for i in order.tolist()),
        completion_prompt=batch.completion_prompt[order],
    )
    with torch.no_grad():
        straight = score(model, batch).logp.sum(1)
        assert torch.allclose(score(model, mixed).logp.sum(1), straight[order], atol=1e-5)


def test_it_runs_the_prompt_and_the_picture_once(encoder, examples, model) -> None:
    batch = collate(encoder.encode_all(examples[:3], "rejected", require_negative=False)[0])
    seen: list[int] = []
    model.model.vision_tower.register_forward_hook(
        lambda m, args, kw, out: seen.append(len(args[0])), with_kwargs=True
    )
    tokens: list[int] = []
    model.model.language_model.layers[0].register_forward_hook(
        lambda m, args, out: tokens.append(args[0].shape[0] * args[0].shape[1])
    )
    with torch.no_grad():
        plain.score(model, batch)
        use_scoring(model, "shared_prefix")
        score(model, batch)
    assert seen == [len(batch.completions), 3]
    assert tokens == [row_tokens(batch, shared=False)[1], row_tokens(batch, shared=True)[1]]


def test_sampling_is_untouched_by_the_switch(encoder, examples, model) -> None:
    """Padded batches under the registered attention need a mask of their own name (trap: transformers makes none)."""
    from cwdpo.models.sample import sample

    before = [s.text for s in sample(model, encoder, examples[:6], temperature=0.0, max_new_tokens=8)]
    use_scoring(model, "shared_prefix")
    after = [s.text for s in sample(model, encoder, examples[:6], temperature=0.0, max_new_tokens=8)]
    assert before == after
    assert len({len(encoder.prompt(e).input_ids) for e in examples[:6]}) > 1, "the batch must be padded"


# --- what is refused, and what falls back -----------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2", "flash_attention_3", "flex_attention"])
def test_other_attention_is_refused_or_falls_back(attention, caplog) -> None:
    """Trap 1: eager attention adds a boolean mask; flash attention un-pads by it."""
    model = build("llava")
    model.config.get_text_config()._attn_implementation_internal = attention
    with pytest.raises(ModelError, match=attention):
        use_scoring(model, "shared_prefix")
    with caplog.at_level(logging.WARNING, logger="cwdpo"):
        assert not use_scoring(model, "auto")
    assert len(caplog.records) == 1
    assert attention in caplog.text
    assert not shares_prefix(model)


def test_a_boolean_mask_in_eager_attention_is_wrong() -> None:
    """Why eager is refused: the same rows, the same mask, other numbers."""
    model = build("llava")
    batch = collate(ragged("llava", model))
    with torch.no_grad():
        wanted = plain.score(model, batch).logp
        use_scoring(model, "shared_prefix")
        inputs, request = shared_prefix.lay_out(model, batch)
        whole = inputs["attention_mask"]
        width = inputs["input_ids"].shape[1]
        prompt = torch.ones(width, width, dtype=torch.bool).tril()[: width - whole.shape[-2]]
        inputs["attention_mask"] = torch.cat([prompt.expand(len(whole), 1, -1, -1), whole], dim=2)
        model.set_attn_implementation("eager")
        from cwdpo.scoring.token_logp import run, unpack

        stats = run(model, inputs, request)
        wrong = unpack(stats, request, [len(c.ids) for c in batch.completions]).logp
    assert float((wrong - wanted).abs().max()) > 0.05


def test_an_unknown_model_type_falls_back_with_one_line(caplog) -> None:
    model = build("llava")
    model.config.model_type = "llava_of_tomorrow"
    with caplog.at_level(logging.WARNING, logger="cwdpo"):
        assert not use_scoring(model, "auto")
    assert [r.getMessage() for r in caplog.records] == [
        "scoring is plain, one full sequence per completion: model type 'llava_of_tomorrow' is not known; known: "
        + ", ".join(family_names())
    ]
    with pytest.raises(ModelError, match="llava_of_tomorrow"):
        use_scoring(model, "shared_prefix")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding_attention"),
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, "linear_attention"),
        ({"layer_types": None, "sliding_window": 8}, "sliding_attention"),
    ],
)
def test_layers_that_the_mask_does_not_cover_fall_back(settings, reason) -> None:
    """One 4-D mask for all layers would switch a window off without a word."""
    model = build("llava")
    for name, value in settings.items():
        setattr(model.config.get_text_config(), name, value)
    assert reason in shared_attention.obstacle(model)


def test_gemma_with_one_mask_for_all_layers_is_wrong() -> None:
    """Why Gemma 3 brings a mask for each kind of layer."""
    model = build("gemma3")
    batch = collate([example("gemma3", model, (9, 30), before=20, after=20)])
    with torch.no_grad():
        wanted = plain.score(model, batch).logp
        use_scoring(model, "shared_prefix")
        assert torch.allclose(score(model, batch).logp, wanted, atol=1e-5)
        inputs, request = shared_prefix.lay_out(model, batch)
        inputs["attention_mask"] = inputs["attention_mask"]["full_attention"]
        from cwdpo.scoring.token_logp import run, unpack

        wrong = unpack(run(model, inputs, request), request, [9, 30]).logp
    assert float((wrong - wanted).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("name", "row"),
    [("qwen2_5_vl", "mm_token_type_ids"), ("qwen3_vl", "mm_token_type_ids"), ("gemma3", "token_type_ids")],
)
@pytest.mark.parametrize("scoring", ["plain", "shared_prefix"])
def test_prompts_without_their_token_types_are_refused(name, row, scoring) -> None:
    """Trap 2: these models take such prompts without an error and give other log-probabilities."""
    model = build(name)
    whole = example(name, model, (5, 6), before=20, after=20)
    bare = replace(whole, prompt=replace(whole.prompt, per_token={}))
    use_scoring(model, scoring)
    with pytest.raises(ModelError, match=row):
        score(model, collate([bare]))
    if scoring == "plain" and name != "qwen3_vl":  # whose own code refuses them by now
        with torch.no_grad():
            silent = plain.score(model, collate([bare])).logp
            wanted = plain.score(model, collate([whole])).logp
        assert float((silent - wanted).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_one_axis_of_positions_is_wrong_for_mrope(name, monkeypatch) -> None:
    """Trap 2: 1-D positions are taken without an error."""
    from cwdpo.models.families.base import Family
    from cwdpo.models.families.mrope import MRope

    model = build(name)
    batch = collate([example(name, model, (5, 6))])
    use_scoring(model, "shared_prefix")
    with torch.no_grad():
        wanted = score(model, batch).logp
        monkeypatch.setattr(MRope, "prompt_positions", Family.prompt_positions)
        wrong = score(model, batch).logp
    assert float((wrong - wanted).abs().max()) > 0.02


def test_the_switch_outlives_the_forward_under_checkpointing() -> None:
    """Trap 3: layers run again in the backward pass, and must find the attention of the forward pass."""
    model = build("llava").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    use_scoring(model, "shared_prefix")
    batch = collate(ragged("llava", model))
    score(model, batch)
    assert model.config.get_text_config()._attn_implementation == NAME
    wanted = gradients(model, weighted(score(model, batch).logp))
    loss = weighted(score(model, batch).logp)
    model.config.get_text_config()._attn_implementation_internal = "sdpa"
    try:  # what a context manager around the forward would do
        wrong = gradients(model, loss)
    except (RuntimeError, ValueError, torch.utils.checkpoint.CheckpointError):
        return
    assert max(float((wrong[n] - wanted[n]).abs().max()) for n in wanted) > 1e-3


def test_plain_takes_the_switch_back(model, encoder, examples) -> None:
    assert use_scoring(model, "auto")
    assert shares_prefix(model)
    assert not use_scoring(model, "plain")
    assert not shares_prefix(model)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_the_switch_is_not_saved(model, tmp_path) -> None:
    use_scoring(model, "shared_prefix")
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_family_needs_image_tokens_of_its_config() -> None:
    """Positions come from the model's own function, so a second picture moves what stands behind it."""
    model = build("qwen2_5_vl")
    one = example("qwen2_5_vl", model, (4,), images=2)
    use_scoring(model, "shared_prefix")
    inputs, _ = shared_prefix.lay_out(model, collate([one]))
    positions = inputs["position_ids"][:, 0]
    ids = inputs["input_ids"][0]
    assert (positions[0] != positions[2])[ids == IMAGE].any()
    text = positions[:, len(one.prompt.input_ids) :]
    assert torch.equal(text[0], text[1])
    assert torch.equal(text[0], text[2])
    assert int(text[0, 0]) == int(positions[:, : len(one.prompt.input_ids)].max()) + 1
    assert int(text[0, 0]) < len(one.prompt.input_ids), "a picture takes fewer positions than tokens"
    assert family_of("no_such_family") is None


def test_a_family_that_changed_is_noticed_before_training(
    model, encoder, examples, monkeypatch, caplog
) -> None:
    """What a release of transformers could do: rows that are laid out as before, and score otherwise."""
    from cwdpo.models.families.base import Family
    from cwdpo.stage.scoring_check import check_scoring

    use_scoring(model, "auto")
    check_scoring(model, encoder, examples, "shared_prefix")
    assert shares_prefix(model)
    original = Family.positions
    monkeypatch.setattr(Family, "positions", lambda self, *a: original(self, *a) // 2)
    with pytest.raises(ModelError, match="log-probabilities differ from those of plain scoring"):
        check_scoring(model, encoder, examples, "shared_prefix")
    with caplog.at_level(logging.WARNING, logger="cwdpo"):
        check_scoring(model, encoder, examples, "auto")
    assert "scoring is plain" in caplog.text
    assert not shares_prefix(model)


def test_an_unknown_family_is_tried_before_a_run(model, encoder, examples, monkeypatch) -> None:
    from cwdpo.models import families
    from cwdpo.scoring import plain
    from cwdpo.stage.scoring_check import check_scoring

    monkeypatch.delitem(families.FAMILIES, "llava")
    assert not use_scoring(model, "auto")
    check_scoring(model, encoder, examples, "auto")
    right = plain.lay_out

    def wrong(model, batch):
        inputs, request = right(model, batch)
        return {**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1])[None] // 2}, request

    monkeypatch.setattr(plain, "lay_out", wrong)
    with pytest.raises(ModelError, match="'llava' is not known, and on 2 rows of the data its scores differ"):
        check_scoring(model, encoder, examples, "auto")


def test_a_tower_that_caps_its_attention_is_refused() -> None:
    model = build("llava")
    model.config.get_text_config().attn_logit_softcapping = 50.0
    assert "caps attention logits" in shared_attention.obstacle(model)
    query = torch.randn(1, 2, 6, 8)
    mask = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    with pytest.raises(ModelError, match="softcap"):
        shared_attention.shared_prefix_attention(model, query, query, query, mask, softcap=50.0)
