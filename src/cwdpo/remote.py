"""A client for OpenAI-compatible servers: vLLM, ``transformers serve``, or a hosted model.

Several servers of one model work together (:mod:`cwdpo.servers`). Each answer is stored when it arrives and is not
requested again, so a kill or a broken connection loses only the requests in flight. With one server the ``openai``
package does retries, back-off and ``Retry-After``. Does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cwdpo.completions_api import Ask, Reply, messages_of, read_reply
from cwdpo.connection import Connection
from cwdpo.errors import FileError, ServerError, optional_package
from cwdpo.files.reading import ends_whole, read_jsonl
from cwdpo.files.writing import open_to_append, write_text
from cwdpo.registry import Settings
from cwdpo.servers import GivenUpError, Server, Servers

_LETTERS_PER_TOKEN = 4


class ServerSettings(Settings):
    """A server with OpenAI's chat completions API, and limits of its use."""

    base_url: str | tuple[str, ...] = Field(
        description="for example http://localhost:8000/v1; a list: several servers of the same model, used together"
    )
    model: str = Field(description="the model's name on the server")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable with the key; its name ends in _API_KEY"
    )
    timeout: float = Field(
        120.0, gt=0, description="seconds for a complete answer, then the request is repeated"
    )
    retries: int = Field(6, ge=0, description="repetitions of one request, each after a longer pause")
    concurrency: int = Field(8, gt=0, description="requests in flight at each server")
    requests_per_minute: float | None = Field(None, gt=0)
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="further keys of every request; transformers serve samples at random only with "
        '{generation_config: \'{"do_sample": true, "top_k": 0}\'}',
    )
    image_tokens: int = Field(800, ge=0, description="input tokens of an image, for the estimate")
    usd_per_million_input: float | None = Field(None, ge=0)
    usd_per_million_output: float | None = Field(None, ge=0)
    max_usd: float | None = Field(None, ge=0, description="refuse to start above this estimate")

    @field_validator("base_url")
    @classmethod
    def _are_addresses(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(value, str) and (not value or len(set(value)) < len(value)):
            raise ValueError("allowed: an address, or a list of different addresses")
        for url in (value,) if isinstance(value, str) else value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no address: it begins with http:// or https://")
        return value

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    @property
    def place(self) -> str:
        """The addresses, for messages."""
        return ", ".join(self.urls)

    @field_validator("api_key_env")
    @classmethod
    def _is_a_key(cls, name: str) -> str:
        """The variable's value is sent to base_url, and a recipe may come from anyone: allow API keys only."""
        if not name.endswith("_API_KEY"):
            raise ValueError("allowed: the name of a variable that ends in _API_KEY")
        return name


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that servers load under a name: its folder, which they must be able to read."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Estimate:
    """Estimate before requests are sent: new requests, stored answers, tokens (output: at most), cost or ``None``."""

    requests: int
    stored: int
    input_tokens: int
    output_tokens: int
    usd: float | None

    def __str__(self) -> str:
        cost = "cost not known (no price is set)" if self.usd is None else f"at most {self.usd:.2f} USD"
        return (
            f"{self.requests} requests ({self.stored} answers are stored), about {self.input_tokens} tokens in and "
            f"at most {self.output_tokens} out: {cost}"
        )


class Client:
    """Sends requests to one or several servers and stores the answers.

    Args:
        settings: the servers.
        store: JSONL file of answers; created if it does not exist. ``None``: answers are not stored.
        adapter: requested in place of the settings' model. A server that does not know it is told to load it.

    Raises:
        MissingPackageError: the ``openai`` package is not installed.
    """

    def __init__(
        self, settings: ServerSettings, store: Path | None = None, adapter: Adapter | None = None
    ) -> None:
        openai = optional_package("openai", "asking a server", "pip install 'cwdpo[server]'")
        if adapter is not None:
            settings = settings.model_copy(update={"model": adapter.name})
        self.settings, self.store, self._adapter = settings, store, adapter
        self._unknown, self._refused = openai.NotFoundError, openai.APIStatusError
        self._loading = {url: threading.Lock() for url in settings.urls}
        self._loads = dict.fromkeys(settings.urls, 0)
        # The user's own server may need no key, but the package does.
        self._key = os.environ.get(settings.api_key_env) or "none"
        self._lock = threading.Lock()
        self._turns: dict[str, float] = {}
        self._known: dict[str, Reply] = {}
        if store is not None:
            rows = read_jsonl(store)
            if not ends_whole(store):  # the last line is incomplete after a kill
                write_text(store, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            self._known = dict(_stored(store, number, row) for number, row in enumerate(rows, 1))
        failures = (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
        self._failures = failures
        self.servers = Servers(
            [Server(url, self._connected(openai, url)) for url in settings.urls],
            self._send,
            self._keep,
            concurrency=settings.concurrency,
            retries=settings.retries,
            failures=failures,
        )

    def _connected(self, openai: Any, url: str) -> Connection:
        settings = self.settings
        try:
            return Connection(
                openai,
                base_url=url,
                api_key=self._key,
                timeout=settings.timeout,
                # With several servers, the next attempt is another server's.
                retries=settings.retries if len(settings.urls) == 1 else 0,
            )
        except Exception as error:  # httpx's errors for an invalid address or proxy
            raise ServerError(f"{url}: {type(error).__name__}: {error}: correct base_url") from None

    def estimate(self, asks: Sequence[Ask]) -> Estimate:
        """Estimate of what :meth:`ask` would send."""
        return self._estimate(self._keyed(asks))

    def _estimate(self, keyed: Sequence[tuple[str, Ask]]) -> Estimate:
        new = {key: ask for key, ask in keyed if key not in self._known}
        letters = sum(len(m.text) for ask in new.values() for m in ask.messages)
        images = sum(len(ask.images) for ask in new.values())
        tokens_in = letters // _LETTERS_PER_TOKEN + images * self.settings.image_tokens
        tokens_out = sum(ask.max_tokens for ask in new.values())
        price_in, price_out = self.settings.usd_per_million_input, self.settings.usd_per_million_output
        known = price_in is not None and price_out is not None
        usd = (tokens_in * (price_in or 0) + tokens_out * (price_out or 0)) / 1e6 if known else None
        return Estimate(len(new), len({k for k, _ in keyed}) - len(new), tokens_in, tokens_out, usd)

    def begin(self, asks: Sequence[Ask]) -> None:
        """Send requests, and do not wait for the answers: a later :meth:`ask` gives them.

        Raises:
            ServerError: the estimate is above ``max_usd``.
        """
        self._submit(self._keyed(asks))

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """Replies in the order of ``asks``; equal requests are sent once.

        Raises:
            ServerError: the estimate is above ``max_usd``, a request failed after all retries, or no server answers.
                Answers received before are stored.
        """
        keyed = self._keyed(asks)
        self._submit(keyed)
        try:
            self.servers.wait(key for key, _ in keyed)
        except GivenUpError as problem:
            raise self._explained(problem) from None
        return [self._known[key] for key, _ in keyed]

    def _submit(self, keyed: Sequence[tuple[str, Ask]]) -> None:
        limit = self.settings.max_usd
        if limit is not None:
            estimate = self._estimate(keyed)
            if estimate.usd is None or estimate.usd > limit:
                raise ServerError(
                    f"{self.settings.place}: {estimate}; that is not below max_usd = {limit:g}: raise it, set both "
                    "prices, or send fewer requests"
                )
        self.servers.submit({key: ask for key, ask in keyed if key not in self._known})

    def _keyed(self, asks: Sequence[Ask]) -> list[tuple[str, Ask]]:
        """Each request with the key of its answer: a stored one's, or the one under which it will be stored.

        One server's answers are known by its address and the model's name, those of several by the model's name. An
        answer that was stored under one server is found with several, and the other way round.
        """
        urls, digests, found = self.settings.urls, dict[int, str](), []
        own = urls[0] if isinstance(self.settings.base_url, str) else None
        for ask in asks:
            for image in ask.images:
                if id(image) not in digests:
                    digests[id(image)] = hashlib.blake2b(image.encoded(), digest_size=16).hexdigest()
            images = [digests[id(image)] for image in ask.images]
            keys = self._keys(ask, images, dict.fromkeys((own, None, *urls)))
            found.append((next((key for key in keys if key in self._known), keys[0]), ask))
        return found

    def _keys(self, ask: Ask, images: Sequence[str], places: Iterable[str | None]) -> list[str]:
        parts = [
            self.settings.model, _extra(self.settings, ask), [asdict(m) for m in ask.messages], images,
            ask.temperature, ask.top_p, ask.max_tokens, ask.draw, ask.seed,
        ]  # fmt: skip
        rest = json.dumps(parts)[1:]
        texts = (f"[{json.dumps(place)}, {rest}" for place in places)
        return [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]

    def close(self) -> None:
        """Let the servers unload the adapter; one that does not keeps it in memory, which harms nothing else."""
        if self._adapter is None:
            return
        for server in self.servers.servers:
            with contextlib.suppress(*self._failures):
                server.line.send("/unload_lora_adapter", lora_name=self._adapter.name)

    def _send(self, server: Server, ask: Ask) -> Reply:
        loads = self._loads[server.url]
        try:
            return self._asked(server, ask)
        except self._unknown:
            if self._adapter is None:
                raise
        # At the first request, and at a server that was started again meanwhile.
        self._load(server, loads)
        return self._asked(server, ask)

    def _load(self, server: Server, loads: int) -> None:
        assert self._adapter is not None
        with self._loading[server.url]:
            if self._loads[server.url] != loads:  # another thread was faster
                return
            self._loads[server.url] += 1
            try:
                server.line.send(
                    "/load_lora_adapter", lora_name=self._adapter.name, lora_path=str(self._adapter.folder)
                )
            except self._refused as error:
                if "already been loaded" in str(error):  # by a run that was killed
                    return
                remedy = (
                    "start vLLM with --enable-lora, --max-lora-rank of at least model.lora.r, and the variable "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and let it read the run folder"
                )
                raise ServerError(
                    f"{server.url}: does not load the adapter {self._adapter.folder} ({self._said(error)}): {remedy}"
                ) from None

    def _asked(self, server: Server, ask: Ask) -> Reply:
        self._wait_for_turn(server.url)
        more: dict[str, Any] = {} if ask.seed is None else {"seed": ask.seed}
        if ask.logprobs:
            more["logprobs"] = True
        return read_reply(
            server.line.post(
                model=self.settings.model,
                messages=messages_of(ask),
                temperature=ask.temperature,
                top_p=ask.top_p,
                max_tokens=ask.max_tokens,
                extra_body=_extra(self.settings, ask) or None,
                **more,
            )
        )

    def _keep(self, key: str, reply: Reply) -> None:
        self._known[key] = reply
        if self.store is not None:
            known = {name: value for name, value in asdict(reply).items() if value is not None}
            row = json.dumps({"key": key, **known}, ensure_ascii=False) + "\n"
            self.store.parent.mkdir(parents=True, exist_ok=True)
            with open_to_append(self.store) as file:
                file.write(row)

    def _wait_for_turn(self, url: str) -> None:
        if self.settings.requests_per_minute is None:
            return
        with self._lock:
            turn = max(self._turns.get(url, 0.0), time.monotonic())
            self._turns[url] = turn + 60 / self.settings.requests_per_minute
        time.sleep(max(turn - time.monotonic(), 0.0))

    def _explained(self, problem: GivenUpError) -> Exception:
        error, server = problem.error, problem.server
        stored = "stored answers are not requested again"
        if server is None:
            said = "; ".join(f"{s.url}: {self._said(s.trouble)}" for s in self.servers.servers)
            kept = "" if self.store is None else f"{len(self._known)} answers are in {self.store}; "
            return ServerError(
                f"no server answers ({said}); {kept}start one again, or name others of the model "
                f"{self.settings.model!r}, then start again: {stored}"
            )
        if not isinstance(error, self._failures):
            assert error is not None
            return error if isinstance(error, Exception) else ServerError(str(error))
        status = getattr(error, "status_code", None)
        remedy = f"check the server, then start again: {stored}"
        if status in (401, 403):
            remedy = f"set the environment variable {self.settings.api_key_env} to a valid key"
        elif status == 404:
            remedy = "correct base_url (it usually ends in /v1) or model"
        elif status is not None and 300 <= status < 400:
            remedy = "it redirects requests, and redirects are not followed: correct base_url"
        return ServerError(
            f"{server.url} (model {self.settings.model!r}): {self._said(error)}; "
            f"{self.settings.retries} retries did not help: {remedy}"
        )

    def _said(self, error: BaseException | str | None) -> str:
        """An error with its cause, without the key: some servers repeat it."""
        if isinstance(error, BaseException):
            status = getattr(error, "status_code", None)
            causes = [error, (error.__cause__ or error.__context__) if status is None else None]
            error = ": ".join(f"{type(one).__name__}: {one}" for one in causes if one is not None)
        said = str(error)
        if self._key != "none":
            said = said.replace(self._key, f"[the value of {self.settings.api_key_env}]")
        return said[:400]


def _extra(settings: ServerSettings, ask: Ask) -> dict[str, Any]:
    return {**settings.extra_body, **({"add_special_tokens": True} if ask.bos else {})}


def _stored(store: Path, number: int, row: Mapping[str, Any]) -> tuple[str, Reply]:
    key, text, ended = row.get("key"), row.get("text"), row.get("ended")
    if not (isinstance(key, str) and isinstance(text, str) and isinstance(ended, bool)):
        raise FileError(
            f"{store}: line {number}: is not a stored answer: remove that line, and it is requested again"
        )
    n_tokens, mean_logp = row.get("n_tokens"), row.get("mean_logp")
    if isinstance(n_tokens, int) and isinstance(mean_logp, float):
        return key, Reply(text, ended, n_tokens, mean_logp)
    return key, Reply(text, ended)
