"""Load a policy through transformers' Auto classes; LoRA by peft; parts frozen by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cwdpo.config import ModelSettings

EMBEDDED = Path(__file__).parent.parent / "worlds" / "base"
"""The shipped base VLM of the embedded world."""

PARTS = {
    "vision": r"(vision_tower|vision_model|visual|vision_encoder|image_encoder)\b",
    "projector": r"(multi_modal_projector|mm_projector|connector|merger|modality_projection|image_newline)\b",
    "text": r"(language_model|text_model|lm_head)\b",
}


@dataclass
class Policy:
    """A model to train with the processor that belongs to it, and the folder or id it came from."""

    model: nn.Module
    processor: Any
    source: str

    def trainable(self) -> dict[str, Tensor]:
        """Parameters that receive gradients, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def load_policy(settings: ModelSettings) -> Policy:
    """Load model and processor from a local folder, a hub id, or the embedded base.

    Raises:
        ModelError: the folder is missing or incomplete, holds no safetensors, or cannot be loaded;
            nothing in it matches ``freeze`` or ``lora.target_modules``.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    source = str(EMBEDDED) if settings.path == "embedded" else settings.path
    adapter = _adapter_base(source)
    processor = load_processor(source, settings)
    logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            adapter or source,
            revision=settings.revision,
            dtype=settings.dtype,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.path {settings.path!r} cannot be loaded: {error}") from error
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source).merge_and_unload()
        model.requires_grad_(True)  # peft leaves the base frozen behind the merge
    disable_dropout(model)
    freeze(model, settings.freeze)
    if settings.tune == "lora":
        model = add_lora(model, settings)
    model.to(_device(settings.device))
    policy = Policy(model, processor, source)
    if not policy.trainable():
        raise ModelError(f"model.freeze {list(settings.freeze)} leaves nothing to train")
    return policy


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: policy and reference must differ by their weights only."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def load_processor(source: str, settings: ModelSettings) -> Any:
    """The checkpoint's processor.

    Raises:
        ModelError: there is none, or it needs a package that is not installed.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(
            source,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **settings.processor_options,
        )
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise ModelError(
            f"model.path {source!r}: no usable processor ({error}). A checkpoint folder must hold its "
            "processor and tokenizer files; some families also need torchvision"
        ) from error


def _adapter_base(source: str) -> str | None:
    """The base checkpoint of a peft adapter folder, or ``None`` for a full checkpoint."""
    config = Path(source) / "adapter_config.json"
    if not config.is_file():
        return None
    import json

    return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _device(name: str) -> Any:
    """The asked device; ``auto`` is this process's own accelerator, or the CPU."""
    from accelerate import PartialState

    return PartialState().device if name == "auto" else name


def freeze(model: nn.Module, parts: tuple[str, ...]) -> int:
    """Freeze parameters whose name matches a part (``vision``, ``projector``, ``text``, or any text).

    Returns:
        Number of parameter tensors frozen.

    Raises:
        ModelError: a part matches nothing.
    """
    frozen = 0
    for part in parts:
        pattern = re.compile(PARTS.get(part, re.escape(part)))
        matched = [p for name, p in model.named_parameters() if pattern.search(name)]
        if not matched:
            tops = sorted({".".join(n.split(".")[:2]) for n, _ in model.named_parameters()})
            raise ModelError(f"model.freeze: {part!r} matches no parameter; the model has: {', '.join(tops)}")
        for parameter in matched:
            parameter.requires_grad_(False)
        frozen += len(matched)
    return frozen


def add_lora(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """Wrap with LoRA; parts that are frozen by name receive no adapter."""
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    excluded = "|".join(PARTS.get(p, re.escape(p)) for p in settings.freeze)
    try:
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            exclude_modules=f".*({excluded}).*" if excluded else None,
            task_type="CAUSAL_LM",
        )
        wrapped: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"model.lora: {error}") from error
    return wrapped


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights (or the adapter) of a saved folder into a model of the same shape.

    Goes through ``from_pretrained``, because families rename their parameters on disk: loading the file's
    own names would leave most of the model as it was.

    Raises:
        ModelError: the folder holds no safetensors.
    """
    adapter = folder / "adapter_model.safetensors"
    if adapter.is_file():
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(adapter))
        return
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no safetensors to continue from; remove the folder to run the stage again"
        )
    saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
