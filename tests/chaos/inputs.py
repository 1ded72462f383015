# ruff: noqa: E501 - a table of samples
"""Every kind of file that a user or a stranger hands in: a good one, and what reads it.

A reader may return or raise :class:`cwdpo.errors.CwdpoError`; anything else is a defect.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cwdpo.completions_api import read_reply
from cwdpo.config import load_recipe, parse_recipe
from cwdpo.data.images import ImageFolder
from cwdpo.data.problems import RowError
from cwdpo.data.read.reader import read_examples
from cwdpo.data.validate.checks import validate
from cwdpo.dynamics.diagnose import diagnose
from cwdpo.lab.spec import load_chosen, load_study
from cwdpo.models.checkpoint import adapter_base, check_folder
from cwdpo.monitor.responses import read_probe_file, stored_responses
from cwdpo.negatives.lexicon import load_lexicon
from cwdpo.records import SAMPLING
from cwdpo.remote import Client, ServerSettings
from cwdpo.report.render import render_report
from cwdpo.rundir import RunDir
from paths import RECIPES
from videos import grey, write_video


@dataclass(frozen=True)
class Format:
    """A kind of file: its name in a folder of its own, a good content, and a reader."""

    name: str
    good: bytes
    read: Callable[[Path], object]
    beside: tuple[tuple[str, bytes], ...] = ()
    """Files that the reader needs next to it."""


def picture(kind: str, mode: str = "RGB") -> bytes:
    """A small picture with structure."""
    buffer = io.BytesIO()
    Image.effect_noise((12, 10), 80).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def lines(*rows: Any) -> bytes:
    """JSONL."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"id": "a", "image": "a.png", "prompt": "Q", "chosen": "a cat", "rejected": "a dog", "margin": 1.5},
    "trl": {"images": ["a.png"], "prompt": TURN, "chosen": [{"role": "assistant", "content": "a cat"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}],
            "negatives": [{"text": "a dog", "kind": "hard", "made": {"reward_margin": 2.0}}], "scene": {"objects": []}},
    "rlaifv": {"image": "a.png", "text": json.dumps({"question": "Q", "chosen": "A", "rejected": "B"}), "ds_name": "x"},
    "mmpr": {"image": ["a.png"], "question": "<image>\nQ", "chosen": "A", "rejected": "B"},
    "sharegpt": {"conversations": [{"from": "human", "value": "<image>Q"}], "images": ["a.png"],
                 "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
    "captions": {"image": "a.png", "captions": ["a cat on a mat", "a small cat"]},
    "kto": {"image": "a.png", "prompt": "Q", "completion": "A", "label": True},
    "data-uri": {"image": "data:image/png;base64,iVBORw0KGgo=", "prompt": "Q", "chosen": "A", "rejected": "B"},
}  # fmt: skip


def rows(path: Path) -> None:
    """Read as training does, and as ``validate`` does."""
    read_examples(path, max_bad_fraction=1, check_images="decode")


def checked(path: Path) -> None:
    """``validate``; what it passes must encode to JSON for its report."""
    report = validate(path, check_images="identify")
    json.dumps(report.to_json(), default=str)
    str(report)


def table() -> bytes:
    """Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    plain = [
        {k: v for k, v in ROWS["plain"].items() if k != "image"}
        | {"image": {"bytes": picture("PNG"), "path": None}}
    ]
    pq.write_table(pa.Table.from_pylist(plain), buffer)
    return buffer.getvalue()


def shard() -> bytes:
    """A WebDataset shard."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (
            ("a.png", picture("PNG")),
            ("a.json", json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}).encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def image(path: Path) -> None:
    """A picture of a row, read to its last pixel, then opened for training if it passed."""
    with contextlib.suppress(RowError):
        ref = ImageFolder(path.parent, "decode").take(path.name, "image")
        ref.open()
        ref.is_altered()


def video(path: Path) -> None:
    """A video of a row, decoded as ``validate`` does."""
    with contextlib.suppress(RowError):
        ImageFolder(path.parent, "decode").videos.take(path.name, "video", SAMPLING)


def encoded(name: str, codec: str) -> bytes:
    """A small video; the name's ending says the container."""
    with tempfile.TemporaryDirectory() as folder:
        return write_video(Path(folder) / name, grey(8, (64, 48)), codec=codec).read_bytes()


def run_folder(path: Path) -> None:
    """What reads a run: the page, the diagnosis, and what a resumed run looks at."""
    run = RunDir.open(path.parent)
    if path.name in ("metrics.jsonl", "readings.jsonl"):
        diagnose(run)
    render_report(path.parent)
    run.changes()


def checkpoint(path: Path) -> None:
    """The settings of a model folder."""
    check_folder(str(path.parent))
    adapter_base(str(path.parent), None)


def reply(path: Path) -> None:
    """A server's answer."""
    with contextlib.suppress(ValueError):  # the client makes it one line
        read_reply(path.read_bytes())


def store(path: Path) -> None:
    """Stored answers of a server."""
    Client(ServerSettings(base_url="http://127.0.0.1:9/v1", model="m"), path)


def override(path: Path) -> None:
    """An override of the command line."""
    parse_recipe({"data": {"path": "x"}}, [path.read_bytes().decode(errors="surrogateescape")])


READING = {"stage": "stage2", "name": "kl", "value": 0.5, "n": 3, "unit": "nats", "step": 5, "split": "validation",
           "low": 0.1, "high": 0.9}  # fmt: skip
RUN = (
    ("recipe.yaml", (RECIPES / "tiny.yaml").read_bytes()),
    ("metrics.jsonl", lines({"stage": "stage2", "step": 1, "loss": 0.6, "grad_norm": 1.0})),
    ("readings.jsonl", lines(READING, {**READING, "step": 10, "value": 0.9})),
    ("summary.json", json.dumps({"name": "x", "seed": 0, "generated": {"prompts": 3, "ended_share": 1.0}}).encode()),
    ("environment.json", b'{"packages": {"torch": "2"}, "python": "3.11", "command": "cwdpo train"}'),
    ("calibration.json", b'{"floor": -1.2, "tau": 0.3, "n": 3, "mean_logps": [-1, -2, -1.5]}'),
    ("samples.jsonl", lines({"id": "a", "image": None, "prompt": "Q", "chosen": "A",
                             "responses": [{"temperature": 0.0, "text": "x", "ended": True}]})),
    ("problems.jsonl", lines({"stage": "read", "problem": "a.jsonl:1: bad"})),
    ("rounds.jsonl", lines({"round": 0, "asked": 0.5, "realised": 0.4, "dropped": {"cut": 2}, "by_origin": {"dataset": 1}})),
    ("checksums.json", b'{"metrics.jsonl": {"bytes": 3, "blake2b": "00"}}'),
    ("probes-stage2.jsonl", lines({"id": "a", "prompt": [], "chosen": "x", "provenance": {"chosen": "y"}})),
    ("curriculum.jsonl", lines({"stage": "stage2", "step": 0, "low": -1, "high": 0})),
    ("stopped-stage2.json", b'{"stage": "stage2", "step": 3, "rolled_back_to": 2, "rule": "kl > 1", "reason": "x"}'),
)  # fmt: skip
STUDY = """
name: s
title: t
question: q
full: a
held_out_seed: 9
first_seed: 1
common: ["data.world.test=6"]
variants:
  a: {label: A}
  b: {label: B, set: ["stage2.objective.floor=-0.3"], grid: {stage2.learning_rate: [1e-5, 2e-5]}}
"""
MODEL = (
    ("config.json", b'{"model_type": "llava", "image_seq_length": 5}'),
    (
        "adapter_config.json",
        b'{"base_model_name_or_path": "./base", "r": 4, "lora_alpha": 8, "target_modules": ["a"]}',
    ),
    ("generation_config.json", b'{"eos_token_id": [1, 2]}'),
    ("processor_config.json", b'{"num_additional_image_tokens": 1}'),
    ("tokenizer_config.json", b'{"eos_token": "</s>"}'),
    ("model.safetensors", b"x"),
    ("adapter_model.safetensors", b"x"),
)


def formats() -> dict[str, Format]:
    """Every kind, by name."""
    beside = (("a.png", picture("PNG")),)
    found = {
        "recipe": Format("r.yaml", (RECIPES / "on_policy.yaml").read_bytes(), load_recipe),
        "override": Format("o", b"stage2.objective={name: cw_dpo, beta: 0.3}", override),
        "study": Format("s.yaml", STUDY.encode(), load_study),
        "chosen": Format("chosen.yaml", b"chosen: {a: ['stage2.learning_rate=1e-5']}\n", load_chosen),
        "lexicon": Format("l.yaml", b"lists: {det: [a, an]}\ncolour: [[red, blue], {from: [x], to: [y/ys], before: [$det]}]\n",
                          lambda path: load_lexicon(str(path))),
        "parquet": Format("t.parquet", table(), rows),
        "tar": Format("t.tar", shard(), rows),
        "gzip": Format("t.jsonl.gz", gzip.compress(lines(*[ROWS["plain"]] * 3)), rows, beside),
        "json": Format("t.json", json.dumps([ROWS["plain"], ROWS["plain"]]).encode(), rows, beside),
        "registry": Format("meta.json", json.dumps({"x": {"root": ".", "annotation": "t.jsonl", "repeat_time": 1}}).encode(),
                           rows, (*beside, ("t.jsonl", lines(ROWS["mmpr"])))),
        "dataset_info": Format("dataset_info.json", json.dumps({"x": {"file_name": "t.jsonl", "ranking": True}}).encode(),
                               lambda path: read_examples(f"{path}:x", max_bad_fraction=1),
                               (*beside, ("t.jsonl", lines(ROWS["sharegpt"])))),
        "probe-file": Format("p.jsonl", lines({**ROWS["plain"], "chosen_paraphrase": ["x"], "provenance": {}}), read_probe_file,
                             beside),
        "probe-set": Format("probes.jsonl", dict(RUN)["probes-stage2.jsonl"],
                            lambda path: stored_responses(RunDir(path.parent).rows(path.name))),
        "reply": Format("r.json", json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode(),
                        reply),
        "answers": Format("answers.jsonl", lines({"key": "a", "text": "b", "ended": True}), store),
        **{f"rows {name}": Format("t.jsonl", lines(row, row), rows, beside) for name, row in ROWS.items()},
        **{f"validate {name}": Format("t.jsonl", lines(row), checked, beside) for name, row in ROWS.items()},
        **{f"picture {kind}": Format("a.img", picture(kind), image)
           for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")},
        **{f"video {name}": Format(name, encoded(name, codec), video)
           for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"), ("a.ts", "libx264"))},
        **{f"model {name}": Format(name, good, checkpoint, tuple(f for f in MODEL if f[0] != name))
           for name, good in MODEL if name.endswith(".json")},
    }  # fmt: skip
    # The page draws a chart of every series, which takes seconds: only where the series itself is mutated.
    series = ("metrics.jsonl", "readings.jsonl")
    for name, good in RUN:
        others = tuple(f for f in RUN if f[0] != name and f[0] not in series)
        found[f"run {name}"] = Format(name, good, run_folder, others)
    return found
