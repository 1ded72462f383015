"""Adapters of rounds at a server with the API of vLLM: loaded, named, loaded again, refused; samples that agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from cwdpo.config import parse_recipe
from cwdpo.dynamics.diagnose import diagnose_rows
from cwdpo.errors import RecipeError, ServerError
from cwdpo.models.load import load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.negatives.settings import NegativeSettings, SamplerSettings
from cwdpo.onpolicy.agreement import Told, agreement
from cwdpo.onpolicy.rounds import Rounds
from cwdpo.onpolicy.sampler import ServerSampler
from cwdpo.onpolicy.served import adapter_of, check_served_parts
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.records import Completion, Example, Message
from cwdpo.rundir import RunDir
from fake_server import Fake

Serve = Callable[..., Fake]


class Vllm:
    """What vLLM does with requests, for the ``trouble`` of a fake server."""

    def __init__(self, problem: str = "") -> None:
        self.loaded: set[str] = set()
        self.loads: list[dict[str, Any]] = []
        self.problem = problem

    def __call__(self, handler: Any, number: int) -> bool:
        server = handler.server
        with server.lock:
            body = server.seen.pop() if handler.path.endswith("_adapter") else server.seen[-1]
            return self._answered(handler, body)

    def _answered(self, handler: Any, body: dict[str, Any]) -> bool:
        name = body.get("lora_name", body.get("model"))
        if handler.path == "/v1/load_lora_adapter":
            self.loads.append(body)
            if self.problem or name in self.loaded:
                said = self.problem or f"The lora adapter '{name}' has already been loaded."
                handler.reply(400, {"error": {"message": said, "type": "BadRequestError", "code": 400}})
            else:
                self.loaded.add(name)
                handler.reply(200, f"Success: LoRA adapter '{name}' added successfully.")
        elif handler.path == "/v1/unload_lora_adapter":
            self.loaded.discard(name)
            handler.reply(200, "Success")
        elif name not in self.loaded:
            handler.reply(404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}})
        else:
            tokens = [{"token": "x", "logprob": -0.5}, {"token": "", "logprob": -1.5}]
            choice = {
                "index": 0, "message": {"role": "assistant", "content": " said"}, "finish_reason": "stop",
                **({"logprobs": {"content": tokens}} if body.get("logprobs") else {}),
            }  # fmt: skip
            handler.reply(
                200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            )
        return True


def sampler(url: str, tmp_path: Path, encoder: Any = None, *, logprobs: bool = True) -> ServerSampler:
    folder = tmp_path / "run" / "round1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    settings = SamplerSettings(
        samples=2,
        serve_adapter=True,
        server={"base_url": url, "model": "base", "retries": 0, "concurrency": 4},
    )
    return ServerSampler(settings, tmp_path / "answers.jsonl", adapter_of(folder), encoder, logprobs=logprobs)


EXAMPLES = [Example(f"r{i}", (), (Message("user", (f"{i}?",)),), Completion("yes")) for i in range(3)]


def test_the_adapter_is_loaded_once_and_requested_by_name(serve: Serve, tmp_path: Path) -> None:
    vllm = Vllm()
    server = serve(vllm)
    drawer = sampler(server.url, tmp_path)
    found = drawer(EXAMPLES, 0, 1)
    folder = tmp_path / "run" / "round1"
    assert all(
        load == {"lora_name": adapter_of(folder).name, "lora_path": str(folder)} for load in vllm.loads
    )
    assert vllm.loaded == {adapter_of(folder).name}
    for body in server.seen:
        assert body["model"] == adapter_of(folder).name
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
    sample = found[0][0]
    assert (sample.text, sample.engine_tokens, sample.engine_mean_logp) == ("said", 2, -1.0)
    assert sample.mean_logp is None, "an engine's log-probabilities are not the policy's"
    drawer.close()
    assert not vllm.loaded
    # Another process finds the answers, log-probabilities included, and asks for none.
    n = len(server.seen)
    assert sampler(server.url, tmp_path)(EXAMPLES, 0, 1) == found
    assert len(server.seen) == n


def test_the_first_token_is_asked_for_where_training_has_it(serve: Serve, tmp_path: Path) -> None:
    """LLaVA 1.5's template does not write bos: the tokenizer adds it in training, and vLLM only if asked to."""

    class Bos:
        def adds_bos(self, example: Example) -> bool:
            return example.id == "r1"

    server = serve(Vllm())
    sampler(server.url, tmp_path, Bos())(EXAMPLES, 0, 1)
    told = {body["messages"][0]["content"][0]["text"]: body.get("add_special_tokens") for body in server.seen}
    assert told == {"0?": None, "1?": True, "2?": None}


def test_a_server_that_was_started_again_loads_the_adapter_again(serve: Serve, tmp_path: Path) -> None:
    vllm = Vllm()
    drawer = sampler(serve(vllm).url, tmp_path)
    drawer(EXAMPLES[:1], 0, 1)
    vllm.loaded.clear()
    drawer(EXAMPLES, 0, 1)
    assert len(vllm.loaded) == 1


def test_other_weights_have_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "round1"
    folder.mkdir(parents=True)
    names = []
    for weights in (b"some", b"others"):
        (folder / "adapter_model.safetensors").write_bytes(weights)
        names.append(adapter_of(folder).name)
    assert names[0] != names[1]
    assert all(name.startswith("run-round1-") for name in names)


def test_a_server_that_does_not_load_adapters_is_named_with_what_to_do(serve: Serve, tmp_path: Path) -> None:
    url = serve(Vllm("LoRA rank 32 is greater than max_lora_rank 16.")).url
    with pytest.raises(ServerError, match=r"round1 .*rank 32 .*--max-lora-rank of at least model\.lora\.r"):
        sampler(url, tmp_path)(EXAMPLES, 0, 1)


def test_without_log_probabilities_nothing_is_known_of_them(serve: Serve, tmp_path: Path) -> None:
    found = sampler(serve(Vllm()).url, tmp_path, logprobs=False)(EXAMPLES, 0, 1)
    assert {s.engine_mean_logp for own in found for s in own} == {None}


SERVER = {"base_url": "http://x/v1", "model": "m"}


@pytest.mark.parametrize(
    ("model", "sampler", "complaint"),
    [
        ({}, {"server": SERVER, "serve_adapter": True}, "the policy has no adapter: set model.tune to lora"),
        (
            {"tune": "lora", "lora": {"use_dora": True}},
            {"server": SERVER, "serve_adapter": True},
            "without model.lora.use_dora",
        ),
        ({"tune": "lora"}, {"serve_adapter": True}, "serve_adapter needs server"),
        (
            {"tune": "lora"},
            {"server": SERVER, "serve_adapter": True, "serve_folder": True},
            "leave out one of the two",
        ),
    ],
)
def test_recipes_without_a_usable_adapter_are_refused(
    model: dict[str, Any], sampler: dict[str, Any], complaint: str
) -> None:
    tree = {
        "model": model,
        "data": {"path": "x.jsonl"},
        "negatives": {"on_policy_fraction": 1, "sampler": sampler},
    }
    with pytest.raises(RecipeError, match=complaint):
        parse_recipe(tree)


def test_an_adapter_on_the_vision_tower_is_refused() -> None:
    """vLLM leaves out its layers without a word, so the samples would be of another policy."""
    model = nn.ModuleDict({"language_model": nn.Linear(2, 2), "vision_tower": nn.Linear(2, 2)})
    with pytest.raises(RecipeError, match=r"layers of the vision \(vision_tower.weight\).*model.freeze"):
        check_served_parts(model)
    model["vision_tower"].requires_grad_(False)
    check_served_parts(model)


def test_it_is_refused_before_anything_is_trained(
    model_folder: Path, world_folder: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(
        {
            "model": {"path": str(model_folder), "device": "cpu", "tune": "lora", "freeze": []},
            "data": {"path": str(world_folder / "train.jsonl")},
            "negatives": {"on_policy_fraction": 1, "sampler": {"server": SERVER, "serve_adapter": True}},
        }
    )
    with pytest.raises(RecipeError, match="layers of the vision"):
        train_two_stage(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "stage1").exists()


def test_agreement_by_hand() -> None:
    """Gaps of 0.1, 0.3 and 8 nats per token: the median is 0.3; the third sample has other tokens."""
    pairs = [
        (Told(4, -1.0), Told(4, -1.1)),
        (Told(5, -2.0), Told(5, -1.7)),
        (Told(5, -9.0), Told(5, -1.0)),
    ]
    gap, apart = agreement(pairs, step=8)
    assert (gap.value, gap.n, gap.step) == (pytest.approx(0.3), 3, 8)
    assert (apart.value, apart.n) == (pytest.approx(1 / 3), 3)
    rows = [{"stage": "stage2", **vars(reading)} for reading in (gap, apart)]
    assert [f.name for f in diagnose_rows(rows, [])] == ["off_policy_samples"]
    near, none = agreement([(Told(4, -1.0), Told(4, -1.01))], step=8)
    assert not diagnose_rows([{"stage": "stage2", **vars(reading)} for reading in (near, none)], [])
    _, counted = agreement([(Told(4, -1.0), Told(5, -1.0))], step=0)
    assert counted.value == 1.0, "another number of tokens"


def test_a_folder_that_a_kill_left_unfinished_is_not_served(model_folder: Path, tmp_path: Path) -> None:
    kills: list[Exception] = [KeyError("killed")]

    class Processor:
        def save_pretrained(self, folder: Path) -> None:
            if kills:
                raise kills.pop()
            (folder / "processor_config.json").write_text("{}")

    policy = load_policy(ModelSettings(path=str(model_folder), device="cpu"))
    settings = NegativeSettings.model_validate(
        {"on_policy_fraction": 1.0, "rounds": 2, "sampler": {"server": SERVER, "serve_folder": True}}
    )
    stage = SimpleNamespace(run=RunDir(tmp_path), policy=replace(policy, processor=Processor()), encoder=None)
    rounds: Any = SimpleNamespace(stage=stage, settings=settings)
    with pytest.raises(KeyError, match="killed"):
        Rounds._sampler(rounds, policy.model, 1)
    assert not (tmp_path / "round1").exists()
    Rounds._sampler(rounds, policy.model, 1)
    assert {"model.safetensors", "processor_config.json"} < {p.name for p in (tmp_path / "round1").iterdir()}
