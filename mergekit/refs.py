"""Model references: ``path@revision+adapter@revision`` as text and as a frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mergekit.errors import RecipeError

__all__ = ["ModelPath", "ModelReference"]


@dataclass(frozen=True, slots=True)
class ModelPath:
    """A folder or a hub repository, with the revision to take from the hub."""

    path: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelPath:
        """Read ``path`` or ``path@revision``.

        >>> ModelPath.parse("org/model@main")
        ModelPath(path='org/model', revision='main')
        """
        path, at, revision = text.partition("@")
        if not path or (at and not revision) or "@" in revision:
            raise RecipeError(f"'{text}' is not a model reference: write path, or path@revision")
        return cls(path, revision or None)

    def __str__(self) -> str:
        """The form that ``parse`` reads."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def short(self) -> str:
        """A name fit for other people's eyes: a folder's own name, or the hub name; never a local path."""
        pure = PurePosixPath(self.path.rstrip("/") or "/")
        is_local = self.path.startswith(("/", "~", ".")) or len(pure.parts) != 2
        return pure.name if is_local else str(pure)


@dataclass(frozen=True, slots=True)
class ModelReference:
    """One model of a recipe: its path, an adapter to bake onto it, and the architecture to take it for.

    Equality is by value, so ``m`` and ``m@main`` differ, and so do two references with different adapters.
    """

    model: ModelPath
    lora: ModelPath | None = None
    override_architecture: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Read ``path[@revision][+adapter[@revision]]``.

        >>> str(ModelReference.parse("a/b@v1+c/d"))
        'a/b@v1+c/d'
        """
        model, plus, lora = text.partition("+")
        if (plus and not lora) or "+" in lora:
            raise RecipeError(f"'{text}' is not a model reference: at most one +adapter may follow the model")
        return cls(ModelPath.parse(model), ModelPath.parse(lora) if lora else None)

    @classmethod
    def model_validate(cls, value: object) -> ModelReference:
        """Accept a reference, its text, or the mapping ``{model, lora, override_architecture}``."""
        if isinstance(value, ModelReference):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - {"model", "lora", "override_architecture"})
            if unknown:
                raise RecipeError(f"a model reference has no key '{unknown[0]}'")
            if "model" not in value:
                raise RecipeError("a model reference needs the key 'model'")
            lora = value.get("lora")
            override = value.get("override_architecture")
            return cls(
                _path(value["model"]),
                None if lora is None else _path(lora),
                None if override is None else str(override),
            )
        raise RecipeError(f"expected a model (text or mapping), got {type(value).__name__}")

    def __str__(self) -> str:
        """The form that ``parse`` reads (``override_architecture`` has no textual form)."""
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)

    def dump(self) -> str | dict[str, Any]:
        """What ``model_validate`` reads back: text where text can say it all."""
        if self.override_architecture is None:
            return str(self)
        record: dict[str, Any] = {"model": str(self.model), "override_architecture": self.override_architecture}
        if self.lora:
            record["lora"] = str(self.lora)
        return record

    @property
    def short(self) -> str:
        """A name for cards and tables: hub name or folder name, never a local path."""
        return f"{self.model.short}+{self.lora.short}" if self.lora else self.model.short


def _path(value: object) -> ModelPath:
    if isinstance(value, ModelPath):
        return value
    if isinstance(value, str):
        return ModelPath.parse(value)
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and set(value) <= {"path", "revision"}:
        return ModelPath(value["path"], value.get("revision"))
    raise RecipeError("expected a model path: text, or {path, revision}")
