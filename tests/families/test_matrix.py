"""What can be done with each family, tried through the product's own commands: the table of docs/models.md."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cells import CELLS, REFUSED, WORKS
from checkpoints import write

from cwdpo.records import Example
from cwdpo.videos import decoded

Run = Callable[..., Any]
AGAINST = ("llava", "mistral3")
STEPS = {
    "lora": {"tune": "lora", "lora": {"r": 4}},
    "full": {"tune": "full"},
}
LOADED = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, chat = sys.argv[1], json.loads(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder)
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
lacking = {key: sorted(map(str, value)) for key, value in info.items() if value}
print(json.dumps({"lacking": lacking, "parameters": sum(p.numel() for p in model.parameters()),
                  "finite": all(bool(p.isfinite().all()) for p in model.parameters())}))
"""


def write_data(folder: Path, examples: Sequence[Example], copies: int = 2) -> Path:
    """Rows in TRL's format, each a few times with another picture and question, pictures as files beside them."""
    from PIL import Image

    rows = []
    for copy in range(copies):
        for example in examples:
            rejected = example.rejected[copy % 2]
            columns = {"images": example.images, "rejected_images": rejected.images or ()}
            files: dict[str, list[str]] = {column: [] for column, images in columns.items() if images}
            for column in files:
                for i, image in enumerate(columns[column]):
                    name = f"{example.id}-{copy}-{column}-{i}.png"
                    picture = image.open().transpose(Image.Transpose.ROTATE_180) if copy % 2 else image.open()
                    picture.putpixel((0, 0), (copy, i, 7))
                    picture.save(folder / name)
                    files[column].append(name)
            if example.videos:
                files["videos"] = [
                    written_video(folder, f"{example.id}-{copy}-{i}", copy)
                    for i in range(len(example.videos))
                ]
            turns = [turn.as_chat() for turn in example.prompt]
            turns[-1]["content"][-1]["text"] += f" Number {copy}?"
            said = {"chosen": example.chosen.text, "rejected": rejected.text}
            answers = {k: [{"role": "assistant", "content": text}] for k, text in said.items()}
            rows.append({"images": [], **files, "prompt": turns, **answers})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written_video(folder: Path, name: str, copy: int) -> str:
    """A video of its own for each copy: a file, or a folder of frames."""
    from PIL import Image

    from conftest import clip

    video = clip(6 + copy, 64, 48, zlib.crc32(name.encode()))
    if copy % 2 == 0:
        (folder / f"{name}.mp4").write_bytes(video.data)
        return f"{name}.mp4"
    (folder / name).mkdir()
    for i, frame in enumerate(decoded(video).frames):
        Image.fromarray(frame).save(folder / name / f"{i}.png")
    return name


def named(kind: str, tune: str, changes: dict[str, Any]) -> str:
    """A name of its own for each recipe."""
    return f"{kind}-{tune}-{zlib.crc32(json.dumps(changes, sort_keys=True).encode()):08x}"


class Bench:
    """A family's runs: each is made once, by the command line, when the first cell asks for it."""

    def __init__(self, family: Any, folder: Path) -> None:
        self.family, self.folder = family, folder
        # The sign is that of most states before the head, which are alike in a random model.
        self.checkpoint = write(family.name, folder / "checkpoint", -12 if family.name in AGAINST else 12)
        self._made: dict[str, Any] = {}

    def data(self, kind: str) -> Path:
        """Rows of one kind; ``text`` is mixed with rows that have a picture."""
        from conftest import rows

        folder = self.folder / f"data-{kind}"
        if not folder.exists():
            folder.mkdir()
            wanted = {kind, *{"text": ("picture",), "video": ("frame",)}.get(kind, ())}
            write_data(folder, [e for e in rows() if e.id in wanted], 3 if kind == "picture" else 2)
        return folder / "rows.jsonl"

    def recipe(self, kind: str, tune: str, **changes: Any) -> Path:
        tree: dict[str, Any] = {
            "name": f"{kind}-{tune}",
            "model": {"path": str(self.checkpoint), "device": "cpu", **STEPS[tune]},
            "data": {
                "path": str(self.data(kind)), "validation_fraction": 0.34, "stage1_fraction": 0.5,
                "max_bad_fraction": 0.0, "video": {"fps": 2, "max_frames": 4},
            },
            "stage1": {"enabled": False, "objective": "sft_constrained", "learning_rate": 1e-3, "steps": 1},
            "stage2": {"objective": {"name": "cw_dpo", "floor": -6.0, "tau": 1.0}, "learning_rate": 1e-3, "steps": 1},
            "train": {"batch_size": 2, "logging_steps": 1, "warmup_steps": 0},
            "negatives": {"mix": {"dataset": 1.0}},
            "probes": {"every": 10, "prompts": 2},
            "evaluation": {"prompts": 1, "max_new_tokens": 4},
            "stop": [],
        }  # fmt: skip
        for key, value in changes.items():
            tree[key] = {**tree[key], **value}
        path = self.folder / f"{named(kind, tune, changes)}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def trained(self, run: Run, kind: str, tune: str = "lora", **changes: Any) -> Path:
        """The folder of a finished run.

        Raises:
            RefusedError: the product refused it, as the family's own template or processor does.
        """
        name = named(kind, tune, changes)
        if name not in self._made:
            out = self.folder / "runs" / name
            done = run("train", self.recipe(kind, tune, **changes), "--out", out)
            self._made[name] = done, out
        done, out = self._made[name]
        refused = self.family.traits.refuses.get(kind)
        if refused is not None and done.code == 1 and refused in done.err:
            raise RefusedError(refused)
        assert done.code == 0, done.err[-2000:]
        assert "Traceback" not in done.err
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in metrics if "loss" in row]
        assert losses
        assert all(isinstance(loss, float) and 0 <= loss < 50 for loss in losses), losses
        return out


class RefusedError(Exception):
    """What the family's own template or processor does not take is refused."""


BF16 = {"train": {"bf16": True, "gradient_checkpointing": True}, "stage1": {"enabled": True}}


def validate(bench: Bench, run: Run) -> None:
    done = run("validate", bench.recipe("picture", "lora"))
    assert done.code == 0, done.out + done.err
    assert "tokens" in done.out


def two_stages(bench: Bench, run: Run) -> None:
    out = bench.trained(run, "picture", "lora", **BF16)
    assert (out / "stage1" / "model" / "adapter_model.safetensors").is_file()


def full(bench: Bench, run: Run) -> None:
    assert (bench.trained(run, "picture", "full") / "model" / "model.safetensors").is_file()


def on_policy(bench: Bench, run: Run) -> None:
    sampler = {"batch_size": 4, "max_new_tokens": 16}
    negatives = {"on_policy_fraction": 0.5, "sampler": sampler, "judge": "none", "mix": {"dataset": 1.0}}
    out = bench.trained(run, "picture", "lora", negatives=negatives)
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert rounds


def several_pictures(bench: Bench, run: Run) -> None:
    bench.trained(run, "pictures")


def text_only(bench: Bench, run: Run) -> None:
    bench.trained(run, "text")


def several_turns(bench: Bench, run: Run) -> None:
    bench.trained(run, "turns")


def system_prompt(bench: Bench, run: Run) -> None:
    bench.trained(run, "system")


def evaluate(bench: Bench, run: Run) -> None:
    out = bench.trained(run, "picture", "lora", **BF16)
    done = run(
        "evaluate", out, "--data", bench.data("picture"), "--max-new-tokens", 4, "--limit", 2, "--metrics", "length",
        "--out", bench.folder / "evaluation",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err


def sample(bench: Bench, run: Run) -> None:
    recipe = bench.recipe("picture", "lora", negatives={"sampler": {"max_new_tokens": 16}, "judge": "none"})
    out = bench.folder / "sampled.jsonl"
    done = run("sample", recipe, "--out", out)
    assert done.code == 0, done.out + done.err
    assert out.read_text()


def export(bench: Bench, run: Run) -> None:
    exported(bench, run, bench.trained(run, "picture", "lora", **BF16))


def exported(bench: Bench, run: Run, trained: Path) -> None:
    """The merged export of a run is loaded by transformers in a process of its own."""
    out = bench.folder / "exported" / trained.name
    done = run("export", trained, "--merge", "--out", out)
    assert done.code == 0, done.out + done.err
    clean = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED, str(out), "[]"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert clean.returncode == 0, clean.stderr[-2000:]
    found = json.loads(clean.stdout.splitlines()[-1])
    assert not found["lacking"], found
    assert found["finite"]
    assert found["parameters"] == sum(p.numel() for p in bench.family.policy.model.parameters())


def quantized(kind: str) -> Callable[[Bench, Run], None]:
    def tried(bench: Bench, run: Run) -> None:
        model = {"quantization": kind, "dtype": "bfloat16"}
        trained = bench.trained(run, "picture", "lora", **BF16, model=model)
        if kind == "nf4":  # the way is the same, and long
            exported(bench, run, trained)

    return tried


def image_side(bench: Bench, run: Run) -> None:
    out = bench.trained(run, "image-side", "lora", negatives={"image_mix": {"image_crop": 1.0}})
    readings = (out / "readings.jsonl").read_text()
    assert "image_crop" in readings


def video(bench: Bench, run: Run) -> None:
    out = bench.trained(run, "video", "lora", **BF16)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert all(sample["video"] and sample["responses"][0]["text"] is not None for sample in samples)
    assert '<img class="strip"' in (out / "report.html").read_text(encoding="utf-8")
    done = run("validate", bench.recipe("video", "lora", **BF16), "--show", 1)
    assert done.code == 0, done.out + done.err
    assert "videos per example: 1: 4" in done.out
    assert "frames of 64 x 48 pixels" in done.out


TRIED: dict[str, Callable[[Bench, Run], None]] = dict(
    zip(
        CELLS,
        (
            validate, two_stages, full, on_policy, several_pictures, text_only, several_turns, system_prompt, evaluate,
            sample, export, quantized("nf4"), quantized("int8"), image_side, video,
        ),
        strict=True,
    )
)  # fmt: skip
_BENCHES: dict[str, Bench] = {}


@pytest.mark.parametrize("cell", CELLS)
def test_cell(
    family: Any, cell: str, run: Run, tmp_path_factory: pytest.TempPathFactory, record_property: Any
) -> None:
    if family.name not in _BENCHES:
        _BENCHES.clear()  # tests of a family follow one another
        _BENCHES[family.name] = Bench(family, tmp_path_factory.mktemp(f"matrix-{family.name}"))
    try:
        TRIED[cell](_BENCHES[family.name], run)
        found = WORKS
    except RefusedError:
        found = REFUSED
    record_property("cell", [family.name, cell, found])
