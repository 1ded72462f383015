"""With one process, nobody waits. Several processes: tests/pipeline/test_processes.py."""

from __future__ import annotations

from cwdpo import waiting


def test_one_process_gets_its_own_values_back() -> None:
    assert not waiting.several()
    waiting.prepare()
    waiting.wait_for_all("nothing")
    value = object()
    assert waiting.from_first(value, "nothing") is value
    assert waiting.of_all([1, 2], "nothing") == [1, 2]
    done = []
    with waiting.first_alone("nothing"):
        done.append(1)
    assert done == [1]
