"""Every export is what was trained: adapters of each kind merged into tied, resized, rounded and vision weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cwdpo.config import stored_model
from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import FileError, ModelError, RunDirError
from cwdpo.files.checksums import write_checksums
from cwdpo.models.load import Policy, adopt, load_policy
from cwdpo.models.merge import rounding
from cwdpo.models.settings import LoraSettings, ModelSettings
from cwdpo.models.write import save_weights
from cwdpo.pipeline import export as module
from cwdpo.pipeline.export import MOST, export
from cwdpo.rundir import RunDir
from cwdpo.scoring import plain
from cwdpo.stage.model import save_model
from paths import ROOT
from random_models import spread

ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "language model": {"target_modules": r".*language_model.*(q_proj|down_proj)"},
    "tied embeddings": {"target_modules": ["embed_tokens"]},
    "tied head": {"target_modules": ["lm_head"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "both ends, kept tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "vision tower": {"target_modules": r".*vision_tower.*(q_proj|fc1|patch_embedding)"},
    "projector": {"target_modules": ["linear_1", "linear_2"]},
    "embeddings saved": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "projector saved": {"target_modules": ATTENTION, "modules_to_save": ["multi_modal_projector"]},
    "resized": {"target_modules": ATTENTION},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
}
LOST = ("both ends, kept tied", "bfloat16")  # refused: peft loses it
TWO_MATRICES = ("tied embeddings", "tied head", "both ends", "embeddings saved", "head saved")


@pytest.fixture(scope="session")
def tied(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small LLaVA with one matrix for input embeddings and head, in both dtypes."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folders = {}
    for name in ("float32", "bfloat16"):
        folder = folders[name] = tmp_path_factory.mktemp("tied") / name
        model = spread(AutoModelForImageTextToText.from_pretrained(model_folder), seed=5)
        for config in (model.config, model.config.text_config):
            config.tie_word_embeddings = True
        model.tie_weights()
        save_weights(model.to(getattr(torch, name)), folder)
        AutoProcessor.from_pretrained(model_folder).save_pretrained(folder)
    return folders


def test_whoever_may_read_the_config_may_read_the_weights(tied: dict[str, Path]) -> None:
    """safetensors gives its files to their owner alone; a server often is another user."""
    modes = {file.name: file.stat().st_mode for file in tied["float32"].iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def trained(base: Path, kind: str, world: Path, run: Path) -> tuple[Policy, Any]:
    """A run folder whose adapter was moved at random, and the policy that it was saved from."""
    from peft import LoraConfig

    settings = ModelSettings(path=str(base), tune="lora", device="cpu", scoring="plain")
    if kind == "resized":
        full = load_policy(settings.model_copy(update={"tune": "full", "dtype": "auto"}))
        full.model.resize_token_embeddings(full.model.get_input_embeddings().weight.shape[0] + 7)
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **KINDS[kind])
        policy = adopt(full, settings, peft_config=config)
    else:
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **KINDS[kind])
        policy = load_policy(settings, peft_config=config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    run.mkdir()
    (run / "recipe.yaml").write_text(
        f"model: {{path: {base}, tune: lora, device: cpu}}\ndata: {{path: {world / 'train.jsonl'}}}\n"
    )
    save_model(policy, run / "model", RunDir(run))
    return policy, policy.model.float()


def said(policy: Policy, world: Path) -> torch.Tensor:
    encoder = Encoder(policy.processor)
    rows, _ = encoder.encode_all(
        read_examples(world / "train.jsonl", limit=4).examples, "rejected", require_negative=False
    )
    with torch.no_grad():
        scores = plain.score(policy.model.eval(), collate(rows))
    return scores.logp[scores.mask].float()


CASES = [(kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16") if (kind, dtype) != LOST]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_merged_adapter_is_the_policy_that_was_trained(
    kind: str, dtype: str, tied: dict[str, Path], world_folder: Path, tmp_path: Path
) -> None:
    policy, _ = trained(tied[dtype], kind, world_folder, tmp_path / "run")
    wanted = said(policy, world_folder)
    done = export(tmp_path / "run", tmp_path / "out", merge=True)
    assert done.largest <= MOST
    again = load_policy(ModelSettings(path=str(done.path), device="cpu", scoring="plain"))
    gap = (said(again, world_folder) - wanted).abs()
    assert float(gap.max()) < 1e-4
    with policy.model.disable_adapter():
        moved = (said(policy, world_folder) - wanted).abs()
    assert float(moved.mean()) > 1e-3, "the adapter changes nothing, so nothing was compared"
    one_matrix = again.model.get_input_embeddings().weight is again.model.lm_head.weight
    assert one_matrix == (kind not in TWO_MATRICES)


def test_a_tie_that_peft_would_lose_is_refused(tied: dict[str, Path]) -> None:
    from peft import LoraConfig

    config = LoraConfig(**KINDS[LOST[0]], task_type="CAUSAL_LM")
    settings = ModelSettings(path=str(tied["bfloat16"]), tune="lora", device="cpu")
    with pytest.raises(ModelError, match=r"ensure_weight_tying.*no longer tied.*load the model in float32"):
        load_policy(settings, peft_config=config)


def test_rounding_is_counted_by_hand() -> None:
    before = torch.tensor([1.0, 1.0, 1.0, 0.0])
    after = torch.tensor([1.0, 1.001, 1.01, 1e-3])  # bf16 holds 1 + 1/128 next to 1
    found = rounding(before, after, torch.bfloat16)
    assert (found.moved, found.undone) == (3, 1)
    assert found.share == pytest.approx(1 / 3)


def test_rounding_is_the_callers_wish_and_its_cost_is_said(
    tied: dict[str, Path], world_folder: Path, tmp_path: Path, run: Any
) -> None:
    policy, _ = trained(tied["bfloat16"], "language model", world_folder, tmp_path / "run")
    with torch.no_grad():  # as small as a short training leaves it
        for parameter in policy.trainable().values():
            parameter.mul_(0.05)
    save_model(policy, tmp_path / "run" / "model", RunDir(tmp_path / "run"))
    exact = export(tmp_path / "run", tmp_path / "exact", merge=True)
    assert (exact.dtype, exact.rounded, exact.rounding) == ("float32", False, None)
    done = run("export", tmp_path / "run", "--merge", "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (done.out, card):
        assert "nats per token" in text
        assert "the cost of rounding to bfloat16" in text
    # The share against the two folders' own weights.
    from safetensors.torch import load_file

    base, full, half = (
        load_file(folder / "model.safetensors")
        for folder in (tied["bfloat16"], tmp_path / "exact", tmp_path / "out")
    )
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    moved = {name: full[name] != base[name].float() for name in full}
    undone = sum(int((moved[name] & (half[name] == base[name])).sum()) for name in full)
    share = undone / sum(int(m.sum()) for m in moved.values())
    assert 0.05 < share < 1
    assert f"Rounding set {share:.1%} of the" in done.out


def test_a_full_fine_tuning_is_compared_and_may_be_rounded(
    tied: dict[str, Path], world_folder: Path, tmp_path: Path
) -> None:
    settings = ModelSettings(path=str(tied["bfloat16"]), device="cpu")
    policy = load_policy(settings)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.001)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(
        f"model: {{path: {tied['bfloat16']}, device: cpu}}\ndata: {{path: {world_folder / 'train.jsonl'}}}\n"
    )
    save_model(policy, run / "model", RunDir(run))
    exact = export(run, tmp_path / "exact", merge=False)
    assert (exact.form, exact.dtype, exact.rounded) == ("full", "float32", False)
    assert exact.largest <= 1e-6
    rounded = export(run, tmp_path / "rounded", merge=True, dtype="bfloat16")
    assert rounded.rounding is not None
    assert rounded.rounding.share > 0.5  # a thousandth is below bf16's step
    assert rounded.mean > 1e-4
    assert "--dtype float32 keeps them" in "\n".join(rounded.lines())


def checkpointed(tune: str, base: Path, world: Path, run: Path) -> Policy:
    """A trained policy, and a run folder whose recipe says how its checkpoints are read."""
    policy, _ = trained(base, "language model", world, run)
    recipe, modules = run / "recipe.yaml", KINDS["language model"]["target_modules"]
    settings = {"full": "full", "lora": f"lora, lora: {{r: 4, alpha: 8, target_modules: '{modules}'}}"}[tune]
    recipe.write_text(recipe.read_text().replace("tune: lora", f"tune: {settings}"))
    return policy if tune == "lora" else load_policy(stored_model(recipe))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_checkpoint_is_exported_as_a_final_model_is(
    tune: str, tied: dict[str, Path], world_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    policy = checkpointed(tune, tied["float32"], world_folder, run)
    if tune == "full":
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.01)
    shutil.rmtree(run / "model")
    place = run / "stage2" / "checkpoint-7"
    place.mkdir(parents=True)
    policy.model.save_pretrained(place)  # as the Trainer does
    write_checksums(place)
    with pytest.raises(
        RunDirError, match=r"no final model yet: .*give one of its checkpoints \(.*checkpoint-7\)"
    ):
        export(run, tmp_path / "none", merge=False)
    with pytest.raises(RunDirError, match=r"checkpoint-8: no such checkpoint; there are .*checkpoint-7$"):
        export(place.with_name("checkpoint-8"), tmp_path / "none", merge=False)
    found = export(place, tmp_path / "out", merge=False)
    assert (found.checkpoints, found.form) == (("stage2/checkpoint-7",), {"lora": "adapter"}.get(tune, tune))
    assert found.lines()[0] == "These are the weights of stage2/checkpoint-7, not of the final model."
    (name,) = (path.name for path in (tmp_path / "out").glob("*.safetensors"))
    written, wanted = load_file(tmp_path / "out" / name), load_file(place / name)
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    assert not list(tmp_path.glob(".out*"))
    (place / name).write_bytes(b"damaged")
    with pytest.raises(FileError, match="export another one"):
        export(place, tmp_path / "more", merge=False)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_last_checkpoints_are_averaged(
    tune: str, tied: dict[str, Path], world_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    policy = checkpointed(tune, tied["float32"], world_folder, run)
    steps = (2, 4, 10, 12)
    for step in steps:
        place = run / "stage2" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.001 * step)
        policy.model.save_pretrained(place)
        write_checksums(place)
    found = export(run, tmp_path / "out", merge=False, average=3)
    assert found.checkpoints == tuple(f"stage2/checkpoint-{step}" for step in (4, 10, 12))
    assert found.lines()[0].startswith(
        "These weights are the mean of stage2/checkpoint-4, stage2/checkpoint-10,"
    )
    (name,) = (path.name for path in (tmp_path / "out").glob("*.safetensors"))
    written = load_file(tmp_path / "out" / name)
    each = [load_file(run / "stage2" / f"checkpoint-{step}" / name) for step in (4, 10, 12)]
    for key, value in written.items():
        torch.testing.assert_close(value, sum(one[key] for one in each) / 3, rtol=1e-6, atol=1e-7)
    (run / "stopped-stage2.json").write_text('{"rolled_back_to": 10}')
    again = export(run, tmp_path / "again", merge=False, average=2)
    assert again.checkpoints == ("stage2/checkpoint-4", "stage2/checkpoint-10"), (
        "the stage went back from step 12"
    )
    with pytest.raises(RunDirError, match="has 3 checkpoints to average, 4 were asked for; allowed: 1 to 3"):
        export(run, tmp_path / "none", merge=False, average=4)
    with pytest.raises(RunDirError, match="name the run, not one of them"):
        export(run / "stage2" / "checkpoint-4", tmp_path / "none", merge=False, average=2)
    shutil.rmtree(run / "stage2")
    with pytest.raises(RunDirError, match=r"no checkpoints to average: set train\.save_steps"):
        export(run, tmp_path / "none", merge=False, average=2)


def test_an_export_that_says_something_else_is_not_written(
    tied: dict[str, Path], world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tied["float32"], "tied embeddings", world_folder, tmp_path / "run")
    # What peft does by itself: one matrix for two.
    monkeypatch.setattr(module, "merge", lambda wrapped: wrapped.merge_and_unload())
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(
            ModelError, match=r"would be a different model: merging the adapter changes .* nats a token"
        ),
    ):
        export(tmp_path / "run", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_damaged_folder_is_noticed_when_it_is_read_again(
    tied: dict[str, Path], world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tied["float32"], "language model", world_folder, tmp_path / "run")

    def damaged(model: Any, folder: Path) -> None:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "q_proj" in n).mul_(1.2)
        save_weights(model, folder)

    monkeypatch.setattr(module, "save_weights", damaged)
    with pytest.raises(ModelError, match="loading what was written changes log-probabilities"):
        export(tmp_path / "run", tmp_path / "out", merge=True)


def test_rows_that_are_gone_are_named_with_the_way_out(
    tied: dict[str, Path], world_folder: Path, tmp_path: Path, run: Any
) -> None:
    trained(tied["float32"], "language model", world_folder, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(world_folder), "/gone"))
    with pytest.raises(RunDirError, match=r"gone/train\.jsonl: there are no rows .* with --data"):
        export(tmp_path / "run", tmp_path / "out", merge=False)
    done = run(
        "export", tmp_path / "run", "--out", tmp_path / "out", "--data", world_folder / "validation.jsonl"
    )
    assert done.code == 0, done.err
    assert "compared with the trained policy on 8 rows" in done.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model" not in card.split("---")[1], "a place on this machine is no id of the hub"
    assert str(tmp_path) not in card
    assert str(world_folder) not in card
    assert str(tied["float32"]) not in card
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert "no run here" in run("export", tmp_path, "--out", tmp_path / "other").err
    refused = run("export", tmp_path / "run", "--out", tmp_path / "o", "--dtype", "bfloat16")
    assert "add --merge" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("stored", [False, True], ids=["quantized at loading", "stored quantized"])
def test_a_quantized_base_is_dequantized_before_the_merge(
    model_folder: Path, world_folder: Path, tmp_path: Path, kind: str, stored: bool
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    base, asked = tmp_path / "base", kind
    plain_base = spread(AutoModelForImageTextToText.from_pretrained(model_folder), seed=5)
    save_weights(plain_base, base)
    AutoProcessor.from_pretrained(model_folder).save_pretrained(base)
    if stored:
        how = BitsAndBytesConfig(
            load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4"
        )
        quantized = AutoModelForImageTextToText.from_pretrained(
            base, quantization_config=how, device_map={"": "cpu"}
        )
        base, asked = tmp_path / "quantized", "null"
        quantized.save_pretrained(base)
        AutoProcessor.from_pretrained(model_folder).save_pretrained(base)
    run = tmp_path / "run"
    run.mkdir()
    recipe = (
        f"model: {{path: {base}, tune: lora, device: cpu, quantization: {asked}, scoring: plain, lora: {{r: 4}}}}\n"
        f"data: {{path: {world_folder / 'train.jsonl'}}}\n"
    )
    (run / "recipe.yaml").write_text(recipe)
    policy = load_policy(stored_model(run / "recipe.yaml"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_model(policy, run / "model", RunDir(run))

    merged = export(run, tmp_path / "merged", merge=True)
    assert (merged.quantized, merged.dtype, merged.rounding) == (kind, "float32", None)
    assert merged.largest < 1e-4
    assert "dequantized weights" in " ".join(merged.lines())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    found = Policy(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), policy.processor, "")
    torch.testing.assert_close(said(found, world_folder), said(policy, world_folder), atol=1e-4, rtol=0)

    rounded = export(run, tmp_path / "rounded", merge=True, dtype="bfloat16")
    assert rounded.rounding is not None
    assert rounded.rounding.moved > 0
    assert rounded.mean > merged.mean

    adapter = export(run, tmp_path / "adapter", merge=False)
    assert adapter.largest < 1e-4
    assert f"a base that is quantized ({kind})" in " ".join(adapter.lines())
    if stored:
        assert adapter.on_whole_base is None
    else:
        # The adapter on the base as it is, which other tools would load.
        whole = load_policy(
            stored_model(run / "recipe.yaml").model_copy(
                update={"quantization": None, "path": str(run / "model"), "lora": LoraSettings()}
            )
        )
        gap = (said(whole, world_folder) - said(policy, world_folder)).abs()
        assert adapter.on_whole_base is not None
        assert adapter.on_whole_base[0] >= float(gap.max()) - 1e-4  # over more rows
        assert adapter.on_whole_base[0] > 1e-3
        assert "On the base without quantization" in " ".join(adapter.lines())


CLEAN = """
import json, sys, torch
from transformers import AutoModelForImageTextToText
folder, out = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not any(m.split(".")[0] in ("cwdpo", "peft") for m in sys.modules)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
with torch.no_grad():
    logits = model.eval()(input_ids=torch.arange(20)[None]).logits[0, -1]
json.dump(logits.tolist(), open(out, "w"))
"""


@pytest.mark.slow
def test_a_merged_export_loads_in_a_clean_process(
    tied: dict[str, Path], world_folder: Path, tmp_path: Path
) -> None:
    policy, _ = trained(tied["bfloat16"], "both ends", world_folder, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", merge=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CLEAN, str(tmp_path / "out"), str(tmp_path / "said.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        ours = policy.model.eval()(input_ids=torch.arange(20)[None]).logits[0, -1]
    theirs = torch.tensor(json.loads((tmp_path / "said.json").read_text()))
    assert float((theirs - ours).abs().max()) < 1e-4


def test_the_page_has_a_line_for_each_case() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    table = page.split("<!-- merged -->")[1].split("<!-- end -->")[0].splitlines()
    cases = [line.split(" | ")[0].removeprefix("| ") for line in table if line.startswith("| ")][1:]
    assert cases == list(KINDS)


def test_a_format_of_ones_own_is_not_loaded_from_a_stored_recipe(
    tied: dict[str, Path], world_folder: Path, tmp_path: Path
) -> None:
    trained(tied["float32"], "language model", world_folder, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("data: {", "data: {format: 'mine.py:Mine', "))
    with pytest.raises(RunDirError, match=r"format of your own \(mine\.py:Mine\).* with --data"):
        export(tmp_path / "run", tmp_path / "out", merge=False)
    done = export(
        tmp_path / "run", tmp_path / "out", merge=False, data=str(world_folder / "validation.jsonl")
    )
    assert done.largest == 0
