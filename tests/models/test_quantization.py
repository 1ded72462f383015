"""Bases in 4 and 8 bits: what the layers compute, how a run scores and trains with them, and what is refused."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cwdpo.config import parse_recipe
from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import ModelError, RecipeError
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.packages import check_packages
from cwdpo.models.quantization import is_rounded, quantized_layers
from cwdpo.models.quantized_linear import Int8Linear, Nf4Linear, dense_weight
from cwdpo.models.settings import LoraSettings, ModelSettings
from cwdpo.models.tiny import TinyModelSettings, init_model
from cwdpo.models.write import save_weights
from cwdpo.scoring import plain
from cwdpo.scoring.reference_cache import reference_digest, weights_digest
from cwdpo.scoring.score import score
from cwdpo.worlds.shapes import VOCABULARY

CLASSES: dict[str, Any] = {"nf4": Nf4Linear, "int8": Int8Linear}
KINDS = tuple(CLASSES)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4: QLoRA (Dettmers et al. 2023), appendix E."""


def settings(folder: Path | str, kind: str | None, **changes: Any) -> ModelSettings:
    asked = {
        "path": str(folder),
        "device": "cpu",
        "tune": "lora",
        "lora": {"r": 4, "alpha": 8},
        "quantization": kind,
    }
    return ModelSettings.model_validate({**asked, **changes})


def moved(policy: Policy, scale: float = 0.2) -> Policy:
    """The policy with adapters that do something."""
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            generator = torch.Generator().manual_seed(len(name))
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return policy


def spread_copy(source: Path, folder: Path) -> Path:
    """A model with weights far from zero: what quantization does to them shows."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from random_models import spread

    save_weights(spread(AutoModelForImageTextToText.from_pretrained(source), seed=3), folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small LLaVA; its layers are 32 wide, so blocks of 4-bit weights reach into the next row."""
    return spread_copy(model_folder, tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose layers are 64 or 192 wide, a multiple of a block."""
    shape = TinyModelSettings(vision_width=64, vision_layers=1, width=64, layers=2, heads=2, vocabulary=400)
    folder = tmp_path_factory.mktemp("even")
    init_model(folder / "first", [" ".join(VOCABULARY)] * 3, shape)
    return spread_copy(folder / "first", folder / "model")


@pytest.fixture
def batch(processor: Any, examples: Any) -> Any:
    return collate(Encoder(processor).encode_all(examples[:3], "rejected", require_negative=True)[0])


def gradients(policy: Policy, logp: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(logp.sum(), list(policy.trainable().values())))


# --- what is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_method_by_hand(small: Path, kind: str) -> None:
    base = dict(load_policy(ModelSettings(path=str(small), device="cpu")).model.named_modules())
    asked = settings(
        small, kind, quantization_options={"double_quantization": False} if kind == "nf4" else {}
    )
    layers = list(quantized_layers(load_policy(asked).model))
    assert len(layers) == 22
    for name, layer in layers:
        assert type(layer) is CLASSES[kind]
        weight = base[name.removeprefix("base_model.model.").removesuffix(".base_layer")].weight.detach()
        if kind == "nf4":
            blocks = weight.reshape(-1, 64)
            largest = blocks.abs().amax(1, keepdim=True)
            codes = torch.tensor(NF4)
            nearest = codes[(blocks / largest)[..., None].sub(codes).abs().argmin(-1)]
            expected = (nearest * largest).reshape(weight.shape)
        else:
            half = weight.half().float()
            largest = half.abs().amax(1, keepdim=True)
            expected = (half / largest * 127).round() * largest / 127
        close = torch.isclose(dense_weight(layer, torch.float32), expected, atol=1e-6, rtol=1e-5)
        assert float(close.float().mean()) > 0.995  # a weight in the middle of two values may fall to either


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_scores_and_gradients(small: Path, even: Path, batch: Any, kind: str, lora: dict[str, Any]) -> None:
    asked = settings(even if lora else small, kind, lora={"r": 4, "alpha": 8, **lora})
    policy = moved(load_policy(asked))
    policy.model.train()
    shared, slow = score(policy.model, batch).logp, plain.score(policy.model, batch).logp
    torch.testing.assert_close(shared, slow, atol=1e-5, rtol=0)
    of_shared = gradients(policy, shared)
    for one, other in zip(of_shared, gradients(policy, slow), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()) + 1e-6, rtol=0)

    # Ordinary linear layers of the same values.
    twin = load_policy(asked, dequantize=True)
    assert not list(quantized_layers(twin.model))
    twin.model.load_state_dict(policy.trainable(), strict=False)
    dense = score(twin.model, batch).logp
    torch.testing.assert_close(shared, dense, atol=1e-5, rtol=0)
    for one, other in zip(of_shared, gradients(twin, dense), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()) + 1e-6, rtol=0)

    # The reference is scored in evaluation mode, the policy in training mode, with or without checkpointing.
    policy.model.eval()
    with torch.no_grad():
        assert torch.equal(score(policy.model, batch).logp, shared)
    policy.model.train()
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    again = score(policy.model, batch).logp
    assert torch.equal(again, shared)
    assert all(map(torch.equal, gradients(policy, again), of_shared))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_both_modes_compute_the_same(small: Path, batch: Any, kind: str) -> None:
    policy = moved(load_policy(settings(small, kind)))
    with torch.autocast("cpu", torch.bfloat16):
        training = score(policy.model.train(), batch).logp
        with torch.no_grad():
            reference = score(policy.model.eval(), batch).logp
    assert training.requires_grad
    assert torch.equal(training, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_quantized_base_and_the_base_is_not_far(
    small: Path, batch: Any, kind: str
) -> None:
    with torch.no_grad():
        full = score(load_policy(ModelSettings(path=str(small), device="cpu")).model, batch)
        quantized = score(load_policy(settings(small, kind)).model, batch)
    gap = float((quantized.logp - full.logp).abs().sum() / full.mask.sum())
    assert gap < {"nf4": 0.5, "int8": 0.05}[kind]
    assert gap > 1e-4  # it is not the base


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_no_activations_for_the_backward_pass(small: Path, kind: str) -> None:
    layer = next(m for _, m in quantized_layers(load_policy(settings(small, kind)).model))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert not kept
    inner = x * 2
    watched = weakref.ref(inner)
    made = layer(inner)
    del inner
    assert watched() is None
    made.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "compute"), [("bfloat16", "auto"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_the_dtype_that_is_computed_in(small: Path, kind: str, dtype: str, compute: str) -> None:
    asked = settings(small, kind, dtype=dtype, quantization_options={"compute_dtype": compute})
    policy = load_policy(asked)
    wanted = getattr(torch, dtype if compute == "auto" else compute)
    assert {layer.compute_dtype for _, layer in quantized_layers(policy.model)} == {wanted}
    assert is_rounded(policy.model)
    layer = next(m for _, m in quantized_layers(policy.model))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, dtype)
    )
    expected = nn.functional.linear(x.to(wanted), dense_weight(layer, torch.float32).to(wanted)).to(x.dtype)
    if layer.bias is not None:
        expected = expected + layer.bias.to(x.dtype)
    torch.testing.assert_close(layer(x), expected)


# --- which layers ---------------------------------------------------------------------------------------


def names_of(policy: Policy) -> set[str]:
    return {name.removesuffix(".base_layer") for name, _ in quantized_layers(policy.model)}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_can_be_left_out(small: Path, kind: str) -> None:
    every = names_of(load_policy(settings(small, kind)))
    assert not any("lm_head" in name for name in every)
    less = names_of(
        load_policy(settings(small, kind, quantization_options={"skip": ["vision", "down_proj"]}))
    )
    assert less == {n for n in every if "vision_tower" not in n and "down_proj" not in n}
    assert 0 < len(less) < len(every)
    with pytest.raises(
        ModelError, match=r"quantization_options\.skip: 'nowhere' matches no linear layer; the model"
    ):
        load_policy(settings(small, kind, quantization_options={"skip": ["nowhere"]}))


def test_a_saved_module_must_not_be_quantized(small: Path) -> None:
    lora = {"r": 4, "alpha": 8, "modules_to_save": ["multi_modal_projector"]}
    with pytest.raises(
        ModelError, match=r"multi_modal_projector holds quantized weights .*quantization_options\.skip"
    ):
        load_policy(settings(small, "nf4", lora=lora))
    policy = load_policy(settings(small, "nf4", lora=lora, quantization_options={"skip": ["projector"]}))
    assert any("modules_to_save" in name for name in policy.trainable())


def test_dora_is_refused_where_peft_would_read_wrong_weights(small: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model\.lora\.use_dora: on a CPU, bitsandbytes gives wrong 4-bit weights"
    ):
        load_policy(settings(small, "nf4", lora={"use_dora": True}))


# --- checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def stored(small: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint that lies quantized, as transformers writes them for the hub."""

    def made(kind: str) -> Path:
        from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

        how = (
            {"load_in_8bit": True}
            if kind == "int8"
            else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
        )
        folder = tmp_path / kind
        AutoModelForImageTextToText.from_pretrained(
            small, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}
        ).save_pretrained(folder)
        AutoProcessor.from_pretrained(small).save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_lies_quantized(
    stored: Callable[[str], Path], batch: Any, tmp_path: Path, kind: str
) -> None:
    folder = stored(kind)
    asked = settings(folder, None, quantization_options={"compute_dtype": "float32"})
    check_packages(asked)
    policy = moved(load_policy(asked))
    assert {type(m) for _, m in quantized_layers(policy.model)} == {CLASSES[kind]}
    with torch.no_grad():
        shared, slow = score(policy.model, batch).logp, plain.score(policy.model, batch).logp
        dense = load_policy(asked, dequantize=True)
        dense.model.load_state_dict(policy.trainable(), strict=False)
        torch.testing.assert_close(shared, slow, atol=1e-5, rtol=0)
        torch.testing.assert_close(score(dense.model, batch).logp, shared, atol=1e-5, rtol=0)
    if kind == "nf4":
        own = load_policy(settings(folder, None))
        assert {layer.compute_dtype for _, layer in quantized_layers(own.model)} == {torch.bfloat16}

    # Its adapter: trained further, and loaded for evaluation, where it must not be merged into few values.
    policy.model.save_pretrained(tmp_path / "adapter")
    policy.processor.save_pretrained(tmp_path / "adapter")
    for tune in ("lora", "full"):
        again = load_policy(
            asked.model_copy(update={"path": str(tmp_path / "adapter"), "tune": tune, "lora": LoraSettings()})
        )
        with torch.no_grad():
            torch.testing.assert_close(score(again.model, batch).logp, shared, atol=1e-6, rtol=0)


def test_a_checkpoint_that_lies_quantized_refuses_what_it_cannot_do(stored: Callable[[str], Path]) -> None:
    folder = stored("nf4")
    with pytest.raises(
        ModelError, match=r"model\.quantization: int8: the weights of .* are quantized already"
    ):
        check_packages(settings(folder, "int8"))
    with pytest.raises(ModelError, match=r"quantized already \(bitsandbytes\): leave it out"):
        load_policy(settings(folder, "nf4"))
    with pytest.raises(
        ModelError, match=r"model\.tune: full: the weights of .* cannot be trained: set model\.tune"
    ):
        check_packages(settings(folder, None, tune="full"))


# --- the digest -----------------------------------------------------------------------------------------


def test_the_digest_holds_what_is_computed(small: Path, batch: Any) -> None:
    asked = [
        settings(small, None),
        settings(small, "nf4"),
        settings(small, "nf4", quantization_options={"double_quantization": False}),
        settings(small, "nf4", quantization_options={"compute_dtype": "bfloat16"}),
        settings(small, "nf4", quantization_options={"skip": ["vision"]}),
        settings(small, "int8"),
        settings(small, "int8", quantization_options={"compute_dtype": "bfloat16"}),
    ]
    policies = [load_policy(one) for one in asked]
    digests = [reference_digest(policy.model) for policy in policies]
    assert len(set(digests)) == len(asked)
    assert [reference_digest(load_policy(one).model) for one in asked] == digests
    for policy in policies:  # scoring changes nothing
        policy.model.eval()
        with torch.no_grad():
            score(policy.model, batch)
    assert [reference_digest(policy.model) for policy in policies] == digests


@pytest.mark.parametrize("kind", KINDS)
def test_another_scale_is_another_model(small: Path, kind: str) -> None:
    policy = load_policy(settings(small, kind))
    before = reference_digest(policy.model), weights_digest(policy.model)
    layer = list(quantized_layers(policy.model))[3][1]
    scale = layer.state.SCB if kind == "int8" else layer.weight.quant_state.state2.absmax
    scale[0] *= 2
    after = reference_digest(policy.model), weights_digest(policy.model)
    assert before[0] != after[0]
    assert before[1] != after[1]


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"quantization": "nf4"}, "quantization: nf4: quantized weights cannot be trained: set tune to lora"),
        ({"quantization": "nf5", "tune": "lora"}, "'nf4' or 'int8'"),
        (
            {"quantization": "int8", "tune": "lora", "quantization_options": {"double_quantization": True}},
            "double_quantization is for quantization: nf4",
        ),
        (
            {"tune": "lora", "quantization_options": {"skip": ["vision"]}},
            "skip is for quantization: nf4 or int8",
        ),
        ({"tune": "lora", "quantization_options": {"skipp": []}}, "did you mean 'skip'"),
    ],
)
def test_a_recipe_that_contradicts_itself(model: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe({"model": model, "data": {"path": "x.jsonl"}})
    assert message in str(error.value)


def test_a_quantized_recipe_survives_its_own_yaml() -> None:
    from cwdpo.files.yamlfile import parse_yaml

    model = {"quantization": "int8", "tune": "lora", "quantization_options": {"skip": ["vision"]}}
    recipe = parse_recipe({"model": model, "data": {"path": "x.jsonl"}})
    assert parse_recipe(parse_yaml(recipe.to_yaml(), "")) == recipe


@pytest.mark.parametrize("quantized", ["by the recipe", "on disk"])
def test_without_bitsandbytes_the_install_line_comes_before_the_data(
    quantized: str, stored: Callable[[str], Path], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (
        "{tune: lora, quantization: nf4}"
        if quantized == "by the recipe"
        else f"{{tune: lora, path: {stored('nf4')}}}"
    )
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else there(n, *a)
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {model}\ndata: {{path: {tmp_path / 'absent.jsonl'}}}\n")
    for command in (["train", recipe, "--out", tmp_path / "run"], ["validate", recipe]):
        done = run(*command)
        assert done.code == 1, done
        assert "pip install 'cwdpo[quant]'" in done.err
        assert "absent.jsonl" not in done.err
    assert not (tmp_path / "run").exists()
