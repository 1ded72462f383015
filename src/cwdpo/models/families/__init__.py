"""Model families whose shared-prefix rows are exact: one file each, named by ``config.model_type``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from cwdpo.models.families.base import Family


def family_names() -> list[str]:
    """The model types that have a file here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "mrope"))


def family_of(model_type: str) -> Family | None:
    """The family of a model type, or ``None`` for one that is not known."""
    if model_type not in family_names():
        return None
    module: Any = importlib.import_module(f"{__name__}.{model_type}")
    family: Family = module.FAMILY
    return family
