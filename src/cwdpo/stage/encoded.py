"""The encoded rows of a stage in the run folder: a resumed run opens them again."""

from __future__ import annotations

import contextlib
from hashlib import blake2b
from typing import Any

from cwdpo.data.encode.encoded_rows import SCHEMA, EncodedRows, write_rows
from cwdpo.data.encode.encoding import encode_rows, encoded_batches
from cwdpo.errors import FileError
from cwdpo.files.checksums import Running, difference
from cwdpo.files.writing import replacing
from cwdpo.stage.stage import Stage
from cwdpo.versions import version_of, versions

FOLDER = "encoded"


def stored_rows(stage: Stage, *, require_negative: bool) -> tuple[EncodedRows, list[str]]:
    """The encoded examples of a stage, and a message for each that cannot be used.

    They are written to ``encoded/<stage>.arrow``. A resumed run reads that file, unless rows, images, processor,
    settings or versions are other ones now, or the file was changed: then it encodes again. Processes that do not
    write to the run folder, and runs without digests of their inputs, use a temporary file.

    Raises:
        DataError: the file cannot be written.
        WorkerError: a worker died.
    """
    run, encoder, negatives = stage.run, stage.encoder, stage.negatives
    inputs = run.json("inputs.json")
    if not (run.writes and inputs):
        return encode_rows(encoder, stage.examples, negatives, require_negative=require_negative)
    folder, name = run.path / FOLDER, f"{stage.name}.arrow"
    made_of = _made_of(stage, inputs, require_negative=require_negative)
    known: Any = {}
    if stage.resume:
        with contextlib.suppress(FileError):
            known = run.json(f"{FOLDER}/{stage.name}.json")
    whole = known == _note(made_of, known.get("file"), known.get("problems"))
    if whole and not difference(folder, name, known["file"]):
        return EncodedRows(folder / name, stage.examples, negatives, encoder), known["problems"]
    problems: list[str] = []
    with replacing(folder / name, durable=False) as temporary:
        batches = encoded_batches(
            encoder, stage.examples, negatives, problems, require_negative=require_negative
        )
        write_rows(temporary, batches)
    entry = Running().entry(folder / name)
    run.write_json(f"{FOLDER}/{stage.name}.json", _note(made_of, entry, problems))
    return EncodedRows(folder / name, stage.examples, negatives, encoder), problems


def forget_rows(stage: Stage) -> None:
    """Remove a stage's rows: nothing reads them once it has ended. Rows in use stay mapped.

    Called before the stage's model is saved: a run killed in between encodes again; one killed after has none left.
    """
    if not stage.run.writes:
        return
    folder = stage.run.path / FOLDER
    for end in (".json", ".arrow"):
        (folder / f"{stage.name}{end}").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _note(made_of: str, entry: Any, problems: Any) -> dict[str, Any]:
    """What stands beside the rows; its digest tells whether anything in it was changed."""
    found = {"made_of": made_of, "file": entry, "problems": problems}
    return {**found, "digest": _digest(found)}


def _digest(facts: Any) -> str:
    return blake2b(repr(facts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _made_of(stage: Stage, inputs: Any, *, require_negative: bool) -> str:
    """A digest of all that the encoded rows depend on."""
    data, encoder = stage.recipe.data, stage.encoder
    facts = [
        inputs.get(stage.name), {k: v for k, v in inputs["model"].items() if k != "weights"},
        encoder.max_length, data.image_tokens, data.image_root, encoder.template.checkpoint, stage.negatives,
        require_negative, encoder.prompt.image_settings, str(SCHEMA), sorted(versions().items()),
        version_of("tokenizers"),
    ]  # fmt: skip
    return _digest(facts)
