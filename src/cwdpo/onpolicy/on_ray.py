"""``cwdpo sample --engine ray``: actors of Ray Data sample a policy, on this machine or on a cluster.

Their unit of work is a batch as one process makes it (:func:`cwdpo.models.sample.by_length`), because the last bits of
a row depend on the other rows of its batch. Ray starts an actor that died again and gives out its batch again.
The rest (what is done, judging, writing) is the work of the command itself: see
:meth:`cwdpo.onpolicy.pool.Pool.fill_by`. ray is imported only if this sampler is made.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import platform
import socket
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from cwdpo import errors
from cwdpo.config import Recipe
from cwdpo.errors import CwdpoError, ProcessError, RecipeError, ServerError, optional_package
from cwdpo.onpolicy.sampler import LocalSampler, loaded_sampler
from cwdpo.records import Example, Sample
from cwdpo.waiting import several

LOCAL = "local"
_INSTALL = "pip install 'cwdpo[ray]'"
_AHEAD = 2
"""Batches that an actor holds: the one that it samples and the next one."""


@dataclass(frozen=True)
class RayOptions:
    """Where Ray runs, and how many actors sample.

    Attributes:
        actors: processes that each hold the policy; ``None``: one for each GPU, one if there is no GPU.
        address: of a cluster, e.g. ``auto`` or ``10.0.0.1:6379``; ``local``: a Ray of this command on this machine.
    """

    actors: int | None = None
    address: str = LOCAL


class PolicyActor:
    """Loads the policy with its first batch and samples one batch after the other; it runs in a process of Ray.

    Args:
        recipe: of the command.
        threads: torch's threads on a CPU, as in the command: sums may differ in their last bits with the number.
        folder: the command's working folder, where relative paths start.
    """

    def __init__(self, recipe: Recipe, threads: int, folder: str) -> None:
        self.recipe, self.threads, self.folder = recipe, threads, folder
        self._loaded: tuple[LocalSampler, AbstractContextManager[None]] | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The samples of a batch as JSON; or the error, as a text: raised here, it would be a traceback of Ray's."""
        kind, problem, samples = "", "", ""
        try:
            found = self._sampled(*pickle.loads(row["work"]))
            samples = json.dumps([[asdict(s) for s in own] for own in found])
        except CwdpoError as error:
            # Its class, or, if that is defined in another room, the one that it derives from.
            kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            kind, problem = next(kinds), str(error)
        except Exception:
            problem = traceback.format_exc()
        return {
            "batch": row["batch"], "samples": samples, "kind": kind, "problem": problem, "node": platform.node(),
        }  # fmt: skip

    def _sampled(self, batch: Sequence[Example], seed: int, round_: int) -> list[tuple[Sample, ...]]:
        if self._loaded is None:
            self._loaded = self._load()
        sampler, precision = self._loaded
        with precision:
            sampler.begin(batch, seed, round_)
            return sampler(batch, seed, round_)

    def _load(self) -> tuple[LocalSampler, AbstractContextManager[None]]:
        if os.path.isdir(self.folder):  # another node may not have it; whatever is missing is then named
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        PartialState(cpu=self.recipe.model.device == "cpu")
        set_seed(self.recipe.seed)
        return loaded_sampler(self.recipe)[1:]


class RaySampler:
    """Samples batches with actors of Ray Data.

    Args:
        recipe: its model is loaded by every actor.
        options: where Ray runs, and how many actors there are.

    Raises:
        MissingPackageError: ray is not installed.
        RecipeError: the recipe samples on a server.
        ProcessError: the command was started as several processes.
    """

    def __init__(self, recipe: Recipe, options: RayOptions) -> None:
        if recipe.negatives.sampler.server is not None:
            raise RecipeError(
                "--engine ray: its actors hold the policy, but negatives.sampler.server (--base-url) names a server "
                "that samples: leave out one of the two"
            )
        if several():
            raise ProcessError(
                "--engine ray starts its own processes: start cwdpo sample once, without a launcher"
            )
        self.ray = optional_package("ray", "--engine ray", _INSTALL)
        self.data = optional_package("ray.data", "--engine ray", _INSTALL)
        self.recipe, self.options = recipe, options

    def drawn(
        self, batches: Sequence[Sequence[Example]], seed: int, round_: int
    ) -> Generator[tuple[int, list[tuple[Sample, ...]]]]:
        """See :class:`cwdpo.onpolicy.sampler.BatchSampler`.

        Raises:
            CwdpoError: of an actor: the model cannot be loaded, an image cannot be read, ...
            ServerError: there is no Ray at the address.
            RecipeError: more actors than Ray has room for.
            ProcessError: Ray gave up, or an actor failed with an error that is not ours.
        """
        if not batches:
            return
        work = [
            {"batch": number, "work": pickle.dumps((list(batch), seed, round_))}
            for number, batch in enumerate(batches)
        ]
        # Batches are sorted by length; the longest first, so that no actor begins a long one at the end.
        for row in self.through_actors(work[::-1]):
            if row["problem"]:
                raise _problem_of(row, batches[row["batch"]])
            yield row["batch"], [tuple(Sample(**s) for s in own) for own in json.loads(row["samples"])]

    def through_actors(self, work: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """What a :class:`PolicyActor` returns for each row of work, in the order in which they are finished."""
        with self._connected():
            actors, gpus = self._room()
            arguments = (self.recipe, torch.get_num_threads(), os.getcwd())
            # One row is one block, so an actor gets batch by batch, and a batch is all that is lost with an actor.
            rows = self.data.from_items(list(work), override_num_blocks=len(work)).map(
                PolicyActor,
                fn_constructor_args=arguments,
                compute=self.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=_AHEAD),
                num_cpus=1,
                num_gpus=gpus,
            )
            rows.context.enable_progress_bars = False
            try:
                yield from rows.iter_rows()
            except Exception as error:  # Ray's errors are of many types
                raise ProcessError(
                    f"Ray ended the work ({_line(error)}). What was sampled is kept: start the command again"
                ) from error

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Ray, unless the caller has started it already; what is started here is ended here."""
        if self.ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        how: dict[str, Any] = {
            "address": self.options.address,
            "log_to_driver": False,
            "logging_level": "error",
        }
        if self.options.address == LOCAL:
            # Room for all actors, however few cores there are, and for Ray Data's own tasks.
            cores = max(os.cpu_count() or 1, self.options.actors or 1) + 1
            how |= {"num_cpus": cores, "include_dashboard": False}
        try:
            _reach(self.options.address)
            self.ray.init(**how)
        except Exception as error:
            raise ServerError(
                f"--ray-address {self.options.address}: no Ray is reached ({_line(error)}); give the HOST:PORT that "
                "`ray start --head` printed, or auto on a machine of the cluster; if it asks for a token, set "
                "RAY_AUTH_MODE=token"
            ) from error
        try:
            yield
        finally:
            self.ray.shutdown()

    def _room(self) -> tuple[int, int]:
        """The number of actors, and of GPUs for each.

        Raises:
            RecipeError: Ray has fewer GPUs, or without GPUs fewer CPUs; it would wait for more.
        """
        has = self.ray.cluster_resources()
        gpus = 0 if self.recipe.model.device == "cpu" else int(has.get("GPU", 0))
        actors = self.options.actors or max(gpus, 1)
        unit, room = ("GPU", gpus) if gpus else ("CPU", int(has.get("CPU", 0)))
        if actors > room:
            raise RecipeError(
                f"--actors {actors}: each takes a {unit}, and Ray ({self.options.address}) has {room} of them"
            )
        return actors, min(gpus, 1)


def _reach(address: str) -> None:
    """Connect to ``HOST:PORT`` once: where nothing listens, ``ray.init`` would try for ten minutes.

    Raises:
        OSError: nothing listens.
        ValueError: no address of this form.
    """
    if address not in (LOCAL, "auto"):
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()


def _problem_of(row: Mapping[str, Any], batch: Sequence[Example]) -> CwdpoError:
    where = f"an actor on {row['node']}, in the batch of row {batch[0].id}"
    if row["kind"]:
        kind: type[CwdpoError] = getattr(errors, row["kind"])
        return kind(f"{row['problem']} ({where})")
    error = ProcessError(f"{row['problem'].strip().splitlines()[-1]} ({where})")
    error.__cause__ = RuntimeError(row["problem"])  # the actor's traceback
    return error


def _line(error: BaseException) -> str:
    """Type and first line of an error: the next ones are advice on Ray's own settings."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
