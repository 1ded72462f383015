"""Rows that workers encode are those of the main process, in the same order, with the same problems."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cwdpo.data.encode import encoding
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.encoding import encode_rows
from cwdpo.errors import WorkerError
from cwdpo.records import Completion, Example

ROWS = 40


@pytest.fixture(scope="module")
def reader(processor: Any) -> Encoder:
    return Encoder(processor, max_length=90, cache_gb=0, workers=1)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PART", 8)
    monkeypatch.setattr(encoding, "FEWEST", 2)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the parts that the main process encodes itself."""
    seen: list[int] = []
    original = Encoder.encodings

    def counted(self: Encoder, part: Sequence[Example], *args: Any, **named: Any) -> Iterator[Any]:
        seen.append(len(part))
        return original(self, part, *args, **named)

    monkeypatch.setattr(Encoder, "encodings", counted)
    return seen


def compared(reader: Encoder, processor: Any, rows: list[Example]) -> list[str]:
    plain = Encoder(processor, max_length=90, cache_gb=0)
    wanted, problems = plain.encode_all(rows, "rejected", require_negative=True)
    found, same = encode_rows(reader, rows, "rejected", require_negative=True)
    assert list(found) == wanted
    assert same == problems
    assert [rows[i].id for i in found.numbers] == [e.id for e in wanted]
    assert found[0].prompt.images.keys() == wanted[0].prompt.images.keys()
    return problems


def test_they_are_the_rows_of_the_main_process(
    reader: Encoder, processor: Any, examples: list[Example], here: list[int]
) -> None:
    """A row without tokens, one without a negative and one that is too long are told in their order."""
    rows = list(examples[:ROWS])
    rows[9] = replace(rows[9], chosen=Completion(""), where="rows.jsonl:10")
    rows[17] = replace(rows[17], rejected=(), where="rows.jsonl:18")
    rows[31] = replace(rows[31], chosen=Completion("a red circle " * 60), where="rows.jsonl:32")
    problems = compared(reader, processor, rows)
    assert [problem.partition(": ")[0] for problem in problems] == [f"rows.jsonl:{n}" for n in (10, 18, 32)]
    assert here == [ROWS, 8, 8, 8], (
        "two parts to learn from, and one that teaches nothing; the plain encoder takes all"
    )


def test_what_is_to_learn_is_learnt_here(
    reader: Encoder, processor: Any, examples: list[Example], here: list[int]
) -> None:
    """Prompts without an image, and with two, come late: each kind is compared with the processor here, eight times."""
    rows = list(examples[:ROWS])
    for i in range(16, 26):
        two = tuple(replace(m, parts=(None, None, "Which?")) for m in rows[i].prompt)
        rows[i] = replace(rows[i], images=rows[i].images * 2, prompt=two)
    for i in range(34, 36):
        rows[i] = replace(
            rows[i], images=(), prompt=tuple(replace(m, parts=("So?",)) for m in rows[i].prompt)
        )
    assert not compared(reader, processor, rows)
    assert here[0] == ROWS
    assert len(here) > 4, "more than the first three parts"


def test_few_rows_wait_for_no_worker(
    reader: Encoder, processor: Any, examples: list[Example], here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "FEWEST", ROWS + 1)
    assert not compared(reader, processor, list(examples[:ROWS]))
    assert here == [ROWS, *[8] * 5]


def test_a_killed_worker_is_one_error(processor: Any, examples: list[Example]) -> None:
    encoder = Encoder(processor, cache_gb=0, workers=1)
    encode_rows(encoder, examples[:ROWS], "rejected", require_negative=True)
    assert encoder.prompt.workers is not None
    assert encoder.prompt.workers._pool is not None
    for process in encoder.prompt.workers._pool._processes.values():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"died while rows were encoded .* lower train\.dataloader_workers"):
        encode_rows(encoder, examples[:ROWS], "rejected", require_negative=True)
