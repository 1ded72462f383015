"""Templates of others: rendered as transformers renders them, and stopped where they would not end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cwdpo.data.encode import render
from cwdpo.data.encode.render import Renderer
from cwdpo.errors import DataError, ModelError

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'What "is" it?\n\U0001f600'}]}
]


class Templated:
    """A processor with a template and transformers' own way of rendering it."""

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, chat: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        texts, _ = render_jinja_template(
            [chat], chat_template=self.template, add_generation_prompt=add_generation_prompt
        )
        return texts[0]


def rendered(template: str, seconds: float = 10.0) -> str:
    return Renderer(Templated(template), seconds)(CHAT, generation=True)


def test_the_text_is_that_of_transformers(processor: Any) -> None:
    renderer = Renderer(processor)
    answer = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "A cat ."}]}]
    for chat, generation in ((CHAT, True), (CHAT, False), (answer, False)):
        wanted = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
        assert renderer(chat, generation=generation) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ ('a' * 10**9) * 10 | length }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{% set x = namespace(v='ab') %}{% for i in range(99) %}{% set x.v = x.v + x.v %}{% endfor %}",
        "{% for i in range(40000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% macro m() %}{% for i in range(99999) %}{{ m }}{% endfor %}{% endmacro %}{% for i in range(999) %}{{ m() }}"
        "{% endfor %}",
    ],
    ids=["loops", "times", "twice", "percent", "ljust", "doubling", "long", "macro"],
)
def test_a_template_without_end_is_stopped(template: str) -> None:
    renderer = Renderer(Templated(template), seconds=2.0)
    begun = time.monotonic()
    for _ in range(2):  # the second time it is not tried
        with pytest.raises(ModelError, match="did not end within 2 seconds and 1024 MiB, or gave more than"):
            renderer(CHAT, generation=True)
    assert time.monotonic() - begun < 120, "it would take hours"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system turn') }}", "TemplateError: no system turn"),
        ("{{ nothing.here }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_refuses_is_heard(template: str, said: str) -> None:
    renderer = Renderer(Templated(template))
    for _ in range(2):
        with pytest.raises(DataError, match=said):
            renderer(CHAT, generation=True)


def test_an_odd_text_comes_back_whole() -> None:
    assert rendered("{{ messages[0].content[1].text }}") == 'What "is" it?\n\U0001f600'
    assert rendered("") == ""
    assert len(rendered("{{ 'é' * 1000000 }}")) == 1_000_000


def test_threads_and_forks_do_not_mix_answers_up() -> None:
    renderer = Renderer(Templated("{{ messages[0].content }}"))

    def one(i: int) -> bool:
        return renderer([{"role": "user", "content": str(i) * 1000}], generation=True) == str(i) * 1000

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))
    child = renderer._child
    assert child is not None
    pid = os.fork()
    if pid == 0:
        os._exit(0 if one(7) and renderer._child is not child else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert one(8)
    assert renderer._child is child


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2] != "Z"


def test_a_child_that_died_is_replaced() -> None:
    renderer = Renderer(Templated("{{ messages[0]['role'] }}"))
    assert renderer(CHAT, generation=True) == "user"
    assert renderer._child is not None
    first = renderer._child.pid
    os.kill(first, signal.SIGKILL)
    assert renderer(CHAT, generation=True) == "user"
    assert renderer._child.pid != first
    os.kill(renderer._child.pid, signal.SIGKILL)
    assert renderer.many([(CHAT, True, [])]) == ["user"]


def test_the_process_goes_with_its_renderer() -> None:
    renderer = Renderer(Templated("a"))
    renderer(CHAT, generation=True)
    assert renderer._child is not None
    pid = renderer._child.pid
    assert alive(pid)
    del renderer
    gc.collect()
    assert not alive(pid)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_the_process_goes_with_a_killed_parent() -> None:
    code = (
        "import sys, time; sys.path.insert(0, 'tests/data/encode')\n"
        "from cwdpo.data.encode.render import Renderer\n"
        "class P:\n    def apply_chat_template(self, chat, **_): return 'a'\n"
        "r = [Renderer(P()) for _ in range(3)]\n"
        "[x([], generation=True) for x in r]\n"
        "print(*[x._child.pid for x in r], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_without_fork_it_is_rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(render.os, "fork")
    assert rendered("a") == "a"


def test_garbage_of_the_parent_is_not_collected_in_the_child() -> None:
    """A mapped tensor that is freed after its file was closed would end the child."""

    class Mapped:
        owner = os.getpid()

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if os.getpid() != self.owner:
                os._exit(3)

    class Collects(Templated):
        def apply_chat_template(self, *args: Any, **more: Any) -> str:
            gc.collect()
            return super().apply_chat_template(*args, **more)

    gc.disable()
    try:
        Mapped()
        assert "hello" in Renderer(Collects("hello"))(CHAT, generation=True)
    finally:
        gc.enable()


class Many(Templated):
    """Takes several conversations, as transformers' processors do; counts the calls in its text."""

    calls = 0

    def apply_chat_template(self, chat: Any, tokenize: bool, add_generation_prompt: bool) -> Any:
        self.calls += 1
        many = isinstance(chat[0], list)
        texts = [
            super(Many, self).apply_chat_template(one, tokenize, add_generation_prompt)
            for one in (chat if many else [chat])
        ]
        return texts if many else texts[0]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


CONTENT = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
REFUSES = "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}" + CONTENT


def test_conversations_are_rendered_together_as_alone() -> None:
    processor = Many(CONTENT)
    together = render._Together(processor)
    orders: list[render.Order] = [(said("a"), True, []), (said("b"), False, []), (said("c"), True, [])]
    wanted = [{"text": text} for text in ("a>", "b", "c>")]
    assert together(orders) == wanted
    processor.calls = 0
    assert together(orders) == wanted
    assert processor.calls == 2
    assert together([(said("a"), True, [{"name": "f"}])] * 2) == []
    assert Renderer(processor).many(orders) == ["a>", "b", "c>"]


def test_one_that_is_refused_does_not_refuse_the_others() -> None:
    orders: list[render.Order] = [(said(text), False, []) for text in "abc"]
    assert render._Together(Many(REFUSES))(orders) == []
    assert Renderer(Many(REFUSES)).many(orders) == ["a", None, "c"]


def test_a_processor_that_takes_one_conversation_at_a_time() -> None:
    orders: list[render.Order] = [(said(text), False, []) for text in "abc"]
    assert Renderer(Templated(CONTENT)).many(orders) == ["a", "b", "c"]


def test_a_processor_that_renders_several_in_another_way_is_found_out() -> None:
    class Other(Many):
        def apply_chat_template(self, chat: Any, tokenize: bool, add_generation_prompt: bool) -> Any:
            found = super().apply_chat_template(chat, tokenize, add_generation_prompt)
            return [text.upper() for text in found] if isinstance(found, list) else found

    orders: list[render.Order] = [(said(text), False, []) for text in "abc"]
    together = render._Together(Other(CONTENT))
    assert together(orders) == []
    assert together(orders) == []
    assert Renderer(Other(CONTENT)).many(orders) == ["a", "b", "c"]
