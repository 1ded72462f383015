"""What the cells of one worker process share: rows, encoded rows, image features, first measurements.

Everything here is what a cell would compute itself, to the last bit, so a cell does not depend on the cells that ran
before it in its process. The grid gives a worker cells of the same data as long as there are any.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import EncodedExample, Encoder, NegativeSet, offered
from cwdpo.data.read.reader import read_examples
from cwdpo.models.load import EMBEDDED, Policy
from cwdpo.models.vision_cache import share_vision_features
from cwdpo.monitor.probe_pass import ProbeSet
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.model import encoder_of
from cwdpo.stage.splits import Splits, prepare_data

T = TypeVar("T")
MOST = 8
"""Number of values of a kind that are kept; the one that was used longest ago makes room."""
MOST_ROWS = 20_000
"""Number of encoded rows that an encoder keeps."""
_NOTES = ("problems.jsonl", "notes.jsonl")
"""Files that preparing the data writes to the run folder."""
_KEPT: dict[str, OrderedDict[Hashable, Any]] = {}


def kept(kind: str, key: Hashable, make: Callable[[], T]) -> T:
    """The value of a key, made now if it is not kept."""
    values = _KEPT.setdefault(kind, OrderedDict())
    if key not in values:
        made = make()
        values[key] = made
        while len(values) > MOST:
            values.popitem(last=False)
    values.move_to_end(key)
    value: T = values[key]
    return value


def forget() -> None:
    """Keep nothing of what is kept now."""
    _KEPT.clear()


def splits_of(recipe: Recipe, run: RunDir) -> Splits:
    """The data of a cell, as :func:`cwdpo.stage.splits.prepare_data` gives and notes it."""
    data, need = recipe.data, recipe.stage2.build().needs_negatives
    if data.world is not None:  # written to the run folder
        return prepare_data(recipe, run)
    sources = (*(one.path for one in data.each()), data.validation_path)
    key = (
        data.model_dump_json(), recipe.negatives.model_dump_json(), recipe.seed, recipe.stage1.enabled,
        recipe.stage2.enabled, *(_stamp(Path(path)) for path in sources if path),
    )  # fmt: skip

    def make() -> tuple[Splits, dict[str, str]]:
        found = prepare_data(recipe, run)
        noted = {name: run.path / name for name in _NOTES}
        return found, {n: p.read_text(encoding="utf-8") for n, p in noted.items() if p.is_file()}

    splits, noted = made = kept("splits", (*key, need), make)
    if all(example.rejected for example in splits.stage2):  # then it does not matter whether they are needed
        kept("splits", (*key, not need), lambda: made)
    for name, text in noted.items():
        run.write_text(name, text)
    return splits


def held_rows(path: Path, recipe: Recipe) -> Sequence[Example]:
    """The rows of a test set."""
    reading = {**recipe.data.reading, "captions_per_image": 1}

    def make() -> Sequence[Example]:
        return read_examples(path, **reading).examples

    return kept("test", (str(path), _stamp(path), repr(reading)), make)


def encoder_for(policy: Policy, recipe: Recipe) -> Encoder:
    """The encoder of a policy; cells whose models have the same processor share it, with what it encoded."""
    made = encoder_of(policy, recipe)
    files = _processor(recipe.model.path)
    if not files:
        return made
    data, train = recipe.data, recipe.train
    said = (data.max_length, data.cache_gb, data.image_tokens, data.image_cache, train.dataloader_workers)
    key = (files, repr(recipe.model.processor_options), repr(vars(made.template.checkpoint)), said)
    return kept("encoder", key, lambda: SharedEncoder(made))


def share_features(policy: Policy, recipe: Recipe) -> None:
    """Let the policy use the image features that earlier cells with the same frozen vision tower computed."""
    share_vision_features(policy.model, kept("features", recipe.model.vision_cache_gb, dict))


def first_measured(policy: Policy, encoder: Encoder, start: Hashable, test: Sequence[Example]) -> ProbeSet:
    """The probe set of test rows, scored with the model at the start; cells with the same start share it.

    Args:
        policy: with the weights of the start.
        encoder: of the policy.
        start: tells one start from another, also in its test rows.
        test: the rows to measure.
    """

    def make() -> ProbeSet:
        held = encoder.encode_all(test, "rejected", require_negative=False)[0]
        return ProbeSet(held, policy.model)

    return kept("probes", start, make)


def start_of(recipe: Recipe, test: Path) -> Hashable:
    """What the first measurement of a cell depends on: the model that it starts from, and the test rows."""
    folder = EMBEDDED if recipe.model.path == "embedded" else Path(recipe.model.path)
    weights = tuple((p.name, _stamp(p)) for p in sorted(folder.glob("*.safetensors")))
    settings = (
        recipe.model.model_dump_json(),
        recipe.data.model_dump_json(exclude={"path", "validation_path"}),
    )
    return settings, weights, recipe.seed, str(test), _stamp(test)


def with_shared_reference(recipe: Recipe, first: Path | None) -> Recipe:
    """The recipe with a reference cache beside the first stage that the cell starts from, if it names no other."""
    if first is None or recipe.train.reference_cache is not None:
        return recipe
    train = recipe.train.model_copy(update={"reference_cache": str(first / "reference")})
    return recipe.model_copy(update={"train": train})


class SharedEncoder(Encoder):
    """An encoder that also keeps encoded rows, :data:`MOST_ROWS` of them, not only prompts and images."""

    def __init__(self, encoder: Encoder) -> None:
        vars(self).update(vars(encoder))
        self._rows: dict[Hashable, EncodedExample] = {}

    def forget(self) -> None:
        """Empty the caches of rows, prompts and images."""
        self._rows.clear()
        super().forget()

    def encode(self, example: Example, negatives: NegativeSet = "rejected") -> EncodedExample:
        """See :meth:`Encoder.encode`."""
        # Rows may be read from disk at each use, so they are told apart by what is in them.
        key = (
            example.id, example.source, example.where, example.images, example.videos, example.prompt,
            repr((example.chosen, offered(example, negatives))), negatives,
        )  # fmt: skip
        if key not in self._rows:
            if len(self._rows) >= MOST_ROWS:
                self.forget()
            self._rows[key] = super().encode(example, negatives)
        return self._rows[key]


def _stamp(path: Path) -> tuple[int, int]:
    """When a file was written and its size; of an id of the hub, zeros."""
    if not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _processor(source: str) -> str:
    """Digest of the files of a model folder that are not weights; empty for an id of the hub."""
    folder = EMBEDDED if source == "embedded" else Path(source)
    if not folder.is_dir():
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and path.suffix in (".json", ".jinja", ".txt", ".model")
            and path.stem != "checksums"
        ):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
