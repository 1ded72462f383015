"""A run's final model as a folder that others load, compared with the policy that was trained before it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.config import DataSettings, stored_data, stored_model
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError, ModelError, RunDirError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.checksums import refuse_damage
from cwdpo.files.reading import read_object
from cwdpo.files.writing import copy_folder, new_folder, write_text
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.merge import Rounding, merge, rounding, rounding_of_adapter
from cwdpo.models.write import save_weights
from cwdpo.report.model_card import Form, model_card
from cwdpo.rundir import RunDir

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cwdpo.models.settings import ModelSettings

CARD = "README.md"
ROWS = 8
"""Rows of the run that an export is compared on."""
MOST = 1e-3
"""Largest difference of one token's log-probability, nats, in float32; merging itself gives some 1e-5."""


@dataclass(frozen=True)
class Exported:
    """An export and how it compares with the trained policy, both computed in float32.

    ``largest`` and ``mean`` are differences of single tokens' log-probabilities in nats, over ``tokens`` tokens of
    ``rows`` rows (chosen and rejected responses). ``rounding`` counts weights that the dtype put back to the base's
    value; ``None`` where nothing was rounded, or the base is not there to compare with.
    """

    path: Path
    form: Form
    dtype: str
    rows: int
    tokens: int
    largest: float
    mean: float
    rounded: bool = False
    rounding: Rounding | None = None

    def lines(self) -> list[str]:
        """What to tell a user."""
        compared = (
            f"compared with the trained policy on {self.rows} rows ({self.tokens} response tokens): log-probabilities "
            f"differ by {self.mean:.2g} nats per token, {self.largest:.2g} at most"
        )
        if not self.rounded:
            return [f"{compared} (allowed: {MOST:g})."]
        lines = [f"{compared}. That is the cost of rounding to {self.dtype}."]
        if self.rounding is not None and self.rounding.moved:
            lines.append(
                f"Rounding put {self.rounding.share:.1%} of the {self.rounding.moved:,} weights that training moved "
                "back to the base's value; --dtype float32 keeps them."
            )
        return lines


def export(
    run: Path, out: Path, *, merge: bool, dtype: str | None = None, data: str | None = None
) -> Exported:
    """Write the final model of ``run`` to ``out`` and compare it with the trained policy.

    A full fine-tuning is written as it is. Of a LoRA run ``merge`` adds the adapter to the base's weights in float32,
    so that ``AutoModelForImageTextToText``, lmms-eval and vLLM load the folder without peft; without it the adapter is
    copied. Weights have the names of the family's hub checkpoints.

    Args:
        dtype: of the weights. Default: what was trained, which is float32 where an adapter is merged. A narrower one is
            written too, and what the rounding cost is said.
        data: rows to compare on; default: the run's own held-out rows, or else its training rows.

    Raises:
        RunDirError: there is no finished run, ``out`` is not empty, or no row to compare on can be read.
        ModelError: the model cannot be loaded, the adapter cannot be merged, or what was written is another model.
    """
    folder = RunDir.open(run)
    model = folder.path / "model"
    if not model.is_dir():
        raise RunDirError(f"{run}: no final model yet: finish the run with cwdpo train --resume")
    refuse_damage(model, "finish the run again: remove the folder, then cwdpo train --resume")
    if out.exists() and any(out.iterdir()):
        raise RunDirError(f"{out} is not empty: choose another --out, or remove it first")
    form: Form = "full"
    if (model / "adapter_config.json").is_file():
        form = "merged" if merge else "adapter"
        if dtype and not merge:
            raise RunDirError(f"{run}: --dtype is of whole weights, and an adapter is copied: add --merge")
    if form == "merged":
        _refuse_quantized(model)
    with new_folder(out) as temporary:
        found = _write(folder, temporary, form, dtype, data)
        card = model_card(folder.path, form)
        write_text(temporary / CARD, card + "\n## Export\n\n" + " ".join(found.lines()) + "\n")
    return replace(found, path=out)


def _write(run: RunDir, out: Path, form: Form, dtype: str | None, data: str | None) -> Exported:
    """Write the folder, load it again, and compare."""
    import torch

    model, settings = run.path / "model", stored_model(run.path / "recipe.yaml")
    policy = _load(settings, model, tune="full" if form == "full" else "lora")
    rows = _rows(run, policy, data)
    wanted = _log_probabilities(policy, rows)
    stored = _stored_dtype(model) if form == "full" else "float32"
    named = dtype or stored
    kind: torch.dtype = getattr(torch, named)
    rounded = named not in (stored, "float32")
    lost, due = None, wanted
    if form == "adapter":
        copy_folder(model, out)
        (out / CHECKSUMS).unlink(missing_ok=True)  # the export is another's from here on
    else:
        if rounded:
            lost = _rounding(settings, policy, form, kind)
        plain: Any = merge(policy.model) if form == "merged" else policy.model
        _check(wanted, _log_probabilities(Policy(plain, policy.processor, ""), rows), "merging the adapter")
        save_weights(plain.to(kind), out)
        policy.processor.save_pretrained(out)
        if rounded:  # what was written is compared with what was to be written
            due = _log_probabilities(Policy(plain.float(), policy.processor, ""), rows)
        del plain
    del policy
    written = _log_probabilities(_load(settings, out, tune="lora" if form == "adapter" else "full"), rows)
    _check(due, written, "loading what was written")
    gap = (written - wanted).abs()
    return Exported(
        out, form, named, len(rows), len(gap), float(gap.max()), float(gap.mean()), rounded, lost
    )  # fmt: skip


def _load(settings: ModelSettings, folder: Path, *, tune: str) -> Policy:
    """A folder's model in float32 on the CPU, scored in plain rows."""
    update = {
        "path": str(folder), "tune": tune, "dtype": "float32", "device": "cpu", "freeze": (), "scoring": "plain",
        "lora": type(settings.lora)(), "vision_cache_gb": 0.0,
    }  # fmt: skip
    policy = load_policy(settings.model_copy(update=update))
    policy.model.eval()
    return policy


def _rows(run: RunDir, policy: Policy, data: str | None) -> list[EncodedExample]:
    """Rows to compare on, those with the run's own pictures and texts.

    Raises:
        RunDirError: none can be read.
    """
    source, how = (data, {}) if data else _own_rows(run)
    remedy = "name others, such as a .jsonl of a few rows, by --data"
    try:
        examples = read_examples(source, max_bad_fraction=1.0, limit=ROWS, **how).examples
    except DataError as error:
        raise RunDirError(
            f"{source}: there are no rows to compare the export on ({error}): {remedy}"
        ) from None
    encoded, problems = policy.encoder(cache_gb=0).encode_all(examples, "rejected", require_negative=False)
    if not encoded:
        raise RunDirError(
            f"{source}: none of the first {len(examples)} rows can be encoded, so there is nothing to compare the "
            f"export on ({problems[0]}): {remedy}"
        )
    return encoded


def _own_rows(run: RunDir) -> tuple[str, dict[str, Any]]:
    """The run's held-out rows, or else its training rows, and how they are read.

    Raises:
        RunDirError: they are in a format of the user's own: a stored recipe loads no code.
    """
    settings: DataSettings = stored_data(run.path / "recipe.yaml")
    if ".py:" in str(settings.format):
        raise RunDirError(
            f"{run.path}: its data are in a format of your own ({settings.format}), and a stored recipe loads no code: "
            "name rows in one of the package's formats to compare the export on, by --data"
        )
    world = run.path / "data" / "validation.jsonl"
    source = str(world) if settings.world is not None else settings.validation_path or settings.path
    return str(source), {
        "format": settings.format, "default_prompt": settings.default_prompt,
        "image_root": Path(settings.image_root) if settings.image_root else None,
        "captions_per_image": settings.captions_per_image, "ignore_columns": settings.ignore_columns,
    }  # fmt: skip


def _log_probabilities(policy: Policy, rows: Sequence[EncodedExample]) -> Tensor:
    """[tokens] log-probability of every response token of the rows, in nats."""
    import torch

    from cwdpo.data.encode.collate import collate
    from cwdpo.scoring import plain

    found = []
    with torch.no_grad():
        for row in rows:  # one by one: memory is what a large model lacks
            scores = plain.score(policy.model, collate([row]))
            found.append(scores.logp[scores.mask].float())
    return torch.cat(found)


def _check(wanted: Tensor, found: Tensor, what: str) -> None:
    """Refuse an export that says something else.

    Raises:
        ModelError: a token's log-probability differs by more than :data:`MOST`.
    """
    gap = float((found - wanted).abs().max())
    if not gap <= MOST:  # NaN too
        raise ModelError(
            f"the export would be another model: {what} changes log-probabilities by up to {gap:.3g} nats a token, "
            f"more than {MOST:g}; nothing was written. Export the adapter without --merge, and report this with the "
            "run's recipe"
        )


def _rounding(settings: ModelSettings, policy: Policy, form: Form, dtype: torch.dtype) -> Rounding | None:
    """What a dtype undoes of training; of a full fine-tuning only where its base can be loaded."""
    if form == "merged":
        return rounding_of_adapter(policy.model, dtype)
    try:
        base = load_policy(settings.model_copy(update={"device": "cpu", "tune": "full", "freeze": ()}))
    except ModelError:
        return None
    before: Mapping[str, Tensor] = dict(base.model.named_parameters())
    total = Rounding()
    for name, after in policy.model.named_parameters():
        if name in before and before[name].shape == after.shape:
            total += rounding(before[name].detach().to(after.dtype), after.detach(), dtype)
    return total


def _stored_dtype(folder: Path) -> str:
    """The dtype that a checkpoint is stored in."""
    written = read_object(folder / "config.json")
    return str(written.get("dtype") or written.get("torch_dtype") or "float32")


def _refuse_quantized(adapter: Path) -> None:
    """Refuse to merge into a base whose weights are stored in 4 or 8 bits.

    Raises:
        ModelError: the base is quantized: its weights have no room for the adapter.
    """
    from transformers import AutoConfig

    base = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError):
        return  # loading the base says what is wrong with it
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{adapter}: the base {base} is stored quantized, and its few bits have no room for the adapter: export "
            "the adapter without --merge, or set base_model_name_or_path in its adapter_config.json to the checkpoint "
            "that was quantized"
        )
