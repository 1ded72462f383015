"""The probe set of a stage: held-out responses by type, each with its provenance, as many as the budget allows."""

from __future__ import annotations

import contextlib
import hashlib
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import compress
from typing import Any

import numpy as np

from cwdpo.data.digests import digest8
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample, Encoder
from cwdpo.dynamics.settings import ProbeSettings
from cwdpo.errors import DataError
from cwdpo.monitor.responses import Response, read_probe_file, stored_responses, to_jsonl
from cwdpo.negatives.base import NEGATIVES, normalised
from cwdpo.records import Completion, Example, Origin
from cwdpo.stage.stage import Stage
from cwdpo.waiting import from_first
from cwdpo.worlds.judged import is_judgeable
from cwdpo.worlds.shapes import paraphrases

FEWEST_PROMPTS = 16
"""Smallest number of prompts, even if the budget allows fewer: with fewer the readings would be too noisy."""
FEWEST = 4
"""Smallest number of prompts with responses of every type, even if the budget allows fewer."""
FORWARD_BACKWARD = 2.0
"""Cost of a training step in forward passes over its tokens (measured on the embedded model)."""
EXTRA_PASSES = 3
"""Passes in addition to those every ``probes.every`` steps: start, end, and about one for sampling and encoding."""


@dataclass(frozen=True)
class Prompts:
    """The held-out prompts of a probe set.

    Attributes:
        examples: the examples; the first ones have further responses.
        encoded: the same examples, encoded with their negatives.
        extras: the further responses, encoded, by example id.
        responses: the further responses as text with provenance, by example id.
    """

    examples: list[Example]
    encoded: list[EncodedExample]
    extras: dict[str, list[EncodedCompletion]]
    responses: dict[str, list[Response]]

    @property
    def typed(self) -> list[Example]:
        """The examples with responses of every type."""
        return [e for e in self.examples if e.id in self.responses]

    def texts(self, kind: str) -> list[str]:
        """The responses of a type."""
        return [r.text for responses in self.responses.values() for r in responses if r.type == kind]

    @property
    def n_responses(self) -> int:
        """Number of responses in one measurement, without those sampled during it."""
        return sum(len(e.completions) + len(self.extras.get(e.id, ())) for e in self.encoded)


@dataclass(frozen=True)
class Load:
    """The amount of training in a stage.

    Attributes:
        tokens: tokens of one optimizer step.
        steps: number of optimizer steps.
        shared: whether shared-prefix rows are used, so that a prompt is processed once for all its completions.
    """

    tokens: float
    steps: int
    shared: bool


def within_budget(encoded: Sequence[EncodedExample], load: Load, settings: ProbeSettings) -> tuple[int, int]:
    """How many prompts the budget allows, and how many of them with responses of every type.

    The budget is spent on chosen responses and negatives first; the rest is spent on responses of every type. The cost
    is counted in tokens, not in seconds, so that a repeated run uses the same prompts.

    Args:
        encoded: held-out prompts with their negatives.
        load: the amount of training that the budget is a share of.
        settings: budget, response types and steps between measurements.

    Returns:
        (number of prompts, number of prompts with all types): at least :data:`FEWEST_PROMPTS` and, if there are
        types, :data:`FEWEST`, as far as there are so many prompts.
    """
    passes = load.steps / settings.every + EXTRA_PASSES
    left = settings.budget * FORWARD_BACKWARD * load.tokens * load.steps / passes

    def every_type(example: EncodedExample) -> int:
        prompt = 0 if load.shared else len(example.prompt.input_ids)
        return len(settings.types) * (prompt + len(example.chosen.ids))

    # Set aside the smallest number with every type, then add prompts, then add types to more of these prompts.
    left -= sum(map(every_type, encoded[:FEWEST]))
    prompts = 0
    for example in encoded:
        left -= sum(example.row_tokens(shared=load.shared))
        if left < 0 and prompts >= FEWEST_PROMPTS:
            break
        prompts += 1
    typed = FEWEST
    while typed < prompts and (left := left - every_type(encoded[typed])) >= 0:
        typed += 1
    return prompts, min(typed, prompts) if settings.types else 0


def build_prompts(stage: Stage, load: Load, sampler: Callable[[Sequence[Example]], list[str]]) -> Prompts:
    """Build the probe set of a stage and store it as ``probes-<stage>.jsonl``; a resumed stage reads that file.

    Held-out examples that cannot be used are left out, with a line in ``problems.jsonl``.

    Args:
        stage: the stage.
        load: the amount of training that the budget is a share of.
        sampler: returns a sample of the current policy for each prompt.

    Raises:
        DataError: ``probes.file`` cannot be read.
    """
    settings, encoder = stage.recipe.probes, stage.encoder
    held_out, given = stage.held_out, dict[str, list[Response]]()
    if settings.file is not None:
        held_out, given = read_probe_file(settings.file)
    encoded, usable, problems = [], [], []
    for example in held_out[: settings.prompts]:
        try:
            one = encoder.encode(example)
            _ = one.prompt.images  # an image that cannot be decoded is found here
            encoded.append(one)
            usable.append(example)
        except DataError as error:
            problems.append(str(error))
    stage.note_problems(problems, "/probes")
    prompts, typed_prompts = within_budget(encoded, load, settings)
    typed = usable[:typed_prompts]
    path = stage.run.path / f"probes-{stage.name}.jsonl"
    if stage.resume and path.is_file():
        # Use the stored prompts, even if the recipe now has more steps and so a larger budget.
        stored = stored_responses(stage.run.rows(path.name))
        measured = [e.id in stored for e in usable]
        asked = {e.id for e in typed}
        responses = {id_: stays for id_, stays in stored.items() if stays or id_ in asked}
    else:
        measured = [i < prompts for i in range(len(usable))]
        pools = {"other_train": stage.examples, "other_test": held_out}
        made = make_responses(typed, pools, settings.types, given, sampler, stage.recipe.seed)
        responses = {e.id: [r for r in made[e.id] if _encoded(encoder, e, r)] for e in typed}
        stage.run.write_text(path.name, to_jsonl(usable[:prompts], responses))
    encoded, usable = list(compress(encoded, measured)), list(compress(usable, measured))
    extras = {e.id: [c for r in responses.get(e.id, ()) if (c := _encoded(encoder, e, r))] for e in usable}
    return Prompts(usable, encoded, extras, responses)


def make_responses(
    examples: Sequence[Example],
    pools: Mapping[str, Sequence[Example]],
    types: Sequence[str],
    given: Mapping[str, Sequence[Response]],
    sampler: Callable[[Sequence[Example]], list[str]],
    seed: int,
) -> dict[str, list[Response]]:
    """Responses of every type, by example id. If a type cannot be made for an example, it is left out.

    Args:
        examples: the held-out examples.
        pools: the examples from which types ``other_train`` and ``other_test`` take a chosen response.
        types: the response types to make.
        given: responses from a file, by example id; they are kept.
        sampler: returns a sample of the current policy for each prompt.
        seed: of all random choices.
    """
    responses: dict[str, list[Response]] = {e.id: list(given.get(e.id, ())) for e in examples}
    others = {kind: _Others(kind, pool) for kind, pool in pools.items()}
    makers: dict[str, Callable[[Example, random.Random], Response | None]] = {
        "chosen_paraphrase": lambda e, rng: _paraphrase(
            "chosen_paraphrase", e, e.chosen.text, e.references, rng
        ),
        "rejected_paraphrase": _rejected_paraphrase,
        "other_train": lambda e, rng: others["other_train"].response(e, rng),
        "other_test": lambda e, rng: others["other_test"].response(e, rng),
        "unrelated": lambda e, rng: _unrelated(rng),
        "shuffled": _shuffled,
    }
    for example in examples:
        has = {r.type for r in responses[example.id]}
        for kind in (t for t in types if t in makers and t not in has):
            made = makers[kind](example, _rng(seed, example.id, kind))
            if made is not None:
                responses[example.id].append(made)
    if "chosen_initial" in types:
        asked = [e for e in examples if "chosen_initial" not in {r.type for r in responses[e.id]}]
        texts = from_first(sampler(asked) if asked else [], "sampling for the probes")
        for example, text in zip(asked, texts, strict=True):
            if text.strip():
                source = f"sampled from the policy at the start of the stage, temperature 1, seed {seed}"
                responses[example.id].append(Response("chosen_initial", text, source))
    return responses


def _rng(*key: object) -> random.Random:
    return random.Random(hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest())


def _rejected_paraphrase(example: Example, rng: random.Random) -> Response | None:
    """A paraphrase of the first negative that differs from chosen in its text."""
    text = next((c.text for c in example.rejected if c.images is None), None)
    return None if text is None else _paraphrase("rejected_paraphrase", example, text, (), rng)


def _paraphrase(
    kind: str, example: Example, text: str, references: Sequence[str], rng: random.Random
) -> Response | None:
    if is_judgeable(example):
        said = [t for t in paraphrases(text) if normalised(t) != normalised(text)]
        return (
            Response(kind, rng.choice(said), "the world's grammar: the same facts in other words")
            if said
            else None
        )
    others = [(i, t) for i, t in enumerate(references) if normalised(t) != normalised(text)]
    if not others:
        return None
    index, other = rng.choice(others)
    return Response(kind, other, f"reference {index} of the same picture, by another writer")


class _Others:
    """Chosen responses of other examples, for one response type; the pool is read once, and digests of it are kept."""

    def __init__(self, kind: str, pool: Sequence[Example]) -> None:
        self.kind, self.pool = kind, pool

    @cached_property
    def _digests(self) -> tuple[Any, Any]:
        seen, said = array("Q"), array("Q")
        for example in self.pool:
            seen.append(_seen(example))
            said.append(_said(example.chosen.text))
        return np.asarray(seen), np.asarray(said)

    def response(self, example: Example, rng: random.Random) -> Response | None:
        """A chosen response to other images that is not known to be true of these."""
        seen, said = self._digests
        true = [_said(text) for text in (example.chosen.text, *example.references)]
        usable = np.flatnonzero((seen != _seen(example)) & ~np.isin(said, np.array(true, dtype=np.uint64)))
        if not len(usable):
            return None
        other = self.pool[int(rng.choice(usable))]
        return Response(self.kind, other.chosen.text, f"chosen of {other.id}")


def _seen(example: Example) -> int:
    data = [one.data or b"" for media in (example.images, example.videos) for one in media]
    said = repr((example.images, example.videos)).encode("utf-8", "surrogatepass")
    return digest8(b"\0".join([said, *data]))


def _said(text: str) -> int:
    return digest8(normalised(text).encode("utf-8", "surrogatepass"))


def _unrelated(rng: random.Random) -> Response:
    text = resources.files("cwdpo.probes").joinpath("unrelated.txt").read_text(encoding="utf-8")
    number, line = rng.choice(list(enumerate(text.splitlines(), 1)))
    return Response("unrelated", line, f"line {number} of the package's unrelated.txt")


def _shuffled(example: Example, rng: random.Random) -> Response | None:
    # A shuffled negative of the data is this type already.
    if any(c.kind == "shuffled" for c in example.rejected):
        return None
    made: list[Completion] = NEGATIVES.build("shuffled").completions(example, (), rng)
    return Response("shuffled", made[0].text, "the words of chosen in random order") if made else None


def _encoded(encoder: Encoder, example: Example, response: Response) -> EncodedCompletion | None:
    """The encoded response; ``None`` if the tokenizer has no tokens for its text, since its score would be useless."""
    try:
        ids = encoder.completion_ids(example, response.text)
    except DataError:
        return None
    if encoder.tokenizer.unk_token_id in ids:
        return None
    origin: Origin = "on_policy" if response.type == "chosen_initial" else "dataset"
    return EncodedCompletion(ids, origin, response.type, (0, len(ids)))


def as_chosen(
    encoder: Encoder, examples: Sequence[Example], texts: Sequence[str], kind: str
) -> list[EncodedExample]:
    """Examples whose chosen responses are the sampled texts; a text without tokens is left out."""
    found = []
    for example, text in zip(examples, texts, strict=True):
        with contextlib.suppress(DataError):
            ids = encoder.completion_ids(example, text)
            completion = EncodedCompletion(ids, "on_policy", kind, (0, len(ids)))
            found.append(EncodedExample(example.id, encoder.prompt(example), completion))
    return found
