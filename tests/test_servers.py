"""Several servers of one model, of which some stall, die, come back or refuse: every request is answered once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the server extra is not installed: pip install 'cwdpo[server]'")

from pydantic import ValidationError

from cwdpo import servers
from cwdpo.completions_api import Ask
from cwdpo.config import load_recipe
from cwdpo.errors import ServerError
from cwdpo.files.reading import read_jsonl
from cwdpo.onpolicy.preferences import make_preferences, on_servers
from cwdpo.records import Message
from cwdpo.remote import Client, ServerSettings
from cwdpo.stage.listener import Listener
from fake_server import Fake, seeded
from paths import RECIPES

Serve = Callable[..., Fake]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(servers, "_TICK", 0.01)
    monkeypatch.setattr(servers, "_SOON", 0.1)


def asks(n: int) -> list[Ask]:
    return [Ask((Message("user", (f"q{i}",)),), seed=i) for i in range(n)]


def to(*several: Fake, **changes: Any) -> ServerSettings:
    address = [server.url for server in several] if len(several) > 1 else several[0].url
    return ServerSettings(base_url=address, model="m", **{"timeout": 0.4, "retries": 3, **changes})


def stalls_after(n: int) -> Callable[[Any, int], bool]:
    def trouble(handler: Any, number: int) -> bool:
        if number > n:
            handler.server.stalls.wait(20)  # the test's end frees it
            return True
        return seeded(handler, number)

    return trouble


def dies_after(n: int) -> Callable[[Any, int], bool]:
    def trouble(handler: Any, number: int) -> bool:
        if number > n:
            handler.server.away.set()
            handler.drop()
            return True
        return seeded(handler, number)

    return trouble


def test_one_stalls_and_one_dies_and_every_answer_is_there_once_as_of_one_server(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Client(to(serve(seeded))).ask(asks(60))
    good, stalled, dead = serve(seeded), serve(stalls_after(3)), serve(dies_after(4))
    settings = to(good, stalled, dead, concurrency=2)
    client = Client(settings, tmp_path / "a.jsonl")
    assert client.ask(asks(60)) == whole
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert len(rows) == len({row["key"] for row in rows}) == 60
    answered = [s.answered for s in client.servers.servers]
    assert sum(answered) == 60
    assert answered[1] <= 3
    assert answered[2] <= 4
    assert f"{dead.url}: " in caplog.text
    sent = len(good.seen)
    assert Client(settings, tmp_path / "a.jsonl").ask(asks(60)) == whole
    assert len(good.seen) == sent, "what is stored is not asked again"


def test_a_server_that_comes_back_is_used_again(serve: Serve) -> None:
    late = serve(seeded)
    late.away.set()

    def trouble(handler: Any, number: int) -> bool:
        if number == 6:
            late.away.clear()
            handler.server.away.set()
        if handler.server.away.is_set():
            handler.drop()
            return True
        return seeded(handler, number)

    first = serve(trouble)
    client = Client(to(first, late, concurrency=1, retries=20, timeout=10.0))
    assert len(client.ask(asks(12))) == 12
    assert [s.answered for s in client.servers.servers] == [5, 7]


def test_a_slow_server_gets_fewer_requests(serve: Serve) -> None:
    ten = threading.Event()

    def slow(handler: Any, number: int) -> bool:
        return not ten.wait(10) or seeded(handler, number)

    def quick(handler: Any, number: int) -> bool:
        if number == 10:
            ten.set()
        return seeded(handler, number)

    client = Client(to(serve(slow), serve(quick), concurrency=1, timeout=10.0))
    client.ask(asks(11))
    assert client.servers.servers[0].answered <= 1


def test_without_a_server_it_says_what_is_kept_and_goes_on_with_others(serve: Serve, tmp_path: Path) -> None:
    a, b, store = serve(dies_after(3)), serve(dies_after(2)), tmp_path / "a.jsonl"
    with pytest.raises(
        ServerError, match=r"no server answers .*5 answers are in .*a\.jsonl; start one again"
    ):
        Client(to(a, b, concurrency=1), store).ask(asks(12))
    c, d = serve(seeded), serve(seeded)
    assert Client(to(c, d), store).ask(asks(12)) == Client(to(serve(seeded))).ask(asks(12))
    assert len(c.seen) + len(d.seen) == 7


def test_a_request_that_all_servers_refuse_ends_the_work(serve: Serve) -> None:
    def refuse(handler: Any, number: int) -> bool:
        with handler.server.lock:
            bad = handler.server.seen[number - 1]["seed"] == 3
        if bad:
            handler.fail(400)
        return bad or seeded(handler, number)

    a, b = serve(refuse), serve(refuse)
    client = Client(to(a, b))
    with pytest.raises(ServerError, match="BadRequestError"):
        client.ask(asks(8))
    assert sum(body["seed"] == 3 for body in a.seen + b.seen) == 2, "each was asked once"
    assert len(client.ask(asks(3))) == 3, "the servers are still used"


def test_answers_are_found_when_servers_are_added_and_taken_away(serve: Serve, tmp_path: Path) -> None:
    a, b, store = serve(seeded), serve(seeded), tmp_path / "a.jsonl"
    Client(to(a), store).ask(asks(4))
    Client(to(b, a), store).ask(asks(6))
    Client(to(b), store).ask(asks(6)[4:])
    assert Counter(body["seed"] for body in a.seen + b.seen) == Counter(range(6))
    Client(to(b), store).ask(asks(1))
    assert len(a.seen + b.seen) == 7, "one server's answers are another's only with a list"


@pytest.mark.parametrize("address", [[], ["http://x/v1", "http://x/v1"]])
def test_a_list_without_or_with_equal_addresses_is_refused(address: list[str]) -> None:
    with pytest.raises(ValidationError, match="a list of different addresses"):
        ServerSettings(base_url=address, model="m")


@pytest.mark.parametrize("address", ["localhost:8000/v1", ["http://x/v1", "x:8001/v1"]])
def test_an_address_without_its_scheme_is_refused_at_once(address: str | list[str]) -> None:
    with pytest.raises(ValidationError, match="begins with http:// or https://"):
        ServerSettings(base_url=address, model="m")


class Killed(BaseException):
    """Stands in for a kill."""


@pytest.mark.slow
def test_sample_on_several_servers_goes_on_after_a_kill_with_the_file_of_one(
    serve: Serve, tmp_path: Path
) -> None:
    small = ("data.world.train=24", "negatives.sampler.batch_size=5", "negatives.sampler.samples=3")

    def made(out: Path, *several: Fake, listener: Listener | None = None) -> Any:
        out.mkdir(exist_ok=True)
        recipe = on_servers(load_recipe(RECIPES / "tiny.yaml", small), [server.url for server in several])
        return make_preferences(recipe, out / "pairs.jsonl", listener=listener)

    def stop(round_: int, done: int, total: int) -> None:
        if done == 30:
            raise Killed

    made(tmp_path / "one", serve(seeded))
    a, b = serve(seeded), serve(dies_after(7))
    with pytest.raises(Killed):
        made(tmp_path / "two", a, b, listener=Listener(sampled=stop))
    found = made(tmp_path / "two", serve(seeded), a)
    assert sum(found.answered.values()) < 24 * 3 - 30 + 1
    files = [(tmp_path / name / "pairs.jsonl").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert found.rows == len(files[0].splitlines()) > 10
