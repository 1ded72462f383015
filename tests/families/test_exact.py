"""For every family: prompts and completions as its own template and processor make them, scores and gradients as its
own logits give them, samples as its own ``generate``."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import read_video_pyav

from conftest import KEPT, clip
from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.prompts import PromptEncoder
from cwdpo.data.encode.template import RefusedRowError, TurnEnd
from cwdpo.errors import DataError, ModelError
from cwdpo.models.families import family_names
from cwdpo.models.families.mrope import MRope
from cwdpo.models.load import load_policy
from cwdpo.models.parts import PARTS
from cwdpo.models.quantization import quantized_layers
from cwdpo.models.quantized_linear import dense_weight
from cwdpo.models.sample import Decoding, forced_logps, shared_prefill
from cwdpo.models.settings import ModelSettings
from cwdpo.models.shared_attention import shares_prefix, use_scoring
from cwdpo.models.vision_cache import forget_vision_features, keep_vision_features
from cwdpo.records import VIDEO, Example, VideoSampling
from cwdpo.scoring import plain
from cwdpo.scoring.score import score
from cwdpo.scoring.shared_prefix import rows_of

EXACT = 1e-5
REFUSES_ONE_FRAME = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v")
"""Their processors take frames in pairs; of three, they repeat the last one themselves."""


def chat(family: Any, example: Example) -> list[dict[str, Any]]:
    """The prompt as a user of transformers writes it."""
    pictures, videos = iter(example.images), iter(own_videos(family, example)[0])
    turns = []
    for turn in example.prompt:
        blocks: Any = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "video", "video": next(videos)}
            if part is VIDEO
            else {"type": "image", "image": next(pictures).open()}
            for part in turn.parts
        ]
        if turn.role in family.traits.text_roles:
            blocks = "".join(block["text"] for block in blocks)
        turns.append({"role": turn.role, "content": blocks})
    return turns


def own_videos(family: Any, example: Example, *, pairs: bool = True) -> tuple[list[Any], dict[str, Any]]:
    """Frames that transformers itself decodes, and what a user of transformers says about them.

    Args:
        pairs: give a single frame twice to processors that refuse one.
    """
    found, said = [], []
    for video in example.videos:
        frames, metadata = read_video_pyav(
            io.BytesIO(video.data), lambda metadata, **_: KEPT[metadata.total_num_frames]
        )
        twice = pairs and len(frames) == 1 and family.name in REFUSES_ONE_FRAME
        found.append(np.repeat(frames, 2, axis=0) if twice else frames)
        said.append(dict(metadata))
    return found, {"do_sample_frames": False, "video_metadata": said} if said else {}


def own_inputs(family: Any, example: Example) -> dict[str, Any]:
    """What the processor's own ``apply_chat_template`` gives for the prompt."""
    processor = family.policy.processor
    if family.traits.template is None:
        text = "".join("<image>" if part is None else part for part in example.prompt[0].parts)
        made = processor(text=[text], images=[[i.open() for i in example.images]], return_tensors="pt")
    else:
        made = processor.apply_chat_template(
            chat(family, example),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **own_videos(family, example)[1],
        )
    made.pop("labels", None)
    return dict(made)


def continued(family: Any, example: Example, text: str) -> dict[str, Any]:
    """What the processor gives for prompt and response together, in one piece."""
    processor, traits = family.policy.processor, family.traits
    pictures: Any = {"images": [[i.open() for i in example.images]]} if example.images else {}
    videos, said = own_videos(family, example)
    pictures |= {"videos": videos, **said} if videos else {}
    if traits.template is None:
        prompt = "".join("<image>" if part is None else part for part in example.prompt[0].parts)
        made = processor(text=[prompt], suffix=[text], return_tensors="pt", **pictures)
    else:
        prompt = processor.apply_chat_template(
            chat(family, example), add_generation_prompt=True, tokenize=False
        )
        bos = traits.adds_bos and not prompt.startswith(traits.bos)
        whole = prompt + traits.opens + text + traits.end
        made = processor(text=[whole], return_tensors="pt", add_special_tokens=bos, **pictures)
    made.pop("labels", None)
    return dict(made)


def batch_of(family: Any) -> PromptBatch:
    encoder = family.encoder
    return collate([encoder.encode(e) for e in family.examples])


def own_logps(family: Any, model: Any) -> list[torch.Tensor]:
    """Token log-probabilities of every completion from the model's own logits, one row at a time, without padding."""
    found = []
    for example in family.examples:
        for completion in (example.chosen, *example.rejected):
            images = example.images if completion.images is None else completion.images
            inputs = continued(family, replace(example, images=images), completion.text)
            n = len(family.encoder.completion_ids(example, completion.text))
            logits = model(**inputs).logits[0, -n - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, inputs["input_ids"][0, -n:, None])[:, 0])
    return found


def gradients(model: Any, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def weights(n: int) -> torch.Tensor:
    """Chosen up, rejected down, as a preference loss has it."""
    return torch.where(torch.arange(n) % 3 == 0, 1.0, -0.5) / n


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 0
    for name in ours.keys() | theirs.keys():
        a = ours.get(name, torch.zeros(()))
        b = theirs.get(name, torch.zeros(()))
        assert bool(a.isfinite().all())
        assert float((a - b).abs().max()) <= EXACT * max(scale, 1.0), name


def test_every_known_family_is_here() -> None:
    from checkpoints import FAMILIES, Made

    types = {
        maker(Made(traits))[0].model_type for name, (maker, traits) in FAMILIES.items() if name != "mllama"
    }
    assert types | {"mllama"} == set(family_names())


def test_prompts_are_what_the_processor_makes(family: Any) -> None:
    encoder, decode = family.encoder, family.policy.processor.tokenizer.decode
    for example in family.examples:
        ours = encoder.prompt(example)
        theirs = own_inputs(family, example)
        ids = theirs.pop("input_ids")[0].tolist()
        assert decode(ours.input_ids) == decode(ids), example.id
        assert list(ours.input_ids) == ids, example.id
        theirs.pop("attention_mask")
        assert {*ours.per_token, *ours.images} == set(theirs)
        for name, value in theirs.items():
            if name in ours.per_token:
                assert list(ours.per_token[name]) == value[0].tolist()
            else:
                assert torch.equal(ours.images[name], value), name


@pytest.mark.parametrize("family", REFUSES_ONE_FRAME, indirect=True, scope="session")
def test_a_single_frame_is_given_twice_where_it_must(family: Any) -> None:
    """Else the processor's own call is an error; no other family is in the list."""
    (example,) = [e for e in family.examples if e.id == "frame"]
    videos, said = own_videos(family, example, pairs=False)
    text = family.policy.processor.video_token
    with pytest.raises(ValueError, match="must be larger than temporal_factor"):
        family.policy.processor(text=[text], videos=videos, return_tensors="pt", **said)
    assert family.encoder.prompt(example).images["video_grid_thw"][0, 0] == 1


def test_a_completion_is_the_response_and_one_end(family: Any) -> None:
    encoder, traits = family.encoder, family.traits
    end, decode = traits.end, family.policy.processor.tokenizer.decode
    for example in family.examples:
        text = example.chosen.text
        ids, prompt = encoder.completion_ids(example, text), encoder.prompt(example).input_ids
        assert decode([*prompt, *ids]) == f"{decode(prompt)}{traits.opens}{text}{end}", example.id
        theirs = continued(family, example, text)["input_ids"][0].tolist()
        assert [*encoder.prompt(example).input_ids, *ids] == theirs, example.id
        for stop in (end, *traits.stops, end + end, " " + end):
            assert encoder.completion_ids(example, text + stop) == ids, stop


def test_an_end_token_within_a_response_does_not_cut_it(family: Any) -> None:
    """It is reported before a run; whoever encodes it all the same gets all of the text."""
    encoder, traits, example = family.encoder, family.traits, family.examples[0]
    ids = encoder.completion_ids(example, f"The tag {traits.end} is old.")
    said = family.policy.processor.tokenizer.decode(ids)
    assert said.count(traits.end) == 2
    assert said.endswith(f"is old.{traits.end}")
    with pytest.raises(RefusedRowError, match="special token") as refused:
        encoder.template.check_texts(example, [("chosen", f"The tag {traits.end} is old.")])
    assert refused.value.key == "chosen"
    encoder.template.check_texts(example, [("chosen", f"It is old.{traits.end}")])


def test_rows_that_the_family_refuses_are_named(family: Any) -> None:
    for example in rows_refused(family):
        with pytest.raises(DataError, match=family.traits.refuses[example.id]):
            family.encoder.encode(example)


def rows_refused(family: Any) -> list[Example]:
    from conftest import rows

    return [e for e in rows() if e.id in family.traits.refuses]


def test_plain_rows_against_the_models_own_logits(family: Any) -> None:
    model, batch = family.policy.model, batch_of(family)
    ours = plain.score(model, batch)
    theirs = own_logps(family, model)
    assert len(theirs) == len(batch.completions)
    for row, logp in enumerate(theirs):
        assert int(ours.mask[row].sum()) == len(logp)
        assert bool(logp.isfinite().all())
        assert float((ours.logp[row][ours.mask[row]] - logp).detach().abs().max()) <= EXACT, row
    scale = weights(len(theirs))
    mine = gradients(model, (ours.logp.sum(1) * scale).sum())
    own = gradients(model, sum(logp.sum() * w for logp, w in zip(theirs, scale, strict=True)))
    assert_same_gradients(mine, own)


def test_shared_rows_against_plain_rows(family: Any) -> None:
    model, batch = family.policy.model, batch_of(family)
    assert use_scoring(model, "auto") == family.traits.shared
    if not family.traits.shared:
        return
    plain_, shared = plain.score(model, batch), score(model, batch)
    assert shares_prefix(model)
    assert bool(shared.logp.isfinite().all())
    assert float((plain_.logp - shared.logp).detach().abs().max()) <= EXACT
    scale = weights(len(batch.completions))
    assert_same_gradients(
        gradients(model, (shared.logp.sum(1) * scale).sum()),
        gradients(model, (plain_.logp.sum(1) * scale).sum()),
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bases_are_as_exact(family: Any, kind: str) -> None:
    """Plain rows against the quantized model's own logits, shared rows against plain ones, with adapters that move."""
    asked = {"path": str(family.folder), "tune": "lora", "lora": {"r": 4}, "quantization": kind}
    policy = load_policy(ModelSettings.model_validate(asked))
    model, batch = policy.model.eval(), batch_of(family)
    whole = load_policy(ModelSettings(path=str(family.folder))).model.eval()
    bare = model.get_base_model()
    with torch.no_grad():
        layers = dict(quantized_layers(bare))
        assert layers
        for name, layer in layers.items():
            name = name.removesuffix(".base_layer")
            whole.get_submodule(name).weight.copy_(dense_weight(layer, torch.float32))
        # Adapters change nothing yet: the model is the one with the rounded weights.
        assert float((plain.score(model, batch).logp - plain.score(whole, batch).logp).abs().max()) <= 1e-4
        for number, parameter in enumerate(policy.trainable().values()):
            parameter += 0.02 * (-1) ** number
    use_scoring(model, "plain")
    ours, theirs = plain.score(model, batch), own_logps(family, model)
    for row, logp in enumerate(theirs):
        assert float((ours.logp[row][ours.mask[row]] - logp).detach().abs().max()) <= EXACT, row
    in_full = plain.score(family.policy.model, batch)
    assert float((ours.logp - in_full.logp).detach().abs().max()) > EXACT, (
        "quantization and adapters must show"
    )
    if not family.traits.shared:
        return
    use_scoring(model, "shared_prefix")
    shared, scale = score(model, batch), weights(len(batch.completions))
    assert float((ours.logp - shared.logp).detach().abs().max()) <= EXACT
    assert_same_gradients(
        gradients(model, (shared.logp.sum(1) * scale).sum()),
        gradients(model, (ours.logp.sum(1) * scale).sum()),
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True, scope="session")
def test_text_after_a_long_video_comes_before_its_last_time(family: Any) -> None:
    """The times of a video are positions, and text after it continues behind its height and width, not its times."""
    model, encoder = family.policy.model, family.encoder
    (example,) = [e for e in family.examples if e.id == "video"]
    video = replace(clip(40, 32, 32, 5), sampling=VideoSampling(fps=1, max_frames=16))
    batch = collate([encoder.encode(replace(example, videos=(video,)))])
    rows, _ = rows_of(batch, torch.device("cpu"))
    places = MRope().positions(model, rows, batch.prompts[0].images)[:, 0]
    first = places[:, rows.prompt_width]
    assert int(places[:, : rows.prompt_width].max()) > int(first.max())
    use_scoring(model, "auto")
    plain_, shared = plain.score(model, batch), score(model, batch)
    assert float((plain_.logp - shared.logp).detach().abs().max()) <= EXACT


def test_whole_distributions_come_in_order(family: Any) -> None:
    model, batch = family.policy.model, batch_of(family)
    kept = torch.arange(len(batch.completions)) % 2 == 0
    with torch.no_grad():
        found = score(model, batch, whole=kept)
    assert found.whole is not None
    tokens = [i for c, wanted in zip(batch.completions, kept.tolist(), strict=True) if wanted for i in c.ids]
    logp = found.whole.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert torch.allclose(logp, found.logp[kept][found.mask[kept]])


def test_sampling_is_the_models_own_greedy_generation(family: Any) -> None:
    model, encoder = family.policy.model, family.encoder
    examples = family.examples
    prompts = [encoder.prompt(e) for e in examples]
    stops = encoder.end_ids
    got = shared_prefill(
        model,
        prompts,
        2,
        Decoding(0.0, 1.0, 10),
        [str(i) for i in range(2 * len(prompts))],
        end_ids=stops,
        pad=0,
    )
    for i, example in enumerate(examples):
        inputs = own_inputs(family, example)
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=10, eos_token_id=sorted(stops))
        theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
        cut = next((k + 1 for k, token in enumerate(theirs) if token in stops), len(theirs))
        assert got[2 * i][0] == got[2 * i + 1][0] == theirs[:cut], example.id


def test_forced_generation_gives_the_same_scores(family: Any) -> None:
    """What an unknown family is tried with before a run."""
    model, batch = family.policy.model, batch_of(family)
    with torch.no_grad():
        ours = plain.score(model, batch)
    for row, (completion, prompt) in enumerate(
        zip(batch.completions, batch.completion_prompt.tolist(), strict=True)
    ):
        own = forced_logps(model, batch.prompts[prompt], completion.ids)
        assert float((ours.logp[row][ours.mask[row]] - own).abs().max()) <= EXACT, row


@pytest.mark.parametrize(
    "family", ["llava_onevision", "lfm2_vl", "paligemma", "mllama"], indirect=True, scope="session"
)
def test_a_family_that_is_not_in_the_table_is_tried_first(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that need nothing of their own, two that would be silently off."""
    from cwdpo.models import families
    from cwdpo.stage.scoring_check import check_scoring

    model, encoder = family.policy.model, family.encoder
    monkeypatch.delitem(families.FAMILIES, model.config.model_type)
    use_scoring(model, "auto")
    if family.name in ("llava_onevision", "lfm2_vl"):
        check_scoring(model, encoder, family.examples, "auto")
        return
    with pytest.raises(ModelError, match="is not known, and"):
        check_scoring(model, encoder, family.examples, "auto")


def test_the_comparisons_notice_a_mistake(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another bos, end or way of giving contents, and prompt or completion are no longer the family's own."""
    example, traits = family.examples[0], family.traits
    own = own_inputs(family, example)["input_ids"][0].tolist()
    whole = continued(family, example, example.chosen.text)["input_ids"][0].tolist()

    def agree(encoder: Encoder) -> bool:
        prompt = list(encoder.prompt(example).input_ids)
        return prompt == own and [*prompt, *encoder.completion_ids(example, example.chosen.text)] == whole

    assert agree(family.encoder)
    if traits.adds_bos:
        right = PromptEncoder.adds_bos
        with monkeypatch.context() as patch:
            patch.setattr(PromptEncoder, "adds_bos", lambda self, text: not right(self, text))
            assert not agree(family.encoder)
    ends_elsewhere = family.encoder
    ends_elsewhere.template.end = TurnEnd(own[-1], "", "")
    assert not agree(ends_elsewhere)
    for role in traits.text_roles:
        as_blocks = family.encoder
        as_blocks.prompt(example)
        as_blocks.template.end  # noqa: B018 - found before the style is changed
        as_blocks.template._styles[role] = "blocks"
        if role != "assistant":
            continue  # the example has no such turn
        with contextlib.suppress(RefusedRowError):  # the template cannot take a list
            assert not agree(as_blocks)


def test_parts_are_found_by_name(family: Any) -> None:
    names = [name for name, _ in family.policy.model.named_parameters()]
    for part, pattern in PARTS.items():
        assert any(re.search(pattern, name) for name in names), part
    unnamed = [n for n in names if not any(re.search(pattern, n) for pattern in PARTS.values())]
    assert not unnamed


def test_kept_image_features_change_nothing(family: Any) -> None:
    model, batch = family.policy.model, batch_of(family)
    text = re.compile(PARTS["text"])
    frozen = [p for name, p in model.named_parameters() if not text.search(name)]
    with torch.no_grad():
        before = score(model, batch).logp
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        kept = keep_vision_features(model, 1.0)
        with torch.no_grad():
            first, second = score(model, batch).logp, score(model, batch).logp
    finally:
        forget_vision_features(model)
        for parameter in frozen:
            parameter.requires_grad_(True)
    assert kept == (family.name != "mllama")
    assert float((first - before).abs().max()) <= EXACT
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True, scope="session")
def test_workers_decode_videos(family: Any, tmp_path: Path) -> None:
    """What a worker gives is what this process gives; a video that changed since its row was encoded is named."""
    (example,) = [e for e in family.examples if e.id == "beside"]
    path = tmp_path / "a.mp4"
    path.write_bytes(example.videos[0].data)
    example = replace(
        example, where="rows.jsonl:3", videos=(replace(example.videos[0], path=path, data=None),)
    )
    here, there = (family.policy.encoder(cache_gb=0, workers=n).prompt(example) for n in (0, 1))
    coming = there.ahead()
    assert coming is not there
    found = coming.images
    assert found.keys() == here.images.keys()
    assert all(torch.equal(found[name], value) for name, value in here.images.items())
    path.write_bytes(clip(1, 48, 64, 2).data)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: images: the processor gives"):
        _ = there.ahead().images
    path.write_bytes(b"no video")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: videos: .*a\.mp4 is not a video"):
        _ = there.ahead().images
