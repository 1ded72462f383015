"""One process of a distributed test: trains a tiny random model and writes what every scenario logged.

``python tests/process_worker.py MODE WORLD MODEL OUT SCENARIO...`` with MODE ``ddp``, ``fsdp2``, ``zero2`` or ``zero3``
and the launcher's environment (RANK, WORLD_SIZE, ...). The tests call :func:`trained` themselves for the single
process.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from cwdpo import waiting
from cwdpo.config import load_recipe
from cwdpo.data.encode.encoder import EncodedExample, EncodedPrompt, Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import CwdpoError, DataError
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.load_sharded import load_sharded
from cwdpo.models.sample import sample
from cwdpo.models.saved import load_weights
from cwdpo.models.settings import ModelSettings
from cwdpo.models.shared_attention import use_scoring
from cwdpo.models.turns import in_turns, silent_rows_from
from cwdpo.models.write import save_weights
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.pipeline import two_stage
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.records import ImageRef
from cwdpo.scoring.pairs import reference_pass
from cwdpo.trainer.guard import Guard
from cwdpo.trainer.held_out import held_out_loss
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions
from random_models import spread

GLOBAL_BATCH = 8
PROCESSES = int(os.environ.get("CWDPO_PROCESSES", "2"))
"""How many processes are compared with one: 2, or 4 by hand."""
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "DS_ACCELERATOR": "cpu",
}
CW = {"name": "cw_dpo", "beta": 0.5, "floor": -6.0, "tau": 0.5, "sft_weight": 0.3}
PLAIN = {"max_steps": 6}


@dataclass(frozen=True)
class Scenario:
    """A run: objective, training arguments, how many examples, and what is done to the data."""

    objective: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    n: int = 24
    text_only: tuple[int, ...] = ()
    nan: int | None = None
    unreadable: int | None = None
    frozen: tuple[str, ...] = ()
    spike: float | None = None
    scoring: Literal["plain", "shared_prefix"] = "shared_prefix"
    by_length: bool = True
    max_tokens: int | None = None
    workers: int = 0


MIXED = tuple(i for i in range(24) if i % 3 or i < 8)
SCENARIOS = {
    "cw_dpo": Scenario(CW, {"max_steps": 6, "optim": "adamw_torch"}),
    "cw_dpo_plain": Scenario(CW, {"max_steps": 6, "optim": "adamw_torch"}, scoring="plain"),
    "by_tokens": Scenario(CW, {"max_steps": 6}, n=22, max_tokens=250),  # 8 batches: one process has as many
    "sft_constrained": Scenario({"name": "sft_constrained", "penalty": 0.5, "constraint": 7.0}, PLAIN),
    "constraint_holds": Scenario({"name": "sft_constrained", "penalty": 0.5, "constraint": 0.5}, PLAIN),
    "sft_smoothed": Scenario({"name": "sft_smoothed", "weight": 0.2}, PLAIN),
    "accumulated": Scenario(CW, {"max_steps": 6, "gradient_accumulation_steps": 2}),
    "checkpointing": Scenario(
        CW,
        {"max_steps": 4, "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        text_only=MIXED,
    ),
    "uneven": Scenario(CW, {"num_train_epochs": 2}, n=19),
    "uneven_sft": Scenario({"name": "sft_constrained", "penalty": 0.5, "constraint": 7.0}, {"num_train_epochs": 2}, n=17),  # noqa: E501
    "mixed": Scenario(CW, {"max_steps": 50, "optim": "adamw_torch", "learning_rate": 1e-3}, n=22, text_only=MIXED),
    "mixed_constrained": Scenario(
        {"name": "sft_constrained", "penalty": 0.5, "constraint": 7.0},
        {"max_steps": 6, "gradient_accumulation_steps": 2},
        n=20,
        text_only=MIXED,
    ),
    "vision_frozen": Scenario(CW, {"max_steps": 4}, text_only=MIXED, frozen=("vision_tower",)),
    "nan": Scenario(CW, {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}, nan=11, by_length=False),
    "unreadable": Scenario(CW, {"num_train_epochs": 1}, unreadable=11),
    "workers": Scenario(CW, {"max_steps": 6, "gradient_accumulation_steps": 2}, n=19, workers=1),
    "unreadable_by_workers": Scenario(CW, {"num_train_epochs": 2}, unreadable=11, workers=1),
    "spike": Scenario(CW, {"max_steps": 8}, spike=1.01),
}  # fmt: skip


def encoded_examples(
    model: Any, world: Path, folder: Path, scenario: Scenario, out: Path
) -> list[EncodedExample]:
    """Examples with their reference values, the scenario's damage done."""
    examples = list(read_examples(world / "train.jsonl").examples[: scenario.n])
    own = out / f"{os.environ.get('RANK', 'alone')}.png"
    if scenario.workers and scenario.unreadable is not None:
        bad = examples[scenario.unreadable]
        own.write_bytes(bad.images[0].stored())
        examples[scenario.unreadable] = replace(bad, images=(ImageRef(own),))
    cache = 0.0 if scenario.workers else 1.0
    encoder = Encoder(AutoProcessor.from_pretrained(folder), cache_gb=cache, workers=scenario.workers)
    encoded, problems = encoder.encode_all(examples, "rejected", require_negative=True)
    assert not problems
    image_token = model.config.image_token_id
    for i in set(scenario.text_only) & set(range(scenario.n)):
        ids = tuple(t for t in encoded[i].prompt.input_ids if t != image_token)
        encoded[i] = replace(encoded[i], prompt=EncodedPrompt(ids))
    encoded[3] = replace(encoded[3], negatives=encoded[3].negatives[:1])
    encoded = reference_pass(model, encoded)
    if scenario.nan is not None:
        bad = encoded[scenario.nan]
        images = {k: torch.full_like(v, math.nan) for k, v in bad.prompt.images.items()}
        encoded[scenario.nan] = replace(bad, prompt=replace(bad.prompt, load_images=lambda: images))
    if scenario.workers and scenario.unreadable is not None:
        own.write_bytes(own.read_bytes()[:100])
    elif scenario.unreadable is not None:

        def vanished() -> Any:
            raise DataError("row 12: images: cannot be decoded (gone)")

        bad = encoded[scenario.unreadable]
        encoded[scenario.unreadable] = replace(bad, prompt=replace(bad.prompt, load_images=vanished))
    return encoded


def random_model(folder: Path) -> Any:
    """The folder's model with weights far enough from zero that token probabilities differ."""
    logging.disable_progress_bar()
    return spread(AutoModelForImageTextToText.from_pretrained(folder), seed=3).eval()


class ZeroGradients(TrainerCallback):
    """Gives parameters without a gradient one of zeros, as DeepSpeed does: Adam's momentum moves them then."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any
    ) -> None:
        """Before each update."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def trained(
    name: str, world: Path, folder: Path, out: Path, processes: int = 1, *, zeros: bool = False
) -> dict[str, Any]:
    """Run a scenario; a dictionary of logged rows, sums over the final weights, and the error's text."""
    scenario = SCENARIOS[name]
    model = random_model(folder)
    use_scoring(model, scenario.scoring)
    encoded = encoded_examples(model, world, folder, scenario, out)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in parameter_name for part in scenario.frozen))
    accumulation = scenario.arguments.get("gradient_accumulation_steps", 1)
    # Micro-batches by tokens are as many whoever runs them: one process takes those of all for a step.
    split = {"gradient_accumulation_steps": PROCESSES // processes} if scenario.max_tokens else {}
    arguments = TrainingArguments(
        **{
            "output_dir": str(out / name),
            "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            **scenario.arguments,
            **split,
        }
    )
    logs: list[dict[str, Any]] = []
    guard = Guard(out / name, scenario.spike, spike_window=3)
    trainer = PreferenceTrainer(
        model, arguments, OBJECTIVES.build(scenario.objective), encoded,
        options=TrainerOptions(
            on_log=lambda row: logs.append(dict(row)), guard=guard,
            group_by_length=scenario.by_length, max_tokens_per_batch=scenario.max_tokens,
            workers=scenario.workers,
        ),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if zeros:
        trainer.add_callback(ZeroGradients())
    error = ""
    try:
        trainer.train()
    except CwdpoError as problem:
        error = f"{type(problem).__name__}: {problem}"
    held: dict[str, Any] = {}
    if name == "uneven":
        try:
            found = held_out_loss(trainer, encoded[:7], 2)
            held = {
                "loss": found.loss,
                "rewards": found.rewards.tolist(),
                "metrics": found.metrics,
                "n": found.n,
            }
        except CwdpoError as problem:
            held = {"error": str(problem)}
    whole = trainer.finished_model().state_dict()
    sums = {name: float(value.double().abs().sum()) for name, value in whole.items()}
    wrapped = type(trainer.model_wrapped).__name__
    return {
        "logs": logs, "weights": sums, "error": error, "wrapped": wrapped, "skipped": guard.skipped, "held_out": held,
    }  # fmt: skip


def shard_on_cpu() -> None:
    """accelerate shards on accelerators only; told that there is one, it does the same on a CPU."""
    os.environ.update(SHARDED)
    original = AcceleratorState.__init__

    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        state = PartialState(cpu=True)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = told


def zero_on_cpu(stage: str) -> None:
    """accelerate starts DeepSpeed on accelerators only; told that there is one, it does the same on a CPU."""
    os.environ.update({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})
    os.environ.pop("ACCELERATE_USE_CPU", None)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that it would first compile

    def not_on_cpu(original: Any) -> Any:
        def told(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **{**kwargs, "cpu": False})

        return told

    for state in (PartialState, AcceleratorState):
        state.__init__ = not_on_cpu(state.__init__)
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def loads_in_parts(world: Path, out: Path, tune: str) -> None:
    """A model that is loaded in parts is the one that is loaded whole, saved and loaded again, and called in turns."""
    state = PartialState(cpu=True)
    settings = ModelSettings(path="embedded", device="cpu", tune=tune)
    set_seed(3)
    whole = load_policy(settings)
    set_seed(3)
    policy = load_sharded(settings, Accelerator(cpu=True))
    expected = dict(whole.model.named_parameters())
    assert [n for n, _ in policy.model.named_parameters()] == list(expected)
    held = 0
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == expected[name].requires_grad, name
        assert torch.equal(parameter.full_tensor(), expected[name]), name
        held += parameter.to_local().numel()
    share = 1.02 / state.num_processes
    assert held < share * sum(p.numel() for p in expected.values()), "each process has its part"
    folder = out / tune if state.is_main_process else None
    if folder is not None:
        folder.mkdir()
        (out / f"{tune}-whole").mkdir()
        save_weights(whole.model, out / f"{tune}-whole")
    save_weights(policy.model, folder)
    state.wait_for_everyone()
    with torch.no_grad():
        for parameter in (p for p in policy.model.parameters() if p.requires_grad):
            parameter.zero_()
    load_weights(policy.model, out / tune)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    _call_in_turns(policy, whole, read_examples(world / "train.jsonl").examples)


def _call_in_turns(policy: Policy, whole: Policy, examples: Any) -> None:
    """One process scores and samples rows with images, the others score one text, twice; a third pass has no rows."""
    encoder = whole.encoder()
    encoded, _ = encoder.encode_all(examples[:4], "rejected", require_negative=True)
    text = [replace(e, prompt=EncodedPrompt(e.chosen.ids)) for e in encoded[:1]]
    silent_rows_from(policy.model, lambda: (e.prompt for e in encoded))
    first = PartialState().is_main_process
    rows = encoded if first else text

    def passes(model: Any) -> Any:
        with in_turns(model):
            scored = reference_pass(model, rows, batch_size=1 if first else 4)
            drawn = sample(model, encoder, examples[:3], max_new_tokens=8, batch_size=2) if first else []
        with in_turns(model):
            again = [] if first else reference_pass(model, text)
        with in_turns(model):
            pass
        return [c.reference_sum_logp for e in [*scored, *again] for c in e.completions], [
            s.text for s in drawn
        ]

    values, texts = passes(policy.model)
    wanted, said = passes(whole.model)
    assert texts == said
    assert max(abs(a - b) for a, b in zip(values, wanted, strict=True)) < 1e-4
    assert (
        len(sample(policy.model, encoder, examples[:3], max_new_tokens=4, batch_size=1, together=True)) == 3
    )
    assert all(hasattr(p, "device_mesh") for p in policy.model.parameters()), "nothing is left gathered"


def slow_first_process(out: Path, recipe: str, settings: tuple[str, ...]) -> None:
    """A run whose first process judges, writes its report and reads its data ten times as long as the timeout.

    At the end, the same wait in the training's own group, which fails: so the timeout is in force.
    """
    state = PartialState(cpu=True, timeout=timedelta(seconds=2))

    def slowly(work: Any) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            if state.is_main_process:
                time.sleep(20)
            return work(*args, **kwargs)

        return slow

    for name in ("prepare_data", "write_report"):
        setattr(two_stage, name, slowly(getattr(two_stage, name)))
    waiting.EVERY = 5.0
    train_two_stage(load_recipe(recipe, settings), out)
    if state.is_main_process:
        time.sleep(8)
        os._exit(0)
    try:
        state.wait_for_everyone()
    except RuntimeError as error:
        print("the training's own group:", str(error).splitlines()[0])


def main(mode: str, world: str, folder: str, out: str, *names: str) -> None:
    """Run the named scenarios on this process and write its results."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if mode == "fsdp2":
        shard_on_cpu()
    if mode.startswith("zero"):
        zero_on_cpu(mode[-1])
    if names[:1] == ("cwdpo",):
        sys.argv[1:] = names[1:]
        runpy.run_module("cwdpo", run_name="__main__", alter_sys=True)
        return
    if names[:1] in (("recipe",), ("resume",)):
        train_two_stage(load_recipe(names[1], names[2:]), out, resume=names[0] == "resume")
        return
    if names[:1] == ("parts",):
        loads_in_parts(Path(world), Path(out), names[1])
        return
    if names[:1] == ("dies",):
        PartialState(cpu=True)
        waiting.prepare()
        if rank == 0:
            os._exit(9)
        try:
            waiting.wait_for_all("a test")
        except CwdpoError as error:
            print(f"{type(error).__name__}: {error}", flush=True)  # os._exit writes out nothing
        os._exit(0)
    if names[:1] == ("slow",):
        slow_first_process(Path(out), names[1], names[2:])
        return
    found = {}
    for name in names:
        if mode == "zero3":  # else transformers shards the next scenario's model when it is loaded
            unset_hf_deepspeed_config()
        found[name] = trained(name, Path(world), Path(folder), Path(out), processes)
        (Path(out) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
