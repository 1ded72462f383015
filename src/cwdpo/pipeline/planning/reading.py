"""What a plan reads: the rows of a recipe as its stages train on them, and its model's configuration; no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import ModelError
from cwdpo.models.adapter import with_adapter_settings
from cwdpo.models.checkpoint import adapter_base, check_folder, quiet, reason
from cwdpo.models.load import EMBEDDED, load_processor, read_checkpoint_tokens
from cwdpo.models.own_code import import_code
from cwdpo.models.settings import ModelSettings
from cwdpo.models.tiny import init_model
from cwdpo.pipeline.planning.rows import StageRows, stage_rows
from cwdpo.rundir import RunDir
from cwdpo.stage.splits import Splits, prepare_data


@dataclass(frozen=True)
class RunData:
    """The examples of a run, the encoder of its checkpoint, and encoded rows of its stages."""

    splits: Splits
    encoder: Encoder
    stages: list[StageRows]

    @property
    def pictures(self) -> int:
        """Number of different pictures (or lists of pictures) that the stages train on."""
        named = {stage.name for stage in self.stages}
        examples = (self.splits.stage1, self.splits.stage2)
        used = [own for name, own in zip(("stage1", "stage2"), examples, strict=True) if name in named]
        return len({(e.images, e.videos) for own in used for e in own if e.pictured})


def read_run(recipe: Recipe, rows: int, folder: Path) -> tuple[Recipe, Any, RunData]:
    """Read what a plan needs of a recipe's data and model.

    Args:
        recipe: the recipe; of ``model.path`` only configurations, tokenizer and processor are read.
        rows: most rows of a stage to encode.
        folder: a temporary folder, for an embedded world and a model that is made from the data.

    Returns:
        The recipe with the settings of its checkpoint (an adapter, stored quantization) and without servers;
        transformers' configuration of the model; and the data.

    Raises:
        CwdpoError: recipe, data or model are bad.
    """
    recipe = recipe.model_copy(
        update={"model": with_adapter_settings(recipe.model), "negatives": _without_servers(recipe)}
    )
    source = _source(recipe)
    splits = prepare_data(recipe, RunDir(folder))
    if source is None:
        source = str(init_model(folder / "init", splits.texts, recipe.model.init))
    config, settings = read_config(source, recipe.model)
    recipe = recipe.model_copy(update={"model": settings})
    encoder = _encoder(source, recipe)
    return recipe, config, RunData(splits, encoder, stage_rows(recipe, splits, encoder, rows))


def _without_servers(recipe: Recipe) -> Any:
    """The section ``negatives`` without servers: a plan asks nobody to write edits."""
    settings = {
        name: {k: v for k, v in own.items() if k != "server"}
        for name, own in recipe.negatives.settings.items()
    }
    return recipe.negatives.model_copy(update={"settings": settings})


def _source(recipe: Recipe) -> str | None:
    """The folder or hub id of the model; ``None`` for ``init``, which is made from the data."""
    path = recipe.model.path
    if path == "init":
        return None
    if path == "embedded":
        return str(EMBEDDED)
    check_folder(path, weights=False, revision=recipe.model.revision)
    return path


def read_config(source: str, settings: ModelSettings) -> tuple[Any, ModelSettings]:
    """The configuration of a checkpoint, and the settings with the quantization that it lies in.

    Raises:
        ModelError: there is none, or its weights are quantized in a way that cannot be planned.
    """
    from transformers import AutoConfig

    import_code(settings)
    base = adapter_base(source, settings.revision) or source
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                base, revision=settings.revision, trust_remote_code=settings.trust_remote_code
            )
    except Exception as error:  # configurations raise errors of many types
        raise ModelError(f"model.path {source!r} cannot be loaded: {reason(error)}") from error
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return config, settings
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kind = "nf4" if stored.get("load_in_4bit") else "int8" if stored.get("load_in_8bit") else None
    if kind is None:
        raise ModelError(
            f"model.path {source!r}: its weights are quantized ({stored.get('quant_method')}), and only bitsandbytes' "
            "4 and 8 bits can be planned: plan the checkpoint that was quantized, with model.quantization: nf4"
        )
    del config.quantization_config
    return config, settings.model_copy(update={"quantization": kind})


def _encoder(source: str, recipe: Recipe) -> Encoder:
    """The encoder of a checkpoint; no image stays in memory, so that reading them can be timed."""
    return Encoder(
        load_processor(source, recipe.model),
        recipe.data.max_length,
        0,
        read_checkpoint_tokens(source, recipe.model),
        from_sizes=recipe.data.image_tokens == "sizes",
    )
