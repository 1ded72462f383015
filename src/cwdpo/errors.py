"""The errors of cwdpo: one base class; each error also derives from the matching standard exception."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class CwdpoError(Exception):
    """Base class of all errors that cwdpo raises deliberately; the CLI prints them without a traceback."""

    exit_code = 1


class RecipeError(CwdpoError, ValueError):
    """An invalid recipe or override."""


class DataError(CwdpoError, ValueError):
    """Data that cannot be used; the message names file, row and key."""


class WorkerError(DataError):
    """A process that reads images and died; like an image that cannot be read, it stops all processes of a run."""


class ProcessError(CwdpoError, RuntimeError):
    """Another process of a distributed run ended while this one waited for it."""


class ModelError(CwdpoError, ValueError):
    """A model folder, adapter or processor that cannot be used."""


class RunDirError(CwdpoError, FileExistsError):
    """A run folder that is missing, in use, or would be overwritten."""


class FileError(CwdpoError, ValueError):
    """A file that cannot be read, or is not what its name says; or a link where a plain file belongs."""


class ReferenceCacheError(CwdpoError, ValueError):
    """Stored reference values that are damaged, or that differ from what the reference model gives now."""


class UnknownComponentError(CwdpoError, LookupError):
    """A name that is not in a registry."""


class MissingPackageError(CwdpoError, ImportError):
    """An optional package that a feature needs and that is not installed."""


class ServerError(CwdpoError, ConnectionError):
    """A server that does not answer, or answers with an error; its earlier answers are kept."""


class NonFiniteError(CwdpoError, ArithmeticError):
    """A loss, gradient or parameter that is no longer finite; raised before the update."""

    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the known name most similar to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def optional_package(name: str, feature: str, install: str) -> Any:
    """Import a package that only one feature needs.

    Raises:
        MissingPackageError: the package is not installed; the message names the feature and the install command.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{feature} needs the package {error.name!r}, which is not installed: {install}"
        ) from None
