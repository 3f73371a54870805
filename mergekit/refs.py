"""Model references: ``path@revision+adapter@revision`` as text and as a frozen record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, count
from pathlib import PurePath, PurePosixPath
from typing import Any

from mergekit.errors import RecipeError

__all__ = ["ModelPath", "ModelReference", "but_folder", "distinct_names", "no_folder"]


def but_folder(path: str) -> str:
    """Words about the folder whose name is most like ``path``, which is not there: ``" (but 'a/b')"``, or none."""
    place, name = os.path.split(os.path.expanduser(path))
    found: list[str] = []
    with suppress(OSError, ValueError):
        found = sorted(entry.name for entry in os.scandir(place or ".") if entry.is_dir())
    like = get_close_matches(name, found, n=1)
    return f" (but '{os.path.join(place, like[0])}')" if like else ""


def no_folder(path: str, advice: str = "give the path of a model folder, or a hub name like org/model") -> str:
    """What to say of a path where a folder should be and none is: a file, or nothing; and ``advice``."""
    if not os.path.exists(os.path.expanduser(path)):
        return f"no folder '{path}'{but_folder(path)}; {advice}"
    if path.endswith((".yml", ".yaml")):
        advice = f"`mergekit plan {path}` shows what a recipe would make, `mergekit merge {path} out` makes it"
    return f"'{path}' is a file, and a model is a folder; {advice}"


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

    def dump(self) -> str | dict[str, str]:
        """The text that ``parse`` reads, or a mapping where the path holds what text can't say."""
        if "@" not in self.path:
            return str(self)
        return {"path": self.path, "revision": self.revision} if self.revision else {"path": self.path}

    @property
    def short(self) -> str:
        """A name fit for other people's eyes: a folder's own name, or the hub name; never a local path."""
        pure = PurePosixPath(self.path.rstrip("/") or "/")
        is_local = self.path.startswith(("/", "~", ".")) or len(pure.parts) != 2
        return pure.name if is_local else str(pure)


def distinct_names(paths: Iterable[ModelPath]) -> dict[ModelPath, str]:
    """The short name of each path; where two have the same, later ones with their revision or a number.

    >>> paths = [ModelPath("/a/code"), ModelPath("/b/code"), ModelPath("org/m"), ModelPath("org/m", "v2")]
    >>> list(distinct_names(paths).values())
    ['code', 'code (2)', 'org/m', 'org/m@v2']
    """
    names: dict[ModelPath, str] = {}
    for path in dict.fromkeys(paths):
        name = f"{path.short}@{path.revision}" if path.revision and path.short in names.values() else path.short
        others = (f"{name} ({number})" for number in count(2))
        names[path] = next(n for n in chain([name], others) if n not in names.values())
    return names


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
            raise RecipeError(
                f"'{text}' is not a model reference: at most one +adapter may follow the model "
                f"(a path with + in it is written as a mapping, model: {{path: ...}})"
            )
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
            if override is not None and not isinstance(override, str):
                raise RecipeError("'override_architecture' is the name of an architecture, such as LlamaForCausalLM")
            return cls(_path(value["model"]), None if lora is None else _path(lora), override)
        if isinstance(value, PurePath):
            return cls(ModelPath(str(value)))
        got = "nothing" if value is None else type(value).__name__
        raise RecipeError(f"expected a model (text or mapping), got {got}")

    def __str__(self) -> str:
        """The form that ``parse`` reads (``override_architecture`` has no textual form)."""
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)

    def dump(self) -> str | dict[str, Any]:
        """What ``model_validate`` reads back: text where text can say it all (a path may hold an @ or a +)."""
        record: dict[str, Any] = {"model": self.model.dump()}
        if self.lora:
            record["lora"] = self.lora.dump()
        if self.override_architecture is not None:
            return {**record, "override_architecture": self.override_architecture}
        return str(self) if all(isinstance(v, str) and "+" not in v for v in record.values()) else record

    @property
    def short(self) -> str:
        """A name for cards and tables: hub name or folder name, never a local path."""
        return f"{self.model.short}+{self.lora.short}" if self.lora else self.model.short


def _path(value: object) -> ModelPath:
    if isinstance(value, ModelPath):
        return value
    if isinstance(value, str):
        return ModelPath.parse(value)
    if isinstance(value, PurePath):
        return ModelPath(str(value))
    if isinstance(value, Mapping) and set(value) <= {"path", "revision"}:
        path, revision = value.get("path"), value.get("revision")
        if isinstance(path, str) and path and (revision is None or isinstance(revision, str)):
            return ModelPath(path, revision or None)
    raise RecipeError("expected a model path: text, or {path, revision} (a revision of digits only needs quotes)")
