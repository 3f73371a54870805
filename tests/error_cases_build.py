"""What an entry of the catalogue of errors is, and the bricks that its situations are built from.

Every situation starts as a folder with two sound models, ``models/a`` and ``models/b``, and ``recipe.yml`` that
averages them; a brick spoils something in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from files import HIDDEN, LAYERS, Array, encode, llama, raw_safetensors, write_model, write_safetensors

__all__ = [
    "MERGE",
    "PLAN",
    "RECIPE",
    "Build",
    "Case",
    "Group",
    "adds",
    "begin",
    "changes",
    "config",
    "header",
    "link",
    "model",
    "one_tensor",
    "recipe",
    "several",
    "tensors",
    "text",
    "without",
]

PLAN = "mergekit plan recipe.yml"
MERGE = "mergekit merge recipe.yml out -j 1"
"""With one thread, so that the first tensor is always the same."""
RECIPE = """merge_method: linear
models:
  - model: models/a
    parameters: {weight: 1}
  - model: models/b
    parameters: {weight: 1}
"""
Build = Callable[[Path], object]
"""Changes something in the folder that it is given."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One error: how to meet it, what the program then says (after ``error: ``), what that means and what to do.

    ``during`` holds while the command runs. ``is_table``: the message has a line for each model.
    """

    title: str
    build: Build
    message: str
    meaning: str
    command: str = PLAN
    code: int = 2
    during: Callable[[], AbstractContextManager[object]] = nullcontext
    is_table: bool = False


@dataclass(frozen=True)
class Group:
    """Errors that are met while doing the same thing."""

    title: str
    introduction: str
    cases: Sequence[Case]


def begin(folder: Path) -> None:
    """Where every situation starts."""
    for seed, name in enumerate("ab"):
        write_model(folder / "models" / name, seed)
    (folder / "recipe.yml").write_text(RECIPE)


def several(*builds: Build) -> Build:
    """One brick after another."""

    def build(folder: Path) -> None:
        for brick in builds:
            brick(folder)

    return build


def recipe(content: str | bytes) -> Build:
    """Another recipe."""
    return text("recipe.yml", content)


def adds(line: str) -> Build:
    """The recipe with a line more."""
    return recipe(f"{RECIPE}{line}\n")


def changes(old: str, new: str, count: int = 1) -> Build:
    """The recipe with other words, in the first ``count`` places."""
    assert old in RECIPE
    return recipe(RECIPE.replace(old, new, count))


def text(name: str, content: str | bytes) -> Build:
    """A file."""

    def build(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return build


def without(name: str) -> Build:
    """A file or folder less."""

    def build(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return build


def link(name: str, target: str) -> Build:
    """A symbolic link."""
    return lambda folder: (folder / name).symlink_to(target)


def model(name: str = "b", more: Mapping[str, Array] | None = None, seed: int = 1, **words: Any) -> Build:
    """A sound model below ``models/`` with ``more`` tensors; ``words``: what ``files.llama`` takes, config entries."""
    shape = {key: words.pop(key) for key in ("code", "layers", "vocab", "intermediate") if key in words}
    settings = {"num_hidden_layers": shape.get("layers", LAYERS), **words}

    def build(folder: Path) -> None:
        write_model(folder / "models" / name, tensors={**llama(seed, **shape), **(more or {})}, settings=settings)

    return build


def config(name: str = "b", **changes: Any) -> Build:
    """Other entries in a model's config.json."""

    def build(folder: Path) -> None:
        path = folder / "models" / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return build


def tensors(found: Mapping[str, Array], name: str = "b") -> Build:
    """Other tensors in a model's file."""
    return lambda folder: write_safetensors(folder / "models" / name / "model.safetensors", found)


def one_tensor(name: str, code: str = "F32", shape: tuple[int, ...] = (HIDDEN, HIDDEN)) -> dict[str, Array]:
    """A tensor of ones, by name."""
    return {name: encode(code, np.ones(shape))}


def header(record: object, data: bytes = bytes(8), **more: Any) -> Build:
    """A weight file of ``models/b`` whose header is ``record``."""
    return lambda folder: raw_safetensors(folder / "models/b/model.safetensors", record, data, **more)
