"""The reference's values on disk: kills, damage, what is a miss, and sharing between runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import NonFiniteError, ReferenceCacheError
from cwdpo.models.shared_attention import use_scoring
from cwdpo.rundir import RunDir
from cwdpo.scoring.pairs import reference_pass
from cwdpo.scoring.reference_cache import (
    CacheWriter,
    ReferenceValues,
    Value,
    read_file,
    reference_digest,
    row_keys,
)
from cwdpo.stage import reference
from cwdpo.stage.reference import stored_reference_pass


def stored(path: Path) -> dict[bytes, Value]:
    return {key: value for batch in read_file(path) for key, value in zip(*batch, strict=True)}


def value(i: int) -> tuple[bytes, tuple[float, float]]:
    return i.to_bytes(16, "little"), (-float(i), -i / 2)


@pytest.fixture
def encoded(encoder: Any, examples: Any) -> Any:
    return encoder.encode_all(examples[:10], "rejected", require_negative=True)[0]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Completions of every batch that the reference really scores."""
    seen: list[int] = []

    def counted(model: Any, batch: Any, **named: Any) -> Any:
        seen.append(sum(1 + len(e.negatives) for e in batch))
        return reference_pass(model, batch, **named)

    monkeypatch.setattr(reference, "reference_pass", counted)
    return seen


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.arrow")
    return path


# --- the file -----------------------------------------------------------------------------------------------


def test_values_come_back(tmp_path: Path) -> None:
    cache = CacheWriter(tmp_path)
    cache.append(dict(map(value, range(3))))
    cache.append(dict(map(value, range(3, 5))))
    cache.close()
    assert stored(only_file(tmp_path)) == dict(map(value, range(5)))


def test_completions_take_over_the_values_of_their_keys(tmp_path: Path) -> None:
    """Keys that end in zeros, keys that several completions have, and keys that are not stored."""
    numbers = [300, 0, 256, 7, 300, 1, 65536, 9]
    missing = {7, 9}
    for part in ([300, 0], [256, 1, 65536, 999]):
        cache = CacheWriter(tmp_path)
        cache.append(dict(map(value, part)))
        cache.close()
    found = ReferenceValues(b"".join(value(i)[0] for i in numbers))
    assert not found.known(found.slots).any()
    found.fill(tmp_path)
    assert found.known(found.slots).tolist() == [i not in missing for i in numbers]
    wanted = [value(i)[1] for i in numbers if i not in missing]
    assert [tuple(v) for v in found.values(found.slots)[found.known(found.slots)].tolist()] == wanted
    assert found.slots[0] == found.slots[4]
    assert len(set(found.slots.tolist())) == 7
    new = {int(found.slots[3]): (-1.5, -2.5)}
    found.put(new)
    assert found.values(found.slots[3]).tolist() == [-1.5, -2.5]
    assert found.by_key({int(slot): (0.0, 0.0) for slot in found.slots}).keys() == {
        value(i)[0] for i in numbers
    }


@pytest.mark.parametrize("closed", [False, True])
def test_a_file_cut_at_any_byte_keeps_its_whole_batches(tmp_path: Path, closed: bool) -> None:
    cache = CacheWriter(tmp_path / "cache")
    ends = []
    for i in range(3):
        cache.append(dict([value(2 * i), value(2 * i + 1)]))
        ends.append(only_file(tmp_path / "cache").stat().st_size)
    if closed:
        cache.close()
    data = only_file(tmp_path / "cache").read_bytes()
    cache.close()
    cut = tmp_path / "cut.bin"
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert stored(cut) == dict(map(value, range(2 * whole))), size


def test_a_changed_byte_is_refused_or_costs_values_but_never_gives_wrong_ones(tmp_path: Path) -> None:
    cache = CacheWriter(tmp_path)
    true = dict(map(value, range(8)))
    for i in range(0, 8, 2):
        cache.append(dict(map(value, range(i, i + 2))))
    cache.close()
    path = only_file(tmp_path)
    data = path.read_bytes()
    refused = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            found = stored(path)
        except ReferenceCacheError:
            refused += 1
        else:
            assert found.items() <= true.items(), place
    assert refused > len(data) / 2
    path.write_bytes(data.replace(value(3)[0], b"x" * 16))
    with pytest.raises(ReferenceCacheError, match=rf"{path}: damaged .*after the first 2 .*delete the file"):
        stored(path)


@pytest.mark.parametrize("content", [b"not arrow at all, but long enough to look at", b"\0" * 64])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(ReferenceCacheError, match=r"a\.arrow: damaged"):
        stored(tmp_path / "a.arrow")


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    """Size is a bound; seconds are printed, because machines differ (pytest -s)."""
    began = time.perf_counter()
    cache = CacheWriter(tmp_path)
    for first in range(0, 100_000, 32):
        cache.append(dict(map(value, range(first, first + 32))))
    cache.close()
    wrote = time.perf_counter() - began
    began = time.perf_counter()
    keys = b"".join(value(i)[0] for i in range(100_000))
    values = ReferenceValues(keys)
    values.fill(tmp_path)
    assert values.known(values.slots).all()
    size = only_file(tmp_path).stat().st_size
    print(f"write {wrote:.2f} s, load {time.perf_counter() - began:.2f} s, {size / 1e6:.1f} MB")
    assert size < 50e6


# --- keys ---------------------------------------------------------------------------------------------------


def keys_of(encoder: Any, example: Any) -> list[bytes]:
    return row_keys("reference", encoder.encode(example))


def test_a_changed_pixel_prompt_or_processor_setting_is_a_miss(
    processor: Any, examples: Any, tmp_path: Path
) -> None:
    import copy

    from PIL import Image

    from cwdpo.records import ImageRef, Message

    example = examples[0]
    before = keys_of(Encoder(processor), example)
    assert keys_of(Encoder(processor), example) == before
    assert len(set(before)) == len(before) > 1
    picture = example.images[0].open()
    picture.putpixel((3, 3), (0, 0, 0))
    picture.save(tmp_path / "changed.png")
    Image.open(tmp_path / "changed.png").close()
    changed = replace(example, images=(ImageRef(path=tmp_path / "changed.png"),))
    other_prompt = replace(example, prompt=(Message("user", (None, "what else ?")),))
    other_setting = copy.deepcopy(processor)
    other_setting.image_processor.image_mean = [0.4] * 3
    for keys in (
        keys_of(Encoder(processor), changed),
        keys_of(Encoder(processor), other_prompt),
        keys_of(Encoder(other_setting), example),
    ):
        assert not set(keys) & set(before)


def test_a_changed_weight_dtype_precision_or_layout_is_a_miss(model: Any) -> None:
    before = reference_digest(model)
    assert reference_digest(model) == before
    digests = {before, reference_digest(model, bf16=True)}
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[3, 2], weight[3, 4] = weight[3, 4].clone(), weight[3, 2].clone()  # every sum stays what it was
    digests.add(reference_digest(model))
    use_scoring(model, "shared_prefix")
    digests.add(reference_digest(model))
    digests.add(reference_digest(model.bfloat16()))
    assert len(digests) == 5


def test_a_fresh_adapter_is_its_base(model: Any) -> None:
    """Runs of other seeds share the base's values; an adapter that has learned something has values of its own."""
    from peft import LoraConfig, get_peft_model

    def wrapped(seed: int) -> Any:
        import copy

        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))

    first, second = wrapped(0), wrapped(1)
    assert reference_digest(first) == reference_digest(second)
    with torch.no_grad():
        next(p for n, p in first.named_parameters() if ".lora_B." in n)[0, 0] = 0.1
    assert reference_digest(first) != reference_digest(second)


# --- the pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_stored_values_are_used_and_what_a_kill_cut_is_scored_again(
    cut: int, model: Any, encoded: Any, tmp_path: Path, scored: list[int]
) -> None:
    run = RunDir(tmp_path)
    plain = reference_pass(model, encoded, batch_size=4)
    ends = []

    class Watching(CacheWriter):
        def append(self, values: Any) -> None:
            super().append(values)
            ends.append(only_file(self.folder).stat().st_size)

    original, reference.CacheWriter = reference.CacheWriter, Watching
    try:
        assert stored_reference_pass(model, encoded, run, batch_size=4) == plain
    finally:
        reference.CacheWriter = original
    whole = list(scored)
    assert len(whole) == 3
    path = only_file(tmp_path / "reference")
    path.write_bytes(path.read_bytes()[: ends[cut] - 9])
    scored.clear()
    assert stored_reference_pass(model, encoded, run, batch_size=4) == plain
    canaries = scored[: len(scored) - (3 - cut)]
    assert scored[len(canaries) :] == whole[cut:], "batches are what they were"
    scored.clear()
    assert stored_reference_pass(model, encoded, run, batch_size=4) == plain
    assert len(scored) <= reference.CANARIES, "everything is stored now"


def test_only_new_negatives_are_scored(model: Any, encoded: Any, tmp_path: Path, scored: list[int]) -> None:
    """A later run with one more negative a prompt, in the same folder, asks for that one only."""
    folder = tmp_path / "shared"
    fewer = [replace(e, negatives=e.negatives[:1]) for e in encoded]
    stored_reference_pass(model, fewer, RunDir(tmp_path / "first"), batch_size=4, folder=folder)
    scored.clear()
    after = stored_reference_pass(model, encoded, RunDir(tmp_path / "second"), batch_size=4, folder=folder)
    assert {len(e.negatives) for e in encoded} == {2}
    assert scored == [4, 4, 2]
    for one, wanted in zip(after, reference_pass(model, encoded), strict=True):
        for completion, other in zip(
            (one.chosen, *one.negatives), (wanted.chosen, *wanted.negatives), strict=True
        ):
            assert completion.reference_sum_logp == pytest.approx(other.reference_sum_logp, abs=1e-4)
            assert completion.reference_span_sum_logp == pytest.approx(
                other.reference_span_sum_logp, abs=1e-4
            )


def test_values_of_another_reference_are_not_used(model: Any, encoded: Any, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first = stored_reference_pass(model, encoded, run, batch_size=4)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 2] += 0.25
    second = stored_reference_pass(model, encoded, run, batch_size=4)
    assert second == reference_pass(model, encoded, batch_size=4)
    assert second != first


def test_values_that_the_reference_does_not_give_any_more_are_refused(
    model: Any, encoded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary: the keys fit, and the values do not."""
    run = RunDir(tmp_path)
    monkeypatch.setattr(reference, "reference_digest", lambda model, bf16: "the same")
    stored_reference_pass(model, encoded, run, batch_size=4)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)
    with pytest.raises(
        ReferenceCacheError, match=r"stale: for example .* response 0, .*train\.reference_cache"
    ):
        stored_reference_pass(model, encoded, run, batch_size=4)


def test_a_reference_that_is_not_finite_names_the_example(model: Any, encoded: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = torch.nan
    with pytest.raises(
        NonFiniteError,
        match=f"example ({'|'.join(e.id for e in encoded)}): the log-likelihood of a response .* is nan",
    ):
        stored_reference_pass(model, encoded, RunDir(tmp_path), batch_size=4)
    assert not list(tmp_path.rglob("*.arrow"))


def test_values_of_bf16_weights_agree_with_themselves_in_other_company(
    model: Any, encoded: Any, tmp_path: Path
) -> None:
    """A row's last bits depend on its batch: in bf16 that is more than the canary of fp32 allows."""
    model = model.bfloat16()
    folder = tmp_path / "shared"
    stored_reference_pass(model, encoded, RunDir(tmp_path / "a"), batch_size=10, folder=folder)
    stored_reference_pass(model, encoded, RunDir(tmp_path / "b"), batch_size=3, folder=folder)
