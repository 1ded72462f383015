"""The page of `cwdpo watch`: one drawing at a time, one page for all who ask, and errors as answers."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cwdpo.report import watch
from cwdpo.report.watch import Page, WatchServer, serve, stamp_of
from cwdpo.rundir import RunDir


@contextmanager
def running(folder: Path, rest: float = 0.0) -> Iterator[WatchServer]:
    with serve(folder, 0, 5, rest) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: WatchServer) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    return tmp_path


def test_eight_clients_get_one_drawing_and_never_two_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, most, drawn = 0, 0, 0

    def slow(_: Path, refresh: int) -> str:
        nonlocal drawing, most, drawn
        drawing, drawn = drawing + 1, drawn + 1
        most = max(most, drawing)
        time.sleep(0.3)
        drawing -= 1
        return f"page {drawn}"

    monkeypatch.setattr(watch, "render_report", slow)
    with running(folder, rest=1e6) as server, ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda _: get(server), range(8)))
        RunDir(folder).append("metrics.jsonl", [{"step": 1}])
        later = list(pool.map(lambda _: get(server), range(8)))
    assert first == later == [(200, "page 1")] * 8, "it rests after drawing"
    assert (drawn, most) == (1, 1)


def test_a_page_is_drawn_again_only_when_the_run_has_changed(folder: Path) -> None:
    drawn: list[int] = []
    page = Page(lambda: f"page {drawn.append(1) or len(drawn)}", lambda: stamp_of(folder), rest=0.0)
    assert [page.get() for _ in range(3)] == [(200, "page 1")] * 3
    RunDir(folder).append("readings.jsonl", [{"step": 1}])
    assert [page.get() for _ in range(3)] == [(200, "page 2")] * 3


def test_the_last_page_is_given_while_a_new_one_is_drawn() -> None:
    begun, go_on = threading.Event(), threading.Event()
    stamps = iter(range(100))

    def draw() -> str:
        if not begun.is_set():
            begun.set()
            return "old"
        go_on.wait(10)
        return "new"

    page = Page(draw, lambda: next(stamps), rest=0.0)
    assert page.get() == (200, "old")
    thread = threading.Thread(target=page.get)
    thread.start()
    time.sleep(0.1)
    assert page.get() == (200, "old")
    go_on.set()
    thread.join()
    assert page.get() == (200, "new")


def test_an_error_is_an_answer_and_the_next_look_may_find_the_run_whole(folder: Path) -> None:
    with running(folder) as server:
        assert get(server)[0] == 200
        (folder / "x.json").symlink_to("recipe.yaml")
        status, text = get(server)
        assert (status, "The run cannot be shown now: " in text) == (500, True)
        assert "x.json: is a link" in text
        (folder / "x.json").unlink()
        assert get(server)[0] == 200
        (folder / "recipe.yaml").unlink()
        assert "no run here" in get(server)[1]


def test_one_thread_makes_all_drawings() -> None:
    """Every request has a thread of its own, and matplotlib keeps fonts open for every thread that has drawn."""
    drew: list[threading.Thread] = []

    def draw() -> str:
        drew.append(threading.current_thread())
        return "x"

    page = Page(draw, object, rest=0.0)
    asking = [threading.Thread(target=page.get) for _ in range(5)]
    for thread in asking:
        thread.start()
        thread.join()
    page.close()
    assert len(drew) == 5
    assert len(set(drew)) == 1
    assert drew[0] not in asking


def test_any_error_of_drawing_is_escaped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, refresh: int) -> str:
        raise RecursionError("<script>alert(1)</script>")

    monkeypatch.setattr(watch, "render_report", fail)
    with running(folder) as server:
        assert "RecursionError: &lt;script&gt;" in get(server)[1]


def test_a_client_that_goes_away_or_says_nothing_harms_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch._Handler, "timeout", 0.2)
    with running(folder) as server:
        silent = socket.create_connection(("127.0.0.1", server.server_port))
        for data in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET"):
            with socket.create_connection(("127.0.0.1", server.server_port)) as gone:
                gone.sendall(data)
        assert get(server)[0] == 200
        assert silent.recv(10) == b"", "closed for it"
        silent.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_requests_leave_no_open_files(folder: Path) -> None:
    with running(folder) as server:
        get(server)
        before = len(os.listdir("/proc/self/fd"))
        with ThreadPoolExecutor(8) as pool:
            assert {status for status, _ in pool.map(lambda _: get(server), range(80))} == {200}
        time.sleep(0.2)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        assert threading.active_count() < 12
