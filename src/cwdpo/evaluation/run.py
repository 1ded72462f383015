"""``cwdpo evaluate`` generates responses and measures them; ``cwdpo compare`` compares runs on the same prompts."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from cwdpo.config import stored_data, stored_model
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import CwdpoError, DataError, FileError, RecipeError, optional_package
from cwdpo.evaluation.paired import conclusion, holm
from cwdpo.evaluation.responses import collect, read_back, store
from cwdpo.files.writing import clear_unfinished, write_json
from cwdpo.files.yamlfile import parse_yaml
from cwdpo.judging.base import AUTO, judge_for
from cwdpo.judging.compare import tournament
from cwdpo.metrics.base import METRICS, Answer, Measured, Metric, difference, reliability
from cwdpo.models.load import load_policy
from cwdpo.models.settings import LoraSettings, ModelSettings
from cwdpo.records import SAMPLING, Example, VideoSampling
from cwdpo.rundir import RunDir
from cwdpo.versions import versions
from cwdpo.worlds.judged import all_judgeable

FILE = "evaluation.json"
Tell = Callable[[str], None]


def model_settings(source: str, code: Sequence[str] = ()) -> ModelSettings:
    """How to load a model: the final model of a run folder, with the run's settings; or any folder or hub id.

    Args:
        source: the run folder, model folder or hub id.
        code: code that may run: ``remote`` (the checkpoint's own), or files that register model classes. Of a run,
            only what its recipe names (:func:`cwdpo.config.stored_model`); of a model, at most one file.

    Raises:
        RecipeError: the run's model needs code that is not named; or more than one file is named for a model.
    """
    folder = Path(source)
    if (folder / "recipe.yaml").is_file() and (folder / "model").is_dir():
        stored = stored_model(folder / "recipe.yaml", code)
        # The recipe's settings for freezing and LoRA are for training; a trained adapter has its own.
        changes = {"path": str(folder / "model"), "freeze": (), "lora": LoraSettings()}
        return stored.model_copy(update=changes)
    own = [name for name in code if name != "remote"]
    if len(own) > 1:
        raise RecipeError(f"--code {', '.join(own)}: allowed: one file; import the others in it")
    return ModelSettings(path=source, code=own[0] if own else None, trust_remote_code="remote" in code)


def parse_specs(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Components from the command line: names separated by commas, or a YAML mapping with ``name``.

    >>> parse_specs(["cider,length", "{name: bleu4, tokenizer: ptb}"])
    [{'name': 'cider'}, {'name': 'length'}, {'name': 'bleu4', 'tokenizer': 'ptb'}]
    """
    specs: list[dict[str, Any]] = []
    for text in texts:
        if text.lstrip().startswith("{"):
            try:
                specs.append(dict(parse_yaml(text, repr(text))))
            except FileError as error:
                raise RecipeError(str(error)) from None
        else:
            specs += [{"name": name.strip()} for name in text.split(",") if name.strip()]
    return specs


def parse_spec(text: str) -> dict[str, Any]:
    """One component from the command line, see :func:`parse_specs`.

    Raises:
        RecipeError: the text is not YAML, or does not name exactly one component.
    """
    specs = parse_specs([text])
    if len(specs) != 1:
        raise RecipeError(
            f"{text!r} names {len(specs)} components: name one, or write {{name: ..., setting: ...}}"
        )
    return specs[0]


def default_metrics(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The metrics that fit the data: the world's judge, multiple choice, or text compared with references."""
    if all_judgeable(examples):
        names = ["world", "length", "diversity"]
    elif all("options" in e.extra for e in examples):
        names = ["multiple_choice"]
    else:
        names = ["cider", "bleu4", "length", "diversity"]
    return [{"name": name} for name in names]


def read_data(data: str, options: Mapping[str, Any]) -> list[Example]:
    """Read the examples to evaluate on; their ids must be unique.

    Raises:
        DataError: no example can be read, or two have the same id.
    """
    video = VideoSampling(**options["video"]) if "video" in options else SAMPLING
    examples = list(read_examples(data, **{**options, "video": video}).examples)
    seen: set[str] = set()
    for e in examples:
        if e.id in seen:
            raise DataError(
                f"{data}: two rows have the id {e.id!r}, but responses are paired by id: make ids unique"
            )
        seen.add(e.id)
    return examples


def evaluate(
    model: str,
    data: str,
    out: Path,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    data_options: Mapping[str, Any] | None = None,
    temperature: float = 0.0,
    samples: int = 1,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    code: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Generate responses to a data set and measure them; writes ``responses.jsonl`` and ``evaluation.json`` to ``out``.

    Args:
        model: run folder, model folder or hub id.
        data: the data set, see :func:`cwdpo.data.read.reader.read_examples`.
        out: folder to write to.
        metrics: specs of the metrics; empty means :func:`default_metrics`.
        data_options: options of ``read_examples`` (``format``, ``limit``, ...), as JSON.
        temperature, samples: of the responses; intervals count several samples of a prompt as one prompt.
        code: see :func:`model_settings`.
        max_new_tokens, batch_size, seed, progress: see :func:`cwdpo.evaluation.responses.collect`.

    Returns:
        The content of ``evaluation.json``: value, interval and n of each number.

    Raises:
        CwdpoError: model, data or metrics cannot be used.
    """
    options = {**_as_trained(model), **(data_options or {})}
    examples = read_data(data, options)
    specs = [dict(s) for s in metrics] or default_metrics(examples)
    built = [METRICS.build(s) for s in specs]
    policy = load_policy(model_settings(model, code))
    encoder = policy.encoder()
    needs = frozenset().union(*(m.needs for m in built))
    decoding = {
        "temperature": temperature, "samples": samples, "max_new_tokens": max_new_tokens, "seed": seed
    }  # fmt: skip
    answers = collect(
        policy, encoder, examples, needs, temperature=temperature, samples=samples, max_new_tokens=max_new_tokens,
        batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    clear_unfinished(out / FILE)
    store(out, answers)
    measured = measure(built, answers)
    found = {
        "model": model, "data": str(data), "data_options": options, "data_digest": digest(examples),
        "n_prompts": len(examples), "decoding": decoding, "metrics": specs,
        "numbers": {m.name: m.to_json() | _shown(m) for m in measured},
        "reliability": {m.name: reliability(m) for m in measured if m.name.endswith("ece")},
        "packages": versions(),
    }  # fmt: skip
    write_json(out / FILE, found)
    return found


def measure(metrics: Sequence[Metric], answers: Sequence[Answer]) -> list[Measured]:
    """The numbers of all metrics."""
    return [m for metric in metrics for m in metric(answers)]


def _shown(m: Measured) -> dict[str, Any]:
    return {"better": m.better, "digits": m.digits, "help": m.help}


def _as_trained(model: str) -> dict[str, Any]:
    """The frames of videos that a run was trained on; nothing for the default, and for other models."""
    recipe = Path(model) / "recipe.yaml"
    sampling = stored_data(recipe).video.sampling if recipe.is_file() else SAMPLING
    return {} if sampling == SAMPLING else {"video": asdict(sampling)}


def digest(examples: Sequence[Example]) -> str:
    """A digest of the examples' ids, prompts and chosen responses."""
    text = "\n".join(f"{e.id}\0{e.prompt_text}\0{e.chosen.text}" for e in examples)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def evaluation_folder(run: Path) -> Path:
    """The folder with a run's evaluation: the given folder itself, or its ``evaluation/``."""
    return run if (run / FILE).is_file() else run / "evaluation"


def compare(
    runs: Sequence[Path],
    out: Path,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    judge: Mapping[str, Any] | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Compare runs that ``cwdpo evaluate`` measured on the same data, paired by prompt; writes ``summary.json``.

    Args:
        runs: run folders or evaluation folders.
        out: folder to write to.
        metrics: specs of the metrics; empty means those of the first run.
        judge: spec of the judge for win rates, see :func:`cwdpo.judging.base.judge_for`; ``None`` means ``auto``.
        tell: called with an estimate of the judge's cost before it starts.

    Raises:
        DataError: a run was not evaluated, or was evaluated on other data or with other decoding settings.
    """
    names = _names(runs)
    folders = [evaluation_folder(r) for r in runs]
    notes = [RunDir(f).json(FILE) for f in folders]
    _same(runs, notes)
    examples = read_data(notes[0]["data"], notes[0]["data_options"])
    if digest(examples) != notes[0]["data_digest"]:
        raise DataError(f"{notes[0]['data']} has changed since the runs were evaluated: evaluate them again")
    specs = [dict(s) for s in metrics] or notes[0]["metrics"]
    built = [METRICS.build(s) for s in specs]
    who = judge_for(judge or {"name": AUTO}, examples)
    by_id = {e.id: e for e in examples}
    answers = {name: read_back(folder, by_id) for name, folder in zip(names, folders, strict=True)}
    measured = {name: measure(built, own) for name, own in answers.items()}
    first = measured[names[0]]
    summary = {
        "kind": "comparison",
        "title": " against ".join(names),
        "note": [f"{len(examples)} prompts of {Path(notes[0]['data']).name}, {_decoded(notes[0]['decoding'])}."],
        "runs": [{"name": n, "path": str(r)} for n, r in zip(names, runs, strict=True)],
        "figures": [{"key": m.name, "label": m.name.replace("_", " "), **_shown(m)} for m in first],
        "values": {name: {m.name: m.to_json() for m in own} for name, own in measured.items()},
        "differences": _differences(names, measured),
        "wins": [],
        "strength": [],
        "provenance": {
            "intervals": "percentile bootstrap over prompts, 2000 resamples",
            "p-values": "paired permutation test over prompts, Holm-corrected within a column",
            **{f"package {k}": v for k, v in versions().items()},
        },
    }  # fmt: skip
    if who is not None:
        asked = [a.example for a in answers[names[0]]]
        texts = {name: [a.text for a in own] for name, own in answers.items()}
        summary["wins"], summary["strength"] = tournament(
            names, who, asked, texts, store=out / "judge", tell=tell
        )
    clear_unfinished(out / "summary.json")
    write_json(out / "summary.json", summary)
    return summary


def _names(runs: Sequence[Path]) -> list[str]:
    """A unique name for each run: the folder's name, or the path if two names are equal."""
    if len(runs) < 2:
        raise DataError("a comparison needs at least two runs")
    names = [r.resolve().name for r in runs]
    return names if len(set(names)) == len(names) else [str(r) for r in runs]


def _same(runs: Sequence[Path], notes: Sequence[Mapping[str, Any]]) -> None:
    for run, note in zip(runs, notes, strict=True):
        if not note:
            raise DataError(
                f"{run}: not evaluated yet: run cwdpo evaluate {run} --data DATA (the same DATA for every run)"
            )
        for key in ("data_digest", "decoding"):
            if note[key] != notes[0][key]:
                raise DataError(
                    f"{run} and {runs[0]} cannot be paired: {key} differs ({note[key]} and {notes[0][key]}); "
                    "evaluate both on the same data with the same options"
                )


def _decoded(decoding: Mapping[str, Any]) -> str:
    if decoding["temperature"] == 0:
        return "greedy responses"
    return f"{decoding['samples']} samples each at temperature {decoding['temperature']:g}"


def _differences(names: Sequence[str], measured: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"ours": a, "theirs": b, "figures": {}} for a, b in combinations(names, 2)]
    for k, figure in enumerate(measured[names[0]]):
        found = [difference(measured[row["ours"]][k], measured[row["theirs"]][k]) for row in rows]
        for row, one, p in zip(rows, found, holm([d["p"] for d in found]), strict=True):
            word = conclusion({"mean": one["value"]}, figure.better, p)
            row["figures"][figure.name] = {**one, "p_corrected": p, "word": word}
    return rows


def loadable(model: str) -> Path:
    """The folder of a model that other programs can load: one that is not an adapter.

    Raises:
        DataError: the model is an adapter.
    """
    folder = Path(model) / "model" if (Path(model) / "model").is_dir() else Path(model)
    if (folder / "adapter_config.json").is_file():
        raise DataError(
            f"{model}: its model is an adapter: merge it with `cwdpo export {model} --merge --out FOLDER` and name "
            "that folder"
        )
    return folder


def lmms_eval(folder: Path, tasks: str, out: Path, *, model: str, batch_size: int) -> int:
    """Run lmms-eval on a model folder; returns its exit code.

    Args:
        folder: the model folder.
        tasks: lmms-eval's task names, separated by commas.
        out: results are written to its folder ``lmms-eval``.
        model: lmms-eval's name of the model family, for example ``qwen2_5_vl`` or ``llava_hf``.
        batch_size: for lmms-eval.

    Raises:
        MissingPackageError: lmms-eval is not installed.
        CwdpoError: lmms-eval failed.
    """
    optional_package(
        "lmms_eval", "--lmms-eval", "pip install lmms-eval==0.7.3 (in a separate environment if necessary)"
    )
    command = [
        sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", f"pretrained={folder}", "--tasks", tasks,
        "--batch_size", str(batch_size), "--output_path", str(out / "lmms-eval"),
    ]  # fmt: skip
    code = subprocess.run(command, check=False).returncode
    if code:
        raise CwdpoError(f"lmms-eval ended with exit code {code}; see its output above ({' '.join(command)})")
    return code
