"""The recipe's ``negatives`` section: sources, their blend, the sampler, the judge, rounds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cwdpo.judging.base import AUTO, JUDGES, NONE, JudgeSpec
from cwdpo.negatives.base import NEGATIVES, NegativeSource
from cwdpo.registry import Settings
from cwdpo.remote import ServerSettings


class SamplerSettings(Settings):
    """How on-policy samples are drawn: by this process, or by a server."""

    samples: int = Field(4, gt=0, description="drawn per prompt and round; negatives are chosen among them")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(48, gt=0)
    batch_size: int = Field(16, gt=0, description="prompts per forward; each has all of its samples there")
    keep_cut: bool = Field(False, description="keep samples that did not end within max_new_tokens")
    server: ServerSettings | None = Field(None, description="sample there instead of in this process")
    serve_folder: bool = Field(
        False,
        description="write the policy to the run before each round and ask the server for that folder's path "
        "as its model (transformers serve loads it)",
    )


WITHOUT_NEGATIVES = (
    "the data has no rejected responses and negatives.mix takes all from there; set the mix, for instance "
    "negatives.mix='{perturb: 0.6, other_prompt: 0.4}', or negatives.on_policy_fraction=1.0"
)


class NegativeSettings(Settings):
    """Where negatives come from: shares by source, and the share of on-policy ones.

    ``gentle`` are the negatives of stage 1. Without ``on_policy_fraction`` stage 2's negatives are made once,
    before training; with it, stage 2 runs in rounds.
    """

    mix: dict[str, float] = Field(default_factory=lambda: {"dataset": 1.0})
    per_prompt: int | None = Field(
        None, gt=0, description="default: all of the dataset's; one from any other mix, or in rounds"
    )
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings by source, e.g. {perturb: {kinds: [colour, object]}}"
    )
    gentle: Literal["auto", "dataset", "perturb", "none"] = "auto"
    on_policy_fraction: float | tuple[float, ...] | None = Field(
        None, description="share of samples of the current policy; a list has one for each round"
    )
    rounds: int = Field(1, gt=0, description="of stage 2; each begins with new samples of the policy")
    on_policy_chosen: bool = Field(
        False, description="a sample that the judge finds right replaces the chosen response"
    )
    easy_cut: float | None = Field(
        None, description="leave out negatives with a lower mean_logp, nats per token"
    )
    hard_cut: float | None = Field(None, description="leave out negatives with a higher mean_logp")
    recalibrate: bool = Field(
        False, description="find floor and tau again from each round's samples, where they are auto"
    )
    sampler: SamplerSettings = SamplerSettings()
    judge: JudgeSpec = Field(
        default_factory=lambda: {"name": AUTO},
        description="name and settings of the judge that says which samples are right, and so are no negatives; auto: "
        "the world's where the data is the world's, else none",
    )

    @field_validator("judge", mode="before")
    @classmethod
    def _written_by_an_older_version(cls, spec: Any) -> Any:
        """Recipes stored in runs had one section for all judges: what it spelled out for others is left out."""
        if isinstance(spec, dict) and "server" in spec and spec["server"] is None:
            kept = ("name", "threshold") if spec.get("name") == "references" else ("name",)
            return {key: spec[key] for key in kept if key in spec}
        return spec

    @field_validator("judge")
    @classmethod
    def _judges_in_batches(cls, spec: dict[str, Any]) -> dict[str, Any]:
        if spec["name"] not in (AUTO, NONE) and JUDGES.build(spec).needs_whole_set:
            raise ValueError(
                f"judge {spec['name']}: its scores depend on the other examples of a call, and samples are judged "
                "batch by batch: name another judge, or another metric of judge metric"
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
                        f"{name} needs on_policy_fraction (0 samples nothing, and runs in rounds)"
                    )
        if self.easy_cut is not None and self.hard_cut is not None and self.easy_cut >= self.hard_cut:
            raise ValueError("easy_cut must be below hard_cut")
        fixed = self.sampler.server is not None and not self.sampler.serve_folder
        if fixed and rounds > 1:
            raise ValueError(
                "sampler.server answers with one model; with rounds > 1 set sampler.serve_folder"
            )
        return self

    def build_sources(self) -> dict[str, NegativeSource]:
        """The sources that have settings of their own, by name."""
        return {name: NEGATIVES.build({"name": name, **own}) for name, own in self.settings.items()}

    def fraction(self, round_: int) -> float:
        """Share of on-policy negatives asked of a round."""
        value = self.on_policy_fraction
        assert value is not None
        return value[round_] if isinstance(value, tuple) else value
