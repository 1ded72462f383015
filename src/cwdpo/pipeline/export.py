"""Exports a run's final model to a folder for other tools, and compares it with the trained policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.config import stored_data
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import open_source
from cwdpo.data.read.source import Source
from cwdpo.data_settings import DataSettings
from cwdpo.errors import DataError, ModelError, RunDirError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.reading import read_object
from cwdpo.files.writing import clear_unfinished, copy_folder, new_folder, write_text
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.merge import Rounding, merge, rounding, rounding_of_adapter
from cwdpo.models.quantization import quantization_of
from cwdpo.models.write import save_weights
from cwdpo.pipeline.export_source import checkpoints_of, model_of, run_of
from cwdpo.report.model_card import Form, model_card
from cwdpo.rundir import RunDir

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cwdpo.models.settings import ModelSettings

CARD = "README.md"
ROWS = 8
"""Number of rows that an export is compared on."""
MOST = 1e-3
"""Largest allowed difference of a token's log-probability (nats, float32); merging itself gives about 1e-5."""


@dataclass(frozen=True)
class Exported:
    """An export and its difference from the trained policy, both computed in float32.

    ``largest`` and ``mean`` are differences of token log-probabilities in nats, over ``tokens`` tokens of ``rows`` rows
    (chosen and rejected responses). ``rounding`` counts weights that the dtype rounds back to the base's value;
    ``None`` if nothing is rounded, or the base is not available. ``quantized`` is how the base was quantized in
    training; ``on_whole_base`` are the largest and the mean difference if the adapter is put on the base without
    quantization. ``checkpoints`` are the names of those whose mean it is; none: it is the final model.
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
    quantized: str | None = None
    on_whole_base: tuple[float, float] | None = None
    checkpoints: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Sentences for the user."""
        compared = (
            f"compared with the trained policy on {self.rows} rows ({self.tokens} response tokens): log-probabilities "
            f"differ by {self.mean:.2g} nats per token, {self.largest:.2g} at most"
        )
        lines = [
            f"{compared}. That is the cost of rounding to {self.dtype}."
            if self.rounded
            else f"{compared} (allowed: {MOST:g})."
        ]
        if self.checkpoints:
            names = ", ".join(self.checkpoints)
            mean = f"These weights are the mean of {names}."
            one = f"These are the weights of {names}, not of the final model."
            lines.insert(0, mean if len(self.checkpoints) > 1 else one)
        lines += self._of_quantization()
        if self.rounding is not None and self.rounding.moved:
            lines.append(
                f"Rounding set {self.rounding.share:.1%} of the {self.rounding.moved:,} weights that training changed "
                "back to the base's value; --dtype float32 keeps them."
            )
        return lines

    def _of_quantization(self) -> list[str]:
        if self.quantized is None:
            return []
        if self.form == "merged":
            return [
                f"The base was quantized ({self.quantized}) in training; the adapter is merged into its dequantized "
                "weights, so this is the trained model without quantization."
            ]
        said = f"The adapter was trained on a base that is quantized ({self.quantized}): load that base so."
        if self.on_whole_base is not None:
            largest, mean = self.on_whole_base
            said += (
                f" On the base without quantization, log-probabilities differ by {mean:.2g} nats per token, "
                f"{largest:.2g} at most."
            )
        return [said]


def export(
    run: Path,
    out: Path,
    *,
    merge: bool,
    dtype: str | None = None,
    data: str | None = None,
    code: Sequence[str] = (),
    average: int | None = None,
) -> Exported:
    """Write the final model of a run, a checkpoint or the mean of several to ``out``, and compare it with that policy.

    The model of full fine-tuning is written unchanged. For a LoRA run, ``merge`` merges the adapter into the base's
    weights in float32, so that ``AutoModelForImageTextToText``, lmms-eval and vLLM load the folder without peft;
    weights of a quantized base are dequantized before. Without ``merge`` the adapter is copied. Weights have the names
    of the family's hub checkpoints.

    Args:
        run: folder of a finished run, or of a checkpoint in a run (``RUN/stage2/checkpoint-40``). A checkpoint that
            several processes wrote in parts is put together on this one.
        out: a new or empty folder.
        merge: see above.
        dtype: dtype of the weights; default: as trained, and float32 for a merged adapter. For a narrower dtype, the
            result tells how much the rounding changes.
        data: rows to compare on; default: the run's held-out rows, or else its training rows.
        code: code of the model that may run, of what the run's recipe names (:func:`cwdpo.config.stored_model`).
        average: export the mean of the weights of this many checkpoints of the run's last stage, the latest ones (MaP,
            arXiv 2510.09295). Of adapters the factors are averaged.

    Raises:
        RunDirError: the run is not finished, or has fewer checkpoints than ``average``; ``out`` is not empty, or no row
            to compare on can be read.
        FileError: model or checkpoint is damaged.
        ModelError: the model cannot be loaded, the adapter cannot be merged, or the written model differs too much.
    """
    folder = RunDir.open(run_of(run)[0])
    chosen = checkpoints_of(run, average)
    if out.exists() and any(out.iterdir()):
        raise RunDirError(f"{out} is not empty: choose another --out, or remove it first")
    clear_unfinished(out)
    with new_folder(out) as temporary, model_of(folder, chosen, out, code) as (model, settings):
        form: Form = "full"
        if (model / "adapter_config.json").is_file():
            form = "merged" if merge else "adapter"
            if dtype and not merge:
                raise RunDirError(
                    f"{run}: --dtype is for full weights, but an adapter is copied: add --merge"
                )
        found = _write(_Trained(folder, model, settings), temporary, form, dtype, data)
        found = replace(found, checkpoints=tuple(f"{one.parent.name}/{one.name}" for one in chosen))
        card = model_card(folder.path, form)
        write_text(temporary / CARD, card + "\n## Export\n\n" + " ".join(found.lines()) + "\n")
    return replace(found, path=out)


@dataclass(frozen=True)
class _Trained:
    """A run, the folder of the model that is exported, and the section ``model`` of the recipe."""

    run: RunDir
    model: Path
    settings: ModelSettings


def _write(trained: _Trained, out: Path, form: Form, dtype: str | None, data: str | None) -> Exported:
    """Write the folder, load it again, and compare."""
    import torch

    model, settings = trained.model, trained.settings
    policy = _load(settings, model, tune="full" if form == "full" else "lora")
    rows = _rows(trained.run, policy, data)
    wanted = _log_probabilities(policy, rows)
    stored = _stored_dtype(model) if form == "full" else "float32"
    named = dtype or stored
    kind: torch.dtype = getattr(torch, named)
    rounded = named not in (stored, "float32")
    lost, due, on_whole_base = None, wanted, None
    quantized = quantization_of(policy.model)
    if form == "adapter":
        copy_folder(model, out)
        (out / CHECKSUMS).unlink(missing_ok=True)  # users may change an export
        if settings.quantization is not None:
            whole = _load(settings.model_copy(update={"quantization": None}), model, tune="lora")
            moved = (_log_probabilities(whole, rows) - wanted).abs()
            on_whole_base = float(moved.max()), float(moved.mean())
            del whole
    else:
        if form == "merged" and quantized is not None:
            policy = _load(settings, model, tune="lora", dequantize=True)
        if rounded:
            lost = _rounding(settings, policy, form, kind)
        plain: Any = merge(policy.model) if form == "merged" else policy.model
        _check(wanted, _log_probabilities(Policy(plain, policy.processor, ""), rows), "merging the adapter")
        _cast(plain, kind)
        save_weights(plain, out)
        policy.processor.save_pretrained(out)
        if rounded:  # the written model is compared with the rounded weights, not with the trained ones
            _cast(plain, torch.float32)
            due = _log_probabilities(Policy(plain, policy.processor, ""), rows)
        del plain
    del policy
    written = _log_probabilities(_load(settings, out, tune="lora" if form == "adapter" else "full"), rows)
    _check(due, written, "loading what was written")
    gap = (written - wanted).abs()
    return Exported(
        out, form, named, len(rows), len(gap), float(gap.max()), float(gap.mean()), rounded, lost, quantized,
        on_whole_base,
    )  # fmt: skip


def _load(settings: ModelSettings, folder: Path, *, tune: str, dequantize: bool = False) -> Policy:
    """A folder's model that computes in float32 on the CPU, for plain scoring."""
    options = settings.quantization_options.model_copy(update={"compute_dtype": "float32"})
    update = {
        "path": str(folder), "tune": tune, "dtype": "float32", "device": "cpu", "freeze": (), "scoring": "plain",
        "lora": type(settings.lora)(), "vision_cache_gb": 0.0, "quantization_options": options,
        "quantization": settings.quantization if tune == "lora" else None,
    }  # fmt: skip
    policy = load_policy(settings.model_copy(update=update), dequantize=dequantize)
    policy.model.eval()
    return policy


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights, in place, but not the buffers: rounded frequencies of rotary positions are another model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _rows(run: RunDir, policy: Policy, data: str | None) -> list[EncodedExample]:
    """Rows to compare on: those of ``data``, or else the run's own.

    Raises:
        RunDirError: no row can be read or encoded.
    """
    rows, how = (data, {}) if data else _own_rows(run)
    source = rows.name if isinstance(rows, Source) else rows
    remedy = "give other rows with --data, for example a .jsonl with a few rows"
    try:
        examples = read_examples(rows, max_bad_fraction=1.0, limit=ROWS, **how).examples
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


def _own_rows(run: RunDir) -> tuple[str | Source, dict[str, Any]]:
    """The source of the run's held-out rows, or else of its training rows, and the settings to read it.

    Raises:
        RunDirError: the data are in the user's own format, and a stored recipe must not load code.
    """
    settings: DataSettings = stored_data(run.path / "recipe.yaml")
    if settings.validation_path is None:
        settings = settings.each()[0]
    if ".py:" in str(settings.format):
        raise RunDirError(
            f"{run.path}: its data are in a format of your own ({settings.format}), and a stored recipe loads no code: "
            "give rows in one of the package's formats with --data, to compare the export on"
        )
    world = run.path / "data" / "validation.jsonl"
    source = str(world) if settings.world is not None else settings.validation_path or settings.path
    if settings.streaming is not None and settings.validation_path is None:
        return open_source(str(source), streaming=True), settings.reading
    return str(source), settings.reading


def _log_probabilities(policy: Policy, rows: Sequence[EncodedExample]) -> Tensor:
    """[tokens] log-probability of every response token of the rows, in nats."""
    import torch

    from cwdpo.data.encode.collate import collate
    from cwdpo.scoring import plain

    found = []
    with torch.no_grad():
        for row in rows:  # one by one, to save memory with large models
            scores = plain.score(policy.model, collate([row]))
            found.append(scores.logp[scores.mask].float())
    return torch.cat(found)


def _check(wanted: Tensor, found: Tensor, what: str) -> None:
    """Refuse an export with other log-probabilities than the trained policy.

    Raises:
        ModelError: a token's log-probability differs by more than :data:`MOST`.
    """
    gap = float((found - wanted).abs().max())
    if not gap <= MOST:  # NaN too
        raise ModelError(
            f"the export would be a different model: {what} changes log-probabilities by up to {gap:.3g} nats a token, "
            f"more than {MOST:g}; nothing was written. Export the adapter without --merge, and report this with the "
            "run's recipe"
        )


def _rounding(settings: ModelSettings, policy: Policy, form: Form, dtype: torch.dtype) -> Rounding | None:
    """How many updates are lost in a dtype; ``None`` for full fine-tuning whose base cannot be loaded."""
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
