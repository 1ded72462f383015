"""Every page of docs/tutorials does what it says: its files and commands in order, and the output that it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import needs_server
from tutorials import PAGES, Command, Reader, missing, same, steps, updated

SERVED = "on_policy_server"


def page(path: Path) -> pytest.param:
    return pytest.param(path, id=path.stem, marks=[needs_server] if path.stem == SERVED else [])


@pytest.mark.slow
@pytest.mark.parametrize("path", [page(path) for path in PAGES if path.stem != "index"])
def test_a_page_does_what_it_says(path: Path, tmp_path: Path) -> None:
    done = steps(path.read_text(encoding="utf-8"))
    assert any(isinstance(step, Command) for step in done)
    with Reader(tmp_path) as reader:
        for step in done:
            if isinstance(step, tuple):
                reader.write(*step)
                continue
            code, output = reader.run(step)
            assert code == step.code, f"{step.text}\n{output[-3000:]}"
            assert missing(step, output) is None, f"{step.text}\n{output[-3000:]}"


EXAMPLE = """
```yaml title="a.yaml"
x: 1
```

```console
$ cat a.yaml
x: 2
$ false  # exit code 1
```

```python
not_run()
```
"""


def test_a_page_is_read_as_files_and_commands() -> None:
    first, cat, false = steps(EXAMPLE)
    assert first == ("a.yaml", "x: 1\n")
    assert (cat, false) == (Command("cat a.yaml", ["x: 2"]), Command("false", [], 1))


def test_what_is_shown_must_be_printed_in_its_order(tmp_path: Path) -> None:
    assert same("loss  -0.5 at step 3", "loss +1e-3 at step 12")
    assert not same("loss 0.5", "losses 0.5")
    assert same("greedy -0.2  ...", "greedy -0.31  a red ring")
    assert not same("greedy -0.2  a ...", "greedy -0.31  the ring")
    assert missing(Command("x", ["a 1", "...", "c"]), "a 2\nb\nc\n") is None
    assert missing(Command("x", ["c", "a"]), "a\nb\nc\n") == "a"
    assert updated(EXAMPLE, Command("cat a.yaml", ["x: 2"]), "x: 7\n") == EXAMPLE.replace("x: 2", "x: 7")
    with Reader(tmp_path) as reader:
        reader.write("a.yaml", "x: 1\n")
        assert reader.run(Command("cat a.yaml; exit 4")) == (4, "x: 1\n")
