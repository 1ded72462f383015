"""The recipe's ``negatives`` section: mix of sources, sampler, judge, rounds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cwdpo.judging.base import AUTO, JUDGES, NONE, JudgeSpec
from cwdpo.negatives.base import NEGATIVES, NegativeSource
from cwdpo.records import NEW_TOKENS
from cwdpo.registry import Settings
from cwdpo.remote import ServerSettings


class SamplerSettings(Settings):
    """How on-policy samples are generated: by this process or by a server."""

    samples: int = Field(4, gt=0, description="samples per prompt and round; negatives are chosen from them")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(NEW_TOKENS, gt=0)
    batch_size: int = Field(16, gt=0, description="prompts per forward pass, each with all of its samples")
    keep_cut: bool = Field(False, description="keep samples that did not end within max_new_tokens")
    server: ServerSettings | None = Field(None, description="sample from this server, not in this process")
    serve_folder: bool = Field(
        False,
        description="before each round, write the policy to the run folder and request that folder's path as the "
        "server's model (transformers serve loads it)",
    )
    serve_adapter: bool = Field(
        False,
        description="before each round, write the policy's LoRA adapter to the run folder and load it at the server, "
        "which serves the base (vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)",
    )
    logprobs: bool = Field(
        True,
        description="request log-probabilities with a server's samples in rounds; they are compared with the policy's",
    )

    @model_validator(mode="after")
    def _served_one_way(self) -> SamplerSettings:
        if self.serve_folder and self.serve_adapter:
            raise ValueError("serve_folder and serve_adapter are both set: leave out one of the two")
        if self.serve_adapter and self.server is None:
            raise ValueError("serve_adapter needs server: the section with base_url and model")
        return self

    @property
    def follows(self) -> bool:
        """Whether the server gets the policy of each round."""
        return self.serve_folder or self.serve_adapter


WITHOUT_NEGATIVES = (
    "the data has no rejected responses, but negatives.mix takes all negatives from the data; set the mix, for example "
    "negatives.mix='{perturb: 0.6, other_prompt: 0.4}', or negatives.on_policy_fraction=1.0"
)


class NegativeSettings(Settings):
    """Where negatives come from.

    ``mix`` and ``on_policy_fraction`` are for stage 2, ``gentle`` is for stage 1. Without ``on_policy_fraction`` the
    negatives of stage 2 are made once, before training; with it, stage 2 runs in rounds.
    """

    mix: dict[str, float] = Field(default_factory=lambda: {"dataset": 1.0})
    per_prompt: int | None = Field(
        None, gt=0, description="default: all negatives of the data; with another mix, or in rounds: 1"
    )
    image_mix: dict[str, float] = Field(
        default_factory=dict,
        description="shares of image-side sources: negatives with chosen's text under other images, in addition to "
        "those of mix, e.g. {image_crop: 1.0}",
    )
    image_per_prompt: int = Field(1, gt=0, description="image-side negatives per prompt, with image_mix")
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings by source, e.g. {perturb: {kinds: [colour, object]}}"
    )
    gentle: Literal["auto", "dataset", "perturb", "none"] = "auto"
    on_policy_fraction: float | tuple[float, ...] | None = Field(
        None, description="share of on-policy negatives; a list gives one share per round"
    )
    rounds: int = Field(1, gt=0, description="rounds of stage 2; each starts with new samples of the policy")
    on_policy_chosen: bool = Field(
        False, description="a sample that the judge calls right replaces the chosen response"
    )
    easy_cut: float | None = Field(
        None, description="leave out negatives with a lower mean_logp, in nats per token"
    )
    hard_cut: float | None = Field(
        None, description="leave out negatives with a higher mean_logp, in nats per token"
    )
    recalibrate: bool = Field(
        False, description="calibrate floor and tau (if auto) again in each round, from its samples"
    )
    sampler: SamplerSettings = SamplerSettings()
    judge: JudgeSpec = Field(
        default_factory=lambda: {"name": AUTO},
        description="name and settings of the judge; samples that it calls right do not become negatives. auto: "
        "judge world if the data is from the embedded world, else none",
    )

    @field_validator("judge", mode="before")
    @classmethod
    def _written_by_an_older_version(cls, spec: Any) -> Any:
        """Recipes of older runs list the settings of all judges in one section; keep those of the named judge."""
        if isinstance(spec, dict) and "server" in spec and spec["server"] is None:
            kept = ("name", "threshold") if spec.get("name") == "references" else ("name",)
            return {key: spec[key] for key in kept if key in spec}
        return spec

    @field_validator("judge")
    @classmethod
    def _judges_in_batches(cls, spec: dict[str, Any]) -> dict[str, Any]:
        if spec["name"] not in (AUTO, NONE) and JUDGES.build(spec).needs_whole_set:
            raise ValueError(
                f"judge {spec['name']}: its scores depend on the other examples of the call, but samples are judged "
                "in batches: name another judge, or another metric for judge metric"
            )
        return spec

    @field_validator("mix")
    @classmethod
    def _known_sources(cls, mix: dict[str, float]) -> dict[str, float]:
        if not mix or any(share < 0 for share in mix.values()) or sum(mix.values()) <= 0:
            raise ValueError("shares must be non-negative and not all zero, e.g. {dataset: 1.0}")
        for name in mix:
            NEGATIVES.get(name)
        return mix

    @field_validator("image_mix")
    @classmethod
    def _known_image_sources(cls, mix: dict[str, float]) -> dict[str, float]:
        if mix:
            cls._known_sources(mix)
        for name in mix:
            if not NEGATIVES.get(name).image_side:
                allowed = ", ".join(n for n in NEGATIVES.names() if NEGATIVES.get(n).image_side)
                raise ValueError(
                    f"{name} changes the text; allowed: {allowed}; texts belong into negatives.mix"
                )
        return mix

    @field_validator("on_policy_fraction")
    @classmethod
    def _is_a_share(cls, value: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
        shares = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () or not all(0 <= share <= 1 for share in shares):
            raise ValueError("allowed: a number from 0 to 1, or a list with one for each round")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> NegativeSettings:
        self.build_sources()
        fraction, rounds = self.on_policy_fraction, self.rounds
        if isinstance(fraction, tuple) and len(fraction) != rounds:
            raise ValueError(f"on_policy_fraction has {len(fraction)} shares for rounds = {rounds}")
        if fraction is None:
            for name in ("rounds", "on_policy_chosen", "easy_cut", "hard_cut", "recalibrate"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} needs on_policy_fraction (with 0, stage 2 runs in rounds without sampling)"
                    )
        if self.easy_cut is not None and self.hard_cut is not None and self.easy_cut >= self.hard_cut:
            raise ValueError("easy_cut must be below hard_cut")
        if self.sampler.server is not None and not self.sampler.follows and rounds > 1:
            raise ValueError(
                "sampler.server serves the same model in every round; with rounds > 1 set sampler.serve_adapter "
                "(vLLM) or sampler.serve_folder (transformers serve)"
            )
        return self

    def build_sources(self) -> dict[str, NegativeSource]:
        """The sources with settings in the recipe, by name."""
        return {name: NEGATIVES.build({"name": name, **own}) for name, own in self.settings.items()}

    def fraction(self, round_: int) -> float:
        """The share of on-policy negatives for a round, counted from 0."""
        value = self.on_policy_fraction
        assert value is not None
        return value[round_] if isinstance(value, tuple) else value
