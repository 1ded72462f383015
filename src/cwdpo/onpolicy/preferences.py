"""``cwdpo sample``: makes a preference data set in TRL's vision format from prompts and samples of a policy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers import set_seed

from cwdpo.config import Recipe, parse_recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.video_store import store_video
from cwdpo.errors import DataError
from cwdpo.files.writing import clear_unfinished, replacing, unfinished_in, write_text
from cwdpo.judging.base import judge_for
from cwdpo.models.load import load_processor_alone
from cwdpo.models.settings import LoraSettings
from cwdpo.onpolicy.best_worst import best_and_worst
from cwdpo.onpolicy.blend import BlendCounts, blend
from cwdpo.onpolicy.on_ray import RayOptions, RaySampler
from cwdpo.onpolicy.pool import Pool
from cwdpo.onpolicy.sampler import ANSWERS, Sampler, ServerSampler, loaded_sampler
from cwdpo.onpolicy.samples import sort_samples
from cwdpo.records import Example, ImageRef, Message, VideoRef, without_tools
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.stage.splits import prepare_data

Chosen = Literal["data", "best"]
FORMATS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Made:
    """The written file, its number of rows (pairs), the counts of their negatives, and new answers by server."""

    path: Path
    rows: int
    counts: BlendCounts
    answered: Mapping[str, int] = field(default_factory=dict)


def sampling_recipe(recipe: Recipe, model: str | None) -> Recipe:
    """The recipe for ``cwdpo sample``: one round over all training examples, by default with on-policy negatives only.

    Args:
        recipe: the user's recipe.
        model: a model to use instead of ``model.path``.
    """
    negatives = recipe.negatives
    fraction = 1.0 if negatives.on_policy_fraction is None else negatives.fraction(0)
    alone = {"enabled": False}
    return recipe.model_copy(
        update={
            # If `model` is an adapter, its own LoRA settings are used.
            "model": recipe.model
            if model is None
            else recipe.model.model_copy(update={"path": model, "lora": LoraSettings()}),
            "stage1": recipe.stage1.model_copy(update=alone),
            "stage2": recipe.stage2.model_copy(update={"enabled": True}),
            "negatives": negatives.model_copy(update={"on_policy_fraction": fraction, "rounds": 1}),
        }
    )


def on_servers(recipe: Recipe, urls: Sequence[str], model: str | None = None) -> Recipe:
    """The recipe with samples from these servers; unchanged if there are none.

    Args:
        recipe: the other settings of its ``negatives.sampler.server``, if it has one, are kept.
        urls: addresses, e.g. ``http://localhost:8000/v1``.
        model: name of the model on the servers, if the recipe names none; default: ``model.path``.

    Raises:
        RecipeError: an address is given twice.
    """
    if not urls:
        return recipe
    tree = recipe.model_dump(mode="json")
    sampler = tree["negatives"]["sampler"]
    known = sampler["server"] or {"model": model or recipe.model.path}
    sampler["server"] = {**known, "base_url": urls[0] if len(urls) == 1 else list(urls)}
    return parse_recipe(tree)


def make_preferences(
    recipe: Recipe,
    out: str | Path,
    *,
    model: str | None = None,
    chosen: Chosen = "data",
    listener: Listener | None = None,
    ray: RayOptions | None = None,
) -> Made:
    """Sample a policy for every training prompt of a recipe, and write pairs of chosen and rejected responses.

    Until the file is complete, the samples are kept in the folder ``.<name>.work`` next to it. If the command was
    killed and is started again, it continues from there and writes the same file.

    Args:
        recipe: gives data, sampler, judge, and the mix with other sources.
        out: a new ``.jsonl`` file (images are copied to a folder next to it) or ``.parquet`` file (with the images).
        model: the policy, instead of ``model.path``.
        chosen: ``data``: the data's chosen response, against samples that are not right; ``best``: the best sample
            against the worst, by the judge's scores (:func:`cwdpo.onpolicy.best_worst.best_and_worst`).
        listener: progress callbacks.
        ray: sample with actors of Ray, with the same result, see :mod:`cwdpo.onpolicy.on_ray`; default: in this
            process.

    Raises:
        CwdpoError: see :class:`cwdpo.onpolicy.on_ray.RaySampler`.
        DataError: the file exists, has another ending, no pair could be made, or ``best`` has no judge.
    """
    out, listener = Path(out), listener or Listener()
    if out.suffix not in FORMATS:
        raise DataError(f"{out}: unknown ending {out.suffix!r}; allowed: {', '.join(FORMATS)}")
    if recipe.data.streaming is not None:
        raise DataError(
            "data.streaming: a file is made of all rows: set data.streaming=false, and data.limit"
        )
    if out.exists():
        raise DataError(f"{out}: exists already; remove it, or choose another --out")
    recipe = sampling_recipe(recipe, model)
    PartialState(cpu=recipe.model.device == "cpu")
    actors = None if ray is None else RaySampler(recipe, ray)
    run = RunDir(out.with_name(f".{out.name}.work"))
    run.lock()
    try:
        run.recover()
        made = _make(recipe, run, out, chosen, listener, actors)
    finally:
        run.unlock()
    shutil.rmtree(run.path)
    return made


def _make(
    recipe: Recipe, run: RunDir, out: Path, chosen: Chosen, listener: Listener, actors: RaySampler | None
) -> Made:
    listener.phase("reading data")
    splits = prepare_data(recipe, run)
    examples = splits.stage2
    for note in splits.notes:
        listener.note(note)
    set_seed(recipe.seed)
    listener.phase("loading the model")
    encoder, sampler, work = _sampler(recipe, run, actors)
    readable = encoder.readable(examples, len(examples))
    settings = recipe.negatives
    judge = judge_for(settings.judge, readable)
    if judge is None and chosen == "best":
        raise DataError(
            "the best and the worst sample are found by a judge's scores, and the recipe has none: set "
            "negatives.judge, for example {name: references}, where the rows have references"
        )
    pooled, in_batches = recipe, judge
    if chosen == "best":
        # Judged at the end; the recipe without a judge keeps stored samples apart from judged ones.
        unjudged = settings.model_copy(update={"judge": {"name": "none"}})
        pooled, in_batches = recipe.model_copy(update={"negatives": unjudged}), None
    listener.phase(f"sampling {len(readable)} prompts")
    pool, progress = Pool(run, pooled, encoder, in_batches), partial(listener.sampled, 0)
    if isinstance(sampler, RaySampler):
        drawn = pool.fill_by(readable, sampler, 0, 0, progress)
    else:
        with work:
            drawn = pool.fill(readable, sampler, 0, 0, progress)
    if judge is not None and chosen == "best":
        listener.phase("judging")
        pairs, counts = best_and_worst(readable, drawn, judge, settings, run.path)
    else:
        sampled = {e.id: sort_samples(e, drawn[e.id], settings) for e in readable}
        pairs, counts = blend(readable, sampled, settings, recipe.seed, 0)
    if not pairs:
        raise DataError(
            f"no pair could be made: samples of {len(readable)} prompts were dropped as {dict(counts.dropped)}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = list(trl_rows(pairs))
    if out.suffix == ".parquet":
        _write_parquet(out, rows)
    else:
        _write_jsonl(out, rows)
    servers = sampler.client.servers.servers if isinstance(sampler, ServerSampler) else ()
    return Made(out, len(rows), counts, {server.url: server.answered for server in servers})


def _sampler(
    recipe: Recipe, run: RunDir, actors: RaySampler | None
) -> tuple[Encoder, Sampler | RaySampler, AbstractContextManager[None]]:
    """Encoder, sampler, and what it samples in. Where servers or actors sample, no weights are loaded here."""
    settings, store = recipe.negatives.sampler, run.path / ANSWERS
    if actors is not None:
        return _encoder(recipe), actors, nullcontext()
    if settings.server is not None:
        return _encoder(recipe), ServerSampler(settings, store), nullcontext()
    return loaded_sampler(recipe)


def _encoder(recipe: Recipe) -> Encoder:
    """The encoder without the weights."""
    processor, tokens = load_processor_alone(recipe.model)
    sizes = recipe.data.image_tokens == "sizes"
    return Encoder(processor, recipe.data.max_length, recipe.data.cache_gb, tokens, from_sizes=sizes)


def trl_rows(examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """One row per pair: TRL's columns, and ``negatives`` with the origin of the rejected response.

    ``images`` (and ``rejected_images`` of an image-side negative) contain :class:`ImageRef` objects, ``videos``
    :class:`VideoRef` objects. The columns that
    a judge needs (``references``, the world's scene) are kept.
    """
    for example in examples:
        turns, tools = without_tools(example.prompt)
        for k, c in enumerate(example.rejected):
            yield {
                **{key: value for key, value in example.extra.items() if _is_json(value)},
                "id": example.id if len(example.rejected) == 1 else f"{example.id}#{k}",
                "images": list(example.images),
                **({"videos": list(example.videos)} if example.videos else {}),
                **({"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}),
                "prompt": [_blocks(m) for m in turns],
                "chosen": [_blocks(Message("assistant", (example.chosen.text,)))],
                "rejected": [_blocks(Message("assistant", (c.text,)))],
                "negatives": [c.as_row()],
                **({} if c.images is None else {"rejected_images": list(c.images)}),
                "references": list(example.references),
            }


def _blocks(message: Message) -> dict[str, Any]:
    # Every block has both keys, because all rows of a table must have the same type.
    chat = message.as_chat()
    blocks = [{"type": block["type"], "text": block.get("text", "")} for block in chat["content"]]
    return {**chat, "content": blocks}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _write_jsonl(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder = out.with_name(f"{out.stem}-images")
    clear_unfinished(out)
    left, text = unfinished_in(folder), ""
    for row in rows:
        named: dict[str, list[Any]] = {
            key: [f"{folder.name}/{_copy(image, folder, left)}" for image in row[key]]
            for key in ("images", "rejected_images")
            if key in row
        }
        if "videos" in row:
            beside = out.with_name(f"{out.stem}-videos")
            named["videos"] = [f"{beside.name}/{_copied(video, beside)}" for video in row["videos"]]
        if "rejected_images" in named:
            named["negatives"] = [{**n, "images": named["rejected_images"]} for n in row["negatives"]]
        text += json.dumps({**row, **named}, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(out, text)


def _copy(image: ImageRef, folder: Path, left: Collection[str]) -> str:
    """Write an image (unchanged unless it has an edit) to ``folder``, named by a digest; returns the name.

    ``left`` are the names of which a killed command left something there.
    """
    data = image.encoded()
    plain = image.path is not None and image.edit is None
    ending = image.path.suffix if image.path is not None and plain else ".png" if image.edit else ".img"
    path = folder / (hashlib.blake2b(data, digest_size=12).hexdigest() + ending)
    if path.name in left:
        clear_unfinished(path)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    return path.name


def _copied(video: VideoRef, folder: Path) -> str:
    return store_video(video, folder, ".video" if video.path is None else video.path.suffix)


def _write_parquet(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    import datasets

    if any("videos" in row for row in rows):
        raise DataError(
            f"{out}: videos are not written to .parquet; name a .jsonl file, which has them beside it"
        )
    # A mapping whose keys differ between rows has no column type, so only keys that every row has are written.
    pictured = [key for key in ("images", "rejected_images") if any(key in row for row in rows)]
    plain = [
        {
            **{k: row[k] for k in ("id", "prompt", "chosen", "rejected", "references")},
            **{k: [{"bytes": i.encoded(), "path": None} for i in row.get(k, ())] for k in pictured},
            "negatives": [{k: n[k] for k in ("text", "origin", "kind")} for n in row["negatives"]],
        }
        for row in rows
    ]
    table = datasets.Dataset.from_list(plain)
    for key in pictured:
        table = table.cast_column(key, datasets.List(datasets.Image(decode=False)))
    clear_unfinished(out)
    with replacing(out) as temporary:
        table.to_parquet(temporary)
