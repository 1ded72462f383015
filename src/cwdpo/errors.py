"""One error root; each kind is also the standard exception that a caller would expect."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class CwdpoError(Exception):
    """Root of every error that cwdpo raises on purpose; the CLI prints it without a traceback."""

    exit_code = 1


class RecipeError(CwdpoError, ValueError):
    """A recipe (or an override) that cannot be understood."""


class DataError(CwdpoError, ValueError):
    """Data that cannot be used; the message names file, row and key."""


class ModelError(CwdpoError, ValueError):
    """A model folder, adapter or processor that cannot be used."""


class RunDirError(CwdpoError, FileExistsError):
    """A run folder that is missing, in use, or would be overwritten."""


class FileError(CwdpoError, ValueError):
    """A file that cannot be read, or is not what its name says; or a link where a plain file belongs."""


class ReferenceCacheError(CwdpoError, ValueError):
    """Stored reference values that are damaged, or that the reference does not give any more."""


class UnknownComponentError(CwdpoError, LookupError):
    """A name that no registry knows."""


class MissingPackageError(CwdpoError, ImportError):
    """An optional package that the asked feature needs."""


class ServerError(CwdpoError, ConnectionError):
    """A server that does not answer, or refuses; what it has answered before is kept."""


class NonFiniteError(CwdpoError, ArithmeticError):
    """A loss, gradient or parameter that is no longer finite; raised before the update."""

    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def optional_package(name: str, feature: str, install: str) -> Any:
    """Import a package that only one feature needs.

    Raises:
        MissingPackageError: it is not installed; the message names the feature and the install line.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{feature} needs the package {error.name!r}, which is not installed: {install}"
        ) from None
