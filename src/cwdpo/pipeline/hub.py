"""Pushes an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cwdpo.errors import ServerError

_LOG_IN = "log in with `hf auth login`, with a token that may write there"


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the hub's library as one line.

    Raises:
        ServerError: with what was wrong and what to do.
    """
    from huggingface_hub import errors

    start = f"--push {repository}"
    try:
        yield
    except errors.HFValidationError:
        raise ServerError(f"{start}: not an id of the hub: OWNER/NAME, or NAME of your own account") from None
    except errors.OfflineModeIsEnabled:
        raise ServerError(f"{start}: HF_HUB_OFFLINE is set: unset it to push") from None
    except errors.LocalTokenNotFoundError:
        raise ServerError(f"{start}: {_LOG_IN}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = (
            _LOG_IN if status in (401, 403) else " ".join(str(error.server_message or "try again").split())
        )
        raise ServerError(f"{start}: the hub refuses it (HTTP {status}): {remedy[:300]}") from None
    except Exception as error:  # of the library that makes the requests, which changes with the hub's
        said = " ".join(str(error).split())[:300]
        raise ServerError(f"{start}: the hub cannot be reached ({type(error).__name__}: {said})") from error


def make_repository(repository: str, *, private: bool) -> str:
    """Make a model repository if there is none; its whole id.

    Args:
        repository: ``OWNER/NAME``, or a name of one's own account.
        private: whether a new repository is private.

    Raises:
        ServerError: nobody is logged in, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _explained(repository):
        return str(HfApi().create_repo(repository, private=private, exist_ok=True).repo_id)


def push_folder(folder: Path, repository: str, report: Path | None = None) -> str:
    """Upload an exported folder as one commit; its address.

    Args:
        folder: the exported folder.
        repository: from :func:`make_repository`.
        report: a page to upload with it.

    Raises:
        ServerError: the hub refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(repository):
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of a cwdpo run"
        )
        if report is not None:
            api.upload_file(
                path_or_fileobj=report, path_in_repo=report.name, repo_id=repository, commit_message="Report"
            )
    return str(done.repo_url)
