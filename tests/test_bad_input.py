"""Every kind of bad input has its own answer: what, where, what was allowed, what to do; exit code 1, no traceback."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cwdpo.config import load_recipe, parse_recipe
from cwdpo.errors import CwdpoError

GOOD = {"image": "a.png", "prompt": "What is it?", "chosen": "a cat", "rejected": "a dog"}
RECIPE = "data: {path: data/train.jsonl}\nmodel: {path: model, device: cpu}\n"


Run = Callable[..., Any]  # the fixture `run`: arguments -> code, out, err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with good data (eight rows) and a recipe; the model is what a test makes it."""
    data = tmp_path / "data"
    data.mkdir()
    Image.effect_noise((24, 24), 90).save(data / "a.png")
    put(tmp_path, *({**GOOD, "id": str(i), "chosen": f"a cat {i}"} for i in range(8)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(place: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    file = place / "data" / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks of runs."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def refused(done: Any, *parts: str) -> None:
    """Exit code 1, one answer with all parts, no traceback."""
    said = done.err + done.out
    assert done.code == 1, said
    assert "Traceback" not in said
    for part in parts:
        assert part in said


# --- recipes --------------------------------------------------------------------------------------------

BAD_RECIPES: dict[str, tuple[str | bytes | None, tuple[str, ...], tuple[str, ...]]] = {
    # what: (text of recipe.yaml, overrides, parts of the answer)
    "absent": (None, (), ("recipe.yaml: cannot be read (No such file",)),
    "not-utf-8": (b"name: caf\xe9\n", (), ("recipe.yaml: cannot be read", "utf-8")),
    "broken-yaml": ("data: [1", (), ("recipe.yaml: not valid YAML", "line 1")),
    "odd-yaml": ("name: !!int x", (), ("recipe.yaml: not valid YAML", "invalid literal")),
    "endless-yaml": ("[" * 3000, (), ("recipe.yaml: not valid YAML", "nested too deep")),
    "no-mapping": ("- a\n", (), ("recipe.yaml: a recipe is a mapping of sections, got list",)),
    "unsafe-yaml": (
        "name: !!python/object/apply:os.mkdir [owned]\n",
        (),
        ("recipe.yaml: not valid YAML", "python/object"),
    ),
    "aliases-in-circles": (
        "data: &d {path: *d}\n",
        (),
        ("recipe.yaml: nested deeper than 30", "write the values out"),
    ),
    "aliases-that-multiply": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(
            f"{n}: &{n} [{', '.join(['*' + b] * 10)}]\n" for b, n in zip("abcdefg", "bcdefgh", strict=True)
        ),
        (),
        ("more than 10000 values", "aliases"),
    ),
    "unknown-key": (
        RECIPE,
        ("train.batchsize=2",),
        ("unknown key 'train.batchsize'; did you mean 'batch_size'?",),
    ),
    "wrong-type": (
        RECIPE,
        ("train.batch_size=many",),
        ("recipe.yaml: train.batch_size: ", "valid integer", "'many'"),
    ),
    "not-a-number": (
        RECIPE,
        ("stage2={objective: dpo, learning_rate: .nan}",),
        ("stage2.learning_rate", "finite"),
    ),
    "negative-number": (
        RECIPE,
        ("train.weight_decay=-1",),
        ("train.weight_decay", "greater than or equal to 0"),
    ),
    "unknown-objective": (
        RECIPE,
        ("stage2={objective: dqo, learning_rate: 1}",),
        ("stage2: unknown objective 'dqo'", "did you mean 'dpo'?"),
    ),
    "unknown-setting": (
        RECIPE,
        ("stage2={objective: {name: dpo, bta: 1}, learning_rate: 1}",),
        ("unknown key 'bta'", "'beta'"),
    ),
    "own-file-absent": (
        RECIPE,
        ("stage2={objective: 'my.py:Mine', learning_rate: 1}",),
        ("there is no file 'my.py'",),
    ),
    "unknown-source": (
        RECIPE,
        ("negatives={mix: {datset: 1}}",),
        ("unknown negative source 'datset'", "'dataset'"),
    ),
    "two-sources": (
        "data: {path: x, world: {}}",
        (),
        ("data: ", "exactly one of 'path', 'sources' and 'world'"),
    ),
    "name-that-leads-out": (RECIPE, ("name=../../other",), ("name: ", "without slashes", "'../../other'")),
    "unknown-schedule": (
        RECIPE,
        ("train.lr_scheduler_type=cosin",),
        ("train.lr_scheduler_type", "did you mean 'cosine'?"),
    ),
    "unknown-tracker": (
        RECIPE,
        ("train.report_to=[wandbb]",),
        ("train.report_to", "did you mean 'wandb'?", "tensorboard"),
    ),
    "bad-override": (RECIPE, ("seed",), ("override 'seed': write section.key=value",)),
}


@pytest.mark.parametrize("what", BAD_RECIPES)
def test_bad_recipes(run: Run, place: Path, what: str) -> None:
    text, overrides, parts = BAD_RECIPES[what]
    file = place / "recipe.yaml"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(place)
    done = run("train", "recipe.yaml", *overrides)
    refused(done, *parts)
    assert done.err.startswith("cwdpo: ")
    assert len(done.err) < 2000
    assert contents(place) == before, "nothing is written for a recipe that cannot be run"
    assert not (place / "owned").exists()


def test_a_tracker_that_is_not_installed(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run("train", "recipe.yaml", "train.report_to=[wandb]")
    refused(done, "train.report_to: the tracker 'wandb' is not installed: pip install wandb, or leave it out")
    assert not (place / "runs").exists()


def test_the_names_that_recipes_may_use_are_those_of_transformers() -> None:
    from transformers import SchedulerType
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from cwdpo.arguments import SCHEDULES, TRACKERS

    assert {kind.value for kind in SchedulerType} >= set(SCHEDULES)
    assert set(INTEGRATION_TO_CALLBACK) >= set(TRACKERS)


YAML_TEXT = st.text(st.sampled_from("ab:-[]{},&*!<>|?'\"#%@ \n\t0.1~é\x00\ud800"), max_size=60)
TAGS = st.sampled_from(
    [
        "!!int",
        "!!float",
        "!!bool",
        "!!null",
        "!!timestamp",
        "!!binary",
        "!!set",
        "!!omap",
        "!!pairs",
        "!!python/name:os",
    ]
)
TAGGED = st.builds("{}: {} {}".format, st.sampled_from(["seed", "data", "stage1"]), TAGS, YAML_TEXT)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.binary(max_size=40) | (YAML_TEXT | TAGGED).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_no_file_makes_the_recipe_parser_raise_anything_but_ours(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "recipe.yaml"
        file.write_bytes(text)
        with contextlib.suppress(CwdpoError):
            load_recipe(file)
        with contextlib.suppress(CwdpoError):
            parse_recipe({"data": {"path": "x"}}, [f"name={text.decode('utf-8', 'replace')}"])


# --- data -----------------------------------------------------------------------------------------------


def turn(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


TEXT, IMAGE = {"type": "text", "text": "Q"}, {"type": "image"}
BAD_ROWS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    # what: (row, its key, parts of the answer)
    "malformed-json": (b'{"image": "a.png", ', "", ("not JSON", "one JSON object per line")),
    "not-utf-8": (b'{"prompt": "caf\xe9"}', "", ("malformed-json", "UTF-8")),
    "not-an-object": ([1, 2], "", ("list is not an object", "write each row as")),
    "missing-key": ({**GOOD, "rejected": None}, "rejected", ("'rejected' is missing", "data.format")),
    "image-missing": ({**GOOD, "image": "gone.png"}, "image", ("no file 'gone.png'", "correct the path")),
    "image-truncated": (
        {**GOOD, "image": "cut.png"},
        "image",
        ("'cut.png' ends too early", "fetch the file again"),
    ),
    "image-unreadable": (
        {**GOOD, "image": "text.png"},
        "image",
        ("'text.png' is not an image", "leave the row out"),
    ),
    "image-bomb": ({**GOOD, "image": "large.png"}, "image", ("more than 900 pixels", "scale the image down")),
    "image-escapes": ({**GOOD, "image": "../outside.png"}, "image", ("leads outside", "stay inside")),
    "image-escapes-by-name": (
        {**GOOD, "image": "/etc/hostname"},
        "image",
        ("image-escapes", "leads outside"),
    ),
    "image-escapes-by-link": ({**GOOD, "image": "link.png"}, "image", ("image-escapes", "links followed")),
    "image-url": ({**GOOD, "image": "https://example.org/a.png"}, "image", ("is a URL", "download")),
    "wrong-type": (
        {"images": "a.png", "prompt": "Q", "chosen": "A", "rejected": "B"},
        "images",
        ("a list of images",),
    ),
    "two-image-keys": ({**GOOD, "images": ["a.png"]}, "images", ("both 'image' and 'images'", "keep one")),
    "empty-chosen": ({**GOOD, "chosen": " "}, "chosen", ("the chosen response is empty", "fill it")),
    "empty-rejected": ({**GOOD, "rejected": ""}, "rejected", ("the negative is empty", "remove it")),
    "chosen-equals-rejected": (
        {**GOOD, "rejected": "a cat"},
        "rejected",
        ("equals the chosen", "a response that differs"),
    ),
    "placeholder-in-text": (
        {**GOOD, "prompt": "<|image_pad|>\nQ"},
        "prompt[0].content",
        ("literal '<|image_pad|>'", "as blocks"),
    ),
    "image-count": (
        {**GOOD, "prompt": turn(IMAGE, IMAGE, TEXT)},
        "prompt",
        ("marks 2 image places, the row has 1", "equal numbers"),
    ),
    "empty-prompt": ({**GOOD, "image": None, "prompt": " "}, "prompt", ("the last user turn is empty",)),
    "wrong-role": (
        {**GOOD, "prompt": [{"role": "bot", "content": "Q"}]},
        "prompt[0].role",
        ("'bot'", "allowed: system, user"),
    ),
    "bad-text": (
        b'{"prompt": "Q", "chosen": "\\ud800", "rejected": "B"}',
        "chosen",
        ("surrogate", "repair the encoding"),
    ),
    "duplicate-id": ({**GOOD, "id": "0"}, "id", ("'0' was used before", "own 'id'")),
    "duplicate-row": (
        {**GOOD, "chosen": "a cat 0"},
        "",
        ("the same images, videos, prompt, chosen and negatives", "keep one"),
    ),
    "too-long": ({**GOOD, "chosen": "w " * 60}, "", ("max_length = 50", "data.max_length")),
    "unknown-key": ({**GOOD, "negatives": [{"txt": "C"}]}, "negatives[0].txt", ("did you mean 'text'?",)),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows(run: Run, place: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, key, parts = BAD_ROWS[what]
    data = place / "data"
    whole = (data / "a.png").read_bytes()
    (data / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "text.png").write_text("no picture")
    Image.new("RGB", (31, 30)).save(data / "large.png")
    Image.new("RGB", (4, 4)).save(place / "outside.png")
    (data / "link.png").symlink_to(place / "outside.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    good = (data / "train.jsonl").read_bytes().splitlines()
    file = put(place, *good, row)
    before = contents(place)
    done = run("validate", "data", "--max-length", 50)
    refused(done, f"data/train.jsonl:9{f' [{key}]' if key else ''}: ", "to do: ", *parts)
    assert "rows 9: 8 good, 1 bad" in done.out
    assert contents(place) == before
    machine = json.loads(run("validate", "data", "--max-length", 50, "--json").out)
    (group,) = machine["problems"]
    assert (group["count"], group["first"][0]["row"], group["first"][0]["key"]) == (1, 9, key)
    assert what.startswith(group["kind"]) or group["kind"] in parts
    assert run("validate", "data", "--max-length", 50, "--fix", "good.jsonl").code == 1
    assert file.read_bytes() == before["data/train.jsonl"]
    assert run("validate", "good.jsonl", "--max-length", 50).code == 0


def test_each_kind_stands_once_with_its_first_rows(run: Run, place: Path) -> None:
    put(
        place,
        GOOD,
        *({**GOOD, "image": f"gone{i}.png"} for i in range(30)),
        *({**GOOD, "chosen": ""} for _ in range(3)),
    )
    done = run("validate", "data")
    refused(done, "image-missing x 30\n", "empty-chosen x 3\n", "... and 25 more")
    assert done.out.count("image-missing") == done.out.count("empty-chosen") == 1
    assert done.out.count("    data/train.jsonl:") == 5 + 3


def test_a_picture_on_both_sides(run: Run, place: Path) -> None:
    shutil.copy(place / "data" / "a.png", place / "data" / "again.png")
    put(place, {**GOOD, "image": "again.png"}, name="validation.jsonl")
    put(place, {**GOOD, "id": "0"}, {"prompt": "Q", "chosen": "A", "rejected": "B"})
    refused(
        run("validate", "data"),
        "leak x 1",
        "data/train.jsonl:1 [images[0]]",
        "is in data/validation.jsonl:1",
    )
    assert run("validate", "data/validation.jsonl").code == 0
    (place / "data" / "validation.jsonl").rename(place / "data" / "other.jsonl")
    assert run("validate", "data/train.jsonl").code == 0
    refused(
        run("validate", "data/train.jsonl", "--against", "data/other.jsonl"), "leak x 1", "data/other.jsonl:1"
    )


BAD_SETS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    # what: (what is done to the data folder, arguments of validate, parts of the answer)
    "absent": (
        lambda d: None,
        ("data/gone.jsonl",),
        ("there is no file or folder 'data/gone.jsonl'", "allowed: "),
    ),
    "empty": (
        lambda d: (d / "train.jsonl").write_text("\n\n"),
        ("data",),
        ("train.jsonl: no rows", "at least one"),
    ),
    "nothing-there": (
        lambda d: (d / "train.jsonl").unlink(),
        ("data",),
        ("data: no data here", "name the file"),
    ),
    "unknown-suffix": (
        lambda d: (d / "a.csv").write_text("x"),
        ("data/a.csv",),
        ("cannot read .csv", ".parquet"),
    ),
    "unknown-format": (
        lambda d: None,
        ("data", "--format", "trll"),
        ("unknown data format 'trll'; did you mean 'trl'?",),
    ),
    "no-format": (
        lambda d: (d / "train.jsonl").write_text('{"a": 1}\n'),
        ("data",),
        ("columns (a) match no known format", "Rename"),
    ),
    "several-formats": (
        lambda d: (d / "train.jsonl").write_text(
            json.dumps({**GOOD, "question": "Q", "messages": [], "rejected_response": "x"})
        ),
        ("data",),
        ("match several formats (ms_swift, rlaifv, trl)", "set data.format"),
    ),
    "ambiguous-folder": (
        lambda d: (d / "train.jsonl").rename(d / "x.jsonl") and (d / "y.jsonl").write_text("{}"),
        ("data",),
        ("several data files (x.jsonl, y.jsonl)", "name the one to read"),
    ),
    "missing-shard": (
        lambda d: (d / "train.jsonl").rename(d / "train-00001-of-00002.jsonl"),
        ("data",),
        ("1 of 2 shards of 'train' are missing", "00000"),
    ),
    "no-parquet": (
        lambda d: (d / "t.parquet").write_text("x" * 50),
        ("data/t.parquet",),
        ("not readable as parquet",),
    ),
    "no-list": (
        lambda d: (d / "t.json").write_text("{}"),
        ("data/t.json",),
        ("holds dict; allowed: a list",),
    ),
    "lines-in-json": (
        lambda d: (d / "train.jsonl").rename(d / "t.json"),
        ("data/t.json",),
        ("must be called .jsonl",),
    ),
    "nothing-but-noise": (
        lambda d: (d / "train.jsonl").write_bytes(os.urandom(50) + b"\n\xff\n"),
        ("data",),
        ("none of the first", "malformed-json"),
    ),
    "no-image-root": (
        lambda d: None,
        ("data", "--image-root", "gone"),
        ("data.image_root: there is no folder",),
    ),
    "no-other-set": (
        lambda d: None,
        ("data", "--against", "gone.jsonl"),
        ("no file or folder 'gone.jsonl'",),
    ),
    "no-model": (lambda d: None, ("data", "--model", "./gone"), ("model.path './gone': no such folder",)),
    "fix-is-there": (
        lambda d: None,
        ("data", "--fix", "recipe.jsonl"),
        ("recipe.jsonl exists already", "another name"),
    ),
    "fix-is-no-jsonl": (
        lambda d: None,
        ("data", "--fix", "good.json"),
        ("allowed: a name that ends in .jsonl",),
    ),
}


def test_a_recipe_says_how_its_data_is_validated(run: Run, place: Path) -> None:
    (place / "my.yaml").write_text("data: {path: data/train.jsonl, max_length: 3, format: trl}\n")
    done = run("validate", "my.yaml")
    refused(done, "too-long", "tokens")
    (place / "my.yaml").write_text(
        "data: {path: data/train.jsonl, max_length: 500}\nmodel: {path: nowhere/at-all}\n"
    )
    assert run("validate", "my.yaml").code == 1
    done = run("validate", "my.yaml", "--model", "embedded")
    assert (done.code, "tokens" in done.out) == (0, True)
    assert run("validate", "my.yaml", "model.path=embedded", "data.max_length=3").code == 1
    done = run("validate", "data", "seed=1")
    assert (done.code, "is for a recipe" in done.err) == (2, True)
    file = place / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        del row["rejected"]
        row["completion"] = row.pop("chosen")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "data: {path: data/train.jsonl, validation_path: data/bad.jsonl}\nmodel: {path: embedded}\n"
    (place / "my.yaml").write_text(text)
    (place / "data" / "bad.jsonl").write_text(
        '{"image": "gone.png", "prompt": "What?", "completion": "a cat"}\n'
    )
    done = run("validate", "my.yaml")
    refused(done, "stage 2 has no negative in data/train.jsonl", "negatives.mix=")
    assert "bad.jsonl" in done.out, "the held-out set is checked too"
    changes = ("data.validation_path=null", "data.validation_fraction=0.3", "data.stage1_fraction=0.5")
    done = run("train", "my.yaml", "model.device=cpu", *changes, "--out", "r")
    refused(done, "no example of stage 2 has a negative", "negatives.mix=")
    assert not (place / "r" / "stage1").exists(), "before stage 1"
    (place / "my.yaml").write_text("data: {world: {}}\n")
    refused(run("validate", "my.yaml"), "data.world is generated by cwdpo")


@pytest.mark.parametrize("what", BAD_SETS)
def test_bad_sets(run: Run, place: Path, what: str) -> None:
    change, arguments, parts = BAD_SETS[what]
    change(place / "data")
    (place / "recipe.jsonl").write_text("kept")
    before = contents(place)
    done = run("validate", *arguments)
    refused(done, *parts)
    assert (done.out, done.err[:7]) == ("", "cwdpo: ")
    assert contents(place) == before


def test_a_bar_of_rows_on_a_terminal_only(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("validate", "data").err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    done = run("validate", "data")
    assert (done.code, "train.jsonl" in done.err, "8/8" in done.err) == (0, True, True)
    assert json.loads(run("validate", "data", "--json").out)["rows"] == 8


def test_a_file_that_may_not_be_read(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permission that root would not lack."""
    opened = Path.open

    def deny(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "train.jsonl":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)
    refused(run("validate", "data"), "data/train.jsonl: cannot be read (Permission denied)")


def test_escape_sequences_of_names_do_not_reach_the_terminal(run: Run, place: Path) -> None:
    own = {"text": "a dog", "kind": "\x1b[2J\u202ekind"}
    put(place, {"image": "a.png", "prompt": "Q", "chosen": "A", "negatives": [own], "\x1b]0;title\x07": 1})
    done = run("validate", "data")
    assert done.code == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(done.out)
    assert "\\x1b[2J\\u202ekind" in done.out


# --- training: data, models, run folders ----------------------------------------------------------------


def train(run: Run, *overrides: str, out: str = "out") -> Any:
    return run("train", "recipe.yaml", *overrides, "--out", out)


def test_too_many_bad_rows(run: Run, place: Path) -> None:
    put(place, GOOD, *({**GOOD, "image": "gone.png"} for _ in range(3)))
    done = train(run)
    refused(done, "data/train.jsonl: 3 of 4 rows are bad, more than data.max_bad_fraction = 0.01 allows")
    refused(done, "image-missing x 3", "data/train.jsonl:2 [image]", "or raise data.max_bad_fraction")


def test_no_usable_row(run: Run, place: Path) -> None:
    put(place, {**GOOD, "chosen": ""})
    refused(train(run, "data.max_bad_fraction=1"), "none of 1 rows is usable", "empty-chosen x 1")


@pytest.fixture
def model(place: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, place / "model"))


def edited(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    for key, value in changes.items():
        node, *rest = key.split("__")
        if rest:
            values[node][rest[0]] = value
        else:
            values[node] = value
    file.write_text(json.dumps(values))


def pickled(folder: Path, name: str = "model") -> None:
    import torch
    from safetensors.torch import load_file

    other = {"model": "pytorch_model.bin", "adapter_model": "adapter_model.bin"}[name]
    torch.save(load_file(folder / f"{name}.safetensors"), folder / other)
    (folder / f"{name}.safetensors").unlink()


def without_layer(folder: Path, name: str = "model") -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / f"{name}.safetensors")
    kept = {
        k: v for k, v in weights.items() if "language_model.layers.1" not in k and ".model.layers.1" not in k
    }
    assert len(kept) < len(weights)
    save_file(kept, folder / f"{name}.safetensors", metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def with_code(folder: Path) -> None:
    edited(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"})
    (folder / "mine.py").write_text("open('owned', 'w')\nclass C: pass\n")


BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    # what: (what is done to the model folder, overrides, parts of the answer)
    "no-folder": (
        lambda m: None,
        ("model.path=./gone",),
        ("model.path './gone': no such folder", "allowed: 'embedded'"),
    ),
    "a-file": (lambda m: None, ("model.path=recipe.yaml",), ("model.path 'recipe.yaml': no such folder",)),
    "no-config": (
        lambda m: (m / "config.json").unlink(),
        (),
        ("neither config.json nor adapter_config.json",),
    ),
    "deep-config": (
        lambda m: (m / "config.json").write_text('{"a":' * 100_000),
        (),
        ("model/config.json: is not JSON (nested too deep)", "fetch the checkpoint again"),
    ),
    "deep-generation-config": (
        lambda m: (m / "generation_config.json").write_text("[" * 80 + "]" * 80),
        (),
        ("model/generation_config.json: is nested deeper than 60",),
    ),
    "endless-image-tokens": (
        lambda m: edited(m / "processor_config.json", num_additional_image_tokens=10**7),
        (),
        ("its processor's num_additional_image_tokens is 10000000; allowed: 0 to 65536",),
    ),
    "broken-config": (lambda m: (m / "config.json").write_text("{"), (), ("model/config.json: is not JSON",)),
    "wrong-value-in-config": (
        lambda m: edited(m / "config.json", image_seq_length="many"),
        (),
        ("'image_seq_length'",),
    ),
    "unknown-family": (
        lambda m: edited(m / "config.json", model_type="mine"),
        (),
        ("model.path 'model' cannot be", "`mine`"),
    ),
    "no-vision": (
        lambda m: edited(m / "config.json", model_type="llama"),
        (),
        ("AutoModelForImageTextToText",),
    ),
    "no-processor": (
        lambda m: (m / "processor_config.json").unlink(),
        (),
        ("no usable processor", "processor and tokenizer files"),
    ),
    "no-tokenizer": (
        lambda m: (m / "tokenizer.json").unlink(),
        (),
        ("no usable processor", "tokenizer files"),
    ),
    "no-weights": (
        lambda m: (m / "model.safetensors").unlink(),
        (),
        ("there is no model*.safetensors", "incomplete"),
    ),
    "pickled-weights": (
        pickled,
        (),
        ("the weights are pickles (pytorch_model.bin)", "save_pretrained(folder)"),
    ),
    "cut-weights": (
        lambda m: cut(m / "model.safetensors"),
        (),
        ("model.path 'model' cannot be loaded", "SafetensorError"),
    ),
    "other-shapes": (
        lambda m: edited(m / "config.json", text_config__hidden_size=64),
        (),
        ("do not fit each other (shapes differ)",),
    ),
    "fewer-weights": (
        without_layer,
        (),
        ("has no weights for", "layers.1.", "Missing weights are never set at random"),
    ),
    "more-layers-in-config": (
        lambda m: edited(m / "config.json", text_config__num_hidden_layers=3),
        (),
        ("has no weights for", "layers.2."),
    ),
    "fewer-layers-in-config": (
        lambda m: edited(m / "config.json", text_config__num_hidden_layers=1),
        (),
        ("has more layers: ", "layers.1."),
    ),
    "code-of-its-own": (
        with_code,
        (),
        ("it comes with its own Python code", "model.trust_remote_code: true"),
    ),
    "unknown-attention": (lambda m: None, ("model.attention=eagre",), ("'model' cannot be loaded", "eager")),
    "bad-processor-option": (
        lambda m: None,
        ("model.processor_options={size: x}",),
        ("no usable processor", "size"),
    ),
    "freeze-nothing": (
        lambda m: None,
        ("model.freeze=[visoin]",),
        ("model.freeze: 'visoin' matches no parameter",),
    ),
    "freeze-all": (lambda m: None, ("model.freeze=[vision,projector,text]",), ("leaves nothing to train",)),
    "lora-nowhere": (
        lambda m: None,
        ("model.tune=lora", "model.lora.target_modules=[nope]"),
        ("model.lora: ", "nope"),
    ),
    "lora-no-pattern": (
        lambda m: None,
        ("model.tune=lora", "model.lora.target_modules='('"),
        ("model.lora: ", "position 0"),
    ),
    "too-long": (
        lambda m: None,
        ("data.max_length=10",),
        ("train.jsonl:1: ", "are more than data.max_length = 10", "raise the limit"),
    ),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_bad_models(run: Run, place: Path, model: Path, what: str) -> None:
    change, overrides, parts = BAD_MODELS[what]
    change(model)
    before = contents(place)
    refused(train(run, *overrides), *parts)
    after = contents(place)
    assert {name: after[name] for name in before} == before
    assert not (place / "owned").exists()


@pytest.fixture
def adapter(place: Path, model: Path) -> Path:
    from cwdpo.config import ModelSettings
    from cwdpo.models.load import load_policy

    policy = load_policy(ModelSettings(path=str(model), tune="lora", device="cpu"))
    policy.model.save_pretrained(place / "adapter")  # type: ignore[operator]
    policy.processor.save_pretrained(place / "adapter")
    return place / "adapter"


def other_base(folder: Path) -> None:
    from cwdpo.models.tiny import TinyModelSettings, init_model

    shape = TinyModelSettings(vision_width=32, vision_layers=1, width=64, layers=1, heads=2, vocabulary=400)
    init_model(folder.parent / "other", ["a cat"], shape)
    edited(folder / "adapter_config.json", base_model_name_or_path="other")


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another-base": (
        other_base,
        ("the adapter does not fit its base", "size mismatch", "base_model_name_or_path"),
    ),
    "no-base": (
        lambda a: edited(a / "adapter_config.json", base_model_name_or_path=None),
        ("names no base",),
    ),
    "base-gone": (
        lambda a: edited(a / "adapter_config.json", base_model_name_or_path="./gone"),
        ("its base: ", "no such folder"),
    ),
    "base-is-an-adapter": (
        lambda a: edited(a / "adapter_config.json", base_model_name_or_path="adapter"),
        ("is an adapter itself",),
    ),
    "pickled": (
        lambda a: pickled(a, "adapter_model"),
        ("the weights are pickles (adapter_model.bin)", "AutoPeftModel"),
    ),
    "cut": (
        lambda a: (a / "adapter_model.safetensors").write_bytes(b"x" * 99),
        ("does not fit", "SafetensorError"),
    ),
    "fewer-layers": (lambda a: without_layer(a, "adapter_model"), ("does not fit", "missing adapter keys")),
    "other-rank": (lambda a: edited(a / "adapter_config.json", r=3), ("does not fit", "size mismatch")),
}


@pytest.mark.parametrize("what", BAD_ADAPTERS)
def test_bad_adapters(run: Run, adapter: Path, what: str) -> None:
    change, parts = BAD_ADAPTERS[what]
    change(adapter)
    refused(train(run, "model.path=adapter"), "model.path 'adapter': ", *parts)


def test_run_folders(run: Run, place: Path) -> None:
    held = place / "held"
    held.mkdir()
    (held / "recipe.yaml").write_text("seed: 3\n")
    (held / "metrics.jsonl").write_text("{}\n")
    before = contents(place)
    refused(train(run, out="held"), "held already contains a run", "--resume", "another --out")
    refused(run("train", "recipe.yaml", "--out", "held", "--resume"), "held/recipe.yaml", "another recipe")
    refused(
        run("train", "recipe.yaml", "--out", "gone", "--resume"),
        "gone: no run to continue; leave out --resume",
    )
    refused(
        train(run, out="recipe.yaml"),
        "recipe.yaml: the file cannot be written (File exists)",
        "another --out",
    )
    refused(run("report", "data"), "data: no run here")
    refused(run("init-model", "data"), "data is not empty", "choose another folder")
    assert contents(place) == before


# --- disks ----------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(place: Path) -> Iterator[Path]:
    """A folder that nobody may write to; root needs a mount for that."""
    folder = place / "fixed"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    with mounted(folder, "ro"):
        yield folder


class mounted:  # noqa: N801
    """A small file system in memory, for as long as the block."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder, self.options = folder, options

    def __enter__(self) -> mounted:
        self.mount(self.options)
        return self

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip("may not mount here")

    def __exit__(self, *_: object) -> None:
        gc.collect()  # encoded rows stay mapped as long as an object of the run lives
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def test_a_read_only_folder(run: Run, place: Path, read_only: Path) -> None:
    for out in (read_only, read_only / "out"):
        refused(
            train(run, out=str(out)),
            f"{read_only}",
            "the file cannot be written",
            "choose a folder that you may write to",
        )
    refused(run("validate", "data", "--fix", read_only / "good.jsonl"), "cannot be written", "may write to")
    assert list(read_only.iterdir()) == []
    refused(
        run("init-model", read_only / "model", "--width", 16, "--layers", 1), "the file cannot be written"
    )


def test_a_full_disk_while_fixing(run: Run, place: Path) -> None:
    full = place / "full"
    full.mkdir()
    put(place, *({**GOOD, "chosen": f"a cat {i} " * 50} for i in range(200)))
    with mounted(full, "size=16k"):
        refused(
            run("validate", "data", "--fix", full / "good.jsonl"),
            "No space left on device",
            "free some space",
        )
        assert list(full.iterdir()) == []


SMALL = (
    "stage1={objective: sft, learning_rate: 1e-4, steps: 2}",
    "stage2={objective: dpo, learning_rate: 1e-4, steps: 2}",
    "train={batch_size: 2, save_steps: 1, warmup_steps: 0}",
    "data={path: data/train.jsonl, validation_path: data/held.jsonl, stage1_fraction: 0.5}",
    "evaluation={prompts: 2, samples: 0, max_new_tokens: 4}",
    "probes={prompts: 2}",
)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 700, 1500, 2400, 3200])
def test_a_full_disk_while_training(run: Run, place: Path, model: Path, kilobytes: int) -> None:
    full = place / "full"
    full.mkdir()
    rows = []
    for i in range(8):
        Image.effect_noise((24, 24), 50 + i).save(place / "data" / f"{i}.png")
        rows.append({**GOOD, "image": f"{i}.png"})
    put(place, *rows)
    put(place, GOOD, name="held.jsonl")
    with mounted(full, f"size={kilobytes}k") as disk:
        refused(train(run, *SMALL, out="full/out"), "No space left on device", "free some space", "--resume")
        disk.mount("remount,size=64m")
        done = run("train", "recipe.yaml", *SMALL, "--out", "full/out", "--resume")
        assert done.code == 0, done.err
        steps = [json.loads(line) for line in (full / "out" / "metrics.jsonl").read_text().splitlines()]
        assert {(row["stage"], row["step"]) for row in steps} >= {("stage1", 2), ("stage2", 2)}
        assert (full / "out" / "report.html").is_file()


# --- the report in a browser ----------------------------------------------------------------------------

ATTACK = (
    "</style></td><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    "' onmouseover='x' \" autofocus onfocus=\"document.title='owned'\" <svg/onload=alert(1)> {{ 7*7 }} "
    "<!-- \u202egnp.\u202c \x00\x07\x1b[31m &lt;b&gt; <base href=//example.org> <meta http-equiv=refresh content=0>"
)


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False], ids=["as-written", "without-the-policy"])
def test_a_malicious_caption_is_harmless_in_a_browser(tmp_path: Path, guarded: bool) -> None:
    """Escaping alone must suffice: it is tried without the Content-Security-Policy too."""
    from cwdpo.report.render import write_report

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    sample = {"id": ATTACK, "image": ATTACK, "prompt": ATTACK, "chosen": ATTACK}
    responses = [{"temperature": 0.0, "text": ATTACK, "ended": True}]
    (tmp_path / "samples.jsonl").write_text(json.dumps({**sample, "responses": responses}) + "\n")
    (tmp_path / "problems.jsonl").write_text(json.dumps({"stage": "read", "problem": ATTACK}) + "\n")
    (tmp_path / "recipe.yaml").write_text(f"# {ATTACK}\n")
    (tmp_path / "environment.json").write_text(json.dumps({"command": ATTACK, "packages": {"x": ATTACK}}))
    page = write_report(tmp_path)
    html = page.read_text(encoding="utf-8")
    if not guarded:
        policy = re.search(r"<meta[^>]*Content-Security-Policy[^>]*>", html)
        assert policy
        page.write_text(html.replace(policy[0], ""), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    dom = Dom(done.stdout.decode("utf-8", "replace"))
    assert dom.title
    assert "owned" not in dom.title
    assert not dom.tags & {"script", "base", "iframe", "object", "embed", "form"}
    assert not {name for name in dom.attributes if name.startswith("on")}
    assert not [url for url in dom.attributes.get("src", ()) if not url.startswith("data:")]
    for part in (
        "<script>document.title = 'owned'</script>",
        "</style>",
        "{{ 7*7 }}",
        "&lt;b&gt;",
        "⟨U+202E⟩gnp.",
    ):
        assert part in dom.text, part
    assert not {"\u202e", "\x07", "\x1b"} & set(dom.text)


class Dom(HTMLParser):
    """Tags, attributes and text of a page as the browser understood it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, list[str]] = {}
        self.text = self.title = self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data
        self.title += data if self._inside == "title" else ""
