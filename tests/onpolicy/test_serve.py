"""Sampling through a real `transformers serve` process, over HTTP, with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cwdpo.completions_api import Ask
from cwdpo.config import ModelSettings, parse_recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import ServerError
from cwdpo.files.reading import read_jsonl
from cwdpo.models.load import EMBEDDED, load_policy
from cwdpo.models.sample import sample
from cwdpo.negatives.settings import SamplerSettings
from cwdpo.onpolicy.pool import FILE, Pool
from cwdpo.onpolicy.sampler import ServerSampler
from cwdpo.records import Example
from cwdpo.remote import Client, ServerSettings
from cwdpo.rundir import RunDir
from server import needs_server

pytestmark = [pytest.mark.slow, needs_server]


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
        return Pool(run, recipe, encoder, None).fill(some, drawer, 0, 0)

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
