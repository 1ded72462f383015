"""Ids of the Hugging Face Hub: how a data set is addressed, and whether the hub has an id, answered within seconds."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

from cwdpo.errors import CwdpoError, nearest

ANSWERS_WITHIN = 5.0
"""Seconds for the hub's answer; its own clients would try for most of a minute."""
ADDRESS = "owner/name[@revision][:configuration][#split]"
_PART = r"[\w][\w.-]*"
_ADDRESS = re.compile(
    rf"(?P<id>{_PART}/{_PART})(@(?P<revision>[^:#\s]+))?(:(?P<config>[^#\s]+))?(#(?P<split>\S+))?"
)
_WHAT = {"models": "model", "datasets": "data set"}
_LOG_IN = "log in with `hf auth login`"


@dataclass(frozen=True)
class HubData:
    """A data set of the hub: its id, and what was named of it.

    >>> hub_data("owner/name@v1.0:english#test")
    HubData(id='owner/name', revision='v1.0', config='english', split='test')
    >>> hub_data("owner/name#train").split
    'train'
    >>> hub_data("a/folder/below") is None
    True
    """

    id: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        parts = zip(("@", ":", "#"), (self.revision, self.config, self.split), strict=True)
        return self.id + "".join(f"{mark}{part}" for mark, part in parts if part is not None)


def hub_data(address: str) -> HubData | None:
    """The parts of an address ``owner/name[@revision][:configuration][#split]``; ``None`` if it is no such address."""
    match = _ADDRESS.fullmatch(address)
    return None if match is None else HubData(**match.groupdict())


def check_hub(
    id: str, kind: Literal["models", "datasets"], revision: str | None, error: type[CwdpoError]
) -> None:
    """Refuse an id of the hub that it does not have, or while it does not answer. A success is asked for once only.

    Nothing is asked under ``HF_HUB_OFFLINE``.

    Args:
        id: ``owner/name``.
        kind: what it is the id of.
        revision: a branch, tag or commit that it must have.
        error: the type of the error to raise.

    Raises:
        CwdpoError: of type ``error``, within :data:`ANSWERS_WITHIN`; the message says what to do.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and (trouble := _asked(id, kind, revision, constants.ENDPOINT)):
        raise error(trouble)


@functools.lru_cache(maxsize=64)
def _known(id: str, kind: str, revision: str | None, endpoint: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    found = api.repo_info(id, repo_type=kind[:-1], revision=revision, timeout=ANSWERS_WITHIN)
    if found.gated:
        api.auth_check(id, repo_type=kind[:-1])


def _asked(id: str, kind: Literal["models", "datasets"], revision: str | None, endpoint: str) -> str | None:
    """What is wrong with an id, and what to do; ``None``: the hub has it."""
    from huggingface_hub import errors

    what = _WHAT[kind]
    try:
        _known(id, kind, revision, endpoint)
    except errors.GatedRepoError:
        return (
            f"{id!r}: the hub has this {what}, but it is only for accounts that accepted its terms: accept them on "
            f"{endpoint}/{'datasets/' if kind == 'datasets' else ''}{id}, and {_LOG_IN}"
        )
    except errors.RevisionNotFoundError:
        return f"{id!r}: the hub has this {what}, but no revision {revision!r} of it: name a branch, tag or commit"
    except errors.RepositoryNotFoundError:
        near = nearest(id, _of_owner(id, kind, endpoint))
        return (
            f"{id!r}: there is no such folder here, and the hub has no such {what}{near or ';'} correct the name; or, "
            f"if it is private, {_LOG_IN}"
        )
    except errors.HFValidationError as error:
        return f"{id!r}: not an id of the hub ({' '.join(str(error).split())[:200]})"
    except errors.HfHubHTTPError as error:
        said = " ".join(str(error.server_message or error).split())[:200]
        return f"{id!r}: the hub refuses this {what} (HTTP {error.response.status_code}: {said}); try again"
    except Exception as error:  # the client of the installed version has its own types
        return (
            f"{id!r}: there is no such folder here, and {endpoint} does not answer ({type(error).__name__}): correct "
            "the network; or use the copy that was fetched before, with HF_HUB_OFFLINE=1; or fetch it elsewhere (hf "
            f"download{' --repo-type dataset' if kind == 'datasets' else ''}) and name its folder"
        )
    return None


def _of_owner(id: str, kind: str, endpoint: str) -> list[str]:
    """Ids of the same owner, for a suggestion; none if the hub does not say."""
    from huggingface_hub import get_session

    try:
        answer: Any = get_session().get(
            f"{endpoint}/api/{kind}",
            params={"author": id.partition("/")[0], "limit": "500"},
            timeout=ANSWERS_WITHIN,
        )
        return [str(one["id"]) for one in answer.json()]
    except Exception:  # a suggestion only
        return []
