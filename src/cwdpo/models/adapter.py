"""Training an adapter further: its own rank and targets hold, and a setting that says otherwise is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.errors import FileError, ModelError
from cwdpo.files.reading import read_object
from cwdpo.models.settings import LoraSettings, ModelSettings

if TYPE_CHECKING:
    from torch import nn

REMEDY = (
    "leave the setting out to train the adapter as it is; or merge it into its base (cwdpo export RUN --merge) and "
    "train a new adapter on that"
)


def with_adapter_settings(settings: ModelSettings) -> ModelSettings:
    """The settings with rank, alpha and targets of the adapter at ``path``, if that is one to be trained further.

    An adapter's rank is the shape of its weights: nothing that ``model.lora`` says can change it.

    Raises:
        ModelError: a setting of ``lora`` that belongs to the adapter was set to something else.
    """
    if settings.tune != "lora":
        return settings
    try:
        written = read_object(Path(settings.path) / "adapter_config.json")
    except FileError:
        return settings  # no adapter, or loading it says what is wrong
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
        # What was asked for stays: it is the same, or `all-linear`, which the loaded model is asked about.
        kept.pop("target_modules", None)
    lora = LoraSettings(**{**settings.lora.model_dump(), **kept})
    return settings.model_copy(update={"lora": lora})


def _written(written: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter_config.json says, by our names."""
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
    if asked == "all-linear":  # peft stores the names that this stood for; the loaded model is asked
        return True
    if isinstance(asked, tuple) and isinstance(value, tuple):
        return set(asked) == set(value)
    return bool(asked == value)


def check_targets(model: nn.Module, settings: ModelSettings, excluded: str) -> None:
    """Refuse ``target_modules: all-linear`` for an adapter that leaves linear layers without one.

    Args:
        model: with its adapter.
        settings: with what was asked for.
        excluded: a pattern of names that get no adapter (``model.freeze``); empty for none.

    Raises:
        ModelError: a linear layer, other than the output head, has no adapter.
    """
    import re

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
    """Give every adapter layer of a loaded model the recipe's ``lora.dropout``: that is no part of its weights."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(share) if share else nn.Identity()
    for config in getattr(model, "peft_config", {}).values():
        config.lora_dropout = share


def sort_targets(model: nn.Module) -> None:
    """Have peft write the names in its config in order: it keeps them as sets, whose order differs from run to run."""
    for config in getattr(model, "peft_config", {}).values():
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(config, key, None)
            if isinstance(value, set | frozenset):
                setattr(config, key, sorted(value))
