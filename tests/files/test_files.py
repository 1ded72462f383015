"""Files of others: nothing is followed, nothing is endless, and every failure is one line that names the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdpo.errors import FileError
from cwdpo.files import reading, writing
from cwdpo.files.reading import DEEPEST, is_deep, parse_json, read_json, read_jsonl, read_object, read_text
from cwdpo.files.writing import (
    clear_pieces,
    clear_unfinished,
    copy_folder,
    discard,
    new_folder,
    open_to_append,
    refuse_links,
    replacing,
    temporary_name,
    unfinished_in,
    write_text,
)
from cwdpo.files.yamlfile import dump_yaml, parse_scalar, parse_yaml

# --- writing --------------------------------------------------------------------------------------------


def test_two_temporary_names_differ_and_a_taken_one_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    assert len({temporary_name(path) for _ in range(100)}) == 100
    outside = tmp_path / "outside"
    outside.write_text("precious")
    monkeypatch.setattr(writing.secrets, "token_hex", lambda n: "ab")
    (tmp_path / ".report.html.ab.tmp").symlink_to(outside)
    with pytest.raises(FileExistsError):
        write_text(path, "page")
    with pytest.raises(FileExistsError), new_folder(path):
        pytest.fail("the name is taken")
    assert outside.read_text() == "precious"


def test_a_name_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", tmp_path / "report.html"
    outside.write_text("precious")
    path.symlink_to(outside)
    write_text(path, "page")
    assert (outside.read_text(), path.read_text(), path.is_symlink()) == ("precious", "page", False)


def test_a_link_is_not_appended_to(tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", tmp_path / "metrics.jsonl"
    path.symlink_to(outside)
    with pytest.raises(FileError, match=r"metrics\.jsonl: is a link; .*put what it points at in its place"):
        open_to_append(path)
    assert not outside.exists()


def test_files_keep_the_rights_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("make", [replacing, new_folder])
def test_after_an_error_nothing_is_left(tmp_path: Path, make: Any) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "a"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with new_folder(tmp_path / "a") as folder:
            assert folder.name.startswith(".a.")
            (folder / "x").write_text(text)
    assert (tmp_path / "a" / "x").read_text() == "new"
    discard(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_what_killed_writings_of_one_name_left_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.0123456789abcdef.tmp").write_text("half")
    (tmp_path / ".a.0123456789abcdee.tmp").mkdir()
    (tmp_path / ".a.0123456789abcdee.tmp" / "x").write_text("half")
    others = [
        ".a.tmp",
        ".a.mine.tmp",
        ".ab.0123456789abcdef.tmp",
        "a",
        "a.0123456789abcdef.tmp",
        ".b.a.0123456789abcdef.tmp",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    assert unfinished_in(tmp_path) == {"a", "ab", "b.a"}
    assert unfinished_in(tmp_path / "none") == set()
    assert clear_unfinished(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    assert not clear_unfinished(tmp_path / "a")
    assert not clear_unfinished(tmp_path / "none" / "a")


# --- links and pipes ------------------------------------------------------------------------------------


def test_links_and_pipes_are_refused_at_any_depth(tmp_path: Path) -> None:
    deep = tmp_path / "run" / "stage1" / "model"
    deep.mkdir(parents=True)
    (deep / "config.json").write_text("{}")
    refuse_links(tmp_path / "run")
    (deep / "x").symlink_to("config.json")
    with pytest.raises(FileError, match=r"stage1/model/x: is a link"):
        refuse_links(tmp_path / "run")
    (deep / "x").unlink()
    os.mkfifo(deep / "pipe")
    with pytest.raises(FileError, match=r"stage1/model/pipe: is a named pipe"):
        refuse_links(tmp_path / "run")


def test_names_that_are_nobodys_business_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    refuse_links(tmp_path, lambda name: name != "mine")


def test_a_folder_with_a_link_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileError, match=r"notes\.txt: is a link"):
        copy_folder(tmp_path / "model", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_piece_that_is_a_link_to_a_folder_goes_and_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".x.tmp").symlink_to(tmp_path / "outside")
    clear_pieces(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []
    assert (tmp_path / "outside" / "a").is_file()


def test_a_pipe_keeps_no_reader_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    code = "import pathlib, sys; from cwdpo.files.reading import *; read_json(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.splitlines()[-1].endswith("a.json: is not a file")


# --- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 100_000, "is not JSON (nested too deep)"),
        (b'{"a":' * 100_000, "is not JSON (nested too deep)"),
        (b"[" * 200 + b"]" * 200, f"is nested deeper than {DEEPEST}"),
        (b"{", "is not JSON (Expecting property name"),
        (b"\xff\xfe", "is not JSON ("),
        (b"", "is not JSON (Expecting value"),
        (b"9" * 5000, "is not JSON (Exceeds the limit"),
        (b"[" + b"9" * 400 + b"]", "contains a number of more than 300 digits"),
        (b"[1]", "holds a JSON list where an object belongs"),
        (b"null", "holds a JSON null where an object belongs"),
    ],
    ids=[
        "deep-lists",
        "deep-objects",
        "rather-deep",
        "cut",
        "utf-16",
        "empty",
        "long-number",
        "infinite-number",
        "list",
        "null",
    ],
)
def test_json_that_is_none(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    path.write_bytes(data + b"\n" + b"{}\n")
    if data:
        with pytest.raises(FileError, match=r"x\.json: line 1: "):
            read_jsonl(path)


def test_large_files_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(reading.MOST_BYTES + 1)
    with pytest.raises(FileError, match=r"x\.json: has more than 67108864 bytes"):
        read_json(path)
    with pytest.raises(FileError, match="line 1: has more than"):
        read_jsonl(path)
    with pytest.raises(FileError, match="absent: cannot be read"):
        read_text(tmp_path / "absent")


@given(
    st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_json_of_usual_depth_is_what_pythons_reader_says(value: Any) -> None:
    assert parse_json(json.dumps(value), "x") == value


@pytest.mark.parametrize("depth", [0, 1, 5, DEEPEST, DEEPEST + 1])
def test_depth_is_counted_in_lists_and_mappings(depth: int) -> None:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    assert is_deep(value) == (depth > DEEPEST)
    assert is_deep(value, 4) == (depth > 4)


# --- YAML -----------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join(['*' + b] * 10)}]\n" for b, n in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 10000 values; aliases"),
        ("a: &a {b: *a}\n", "nested deeper than 30"),
        ("[" * 3000, "not valid YAML: nested too deep"),
        ("train: {a: 1}\nmodel: {}\ntrain: {b: 2}\n", "the key 'train' is given twice, in lines 1 and 3"),
        ("a: {b: 1, b: 2}\n", "the key 'b' is given twice"),
        ("a: !!python/name:os.system\n", "not valid YAML"),
        ("? [1]\n: 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("a: 0x_\n", "not valid YAML"),
    ],
    ids=[
        "bomb",
        "circle",
        "deep",
        "twice",
        "twice-inside",
        "tag",
        "list-key",
        "two-documents",
        "null-byte",
        "number",
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(FileError) as caught:
        parse_yaml(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert said in str(caught.value)


def test_aliases_and_merges_within_the_limits_are_read() -> None:
    text = "base: &b {a: 1, b: 2}\nmine: {<<: *b, b: 3}\nsame: *b\n"
    assert parse_yaml(text, "x") == {
        "base": {"a": 1, "b": 2},
        "mine": {"a": 1, "b": 3},
        "same": {"a": 1, "b": 2},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-3", -3),
        ("0", 0),
        ("010", "010"),
        ("0123456", "0123456"),
        ("1_000_000", 1_000_000),
        ("0x10", 16),
        ("1.5", 1.5),
        ("1.0e-5", 1e-5),
        ("5e5", "5e5"),
        ("12e4567", "12e4567"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", True),
        ("off", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("/a #1/t.jsonl", "/a #1/t.jsonl"),
        ("a: b", "a: b"),
        ("!x", "!x"),
        ("*", "*"),
        ("-", "-"),
    ],
)
def test_plain_scalars(text: str, value: Any) -> None:
    found = parse_scalar(text)
    assert (found, type(found)) == (value, type(value))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])
) | st.from_regex(r"[-+]?[0-9._eExX:]{1,8}", fullmatch=True)  # fmt: skip


@given(st.dictionaries(st.text("abc", min_size=1), LEAVES | st.lists(LEAVES, max_size=3), max_size=4))
def test_what_is_written_is_read_back(tree: dict[str, Any]) -> None:
    assert parse_yaml(dump_yaml(tree), "x") == tree
