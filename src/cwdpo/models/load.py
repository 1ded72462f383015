"""Loads a policy with transformers' Auto classes, adds LoRA with peft, and freezes parts by name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.image_cache import ImageCache
from cwdpo.data.encode.template import CheckpointTokens
from cwdpo.errors import ModelError
from cwdpo.models.adapter import (
    add_lora,
    check_targets,
    excluded_names,
    set_dropout,
    sort_targets,
    with_adapter_settings,
    wrapped,
)
from cwdpo.models.checkpoint import (
    adapter_base,
    check_folder,
    check_loaded,
    check_processor,
    quiet,
    reason,
    with_adapter,
)
from cwdpo.models.inputs import unwrapped
from cwdpo.models.own_code import import_code
from cwdpo.models.packages import checkpoint_config, install_line, missing_package
from cwdpo.models.parts import patterns_of
from cwdpo.models.quantization import (
    check_quantization,
    dequantized,
    load_options,
    quantized_layers,
    use_exact_layers,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cwdpo.models.settings import ModelSettings

EMBEDDED = Path(__file__).parent.parent / "worlds" / "base"
"""The base model of the embedded world; it is part of the package."""


@dataclass
class Policy:
    """A model to train, its processor, and the folder or hub id that it was loaded from."""

    model: nn.Module
    processor: Any
    source: str

    def trainable(self) -> dict[str, Tensor]:
        """Trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def encoder(
        self,
        max_length: int | None = None,
        cache_gb: float = 1.0,
        *,
        from_sizes: bool = True,
        workers: int = 0,
        on_disk: ImageCache | None = None,
    ) -> Encoder:
        """An encoder with this model's end tokens and its number of embedded tokens.

        Args:
            max_length, cache_gb, from_sizes, workers, on_disk: see :class:`Encoder`.
        """
        inner: Any = unwrapped(self.model)
        embeddings = inner.get_input_embeddings()
        # The weight itself may be sharded, or wrapped by an adapter.
        embedded = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
        tokens = checkpoint_tokens(getattr(inner, "generation_config", None), inner.config, embedded)
        return Encoder(
            self.processor,
            max_length,
            cache_gb,
            tokens,
            from_sizes=from_sizes,
            workers=workers,
            on_disk=on_disk,
        )


def load_policy(
    settings: ModelSettings, *, peft_config: Any = None, dropout: bool = False, dequantize: bool = False
) -> Policy:
    """Load model and processor from a local folder, a hub id, or the embedded base, ready to train.

    Args:
        settings: the recipe's section ``model``.
        peft_config: a peft configuration to use instead of ``settings.lora``.
        dropout: keep the checkpoint's dropout; policy and reference model then differ by more than their weights.
        dequantize: turn quantized weights back into float32 ones, of the same values.

    Raises:
        ModelError: the folder is missing or incomplete, has no safetensors, or cannot be loaded;
            ``freeze`` or ``lora.target_modules`` matches nothing; ``scoring`` is not possible for this model; an
            adapter to train further has another rank, alpha or targets than the settings; or a checkpoint that lies
            quantized is to be quantized again.
    """
    settings = with_adapter_settings(settings)
    source = str(EMBEDDED) if settings.path == "embedded" else settings.path
    check_folder(source, revision=settings.revision)
    base = adapter_base(source, settings.revision)
    processor = load_processor(source, settings)
    model = read_model(base or source, settings)
    if dequantize:
        use_exact_layers(model, settings)
        model = dequantized(model)
    further = base is not None and settings.tune == "lora"
    asked = settings
    if base is not None:
        # An adapter merged into quantized weights would be rounded to their few values.
        model = with_adapter(model, source, merged=not further and not any(quantized_layers(model)))
        settings = settings.model_copy(
            update={"tune": "full"}
        )  # the adapter is there: adopt adds no second one
    policy = adopt(Policy(model, processor, source), settings, peft_config=peft_config, dropout=dropout)
    if further:
        check_targets(policy.model, asked, excluded_names(asked))
        if not dropout:
            set_dropout(policy.model, asked.lora.dropout)
    if not policy.trainable():
        raise ModelError(f"model.freeze {list(settings.freeze)} leaves nothing to train")
    return policy


def adopt(
    policy: Policy, settings: ModelSettings, *, peft_config: Any = None, dropout: bool = False
) -> Policy:
    """Make a loaded model ready to train: frozen parts, LoRA, device, scoring, cache of image features.

    Args:
        policy: its model is changed in place, and wrapped by peft if there are adapters.
        settings, peft_config, dropout: see :func:`load_policy`.

    Raises:
        ModelError: see :func:`load_policy`.
    """
    from cwdpo.models.shared_attention import use_scoring
    from cwdpo.models.vision_cache import keep_vision_features

    model = tunable(policy.model, settings, peft_config=peft_config, dropout=dropout)
    _move(model, settings.device)
    use_scoring(model, settings.scoring)
    keep_vision_features(model, settings.vision_cache_gb)
    return Policy(model, policy.processor, policy.source)


def tunable(
    model: nn.Module, settings: ModelSettings, *, peft_config: Any = None, dropout: bool = False
) -> nn.Module:
    """The model with its frozen parts and its LoRA adapter; see :func:`adopt`."""
    if not dropout:
        disable_dropout(model)
    use_exact_layers(model, settings)
    freeze(model, settings.freeze)
    if peft_config is not None:
        model = wrapped(model, peft_config)
    elif settings.tune == "lora":
        model = add_lora(model, settings)
    sort_targets(model)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: policy and reference model may differ by their weights only."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def load_processor(source: str, settings: ModelSettings) -> Any:
    """The checkpoint's processor.

    Raises:
        ModelError: the checkpoint has no processor, or it needs a package that is not installed.
    """
    from transformers import AutoProcessor

    import_code(settings)
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(
                source,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                **settings.processor_options,
            )
    except Exception as error:  # processors parse many files and raise errors of many types
        if (package := missing_package(error)) is not None:
            raise ModelError(
                f"model.path {source!r}: its processor needs a package that is not installed: {install_line(package)}"
            ) from error
        raise ModelError(
            f"model.path {source!r}: no usable processor ({reason(error)}). A checkpoint folder must contain its "
            "processor and tokenizer files"
        ) from error
    check_processor(processor, source)
    return processor


def checkpoint_tokens(generation: Any, config: Any, embedded: int | None = None) -> CheckpointTokens:
    """Token ids from generation_config and config.

    Args:
        generation, config: transformers' configurations; ``None`` if the checkpoint has none.
        embedded: rows of the embedding; default: ``vocab_size`` of the config.
    """
    stops = getattr(generation, "eos_token_id", None)
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if config is not None and embedded is None:
        embedded = getattr(config.get_text_config(), "vocab_size", None)
    names = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index", "video_token_index")
    placeholders = frozenset(i for name in names if isinstance(i := getattr(config, name, None), int))
    text = None if config is None else config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    return CheckpointTokens(
        tuple(int(i) for i in stops),
        embedded,
        placeholders,
        positions if isinstance(positions, int) else None,
    )


def read_checkpoint_tokens(source: str, settings: ModelSettings) -> CheckpointTokens:
    """:func:`checkpoint_tokens` from the files of a checkpoint; no weights are read."""
    from transformers import AutoConfig, GenerationConfig

    import_code(settings)
    how: dict[str, Any] = {"revision": settings.revision}
    base = adapter_base(source, settings.revision) or source
    found: list[Any] = []
    for kind, more in (
        (GenerationConfig, {}),
        (AutoConfig, {"trust_remote_code": settings.trust_remote_code}),
    ):
        try:
            with quiet():
                found.append(kind.from_pretrained(base, **how, **more))
        except Exception:  # a checkpoint may lack them; loading reports what is wrong
            found.append(None)
    return checkpoint_tokens(*found)


def load_processor_alone(settings: ModelSettings) -> tuple[Any, CheckpointTokens]:
    """A checkpoint's processor, and what its other files say of tokens; no weights are read.

    Raises:
        ModelError: see :func:`load_processor`; or there is no such checkpoint.
    """
    source = str(EMBEDDED) if settings.path == "embedded" else settings.path
    check_folder(source, revision=settings.revision)
    return load_processor(source, settings), read_checkpoint_tokens(source, settings)


def read_model(source: str, settings: ModelSettings, **more: Any) -> Any:
    """The model with every weight from the checkpoint.

    For weights that a checkpoint lacks, transformers uses random numbers; weights that the config has no place for are
    ignored. It only warns. Both would train a different model than the recipe names, so both are refused.

    Args:
        source: a folder or a hub id.
        settings: the recipe's section ``model``.
        more: further arguments of ``from_pretrained``.

    Raises:
        ModelError: the checkpoint cannot be loaded, or lacks weights.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.integrations import is_fsdp_enabled

    if is_fsdp_enabled():  # true only with fsdp_cpu_ram_efficient_loading
        raise ModelError(
            "fsdp_cpu_ram_efficient_loading: true loads all weights on the first process. It is not needed: every "
            "process reads its part of them; set it to false, as configs/accelerate/fsdp2.yaml does"
        )
    config = checkpoint_config(source, settings)
    if settings.quantization is not None:
        check_quantization(settings, config, source)
    try:
        with quiet():
            model, info = AutoModelForImageTextToText.from_pretrained(
                # An adapter's config stores this name: a relative path would be wrong from another folder.
                os.path.abspath(source) if Path(source).is_dir() else source,
                revision=settings.revision,
                dtype=settings.load_dtype,
                attn_implementation=settings.attention,
                trust_remote_code=settings.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **load_options(settings, config, _device(settings.device)),
                **more,
            )
    except Exception as error:  # from_pretrained raises errors of many types
        raise ModelError(f"model.path {source!r} cannot be loaded: {reason(error)}") from error
    check_loaded(model, info, source)
    return model


def _device(name: str) -> Any:
    """The device of a name; ``auto`` is this process's accelerator, or the CPU."""
    from accelerate import PartialState

    return PartialState().device if name in ("auto", "cuda") else name


def _move(model: nn.Module, name: str) -> None:
    try:
        model.to(_device(name))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(
            f"model.device {name!r} cannot take the model ({str(error)[:200]}); allowed: auto, cpu, cuda"
        ) from error


def freeze(model: nn.Module, parts: tuple[str, ...]) -> int:
    """Freeze parameters whose names match a part (``vision``, ``projector``, ``text``, or part of a name).

    Returns:
        Number of parameter tensors frozen.

    Raises:
        ModelError: a part matches nothing.
    """
    frozen = 0
    for part, pattern in patterns_of(parts).items():
        matched = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            tops = sorted({".".join(n.split(".")[:2]) for n, _ in model.named_parameters()})
            raise ModelError(f"model.freeze: {part!r} matches no parameter; the model has: {', '.join(tops)}")
        for parameter in matched:
            parameter.requires_grad_(False)
        frozen += len(matched)
    return frozen
