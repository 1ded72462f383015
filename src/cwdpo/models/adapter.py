"""LoRA: a new adapter, or one that is trained further, which keeps its rank and targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.errors import FileError, ModelError
from cwdpo.files.reading import read_object
from cwdpo.models.merge import tied_layers_handled
from cwdpo.models.parts import patterns_of
from cwdpo.models.quantization import quantized_layers
from cwdpo.models.settings import LoraSettings, ModelSettings

if TYPE_CHECKING:
    from torch import nn

REMEDY = (
    "leave the setting out to train the adapter as it is; or merge it into its base (cwdpo export RUN --merge) and "
    "train a new adapter on that"
)


def with_adapter_settings(settings: ModelSettings) -> ModelSettings:
    """The settings with rank, alpha and targets of the adapter at ``path``, if there is one to train further.

    The rank is given by the shape of the adapter's weights, so ``model.lora`` cannot change it.

    Raises:
        ModelError: a setting of ``lora`` that belongs to the adapter is set to another value.
    """
    if settings.tune != "lora":
        return settings
    try:
        written = read_object(Path(settings.path) / "adapter_config.json")
    except FileError:
        return settings  # no adapter, or a broken one: loading reports the error
    kept = _written(written)
    for key, value in kept.items():
        if key in settings.lora.model_fields_set and not _same(getattr(settings.lora, key), value):
            raise ModelError(
                f"model.lora.{key} = {getattr(settings.lora, key)!r}, but the adapter that is trained further "
                f"({settings.path}) has {value!r}: {REMEDY}"
            )
    if settings.lora.init_lora_weights != "default":
        raise ModelError(
            f"model.lora.init_lora_weights is of a new adapter, and {settings.path} is one that is trained further: "
            f"{REMEDY}"
        )
    if "target_modules" in settings.lora.model_fields_set:
        # The recipe's value is kept: it is the same, or `all-linear`, which check_targets compares with the model.
        kept.pop("target_modules", None)
    lora = LoraSettings(**{**settings.lora.model_dump(), **kept})
    return settings.model_copy(update={"lora": lora})


def _written(written: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an adapter_config.json, by their names in ``model.lora``."""
    named = {"r": written.get("r"), "alpha": written.get("lora_alpha")}
    kept: dict[str, Any] = {
        key: value
        for key, value in named.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 0
    }
    kept |= {key: value for key in ("use_dora", "use_rslora") if isinstance(value := written.get(key), bool)}
    kept |= {
        key: value for key in ("rank_pattern", "alpha_pattern") if isinstance(value := written.get(key), dict)
    }
    saved = written.get("modules_to_save") or []
    if isinstance(saved, list) and all(isinstance(one, str) for one in saved):
        kept["modules_to_save"] = tuple(sorted(saved))
    targets = written.get("target_modules")
    if isinstance(targets, str):
        kept["target_modules"] = targets
    elif isinstance(targets, list) and all(isinstance(one, str) for one in targets):
        kept["target_modules"] = tuple(sorted(targets))
    return kept


def _same(asked: Any, value: Any) -> bool:
    if asked == "all-linear":  # peft stores the names of the layers instead; check_targets compares them
        return True
    if isinstance(asked, tuple) and isinstance(value, tuple):
        return set(asked) == set(value)
    return bool(asked == value)


def excluded_names(settings: ModelSettings) -> str:
    """Regular expression of the names of frozen parts; empty for none."""
    return "|".join(patterns_of(settings.freeze).values())


def add_lora(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """Wrap the model with LoRA; parts frozen by ``settings.freeze`` get no adapter.

    Raises:
        ModelError: ``lora.target_modules`` matches nothing, or a frozen module is to be saved.
    """
    from peft import LoraConfig

    lora = settings.lora
    excluded = excluded_names(settings)
    for name in lora.modules_to_save:
        if excluded and re.search(excluded, name):
            raise ModelError(
                f"model.lora.modules_to_save: {name} is frozen by model.freeze {list(settings.freeze)}: leave it out "
                "of one of the two"
            )
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=list(lora.modules_to_save) or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=True if lora.init_lora_weights == "default" else lora.init_lora_weights,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        exclude_modules=f".*({excluded}).*" if excluded else None,
        task_type="CAUSAL_LM",
    )
    return wrapped(model, config)


def wrapped(model: Any, config: Any) -> nn.Module:
    """The model in peft's wrapper.

    Raises:
        ModelError: the configuration does not fit the model.
    """
    import torch
    from peft import get_peft_model

    if getattr(config, "ensure_weight_tying", False) and model.dtype != torch.float32:
        raise ModelError(
            "peft_config.ensure_weight_tying: in half precision, peft casts tied adapters to float32 one by one, so "
            "they are no longer tied and only one is saved: load the model in float32 (model.dtype), or leave "
            "ensure_weight_tying out"
        )
    for name in getattr(config, "modules_to_save", None) or ():
        place = re.compile(rf"(^|\.){re.escape(name)}(\.|$)")
        inside = next((layer for layer, _ in quantized_layers(model) if place.search(layer)), None)
        if inside is not None:
            raise ModelError(
                f"model.lora.modules_to_save: {name} holds quantized weights ({inside}), which cannot be trained: add "
                f"{name} to model.quantization_options.skip"
            )
    if getattr(config, "use_dora", False):
        _refuse_misread(model)
    try:
        with tied_layers_handled():
            made: nn.Module = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise ModelError(f"model.lora: {error}") from error
    return made


def _refuse_misread(model: nn.Module) -> None:
    """peft asks bitsandbytes for the weights whose norms DoRA starts from."""
    for name, layer in quantized_layers(model):
        from cwdpo.models.quantized_linear import misread_on_cpu

        if misread_on_cpu(layer):
            raise ModelError(
                f"model.lora.use_dora: on a CPU, bitsandbytes gives wrong 4-bit weights of {name}, whose width "
                f"{layer.in_features} is no multiple of a block, and DoRA needs their norms: train on a GPU, or with "
                "quantization: int8, or name such layers in model.quantization_options.skip"
            )


def check_targets(model: nn.Module, settings: ModelSettings, excluded: str) -> None:
    """Refuse ``target_modules: all-linear`` if the adapter does not cover all linear layers.

    Args:
        model: the model with its adapter.
        settings: the recipe's settings.
        excluded: regular expression of names that get no adapter (``model.freeze``); empty for none.

    Raises:
        ModelError: a linear layer, other than the output head, has no adapter.
    """
    from torch import nn

    if "target_modules" not in settings.lora.model_fields_set or settings.lora.target_modules != "all-linear":
        return
    bare = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ".base_layer" not in name
        and "lora_" not in name
        and not name.endswith(("lm_head", "embed_out"))
        and not (excluded and re.search(excluded, name))
    ]
    if bare:
        raise ModelError(
            f"model.lora.target_modules = 'all-linear', but the adapter that is trained further ({settings.path}) has "
            f"none on {', '.join(bare[:3])} ({len(bare)} in all): {REMEDY}"
        )


def set_dropout(model: nn.Module, share: float) -> None:
    """Set the recipe's ``lora.dropout`` in every adapter layer of a loaded model; weights do not contain it."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(share) if share else nn.Identity()
    for config in getattr(model, "peft_config", {}).values():
        config.lora_dropout = share


@contextmanager
def idle_adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, LoRA layers are skipped if none of them changes what the model computes.

    Until the first update the second matrix of a LoRA layer is zero. What is scored and sampled before it, the
    reference pass and the calibration above all, then gives the same values, to the last bit, in less time
    (docs/benchmarks.md). Which parameters are trained does not change.

    Args:
        model: bare or wrapped by peft.
    """
    layers = _idle_layers(model)
    if not layers:
        yield
        return
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]

    def switch(on: bool) -> None:
        for layer in layers:
            layer.enable_adapters(on)
        for parameter, trained in flags:  # peft sets them
            parameter.requires_grad_(trained)

    switch(False)
    try:
        yield
    finally:
        switch(True)


def _idle_layers(model: nn.Module) -> list[Any]:
    """All LoRA layers, if they are of the plain kind and each adds zero; else none."""
    from peft.tuners.lora import LoraLayer

    from cwdpo.models.sharding import anything

    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    plain = not any(
        layer.lora_variant or layer.lora_embedding_A or layer.merged or layer.disable_adapters
        for layer in layers
    )
    changes = plain and anything(p for layer in layers for p in layer.lora_B.parameters())
    return layers if plain and not changes else []


def sort_targets(model: nn.Module) -> None:
    """Sort the names in peft's config: peft keeps them as sets, whose order differs from run to run."""
    for config in getattr(model, "peft_config", {}).values():
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(config, key, None)
            if isinstance(value, set | frozenset):
                setattr(config, key, sorted(value))
