"""A package that a checkpoint needs is named with the line that installs it, before data are looked at."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cwdpo.errors import ModelError
from cwdpo.models.load import load_processor
from cwdpo.models.packages import check_packages, install_line, missing_package
from cwdpo.models.settings import ModelSettings

# What transformers 5.24 says.
SAID = {
    "torchvision": ImportError(
        "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in your environment. Check out "
        "the instructions on the installation page: https://pytorch.org/get-started/locally/ and follow the ones"
    ),
    "num2words": ImportError(
        "Package `num2words` is required to run SmolVLM processor. Install it with `pip install num2words`."
    ),
    "timm": ImportError(
        "\nTimmWrapperModel requires the timm library but it was not found in your environment. You can install it "
        "with pip: `pip install timm`."
    ),
    "av": ImportError("To decode videos install PyAV: `pip install av`"),
    "mistral_common": ModuleNotFoundError("No module named 'mistral_common'"),
}


@pytest.mark.parametrize("package", SAID)
def test_the_package_is_read_off_the_error(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def fails(*_: Any, **__: Any) -> None:
        raise SAID[package]

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fails)
    with pytest.raises(ModelError) as caught:
        load_processor("some/model", ModelSettings(path="some/model"))
    assert str(caught.value).endswith(install_line(package))


def test_of_several_backends_the_missing_one() -> None:
    said = (
        "Could not load any image processor class for m. The model configuration resolves to the following image "
        "processor classes: torchvision: Lfm2VlImageProcessor. None of these classes could be imported. Missing "
        "optional dependencies: torchvision. Please install the missing dependencies"
    )
    assert missing_package(ValueError(said)) == "torchvision"
    assert missing_package(ValueError("you could pip install luck")) is None
    assert "cwdpo[vision]" in install_line("torchvision")


@pytest.fixture
def like(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the small LLaVA whose files say more."""

    def made(**changes: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        for name, change in changes.items():
            file = folder / f"{name}.json"
            before = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps({**before, **change}))
        return folder

    return made


def needs(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_packages(ModelSettings(path=str(folder), tune="lora"))
    return str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="it is installed")
def test_quantized_weights_name_their_reader(like: Callable[..., Path]) -> None:
    folder = like(config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert needs(folder).endswith(
        "its weights are quantized (gptq), which needs a package that is not installed: "
        "pip install gptqmodel --no-build-isolation"
    )


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="it is installed")
def test_a_tower_of_timm(like: Callable[..., Path]) -> None:
    assert needs(like(config={"vision_config": {"model_type": "timm_wrapper"}})).endswith("pip install timm")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="it is installed")
def test_a_qwen_folder_without_torchvision_stops_train_and_validate_before_the_data(
    like: Callable[..., Path], tmp_path: Path, run: Any
) -> None:
    folder = like(
        processor_config={"processor_class": "Qwen2_5_VLProcessor"},
        tokenizer_config={"processor_class": "Qwen2_5_VLProcessor"},
        preprocessor_config={"image_processor_type": "Qwen2VLImageProcessor"},
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{path: {folder}}}\ndata: {{path: {tmp_path / 'absent.jsonl'}}}\n")
    for command in (["train", recipe, "--out", tmp_path / "run"], ["validate", recipe]):
        done = run(*command)
        assert done.code == 1, done
        assert "pip install 'cwdpo[vision]'" in done.err
        assert "absent.jsonl" not in done.err
    assert not (tmp_path / "run").exists()


def test_attention_of_a_package(model_folder: Path) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ModelError, match=r"flash_attention_2.*pip install flash-attn"):
            check_packages(ModelSettings(path=str(model_folder), attention="flash_attention_2"))
    check_packages(ModelSettings(path=str(model_folder), attention="sdpa"))
    check_packages(ModelSettings(path="embedded"))
