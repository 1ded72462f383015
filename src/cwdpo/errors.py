"""One error root; each kind is also the standard exception that a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class ReferenceCacheError(CwdpoError, ValueError):
    """Stored reference values that are damaged, or that the reference does not give any more."""


class UnknownComponentError(CwdpoError, LookupError):
    """A name that no registry knows."""


class MissingPackageError(CwdpoError, ImportError):
    """An optional package that the asked feature needs."""


class NonFiniteError(CwdpoError, ArithmeticError):
    """A loss, gradient or parameter that is no longer finite; raised before the update."""

    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
