"""The recipe's section ``model``. Does not import torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cwdpo.files.yamlfile import as_number
from cwdpo.models.tiny import TinyModelSettings
from cwdpo.registry import Settings


class LoraSettings(Settings):
    """LoRA by peft, under peft's names.

    ``target_modules`` may be ``all-linear``, a regular expression or a list of names. ``init_lora_weights`` offers only
    starts that leave the base's weights as they are: the reference is the policy without its adapter.
    """

    r: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = Field((), description="modules that are trained and saved whole")
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: Literal["default", "gaussian"] = "default"
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="r of layers by name or pattern")
    alpha_pattern: dict[str, int] = Field(
        default_factory=dict, description="alpha of layers by name or pattern"
    )


class QuantizationOptions(Settings):
    """How ``model.quantization`` quantizes the linear layers; the output head keeps its dtype."""

    double_quantization: bool | None = Field(
        None, description="nf4: also quantize the scales of the blocks; default: true"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the model's dtype, or what a checkpoint that lies quantized says"
    )
    skip: tuple[str, ...] = Field(
        (), description="not quantized: vision, projector, text, or parts of layer names"
    )


class ModelSettings(Settings):
    """Which model, and which parts of it are trained."""

    path: str = Field("embedded", description="'embedded', 'init', a local folder, or a hub id")
    init: TinyModelSettings = Field(
        default_factory=TinyModelSettings,
        description="shape of the small random LLaVA that path: init makes, with a tokenizer trained on the data",
    )
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's own with LoRA, float32 with full fine-tuning"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: str | None = Field(None, description="sdpa, eager, flash_attention_2; default: transformers'")
    scoring: Literal["auto", "shared_prefix", "plain"] = Field(
        "auto",
        description="auto: image and prompt once for all completions if that is exact; plain: one sequence each",
    )
    vision_cache_gb: float = Field(
        1.0,
        ge=0,
        description="memory for image features if the vision tower is frozen; those that do not fit are recomputed",
    )
    tune: Literal["full", "lora"] = "full"
    lora: LoraSettings = LoraSettings()
    quantization: Literal["nf4", "int8"] | None = Field(
        None,
        description="with tune: lora: 4 or 8 bits for the base's weights (bitsandbytes); null: the checkpoint's",
    )
    quantization_options: QuantizationOptions = QuantizationOptions()
    freeze: tuple[str, ...] = Field((), description="vision, projector, text, or parts of parameter names")
    trust_remote_code: bool = False
    code: str | None = Field(
        None,
        description="a Python file of your own that registers model classes with transformers' Auto classes",
    )
    processor_options: dict[str, Any] = Field(
        default_factory=dict, description="passed to AutoProcessor, e.g. min_pixels, max_pixels"
    )

    @property
    def load_dtype(self) -> str:
        """The dtype to load in: ``auto`` is float32 for full fine-tuning, else the checkpoint's own dtype.

        At the usual learning rates, updates of bf16 weights are rounded away. ``train.bf16`` casts the computation
        instead.
        """
        return "float32" if self.dtype == "auto" and self.tune == "full" else self.dtype

    @model_validator(mode="after")
    def _quantization_has_its_settings(self) -> ModelSettings:
        options = self.quantization_options
        if self.quantization is not None and self.tune == "full":
            raise ValueError(
                f"quantization: {self.quantization}: quantized weights cannot be trained: set tune to lora"
            )
        if self.quantization != "nf4" and options.double_quantization is not None:
            raise ValueError(
                "quantization_options.double_quantization is for quantization: nf4: leave it out"
            )
        if self.quantization is None and options.skip:
            raise ValueError(
                "quantization_options.skip is for quantization: nf4 or int8: leave it out (a checkpoint that lies "
                "quantized has its own list)"
            )
        return self

    @field_validator("processor_options")
    @classmethod
    def _numbers(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Convert numbers that YAML reads as text (``max_pixels: 5e5``)."""
        return {
            key: {k: as_number(v) for k, v in value.items()} if isinstance(value, dict) else as_number(value)
            for key, value in options.items()
        }
