"""``model.code``: a file of the user's own that registers model classes before a checkpoint is read."""

from __future__ import annotations

import sys
from pathlib import Path

from cwdpo.errors import ModelError
from cwdpo.models.settings import ModelSettings
from cwdpo.registry import import_file, module_name


def import_code(settings: ModelSettings) -> None:
    """Import ``model.code``, once in a process: transformers refuses to register a class twice.

    The file calls ``AutoConfig.register``, ``AutoModel.register`` and the like, after which ``from_pretrained`` knows
    its types as those of transformers itself.

    Raises:
        ModelError: there is no such file, or it raises an error.
    """
    path = settings.code
    if path is None or module_name(path) in sys.modules:
        return
    if not Path(path).is_file():
        raise ModelError(f"model.code {path!r}: there is no such file; allowed: a Python file")
    try:
        import_file(path)
    except Exception as error:  # whatever the user's file raises
        raise ModelError(
            f"model.code {path!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
