"""Loads saved weights, or a saved adapter, into a model that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo.errors import ModelError
from cwdpo.models.checkpoint import check_loaded, quiet, reason
from cwdpo.models.sharding import copy_parts, copy_whole, in_parts, is_sharded


def load_weights(model: Any, folder: Path) -> None:
    """Load the weights (or the adapter) of a saved folder into a model of the same shape.

    It uses ``from_pretrained``, because families rename their parameters in files: loading the file's names directly
    would leave most of the model unchanged. Of a sharded model, all processes call this together.

    Raises:
        ModelError: the folder has no safetensors, or they do not fit the model.
    """
    adapter = folder / "adapter_model.safetensors"
    if adapter.is_file():
        _load_adapter(model, adapter)
        return
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no safetensors to continue from; remove the folder to run the stage again"
        )
    kind, more = type(model), dict[str, Any]()
    if is_sharded(model):
        kind, more = (
            type(model).__bases__[-1],
            in_parts(),
        )  # FSDP2's own class has the model's as its last base
    try:
        with quiet():
            saved, info = kind.from_pretrained(
                folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True, **more
            )
    except Exception as error:  # from_pretrained raises errors of many types
        raise ModelError(
            f"{folder}: cannot be loaded ({reason(error)}); remove the folder to run the stage again"
        ) from error
    check_loaded(saved, info, str(folder))
    if is_sharded(model):
        copy_parts(saved, model)
    else:
        model.load_state_dict(saved.state_dict())


def _load_adapter(model: Any, file: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = load_file(file)
        if is_sharded(model):
            places = get_peft_model_state_dict(model)
            left_over = sorted(values.keys() ^ places.keys())
            if not left_over:
                copy_whole(values, places)
        else:
            left_over = set_peft_model_state_dict(model, values).unexpected_keys
    except (SafetensorError, RuntimeError, OSError) as error:
        left_over = [str(error)[:300]]
    if left_over:
        raise ModelError(
            f"{file}: does not fit the run's adapter ({', '.join(left_over[:3])}); remove the folder to run the "
            "stage again"
        )
