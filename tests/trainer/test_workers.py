"""Images read by worker processes: every run gives what it gives without them, and no failure goes unseen."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.reading import PROMPTS_AHEAD, read_ahead
from cwdpo.errors import DataError, WorkerError
from cwdpo.files.reading import read_jsonl
from cwdpo.models.sample import begun_prompts, sample
from cwdpo.models.vision_cache import keep_vision_features
from cwdpo.negatives.settings import SamplerSettings
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.onpolicy.sampler import LocalSampler
from cwdpo.pipeline.run_stage import ListenerCallback
from cwdpo.records import ImageRef
from cwdpo.scoring.pairs import reference_pass
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions
from paths import TESTS
from trainer.test_trainer import arguments

CW = {"name": "cw_dpo", "beta": 0.5, "floor": -6.0, "tau": 0.5}


@pytest.fixture(scope="module")
def reader(processor) -> Encoder:
    """An encoder with a worker, which keeps no images."""
    return Encoder(processor, cache_gb=0, workers=1)


# --- the order of reading ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 9])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_items_come_in_order_and_the_window_is_begun(n, window) -> None:
    begun: list[int] = []

    def begin(item: int) -> str:
        begun.append(item)
        return str(item)

    for k, item in enumerate(read_ahead(range(n), begin, lambda _: PROMPTS_AHEAD, window)):
        assert item == str(k)
        assert begun == list(range(min(n, k + 1 + window)))
    assert len(begun) == n


def test_small_batches_are_begun_until_there_are_prompts_enough() -> None:
    begun: list[int] = []
    stream = read_ahead(range(100), lambda item: begun.append(item) or item, lambda _: 3, 1)
    assert next(stream) == 0
    # Six batches of 3 prompts are 16 at least; the first of them is the one that came.
    assert len(begun) == 6


# --- what a worker reads -------------------------------------------------------------------------------


def test_a_worker_gives_the_tensors_of_the_main_process(reader, processor, examples) -> None:
    states = random.getstate(), torch.get_rng_state()
    coming = [reader.prompt(e).ahead() for e in examples[:6]]
    for example, prompt in zip(examples, coming, strict=False):
        expected = Encoder(processor, cache_gb=0).prompt(example)
        assert prompt == expected
        assert prompt.load_images is not reader.prompt(example).load_images
        assert prompt.images.keys() == expected.images.keys()
        for name, value in expected.images.items():
            assert torch.equal(prompt.images[name], value), name
            assert prompt.images[name].dtype == value.dtype
        assert prompt.images is prompt.images, "read once"
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_what_is_in_the_cache_is_read_by_nobody(processor, examples) -> None:
    encoder = Encoder(processor, workers=1)
    kept, other = (encoder.prompt(e) for e in examples[1:3])
    assert kept.images
    assert kept.ahead() is kept
    before = len(multiprocessing.active_children())
    coming = other.ahead()
    assert len(multiprocessing.active_children()) == before + 1
    assert coming is not other
    assert other.images, "read here, in the meantime"
    assert coming.images
    assert other.ahead() is other


def test_what_a_worker_read_is_put_into_the_cache(processor, examples) -> None:
    encoder = Encoder(processor, workers=1)
    prompt = encoder.prompt(examples[2])
    images = prompt.ahead().images
    assert prompt.images is images
    assert not any(value.is_shared() for value in images.values()), "else each would hold a file open"


def test_without_workers_and_without_images_nothing_is_begun(encoder, reader, examples) -> None:
    assert encoder.prompt(examples[0]).ahead() is encoder.prompt(examples[0])
    words = tuple(replace(m, parts=tuple(p for p in m.parts if p)) for m in examples[0].prompt)
    text = reader.prompt(replace(examples[0], images=(), prompt=words))
    assert text.ahead() is text


def test_kept_features_need_no_images(reader, examples, model) -> None:
    from cwdpo.data.encode.collate import collate
    from cwdpo.scoring.ahead import begun

    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.requires_grad_(False)
    assert keep_vision_features(model, 1.0)
    first, second = (reader.encode(e) for e in examples[:2])
    reference_pass(model, [first])
    coming = begun(model, collate([first, second])).prompts
    assert coming[0] is first.prompt
    assert coming[1] is not second.prompt


def test_a_processor_that_cannot_be_copied_reads_here(processor, examples, caplog) -> None:
    stubborn = copy.copy(processor)
    stubborn.hook = lambda: None
    encoder = Encoder(stubborn, cache_gb=0, workers=1)
    with caplog.at_level(logging.WARNING, logger="cwdpo"):
        for example in examples[:2]:
            prompt = encoder.prompt(example)
            assert prompt.ahead() is prompt
            assert prompt.images
    (message,) = [r.getMessage() for r in caplog.records if "workers" in r.getMessage()]
    assert message.startswith(
        "the main process decodes the images: the processor cannot be copied to workers ("
    )


def test_a_copy_of_the_encoder_is_empty(reader, examples) -> None:
    reader.prompt(examples[0])
    copied = pickle.loads(pickle.dumps(reader.prompt))
    assert not copied._prompts
    assert copied.workers is None
    assert copied(examples[0]) == reader.prompt(examples[0])


# --- what goes wrong -----------------------------------------------------------------------------------


def damaged(example, folder: Path):
    """The example with an image of its own, and a function that spoils the image in its middle."""
    path = folder / "own.png"
    shutil.copy(example.images[0].path, path)

    def spoil() -> None:
        data = bytearray(path.read_bytes())
        middle = data.index(b"IDAT") + 12
        data[middle : middle + 40] = bytes(40)
        path.write_bytes(data)

    return replace(example, images=(ImageRef(path),)), spoil


def test_an_image_that_a_worker_cannot_read_is_the_error_of_the_main_process(
    reader, processor, examples, tmp_path
) -> None:
    example, spoil = damaged(examples[4], tmp_path)
    here = Encoder(processor, cache_gb=0).prompt(example)
    there = reader.prompt(example)
    spoil()
    with pytest.raises(DataError, match="images: cannot be decoded") as expected:
        _ = here.images
    coming = there.ahead()
    with pytest.raises(DataError) as found:
        _ = coming.images
    assert str(found.value) == str(expected.value)
    assert example.where in str(found.value)
    assert reader.prompt(examples[5]).ahead().images, "the worker goes on"


def test_a_killed_worker_is_one_error(processor, examples) -> None:
    encoder = Encoder(processor, cache_gb=0, workers=2)
    assert encoder.prompt(examples[0]).ahead().images
    for process in encoder.prompt.workers._pool._processes.values():
        os.kill(process.pid, signal.SIGKILL)
    coming = [encoder.prompt(example).ahead() for example in examples[1:]]
    with pytest.raises(WorkerError, match=r"a data worker died .* lower train.dataloader_workers") as found:
        _ = coming[-1].images
    assert isinstance(found.value, DataError)
    assert found.value.__suppress_context__


# --- training ------------------------------------------------------------------------------------------

RUNS = {
    "one batch": (CW, {}, {}),
    "accumulated": (CW, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, {}),
    "by tokens": (CW, {}, {"max_tokens_per_batch": 340}),
    "random lengths": (CW, {}, {"group_by_length": False}),
    "looks ahead": (
        {"name": "beta_dpo", "beta": 0.5, "alpha": 2.0, "keep": 0.6},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {},
    ),
}  # fmt: skip


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop = state.global_step == 4


def trained(model, encoder, examples, folder, run: str, *, resume: bool = False, stop: bool = False):
    """Weights and logged rows of six steps, over more than one epoch."""
    spec, changes, options = RUNS[run]
    encoded, _ = encoder.encode_all(examples[:19], "rejected", require_negative=True)
    encoded = reference_pass(model, encoded, batch_size=4)
    logs: list[dict[str, float]] = []
    trainer = PreferenceTrainer(
        model,
        arguments(folder, max_steps=6, save_strategy="steps", save_steps=2, save_only_model=False, **changes),
        OBJECTIVES.build(spec),
        encoded,
        callbacks=[Stop()] if stop else [],
        options=TrainerOptions(
            on_log=lambda row: logs.append(dict(row)),
            workers=0 if encoder.prompt.workers is None else 2,
            **options,
        ),
    )
    trainer.train(resume_from_checkpoint=resume)
    rows = [{k: v for k, v in row.items() if not k.startswith("train_")} for row in logs]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, rows


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=pytest.mark.slow if i > 1 else ()) for i, run in enumerate(RUNS)]
)
def test_workers_change_nothing(run, model, processor, examples, tmp_path) -> None:
    wanted, rows = trained(
        copy.deepcopy(model), Encoder(processor, cache_gb=0), examples, tmp_path / "none", run
    )
    start = dict(model.named_parameters())
    assert max(float((wanted[n] - start[n].detach()).abs().max()) for n in wanted) > 1e-4
    for workers in (1, 2):
        encoder = Encoder(processor, cache_gb=0, workers=workers)
        found, logs = trained(copy.deepcopy(model), encoder, examples, tmp_path / str(workers), run)
        assert logs == rows
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert encoder.prompt.workers._pool is not None, "or nothing was tested"


@pytest.mark.parametrize("run", ["one batch", "random lengths"])
def test_a_run_resumed_within_an_epoch_is_the_uninterrupted_one(
    run, model, reader, examples, tmp_path
) -> None:
    wanted, rows = trained(copy.deepcopy(model), reader, examples, tmp_path / "whole", run)
    trained(copy.deepcopy(model), reader, examples, tmp_path / "run", run, stop=True)
    found, again = trained(copy.deepcopy(model), reader, examples, tmp_path / "run", run, resume=True)
    assert [row["step"] for row in again if "loss" in row] == [5, 6]
    assert [r for r in again if "loss" in r] == [r for r in rows if r.get("step", 0) > 4 and "loss" in r]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_an_unreadable_image_stops_training_at_its_row(model, processor, examples, tmp_path) -> None:
    rows = list(examples[:19])
    rows[7], spoil = damaged(rows[7], tmp_path)
    encoder = Encoder(processor, cache_gb=0, workers=2)
    encoded, _ = encoder.encode_all(rows, "rejected", require_negative=True)
    encoded = reference_pass(model, encoded)
    spoil()
    trainer = PreferenceTrainer(
        model, arguments(tmp_path / "out"), OBJECTIVES.build(CW), encoded, options=TrainerOptions(workers=2)
    )
    with pytest.raises(DataError, match="images: cannot be decoded") as found:
        trainer.train()
    assert rows[7].where in str(found.value)


def test_samples_are_the_same(model, processor, reader, examples) -> None:
    """Calibration's and the pool's way of sampling; a prompt that is asked twice is read once."""
    settings = SamplerSettings(samples=2, max_new_tokens=4)
    found = []
    for encoder in (Encoder(processor, cache_gb=0), reader):
        sampler = LocalSampler(model, encoder, settings)
        sampler.begin(examples[:3], 0, 0)
        assert all(
            (prompt is encoder.prompt(e)) == (encoder is not reader)
            for e, prompt in zip(examples, sampler._begun.values(), strict=False)
        )
        rows = sampler(examples[:3], 0, 1)
        assert not sampler._begun
        repeated = [*examples[:5], *examples[:5]]
        found.append((rows, sample(model, encoder, repeated, max_new_tokens=4, batch_size=3)))
    assert found[0] == found[1]
    first, again = begun_prompts([reader.prompt(examples[0])] * 2)
    assert first is again


# --- whole runs ----------------------------------------------------------------------------------------


def written_recipe(world: Path, model: Path, folder: Path) -> Path:
    from pipeline.test_two_stage import recipe

    settings = recipe(
        world, model, data={"cache_gb": 0}, model={"vision_cache_gb": 0}, stage1={"steps": 8},
        train={"dataloader_workers": 0},
    )  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(settings.to_yaml())
    return path


def results(run: Path):
    weights = load_file(run / "model" / "model.safetensors")
    timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    rows = [
        {k: v for k, v in r.items() if k not in timings}
        for name in ("metrics.jsonl", "readings.jsonl", "samples.jsonl")
        for r in read_jsonl(run / name)
    ]
    return {name: value.numpy().tobytes() for name, value in weights.items()}, rows


@pytest.mark.slow
def test_whole_runs_are_equal_and_a_killed_worker_costs_nothing(
    run, world_folder, model_folder, tmp_path, monkeypatch
) -> None:
    path = written_recipe(world_folder, model_folder, tmp_path)
    found = {}
    for workers in (0, 2):
        out = tmp_path / str(workers)
        assert run("train", path, "--out", out, f"train.dataloader_workers={workers}").code == 0
        found[workers] = results(out)
    assert found[2] == found[0]
    for start in ("fills the cache", "reads it"):
        out, kept = tmp_path / start, f"data.image_cache={tmp_path / 'cache'}"
        assert run("train", path, "--out", out, "train.dataloader_workers=1", kept).code == 0
        assert results(out) == found[0], start
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert json.loads((tmp_path / "0" / "calibration.json").read_text()) == json.loads(
        (tmp_path / "2" / "calibration.json").read_text()
    )

    original = ListenerCallback.on_step_end

    def kill(self, args, state, control, **more) -> None:
        original(self, args, state, control, **more)
        if (self.stage.name, state.global_step) == ("stage1", 3):
            for process in self.stage.encoder.prompt.workers._pool._processes.values():
                os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(ListenerCallback, "on_step_end", kill)
    out = tmp_path / "killed"
    ended = run("train", path, "--out", out, "train.dataloader_workers=2")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("cwdpo: a data worker died")
    assert "Traceback" not in ended.err
    monkeypatch.undo()
    # Another number of workers is no change of the recipe.
    assert run("train", path, "--out", out, "--resume", "train.dataloader_workers=1").code == 0
    assert results(out) == found[0]


PARENT = """
import sys, time
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from transformers import AutoProcessor
encoder = Encoder(AutoProcessor.from_pretrained(sys.argv[2]), cache_gb=0, workers=2)
prompts = [encoder.prompt(e).ahead() for e in read_examples(sys.argv[1]).examples[:4]]
assert all(p.images for p in prompts)
print(*(p.pid for p in encoder.prompt.workers._pool._processes.values()), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number, world_folder, model_folder, tmp_path) -> None:
    """The script has no guard against running again in a worker, and needs none."""
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(script), str(world_folder / "train.jsonl"), str(model_folder)],
        stdout=subprocess.PIPE, text=True, cwd=TESTS,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            workers = [int(pid) for pid in process.stdout.readline().split()]
            assert len(workers) == 2
        finally:
            process.send_signal(number)
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.1)
