"""Registries of components. A component is a class with settings and behaviour; each is in a file of its own.

A registry finds its components by listing the files of a package, so a new file is a new component. Listing the names
imports no component. A component outside the package is named ``path/to/file.py:ClassName``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cwdpo.errors import RecipeError, UnknownComponentError, nearest
from cwdpo.files.yamlfile import as_number


class Settings(BaseModel):
    """Base of all settings classes: they are frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        """Accept ``report_to: wandb`` for ``[wandb]``, and ``steps: 1e3``, which is a text in YAML, for the number."""
        if not isinstance(values, dict):
            return values
        return {key: cls._meant(key, value) for key, value in values.items()}

    @classmethod
    def _meant(cls, key: Any, value: Any) -> Any:
        field = cls.model_fields.get(key) if isinstance(value, str) else None
        if field is None:
            return value
        if field.annotation == tuple[str, ...]:
            return (value,)
        kinds = set(get_args(field.annotation)) or {field.annotation}
        return as_number(value) if kinds <= {int, float, type(None)} else value


class Component(Settings):
    """Settings plus behaviour. The name of a shipped component is the name of its file."""


C = TypeVar("C", bound=Component)


def explain(error: ValidationError, where: str, fields: Mapping[str, Any] | None = None) -> str:
    """One line per problem of a pydantic error: dotted key, what is wrong, the nearest known key.

    Args:
        error: the error.
        where: start of each line, for example a file or section.
        fields: the known keys.
    """
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(str(item["loc"][-1]), fields or {})
            lines.append(f"{where}: unknown key {key!r}{hint}")
        else:
            # What a check over several keys was given is a whole section: cut off, it tells nothing.
            got = shortened(item.get("input"))
            got = "" if item["type"] == "value_error" and got.endswith("...") else f" (got {got})"
            said = item["msg"].removeprefix("Value error, ")
            lines.append(": ".join(part for part in (where, key, said) if part) + got)
    return "\n".join(lines)


def shortened(value: Any, limit: int = 120) -> str:
    """``repr`` of a value, cut after ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


class Registry(Generic[C]):
    """The components of one kind: one in each file of ``package``.

    Args:
        kind: name of the kind, for messages.
        package: the package with the files.
        base: the base class of the components.
        renamed: old name -> new name; an old name is an error whose message gives the new one.
    """

    def __init__(
        self, kind: str, package: str, base: type[C], renamed: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self.package, self.base, self.renamed = kind, package, base, dict(renamed or {})

    def names(self) -> list[str]:
        """The sorted names of the shipped components; imports only the package itself."""
        package = importlib.import_module(self.package)
        stems = (m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg)
        return sorted(s for s in stems if not s.startswith("_") and s != "base")

    def get(self, name: str) -> type[C]:
        """The component class called ``name``, or the one at ``file.py:ClassName``.

        Raises:
            UnknownComponentError: there is no such component, file or class.
        """
        if ".py:" in name:
            return self._from_file(name)
        if name in self.renamed:
            raise UnknownComponentError(f"{self.kind} {name!r} is now called {self.renamed[name]!r}")
        if name not in self.names():
            raise UnknownComponentError(
                f"unknown {self.kind} {name!r}{nearest(name, self.names())}; "
                f"known: {', '.join(self.names())}; or name your own as 'file.py:ClassName'"
            )
        module = importlib.import_module(f"{self.package}.{name}")
        return self._only_class(vars(module), module.__name__)

    def build(self, spec: str | Mapping[str, Any]) -> C:
        """A component from its name, or from a mapping with ``name`` and settings.

        Raises:
            UnknownComponentError: the name is not known.
            RecipeError: a setting is unknown or out of range; the message names the nearest key.
        """
        settings = {"name": spec} if isinstance(spec, str) else dict(spec)
        if "name" not in settings:
            raise RecipeError(f"{self.kind}: 'name' is missing; known: {', '.join(self.names())}")
        name = str(settings.pop("name"))
        cls = self.get(name)
        try:
            return cls(**settings)
        except ValidationError as error:
            raise RecipeError(explain(error, f"{self.kind} {name}", cls.model_fields)) from None

    def _only_class(self, names: Mapping[str, Any], module: str) -> type[C]:
        found = [
            value
            for value in names.values()
            if inspect.isclass(value)
            and issubclass(value, self.base)
            and value.__module__ == module
            and not inspect.isabstract(value)
        ]
        if len(found) != 1:
            raise UnknownComponentError(f"{module} must define exactly one {self.kind}, found {len(found)}")
        return found[0]

    def _from_file(self, name: str) -> type[C]:
        path, _, class_name = name.rpartition(":")
        if not Path(path).is_file():
            raise UnknownComponentError(f"{self.kind} {name!r}: there is no file {path!r}")
        try:
            module = import_file(path)
        except Exception as error:
            raise UnknownComponentError(
                f"{self.kind} {name!r}: {path} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        cls = getattr(module, class_name, None)
        if not (inspect.isclass(cls) and issubclass(cls, self.base)):
            raise UnknownComponentError(
                f"{self.kind} {name!r}: {path} has no class {class_name!r} derived from {self.base.__name__}"
            )
        return cls


def module_name(path: str | Path) -> str:
    """Under which name a user's Python file is imported: its own, and a digest of where it is."""
    digest = hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=6).hexdigest()
    return f"cwdpo_user_{Path(path).stem}_{digest}"


def import_file(path: str | Path) -> ModuleType:
    """Import a user's Python file under :func:`module_name`, again if it was imported before.

    Raises:
        Exception: whatever the file raises.
    """
    spec = importlib.util.spec_from_file_location(module_name(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves the class's annotations there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
