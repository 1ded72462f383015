"""The policy of a run: loaded before training, saved after each stage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from accelerate import Accelerator, DistributedType, PartialState
from transformers import set_seed

from cwdpo.arguments import TrainSettings
from cwdpo.clock import spent_on
from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import EncodedPrompt, Encoder
from cwdpo.data.encode.image_cache import ImageCache
from cwdpo.errors import DataError
from cwdpo.files.checksums import refuse_damage, write_checksums
from cwdpo.files.writing import new_folder
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.load_sharded import why_not_sharded
from cwdpo.models.saved import load_weights
from cwdpo.models.settings import ModelSettings
from cwdpo.models.sharding import is_sharded
from cwdpo.models.tiny import init_model
from cwdpo.models.write import save_weights
from cwdpo.rundir import RunDir
from cwdpo.stage.splits import Splits
from cwdpo.waiting import several


def model_settings(recipe: Recipe, splits: Splits, run: RunDir) -> ModelSettings:
    """The recipe's section ``model``; ``path: init`` makes a small LLaVA, its tokenizer trained on the data."""
    if recipe.model.path != "init":
        return recipe.model
    folder = run.path / "init"
    if not folder.exists():
        with new_folder(folder) as temporary:
            init_model(temporary, splits.texts, recipe.model.init)
            write_checksums(temporary)
        # Creating the model used random numbers; a run that finds the folder uses none. Set the seed again, so that a
        # new adapter starts with the same weights in both cases.
        set_seed(recipe.seed)
    else:
        refuse_damage(folder, "remove it, and it is created again")
    return recipe.model.model_copy(update={"path": str(folder)})


def load_model(recipe: Recipe, splits: Splits, run: RunDir) -> Policy:
    """The policy, whole on this process; see :func:`model_settings`."""
    return load_policy(model_settings(recipe, splits, run))


def pictured_prompts(encoder: Encoder, splits: Splits) -> Iterator[EncodedPrompt]:
    """The prompts with images or videos; rows that cannot be encoded are left out."""
    for example in chain(splits.stage1, splits.stage2, splits.validation):
        if example.pictured:
            with contextlib.suppress(DataError):
                yield encoder.prompt(example)


def sharding_accelerator(recipe: Recipe, note: Callable[[str], None]) -> Accelerator | None:
    """accelerate's settings of FSDP2, if the launcher asks for it and the model can be loaded in parts; else ``None``.

    Args:
        recipe: the recipe of the run.
        note: told why a model that is to be sharded is loaded whole.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1") or not several():
        return None
    reason = why_not_sharded(recipe.model)
    if reason is not None:
        note(f"{reason}: every process loads the whole model; FSDP2 shards it for training only")
        return None
    accelerator = Accelerator(
        cpu=recipe.model.device == "cpu", mixed_precision="bf16" if recipe.train.bf16 else "no"
    )
    if accelerator.distributed_type is not DistributedType.FSDP:
        note("accelerate shards on accelerators only: on this device every process trains the whole model")
        return None
    return accelerator


WORKERS = 4
"""Processes that read images, for each process of a run on an accelerator."""


def data_workers(train: TrainSettings) -> int:
    """``train.dataloader_workers``, or its default: some where an accelerator would wait, none on a CPU."""
    default = 0 if PartialState().device.type == "cpu" else WORKERS
    return default if train.dataloader_workers is None else train.dataloader_workers


def encoder_of(policy: Policy, recipe: Recipe) -> Encoder:
    """The encoder of a policy's checkpoint, with the recipe's settings."""
    data = recipe.data
    return policy.encoder(
        data.max_length,
        data.cache_gb,
        from_sizes=data.image_tokens == "sizes",
        workers=data_workers(recipe.train),
        on_disk=ImageCache(Path(data.image_cache), data.image_cache_gb) if data.image_cache else None,
    )


def load_saved(policy: Policy, folder: Path) -> None:
    """Load the weights that :func:`save_model` wrote into the policy.

    Raises:
        FileError: files of the folder were changed.
        ModelError: the weights do not fit the model.
    """
    refuse_damage(
        folder,
        "remove it, and --resume continues from the stage's last checkpoint, or trains the stage again",
    )
    load_weights(policy.model, folder)


@spent_on("saving")
def save_model(policy: Policy, folder: Path, run: RunDir) -> None:
    """Write the model (or its adapter) and the processor; the folder gets its name only when it is complete."""
    if not run.writes:
        if is_sharded(policy.model):
            save_weights(policy.model, None)
        return
    with new_folder(folder) as temporary:
        save_weights(policy.model, temporary)
        policy.processor.save_pretrained(temporary)
        write_checksums(temporary)
    run.sync()
