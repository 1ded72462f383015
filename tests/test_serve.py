"""Sampling through a real `transformers serve` process, over HTTP, with pictures."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cwdpo.config import ModelSettings, parse_recipe
from cwdpo.data.encode import Encoder
from cwdpo.errors import ServerError
from cwdpo.models.load import EMBEDDED, load_policy
from cwdpo.models.sample import sample
from cwdpo.negatives._settings import SamplerSettings
from cwdpo.records import Example
from cwdpo.remote import Ask, Client, ServerSettings
from cwdpo.rundir import RunDir, read_jsonl
from cwdpo.training.pool import FILE, Pool, ServerSampler

ABSENT = [name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)} (pip install 'cwdpo[dev]')"),
]
LIMIT = 240.0
"""Seconds after which the server counts as stuck."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that holds the embedded small LLaVA."""
    home, port = tmp_path_factory.mktemp("hub"), free_port()
    (home / "hub").mkdir()
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", str(EMBEDDED), "--device", "cpu", "--host",
        "127.0.0.1", "--port", str(port), "--log-level", "info",
    ]  # fmt: skip
    said: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        patience = threading.Timer(LIMIT, server.kill)
        patience.start()
        assert server.stdout is not None
        for line in server.stdout:
            said.append(line)
            if "Uvicorn running on" in line:
                break
        else:
            pytest.fail("the server ended: " + "".join(said)[-3000:])
        drain = threading.Thread(target=lambda: said.extend(server.stdout or ()))
        drain.start()
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()
        drain.join(30)
        patience.cancel()


def test_samples_with_pictures_from_a_real_server(
    served: str, tmp_path: Path, examples: list[Example]
) -> None:
    policy = load_policy(ModelSettings(path="embedded", device="cpu"))
    encoder = Encoder(policy.processor)
    greedy = {"base_url": served, "model": str(EMBEDDED), "concurrency": 2, "retries": 2}
    server = {**greedy, "extra_body": {"generation_config": '{"do_sample": true, "top_k": 0}'}}
    sampler = {"samples": 2, "max_new_tokens": 40, "batch_size": 4, "server": server}
    recipe = parse_recipe(
        {"data": {"path": "x.jsonl"}, "negatives": {"on_policy_fraction": 1.0, "sampler": sampler}}
    )
    some = [e for e in {e.id: e for e in examples}.values() if e.images][:4]
    run = RunDir(tmp_path)

    def fill() -> Any:
        drawer = ServerSampler(recipe.negatives.sampler, tmp_path / "answers.jsonl")
        return Pool(run, recipe).fill(some, drawer, encoder, None, 0, 0)

    found = fill()
    assert sorted(found) == sorted(e.id for e in some)
    texts = [s.text for row in found.values() for s in row.samples]
    assert len(texts) == 8
    assert len(set(texts)) > 4, "each sample has a seed of its own"
    assert {len(row.samples) for row in found.values()} == {2}
    rows = read_jsonl(tmp_path / FILE)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-30])
    assert fill() == found, "a cut pool is filled up from the stored answers"
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 8
    assert len(rows) == 4
    # The server sees the pictures: its greedy captions are those of this process.
    asks = [Ask(e.prompt, e.images, max_tokens=40) for e in some]
    theirs = Client(ServerSettings(**greedy)).ask(asks)
    ours = sample(policy.model, encoder, some, temperature=0, max_new_tokens=40)
    assert [(a.text, a.ended) for a in theirs] == [(s.text, s.ended) for s in ours]
    assert len({s.text for s in ours}) > 2
    # Without the extra key the server is greedy whatever temperature it is asked for, and does not say so.
    silent = SamplerSettings(samples=2, max_new_tokens=40, server=ServerSettings(**greedy))
    with pytest.raises(ServerError, match="ignores temperature = 1"):
        ServerSampler(silent, tmp_path / "others.jsonl")(some, 0, 0)
