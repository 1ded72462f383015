"""``cwdpo chat``: what its page answers is what ``cwdpo ask`` prints. Where gradio is: `make test-trackers` has it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cwdpo.evaluation.ask import ask
from cwdpo.models.sample import Decoding
from server import free_port

QUESTION = "describe the picture ."
# In processes of their own: gradio and its client leave sockets to the end of the process.
CLIENT = """
import json, sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
said = client.predict(handle_file(sys.argv[2]), sys.argv[3], 1, api_name="/ask")
try:
    client.predict(None, " ", 0, api_name="/ask")
except Exception as error:
    print(json.dumps([said, str(error)]))
"""


def test_without_gradio_the_command_says_what_to_install(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = run("chat", "embedded")
    assert done.code == 1
    assert done.err == (
        "cwdpo: cwdpo chat needs the package 'gradio', which is not installed: pip install 'cwdpo[chat]'\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
@pytest.mark.parametrize("reload", [(), ("--reload",)])
def test_the_page_answers_as_ask_does(trained: Path, picture: Path, reload: tuple[str, ...]) -> None:
    port = free_port()
    words = ["chat", str(trained), "--port", str(port), "--max-new-tokens", "24", *reload]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "cwdpo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            said = []
            for line in server.stdout or ():
                said.append(line)
                if str(port) in line:
                    break
            else:
                pytest.fail("".join(said))
            client = [sys.executable, "-c", CLIENT, f"http://127.0.0.1:{port}", str(picture), QUESTION]
            done = subprocess.run(client, capture_output=True, text=True, check=False, timeout=300)
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr[-3000:]
    found, refused = json.loads(done.stdout.splitlines()[-1])
    assert "the question is empty" in refused
    decodings = [Decoding(0.0, max_new_tokens=24), Decoding(1.0, max_new_tokens=24)]
    wanted = ask(str(trained), QUESTION, [picture], decodings=decodings)
    assert list(wanted) == ["base", "stage 1", "final"]
    for answers, text, tokens in zip(wanted.values(), found[0::2], found[1::2], strict=True):
        lines = [line.split("  ", 2)[2].removesuffix(" [cut]") for line in text.splitlines()]
        assert lines == [one["text"] for one in answers]
        assert text.startswith(f"greedy  {answers[0]['mean_logp']:.3f}  ")
        values = [one["class_or_confidence"] for one in tokens]
        assert values == pytest.approx([max(v, -1.0) for _, v in answers[0]["tokens"]], abs=1e-4)
