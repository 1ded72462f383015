"""Prompt and completion ids: joined equals apart, nothing is truncated, spans are where texts differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import DataError
from cwdpo.records import Completion, ImageRef, Message

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<>\x00"), min_size=1, max_size=30).filter(
    str.strip
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXTS, answer=TEXTS)
def test_joined_equals_apart(encoder, examples, question, answer) -> None:
    example = replace(examples[0], images=(), prompt=(Message("user", (question,)),))
    apart = [*encoder.prompt(example).input_ids, *encoder.completion_ids(example, answer)]
    text = encoder.prompt_text(example) + answer + "<|end|>"
    assert apart == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_prompt_is_what_generation_sees(encoder, examples, processor) -> None:
    example = examples[1]
    text = encoder.prompt_text(example)
    expected = processor(text=[text], images=[example.images[0].open()], add_special_tokens=False)[
        "input_ids"
    ][0]
    assert list(encoder.prompt(example).input_ids) == list(expected)
    assert list(expected).count(encoder.tokenizer.convert_tokens_to_ids("<image>")) == 16


def test_a_completion_ends_in_the_end_token_once(encoder, examples) -> None:
    ids = encoder.completion_ids(examples[0], "a red ring .")
    end = encoder.tokenizer.eos_token_id
    assert ids[-1] == end
    assert ids.count(end) == 1
    assert encoder.tokenizer.decode(ids[:-1]) == "a red ring ."


def test_a_template_that_adds_text_behind_the_turn_is_cut(processor, examples) -> None:
    """Qwen's template writes a line break behind the end-of-turn token: it is not part of the response."""
    import copy

    changed = copy.deepcopy(processor)
    changed.chat_template = processor.chat_template.replace(
        "<|end|>{% endif %}{% endfor %}", "<|end|>\n{% endif %}{% endfor %}"
    )
    assert changed.chat_template != processor.chat_template
    assert Encoder(changed).completion_ids(examples[0], "yes") == Encoder(processor).completion_ids(
        examples[0], "yes"
    )


def test_a_prompt_that_ends_in_a_space_moves_it_over(processor, examples) -> None:
    import copy

    changed = copy.deepcopy(processor)
    changed.chat_template = processor.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "{% if add_generation_prompt %}<|assistant|> {% endif %}",
    ).replace(
        "<|{{ message['role'] }}|>",
        "<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %} {% endif %}",
    )
    encoder = Encoder(changed)
    example = replace(examples[0], images=(), prompt=(Message("user", ("why ?",)),))
    ids = [*encoder.prompt(example).input_ids, *encoder.completion_ids(example, "red")]
    joined = encoder.tokenizer("<s><|user|>why ?<|assistant|> red<|end|>", add_special_tokens=False)[
        "input_ids"
    ]
    assert ids == joined


def test_bos_is_left_to_a_tokenizer_whose_template_writes_none(processor, examples) -> None:
    """LLaVA 1.5's template holds no bos; its tokenizer puts one in front. It must not be lost, nor doubled."""
    import copy

    from tokenizers.processors import TemplateProcessing

    bare = copy.deepcopy(processor)
    bare.chat_template = processor.chat_template.replace("{{ bos_token }}", "")
    bos = processor.tokenizer.bos_token_id
    assert Encoder(bare).prompt(examples[0]).input_ids[0] != bos, "this tokenizer adds none by itself"
    bare.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    ids = Encoder(bare).prompt(examples[0]).input_ids
    assert ids == Encoder(processor).prompt(examples[0]).input_ids
    writes_it = copy.deepcopy(bare)
    writes_it.chat_template = processor.chat_template
    assert Encoder(writes_it).prompt(examples[0]).input_ids.count(bos) == 1
    answer = Encoder(bare).completion_ids(examples[0], "yes")
    assert bos not in answer
    closing = copy.deepcopy(bare)
    closing.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", bos), ("<|end|>", processor.tokenizer.eos_token_id)]
    )
    assert processor.tokenizer.eos_token_id not in Encoder(closing).prompt(examples[0]).input_ids


def test_white_space_that_a_template_writes_behind_the_response_is_no_token(processor, examples) -> None:
    """LLaVA 1.5's template ends a turn with a space and no marker."""
    import copy

    changed = copy.deepcopy(processor)
    changed.chat_template = processor.chat_template.replace(
        "{% if message['role'] == 'assistant' %}<|end|>{% endif %}", " "
    )
    assert changed.chat_template != processor.chat_template
    assert Encoder(changed).completion_ids(examples[0], "yes") == Encoder(processor).completion_ids(
        examples[0], "yes"
    )


def test_eos_ends_a_turn_even_where_it_is_also_the_unknown_token(processor) -> None:
    import copy

    changed = copy.deepcopy(processor)
    changed.tokenizer.unk_token = changed.tokenizer.eos_token
    assert Encoder(changed).end_ids == {processor.tokenizer.eos_token_id}


def test_nothing_is_truncated(encoder, processor, examples) -> None:
    length = encoder.encode(examples[0]).n_tokens
    assert Encoder(processor, max_length=length).encode(examples[0]).n_tokens == length
    with pytest.raises(DataError, match=f"{length} tokens.*max_length = {length - 1}"):
        Encoder(processor, max_length=length - 1).encode(examples[0])
    good, problems = Encoder(processor, max_length=length - 1).encode_all(
        [examples[0]], "rejected", require_negative=True
    )
    assert not good
    assert examples[0].where in problems[0]


def test_an_unreadable_image_names_the_row(encoder, examples, tmp_path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(examples[0].images[0].encoded()[:100])
    broken = replace(examples[0], images=(ImageRef(path=path),), where="set.jsonl:7")
    with pytest.raises(DataError, match=r"set\.jsonl:7: images"):
        encoder.encode(broken)


def test_the_span_covers_what_differs(encoder, examples) -> None:
    example = replace(
        examples[0],
        chosen=Completion("a small red ring top left ."),
        rejected=(Completion("a small blue ring top left .", kind="hard"),),
    )
    encoded = encoder.encode(example)
    (negative,) = encoded.negatives
    first, last = negative.span
    assert encoder.tokenizer.decode(negative.ids[first:last]).strip() == "blue"
    assert encoded.chosen.span == (0, len(encoded.chosen.ids))
    assert negative.kind == "hard"


def test_a_negative_with_chosens_tokens_is_left_out(encoder, examples) -> None:
    example = replace(examples[0], chosen=Completion("yes"), rejected=(Completion("yes"), Completion("no")))
    assert len(encoder.encode(example).negatives) == 1


def test_images_beyond_the_cache_are_decoded_again(processor, encoder, examples) -> None:
    small = Encoder(processor, cache_gb=0.0)
    prompt = small.prompt(examples[0])
    assert not small.prompt._images
    kept = encoder.prompt(examples[0]).images
    for name, value in prompt.images.items():
        assert (value == kept[name]).all()
    assert prompt.images is not prompt.images
    assert encoder.prompt(examples[0]).images is kept


def test_batches_hold_pairs_as_indices(encoder, examples) -> None:
    first = replace(examples[0], rejected=(Completion("no", kind="hard"), Completion("maybe", kind="easy")))
    second = replace(examples[1], rejected=())
    third = replace(examples[2], rejected=(Completion("never", kind="hard"),))
    encoded = [encoder.encode(e) for e in (first, second, third)]
    batch = collate(encoded)
    assert [batch.completions[i].kind for i in batch.rejected.tolist()] == ["hard", "easy", "hard"]
    assert batch.pair_prompt.tolist() == [0, 0, 2]
    assert [batch.completions[i] for i in batch.chosen.tolist()] == [e.chosen for e in encoded]
    assert batch.n_paired_prompts == 2
    assert batch.n_rejected_tokens == sum(len(c.ids) for e in encoded for c in e.negatives)
