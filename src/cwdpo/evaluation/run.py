"""``cwdpo evaluate`` and ``cwdpo compare``: responses once per model, then numbers and paired comparisons."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from cwdpo.config import stored_model
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import CwdpoError, DataError, FileError, RecipeError, optional_package
from cwdpo.evaluation.paired import conclusion, holm
from cwdpo.evaluation.responses import collect, read_back, store
from cwdpo.files.writing import write_json
from cwdpo.files.yamlfile import parse_yaml
from cwdpo.judging.base import AUTO, judge_for
from cwdpo.judging.compare import tournament
from cwdpo.metrics.base import METRICS, Answer, Measured, Metric, difference, reliability
from cwdpo.models.load import load_policy
from cwdpo.models.settings import LoraSettings, ModelSettings
from cwdpo.records import Example
from cwdpo.rundir import RunDir, versions
from cwdpo.worlds.judged import all_judgeable

FILE = "evaluation.json"
Tell = Callable[[str], None]


def model_settings(source: str) -> ModelSettings:
    """How to load what a user names: a run's final model, with the run's own settings, or any folder or hub id."""
    folder = Path(source)
    if (folder / "recipe.yaml").is_file() and (folder / "model").is_dir():
        stored = stored_model(folder / "recipe.yaml")
        # The adapter is as it is; what the recipe asked of it was asked of its training.
        changes = {"path": str(folder / "model"), "freeze": (), "lora": LoraSettings()}
        return stored.model_copy(update=changes)
    return ModelSettings(path=source)


def parse_specs(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Components from the command line: names with commas between, or a YAML mapping with ``name``.

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
        RecipeError: it is not YAML, or names no component or several.
    """
    specs = parse_specs([text])
    if len(specs) != 1:
        raise RecipeError(
            f"{text!r} names {len(specs)} components: name one, or write {{name: ..., setting: ...}}"
        )
    return specs[0]


def default_metrics(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What the data allows: the exact judge, multiple choice, or text against references."""
    if all_judgeable(examples):
        names = ["world", "length", "diversity"]
    elif all("options" in e.extra for e in examples):
        names = ["multiple_choice"]
    else:
        names = ["cider", "bleu4", "length", "diversity"]
    return [{"name": name} for name in names]


def read_data(data: str, options: Mapping[str, Any]) -> list[Example]:
    """The examples to evaluate on; ids must tell them apart.

    Raises:
        DataError: nothing can be read, or an id stands twice.
    """
    examples = read_examples(data, **options).examples
    seen: set[str] = set()
    for e in examples:
        if e.id in seen:
            raise DataError(f"{data}: the id {e.id!r} stands twice: responses are paired by id")
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
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Answer a data set and measure the answers; writes ``responses.jsonl`` and ``evaluation.json`` into ``out``.

    Args:
        metrics: specs; empty means :func:`default_metrics`.
        data_options: of :func:`cwdpo.data.read.reader.read_examples` (``format``, ``limit``, ...).
        temperature, samples: of the responses; several samples of a prompt count as one prompt in intervals.
        seed: of the sampler.

    Returns:
        What ``evaluation.json`` holds: per number its value, interval, n.

    Raises:
        CwdpoError: model, data or metrics that cannot be used.
    """
    options = dict(data_options or {})
    examples = read_data(data, options)
    specs = [dict(s) for s in metrics] or default_metrics(examples)
    built = [METRICS.build(s) for s in specs]
    policy = load_policy(model_settings(model))
    encoder = Encoder(policy.processor)
    needs = frozenset().union(*(m.needs for m in built))
    decoding = {
        "temperature": temperature,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    answers = collect(
        policy, encoder, examples, needs, temperature=temperature, samples=samples, max_new_tokens=max_new_tokens,
        batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
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
    """All numbers of all metrics."""
    return [m for metric in metrics for m in metric(answers)]


def _shown(m: Measured) -> dict[str, Any]:
    return {"better": m.better, "digits": m.digits, "help": m.help}


def digest(examples: Sequence[Example]) -> str:
    """A digest of ids, prompts and chosen responses."""
    text = "\n".join(f"{e.id}\0{e.prompt_text}\0{e.chosen.text}" for e in examples)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def evaluation_folder(run: Path) -> Path:
    """Where a run keeps its evaluation: the folder itself, or the run's ``evaluation/``."""
    return run if (run / FILE).is_file() else run / "evaluation"


def compare(
    runs: Sequence[Path],
    out: Path,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    judge: Mapping[str, Any] | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Compare runs that ``cwdpo evaluate`` measured on the same data: paired, with a page in ``out``.

    Args:
        metrics: specs; empty means those of the first run.
        judge: spec of a judge for win rates, see :func:`cwdpo.judging.base.judge_for`; ``None`` means ``auto``.
        tell: hears what a judge will cost before it starts.

    Raises:
        DataError: a run was not evaluated, or on other data or with another decoding.
    """
    names = _names(runs)
    folders = [evaluation_folder(r) for r in runs]
    notes = [RunDir(f).json(FILE) for f in folders]
    _same(runs, notes)
    examples = read_data(notes[0]["data"], notes[0]["data_options"])
    if digest(examples) != notes[0]["data_digest"]:
        raise DataError(f"{notes[0]['data']} has changed since the runs answered it: evaluate them again")
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
    write_json(out / "summary.json", summary)
    return summary


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart."""
    if len(runs) < 2:
        raise DataError("a comparison needs at least two runs")
    names = [r.resolve().name for r in runs]
    return names if len(set(names)) == len(names) else [str(r) for r in runs]


def _same(runs: Sequence[Path], notes: Sequence[Mapping[str, Any]]) -> None:
    for run, note in zip(runs, notes, strict=True):
        if not note:
            raise DataError(
                f"{run}: was not evaluated yet: cwdpo evaluate {run} --data DATA (the same DATA for every run)"
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
    """The folder of a model without adapters, which other programs can load.

    Raises:
        DataError: it is a run of adapters.
    """
    folder = Path(model) / "model" if (Path(model) / "model").is_dir() else Path(model)
    if (folder / "adapter_config.json").is_file():
        raise DataError(
            f"{model}: its model is an adapter: write it out with `cwdpo export {model} --merge --out FOLDER` and "
            "name that folder"
        )
    return folder


def lmms_eval(folder: Path, tasks: str, out: Path, *, model: str, batch_size: int) -> int:
    """Run lmms-eval on a model folder; returns its exit code.

    Args:
        model: lmms-eval's name of the family, for instance ``qwen2_5_vl`` or ``llava_hf``.

    Raises:
        MissingPackageError: it is not installed.
        CwdpoError: it ended in an error.
    """
    optional_package(
        "lmms_eval", "--lmms-eval", "pip install lmms-eval==0.7.3 (in an environment of its own if need be)"
    )
    command = [
        sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", f"pretrained={folder}", "--tasks", tasks,
        "--batch_size", str(batch_size), "--output_path", str(out / "lmms-eval"),
    ]  # fmt: skip
    code = subprocess.run(command, check=False).returncode
    if code:
        raise CwdpoError(
            f"lmms-eval ended with exit code {code}; its own output stands above ({' '.join(command)})"
        )
    return code
