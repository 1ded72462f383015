"""Checks of a checkpoint before and after loading: safetensors only, and every weight loaded."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.errors import FileError, ModelError
from cwdpo.files.reading import read_object
from cwdpo.hub import check_hub
from cwdpo.models.merge import merge, tied_layers_handled

if TYPE_CHECKING:
    from torch import nn

PICKLE = (
    "unpickling can run any code, so only safetensors are read: convert it where you trust it, with "
    "AutoModelForImageTextToText.from_pretrained(...).save_pretrained(folder), or for an adapter "
    "AutoPeftModel.from_pretrained(...).save_pretrained(folder)"
)
_SETTINGS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
)  # fmt: skip
"""Files that transformers reads besides config.json; the tokenizer's file is too large to be read twice."""
MOST_IMAGE_TOKENS = 2**16
_DIGITS = re.compile(r"\d+")
_EMBEDDING = re.compile(r"\b(embed_tokens|lm_head)(\.base_layer|\.modules_to_save)?\.weight$")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars; :func:`check_loaded` reports wrong weights in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_folder(source: str, *, weights: bool = True, revision: str | None = None) -> None:
    """Refuse a local folder without a checkpoint, or with pickled weights only. Other names are hub ids.

    Args:
        source: a folder or a hub id.
        weights: whether weights are needed, too.
        revision: of a hub id.

    Raises:
        ModelError: the folder does not exist, has no config, or its weights are pickles; or the hub has no such model,
            or does not answer within seconds.
    """
    folder = Path(source)
    try:
        there, is_folder = folder.exists(), folder.is_dir()
    except (OSError, ValueError):  # too long for a path, or with a null character
        there, is_folder = True, False
    if not is_folder and (there or source.startswith((".", "/", "~"))):
        raise ModelError(
            f"model.path {source[:300]!r}: no such folder; allowed: 'embedded', 'init', the folder of a checkpoint, "
            "or a hub id (owner/name)"
        )
    if not is_folder:
        check_hub(source, "models", revision, ModelError)
        return
    kind, config = "model", folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        kind, config = "adapter_model", folder / "adapter_config.json"
    if not config.is_file():
        raise ModelError(
            f"model.path {source!r}: the folder contains neither config.json nor adapter_config.json; name the "
            "folder that save_pretrained wrote"
        )
    try:
        for file in (config, *(folder / name for name in _SETTINGS)):
            if file.is_file():
                read_object(file)
    except FileError as error:
        raise ModelError(f"{error}; fetch the checkpoint again") from None
    if not weights or any(folder.glob(f"{kind}*.safetensors")):
        return
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        raise ModelError(
            f"model.path {source!r}: the weights are pickles ({', '.join(pickles[:3])}); {PICKLE}"
        )
    raise ModelError(
        f"model.path {source!r}: there is no {kind}*.safetensors; fetch the checkpoint again, it is incomplete"
    )


def check_processor(processor: Any, source: str) -> None:
    """Refuse a processor whose number of tokens per image is impossible: encoding would not end.

    Raises:
        ModelError: with the setting.
    """
    for part in (
        processor,
        getattr(processor, "image_processor", None),
        getattr(processor, "tokenizer", None),
    ):
        for name in ("num_additional_image_tokens", "image_seq_length", "image_seq_len", "num_image_tokens"):
            value = getattr(part, name, 0)
            if isinstance(value, int | float) and not 0 <= value <= MOST_IMAGE_TOKENS:
                raise ModelError(
                    f"model.path {source!r}: its processor's {name} is {value}; allowed: 0 to {MOST_IMAGE_TOKENS}: "
                    "fetch the checkpoint again, or set it in model.processor_options"
                )


def adapter_base(source: str, revision: str | None) -> str | None:
    """The base checkpoint of a local peft adapter folder, or ``None`` for a full checkpoint.

    Raises:
        ModelError: the adapter names no base, or the base does not exist or is an adapter itself; or ``source``
            is an adapter on the hub, where transformers would also load pickled weights.
    """
    config = Path(source) / "adapter_config.json"
    if not config.is_file():
        if not os.path.isdir(source) and _is_hub_adapter(source, revision):
            raise ModelError(
                f"model.path {source!r} is an adapter on the hub; download it, and name its folder"
            )
        return None
    base = read_object(config).get("base_model_name_or_path")
    hint = f"set base_model_name_or_path in {config} to the checkpoint that the adapter was trained on"
    if not isinstance(base, str) or not base:
        raise ModelError(f"model.path {source!r}: the adapter names no base; {hint}")
    if not os.path.isdir(base) and (near := _near(base, Path(source))) is not None:
        raise ModelError(
            f"model.path {source!r}: its base {base!r} is a relative path, and there is no such folder in "
            f"{Path.cwd()}; there is one at {near}: if that is it, {hint}"
        )
    try:
        check_folder(base)
    except ModelError as error:
        raise ModelError(f"model.path {source!r}: its base: {error}; {hint}") from None
    if os.path.isfile(Path(base) / "adapter_config.json") or _is_hub_adapter(base, None):
        raise ModelError(f"model.path {source!r}: its base {base!r} is an adapter itself; {hint}")
    return base


def _near(base: str, adapter: Path) -> Path | None:
    """A folder with this relative path, seen from the adapter's folder or a parent; only suggested in a message."""
    try:
        return next(
            (one / base for one in (adapter, *adapter.resolve().parents) if (one / base).is_dir()), None
        )
    except (OSError, ValueError):
        return None


def _is_hub_adapter(name: str, revision: str | None) -> bool:
    from transformers.utils import find_adapter_config_file

    if os.path.isdir(name):
        return False
    try:
        return find_adapter_config_file(name, revision=revision) is not None
    except (OSError, ValueError):  # no such name, or no network: loading reports it
        return False


def with_adapter(model: Any, source: str, *, merged: bool) -> Any:
    """The base with the adapter: merged into its weights, or as an adapter to train further.

    Raises:
        ModelError: the adapter does not fit this base.
    """
    from peft import PeftModel
    from safetensors import safe_open

    try:
        with (
            warnings.catch_warnings(),
            tied_layers_handled(),
            safe_open(Path(source) / "adapter_model.safetensors", "pt") as file,
        ):
            # peft only warns if the adapter's file lacks weights.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            _resize(model, file)
            wrapped = PeftModel.from_pretrained(model, source, is_trainable=not merged)
            _refuse_layers_beyond(wrapped, file.keys())
    except Exception as error:  # peft's tuners raise errors of many types
        raise ModelError(
            f"model.path {source!r}: the adapter does not fit its base ({type(error).__name__}: "
            f"{str(error)[:300]}); set base_model_name_or_path in its adapter_config.json to the checkpoint that it "
            "was trained on"
        ) from error
    return merge(wrapped) if merged else wrapped


def _resize(model: Any, file: Any) -> None:
    """Resize the base's embeddings to those saved with the adapter, which was trained on a resized model."""
    rows = {file.get_slice(key).get_shape()[0] for key in file.keys() if _EMBEDDING.search(key)}  # noqa: SIM118
    if len(rows) == 1 and rows != {model.get_input_embeddings().weight.shape[0]}:
        with quiet():
            model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _refuse_layers_beyond(model: nn.Module, keys: Iterable[str]) -> None:
    """Refuse adapter weights for which the base has no layer; peft ignores them."""
    names = {name.replace(".default.", ".") for name, _ in model.named_parameters()}
    places = {_DIGITS.sub("#", name) for name in names}
    beyond = [key for key in keys if key not in names and _DIGITS.sub("#", key) in places]
    if beyond:
        raise ValueError(f"the base has no layer for {', '.join(beyond[:3])}")


def check_loaded(model: nn.Module, info: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint that lacks weights of the model, or has more layers than the model.

    Args:
        model: the loaded model.
        info: from ``from_pretrained(..., output_loading_info=True)``.
        source: the checkpoint's name, for the message.

    Raises:
        ModelError: weights are missing, have another shape, or belong to layers that the config does not have.
    """
    missing = sorted(info["missing_keys"])
    other_shape = sorted(key for key, *_ in info["mismatched_keys"])
    places = {_DIGITS.sub("#", name) for name, _ in model.named_parameters()}
    beyond = sorted(key for key in info["unexpected_keys"] if _DIGITS.sub("#", key) in places)
    told = {"has no weights for": missing, "has another shape of": other_shape, "has more layers:": beyond}
    found = "; ".join(
        f"{what} {', '.join(keys[:3])} ({len(keys)} in all)" for what, keys in told.items() if keys
    )
    if found:
        raise ModelError(
            f"model.path {source!r}: weights and config.json do not fit each other: the checkpoint {found}. "
            "Missing weights are never set at random: fetch weights and config from the same place"
        )


def reason(error: Exception) -> str:
    """Transformers' message, or a clearer one that names the recipe's key."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it comes with its own Python code, which would run on this machine: read that code, pin its "
            "model.revision, and set model.trust_remote_code: true"
        )
    if "use_safetensors" in text or "no file named model.safetensors" in text:
        return f"it has no safetensors; {PICKLE}"
    if "ignore_mismatched_sizes" in text or "mismatch" in text:
        return "weights and config.json do not fit each other (shapes differ); fetch both from the same place"
    if "We couldn't connect to" in text or "is not a local folder" in text:
        return "no such folder here, and the hub does not answer or has no such model: correct the name, or the network"
    return f"{type(error).__name__}: {text[:1000]}"
