"""The client against servers that misbehave, on loopback, bounded in requests and time."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the server extra is not installed: pip install 'cwdpo[server]'")

from pydantic import ValidationError

from cwdpo import errors
from cwdpo.completions_api import Ask, Reply
from cwdpo.config import parse_recipe
from cwdpo.errors import FileError, MissingPackageError, ServerError
from cwdpo.files.reading import read_jsonl
from cwdpo.negatives.base import NEGATIVES
from cwdpo.negatives.mix import attach_negatives
from cwdpo.negatives.settings import SamplerSettings
from cwdpo.onpolicy.pool import FILE, Pool
from cwdpo.onpolicy.sampler import ServerSampler
from cwdpo.onpolicy.samples import PromptSamples, sort_samples
from cwdpo.records import Completion, Example, ImageRef, Message, Sample
from cwdpo.remote import Client, ServerSettings
from cwdpo.rundir import RunDir
from fake_server import Fake, to

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP439AAAASBAgCFVE/wAAAAAElFTkSuQmCC"
)


def asks(n: int) -> list[Ask]:
    return [Ask((Message("user", (f"q{i}",)),)) for i in range(n)]


def every_trouble(handler: Any, number: int) -> bool:
    """Of each six requests: 429, 500, a drop in the middle, a stall past the client's patience; two are answered."""
    kind = number % 6
    if kind == 1:
        handler.fail(429, **{"retry-after-ms": "5"})
    elif kind == 2:
        handler.fail(500, **{"retry-after-ms": "5"})
    elif kind == 3:
        handler.drop()
    elif kind == 4:
        handler.server.stalls.wait(20)  # the test's end frees it
    return kind in (1, 2, 3, 4)


@pytest.mark.slow
def test_a_server_that_stalls_drops_and_refuses_loses_and_doubles_nothing(
    serve: Callable[..., Fake], tmp_path: Path
) -> None:
    server = serve(every_trouble)
    settings = to(server, timeout=0.3, retries=12, concurrency=4)
    answers = Client(settings, tmp_path / "a.jsonl").ask(asks(12))
    assert [a.text for a in answers] == [f"re: q{i}" for i in range(12)]
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert Counter(r["text"] for r in rows) == Counter(f"re: q{i}" for i in range(12))
    assert len(server.seen) > 12 * 2
    sent = len(server.seen)
    assert Client(settings, tmp_path / "a.jsonl").ask(asks(12)) == answers
    assert len(server.seen) == sent, "what is stored is not asked again"


def test_what_came_before_a_failure_is_kept_and_a_cut_line_is_asked_again(
    serve: Callable[..., Fake], tmp_path: Path
) -> None:
    store, broken = tmp_path / "a.jsonl", threading.Event()

    def trouble(handler: Any, number: int) -> bool:
        if number > 5 and not broken.is_set():
            handler.fail(500, **{"retry-after-ms": "1"})
            return True
        return False

    server = serve(trouble)
    settings = to(server, retries=2, concurrency=1)
    with pytest.raises(ServerError, match=r"InternalServerError.*2 retries did not help.*start again"):
        Client(settings, store).ask(asks(9))
    assert [r["text"] for r in read_jsonl(store)] == [f"re: q{i}" for i in range(5)]
    store.write_bytes(store.read_bytes()[:-7])
    broken.set()
    answers = Client(settings, store).ask(asks(9))
    assert [a.text for a in answers] == [f"re: q{i}" for i in range(9)]
    assert server.answered == {**{f"q{i} None": 1 for i in range(9)}, "q4 None": 2}
    assert len(read_jsonl(store)) == 9


def test_equal_requests_are_sent_once_and_images_go_as_data(serve: Callable[..., Fake]) -> None:
    server = serve()
    ask = Ask((Message("user", (None, "what?")),), (ImageRef(data=PIXEL),), max_tokens=7, seed=3)
    assert Client(to(server)).ask([ask, ask]) == [Reply("re: what?", True)] * 2
    (body,) = server.seen
    assert body["messages"][0]["content"] == [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"},
        },
        {"type": "text", "text": "what?"},
    ]
    assert (body["max_tokens"], body["seed"], body["temperature"]) == (7, 3, 0.0)


def test_the_key_comes_from_the_environment_and_is_stored_nowhere(
    serve: Callable[..., Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_API_KEY", "s3cret")
    server = serve()
    Client(to(server, api_key_env="LAB_API_KEY"), tmp_path / "a.jsonl").ask(asks(1))
    assert server.keys == {"Bearer s3cret"}
    assert "s3cret" not in (tmp_path / "a.jsonl").read_text()
    with pytest.raises(ValidationError, match="ends in _API_KEY"):
        to(server, api_key_env="AWS_SECRET_ACCESS")


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "environment variable OPENAI_API_KEY"), (404, "base_url")]
)
def test_refusals_name_the_remedy(serve: Callable[..., Fake], status: int, remedy: str) -> None:
    def refuse(handler: Any, number: int) -> bool:
        handler.fail(status)
        return True

    server = serve(refuse)
    with pytest.raises(ServerError, match=remedy):
        Client(to(server)).ask(asks(1))
    assert len(server.seen) == 1, "a refusal is not retried"


def test_the_estimate_comes_before_the_requests(serve: Callable[..., Fake]) -> None:
    server = serve()
    pictured = Ask((Message("user", (None, "a" * 396)),), (ImageRef(data=PIXEL),), max_tokens=50)
    prices = {"usd_per_million_input": 10.0, "usd_per_million_output": 40.0, "image_tokens": 901}
    client = Client(to(server, **prices, max_usd=0.01))
    estimate = client.estimate([pictured, pictured])
    assert (estimate.requests, estimate.input_tokens, estimate.output_tokens) == (1, 1000, 50)
    assert estimate.usd == pytest.approx(0.012)
    with pytest.raises(ServerError, match=r"at most 0\.01 USD.*max_usd"):
        client.ask([pictured])
    assert not server.seen


def test_requests_keep_to_the_rate(serve: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the client's own clock, which stands still here."""
    slept: list[float] = []
    monkeypatch.setattr("cwdpo.remote.time.sleep", slept.append)
    monkeypatch.setattr("cwdpo.remote.time.monotonic", lambda: 100.0)
    Client(to(serve(), requests_per_minute=120, concurrency=2)).ask(asks(5))
    assert sorted(slept) == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    with pytest.raises(
        MissingPackageError, match=r"asking a server needs .*'openai'.*pip install 'cwdpo\[server\]'"
    ):
        Client(ServerSettings(base_url="http://127.0.0.1:1/v1", model="m"))


def test_the_pool_through_a_server_resumes_without_asking_again(
    serve: Callable[..., Fake], tmp_path: Path, encoder: Any, examples: list[Example]
) -> None:
    from cwdpo.config import parse_recipe

    failing = threading.Event()
    failing.set()

    def trouble(handler: Any, number: int) -> bool:
        if number > 10 and failing.is_set():
            handler.fail(400)
            return True
        # no stalls: they need a short timeout, and a loaded machine then asks again what is being answered
        return number < 10 and number % 6 != 4 and every_trouble(handler, number)

    server = serve(trouble)
    sampler = SamplerSettings(samples=2, batch_size=3, server=to(server, retries=12, concurrency=2))
    negatives = {"on_policy_fraction": 1.0, "sampler": sampler.model_dump()}
    recipe = parse_recipe({"data": {"path": "x.jsonl"}, "negatives": negatives})
    run, some = RunDir(tmp_path), list({e.id: e for e in examples}.values())[:8]

    def fill() -> Any:
        drawer = ServerSampler(recipe.negatives.sampler, tmp_path / "answers.jsonl")
        return Pool(run, recipe, encoder, None).fill(some, drawer, 0, 0)

    with pytest.raises(ServerError):
        fill()
    before = dict(server.answered)
    failing.clear()
    found = fill()
    assert len(found) == 8
    assert all(len(row.samples) == 2 for row in found.values())
    rows = read_jsonl(tmp_path / FILE)
    assert len(rows) == len({r["key"] for r in rows}) == 8
    assert all(server.answered[key] == n for key, n in before.items()), "nothing answered is asked again"
    assert sum(server.answered.values()) == 16


def test_a_writer_of_edits_is_asked_once_checked_and_falls_back_to_the_lexicon(
    serve: Callable[..., Fake],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = [
        {"kind": "colour", "text": "A black dog sleeps on a mat ."},
        {"kind": "action", "text": "a  brown dog SLEEPS on a mat ."},  # chosen itself
        {"kind": "object", "text": "A brown dog sleeps on a rug ."},  # a reference
        {"kind": "all", "text": "One two three four five six seven eight nine"},  # no small edit
        {"kind": "made up", "text": "A brown dog sleeps under a mat ."},
        {"kind": "colour"},
    ]
    words = {"A brown dog": f"Sure: ```{json.dumps(listed)}```", "A red car": "I cannot do that."}

    def answer(handler: Any, number: int) -> bool:
        text = handler.server.seen[number - 1]["messages"][-1]["content"][-1]["text"]
        word = next(v for k, v in words.items() if f"Description: {k}" in text)
        choice = {"index": 0, "message": {"role": "assistant", "content": word}, "finish_reason": "stop"}
        handler.reply(
            200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )
        return True

    server = serve(answer)
    prompt = (Message("user", ("q",)),)
    dog = Example(
        "a",
        (),
        prompt,
        Completion("A brown dog sleeps on a mat ."),
        references=("A brown dog sleeps on a rug .",),
    )
    car = Example("b", (), prompt, Completion("A red car is parked ."))
    source = {"writer": to(server).model_dump(), "per_example": 3}

    def made() -> Any:
        return attach_negatives(
            [dog, car],
            {"perturb": 1.0},
            2,
            0,
            "none",
            sources={"perturb": NEGATIVES.build({"name": "perturb", **source})},
        )[0]

    first, second = made()
    assert {c.text: (c.made["edit"], c.made["from"], c.made["to"]) for c in first.rejected} == {
        "A black dog sleeps on a mat .": ("colour", "brown", "black"),
        "A brown dog sleeps under a mat .": ("other", "on", "under"),
    }
    for c in first.rejected:
        text = dog.chosen.text
        assert text[: c.made["start"]] + c.made["to"] + text[c.made["end"] :] == c.text
    assert "writer" not in second.rejected[0].made, "from the lexicon"
    assert "2 requests (0 answers are stored)" in caplog.text
    assert made() == [first, second]
    assert len(server.seen) == 2, "answers outlive the run"


def test_a_server_sees_the_picture_that_training_sees(tmp_path: Path) -> None:
    """A JPEG goes as it is; a deep or transparent PNG as the RGB that ImageRef.open gives."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    from cwdpo.completions_api import data_uri
    from cwdpo.records import ImageRef

    def sent(image: Image.Image, name: str) -> tuple[bytes, ImageRef]:
        image.save(tmp_path / name)
        ref = ImageRef(path=tmp_path / name)
        return base64.b64decode(data_uri(ref).partition(",")[2]), ref

    plain, ref = sent(Image.effect_noise((8, 8), 50), "a.jpg")
    assert plain == ref.encoded()
    deep = Image.frombytes("I;16", (4, 1), np.array([1000, 1100, 1200, 1300], "<u2").tobytes())
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    for image, name in ((deep, "b.png"), (clear, "c.png")):
        data, ref = sent(image, name)
        assert data != ref.encoded()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(ref.open()))


# --- answers that are none ------------------------------------------------------------------------------


def raw(body: bytes, status: int = 200, **headers: str) -> Callable[[Any, int], bool]:
    """A ``trouble`` that answers every request with these bytes."""

    def answer(handler: Any, number: int) -> bool:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return answer


def completion(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html><body>sign in</body></html>", "text/html"),
        (b"<html>", "application/json"),
        (b"[1, 2]", "application/json"),
        (b'"text"', "application/json"),
        (b"null", "application/json"),
        (b"", "application/json"),
        (b"{}", "application/json"),
        (b'{"choices": []}', "application/json"),
        (b'{"choices": {"0": 1}}', "application/json"),
        (b'{"choices": [{"message": null}]}', "application/json"),
        (completion(3), "application/json"),
        (completion([{"type": "text", "text": "a"}]), "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"choices":' * 20_000, "application/json"),
        (b"\xff\xfe", "application/json"),
    ],
)
def test_an_answer_that_is_no_completion_is_named(
    serve: Callable[..., Fake], tmp_path: Path, body: bytes, kind: str
) -> None:
    server = serve(raw(body, Content_Type=kind))
    with pytest.raises(ServerError, match=r"model 'm'\).*: check the server, then start again"):
        Client(to(server, retries=0), tmp_path / "a.jsonl").ask(asks(1))
    assert read_jsonl(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize(
    ("content", "text"), [(None, ""), (" a\n", "a"), ("x\ud800y", "x\ufffdy"), ("\ud83d\ude00", "\U0001f600")]
)
def test_what_an_answer_says(serve: Callable[..., Fake], tmp_path: Path, content: Any, text: str) -> None:
    server = serve(raw(completion(content), Content_Type="application/json"))
    store = tmp_path / "a.jsonl"
    assert Client(to(server), store).ask(asks(1)) == [Reply(text, True)]
    assert Client(to(server), store).ask(asks(1)) == [Reply(text, True)], "read back from the file"


def test_a_redirect_is_not_followed(serve: Callable[..., Fake]) -> None:
    other = serve()
    server = serve(raw(b"", 307, Location=f"{other.url}/chat/completions"))
    with pytest.raises(
        ServerError, match="redirects requests, and redirects are not followed: correct base_url"
    ):
        Client(to(server, retries=0)).ask(asks(1))
    assert len(server.seen) == 1
    assert not other.seen


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_drips_is_cut_off_in_time(serve: Callable[..., Fake], part: str) -> None:
    def drip(handler: Any, number: int) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX: " + b"x" * 60_000
        if part == "body":
            handler.wfile.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n"
            )
        for i in range(200):
            handler.wfile.write(head[i : i + 1] if part == "head" else b" ")
            handler.wfile.flush()
            if handler.server.stalls.wait(0.05):
                break
        return True

    server = serve(drip)
    begun = time.monotonic()
    with pytest.raises(ServerError, match="1 retries did not help"):
        Client(to(server, timeout=0.4, retries=1)).ask(asks(1))
    assert time.monotonic() - begun < 6  # two attempts and the package's pause; undisturbed it drips for 20 s
    assert len(server.seen) == 2


def test_the_key_that_a_server_says_back_is_not_shown(
    serve: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_API_KEY", "s3cret-value")
    body = json.dumps({"error": {"message": "no such key: s3cret-value"}}).encode()
    server = serve(raw(body, 401, Content_Type="application/json"))
    with pytest.raises(ServerError) as caught:
        Client(to(server, api_key_env="LAB_API_KEY")).ask(asks(1))
    assert "s3cret-value" not in str(caught.value)
    assert "no such key: [the value of LAB_API_KEY]" in str(caught.value)


@pytest.mark.parametrize("how", ["long", "packed"])
def test_a_flood_is_refused(serve: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("cwdpo.connection.MOST_BYTES", 10_000)
    body = completion("x" * 20_000)
    headers = {"Content_Type": "application/json"}
    if how == "packed":
        body, headers = gzip.compress(body), {**headers, "Content_Encoding": "gzip"}
    said = {"long": "has more than 10000 bytes", "packed": "compressed by 'gzip'"}[how]
    with pytest.raises(ServerError, match=said):
        Client(to(serve(raw(body, **headers)), retries=0)).ask(asks(1))


@pytest.mark.parametrize(
    "row", [{}, {"key": "a", "text": 3, "ended": True}, {"key": ["a"], "text": "", "ended": True}]
)
def test_a_damaged_store_is_named(tmp_path: Path, row: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(FileError, match=r"a\.jsonl: line 1: is not a stored answer: remove that line"):
        Client(ServerSettings(base_url="http://127.0.0.1:1/v1", model="m"), tmp_path / "a.jsonl")


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(ServerError, match="correct base_url"):
        Client(ServerSettings(base_url="http://[::1/v1", model="m")).ask(asks(1))


def test_a_picture_placeholder_in_an_answer_is_no_negative(examples: list[Example]) -> None:
    settings = parse_recipe({"data": {"path": "x"}}).negatives
    samples = tuple(Sample(text, True) for text in ("a <image> here", "fine words"))
    found = sort_samples(examples[0], PromptSamples(examples[0].id, 0, 0, samples), settings)
    assert [c.text for c in found.negatives] == ["fine words"]
    assert found.dropped == {"placeholder": 1}
