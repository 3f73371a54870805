"""Recipe text: YAML read with the place of every node, so that messages can point at it; and YAML written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit.errors import RecipeError

__all__ = ["ConfigYamlDumper", "RecipeText", "dump_yaml", "read_recipe_text"]

_MAX_BYTES = 4 * 1024 * 1024
_MAX_DEPTH = 32
_MAX_NODES = 500_000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RecipeText:
    """A parsed YAML document: its value, its text, and where each node stands.

    ``node`` is None for recipes that were given as Python objects; places then name the path inside the object.
    """

    name: str
    text: str
    value: Any
    node: yaml.Node | None
    duplicates: tuple[str, ...] = ()

    def place(self, path: Sequence[str | int]) -> str:
        """``file:line:column`` of the node at ``path``, or of the nearest node above it that exists.

        A mapping's entry is pointed at by its key.
        """
        if self.node is None:
            return ".".join([self.name, *map(str, path)])
        node, mark = self.node, self.node.start_mark
        for step in path:
            found = None
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(step):
                        found, mark = value, key.start_mark
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                found = node.value[step]
                mark = found.start_mark
            if found is None:
                break
            node = found
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"


def read_recipe_text(source: str | Path, name: str | None = None) -> RecipeText:
    """Parse the YAML file ``source`` (a Path) or YAML text (a str); RecipeError points at what is wrong."""
    if isinstance(source, Path):
        name = name or str(source)
        try:
            raw = source.read_bytes()
        except OSError as error:
            raise RecipeError(f"cannot read the recipe: {error.strerror or error}", place=name) from None
        if len(raw) > _MAX_BYTES:
            raise RecipeError(f"{len(raw)} bytes are too many for a recipe", place=name)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"not UTF-8 text (byte {error.start}); is this a recipe?", place=name) from None
    else:
        name, text = name or "recipe", source
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise RecipeError("the recipe is empty", place=name)
        duplicates: list[str] = []
        _check(node, name, duplicates, {})
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError(f"not valid YAML: {error.problem or error.context}", place=place) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"not valid YAML: {str(error).splitlines()[0]}", place=name) from None
    if not isinstance(value, dict):
        raise RecipeError("a recipe is a mapping such as 'merge_method: linear'", place=f"{name}:1:1")
    return RecipeText(name, text, value, node, tuple(duplicates))


def _check(node: yaml.Node, name: str, duplicates: list[str], sizes: dict[int, int], depth: int = 0) -> int:
    """Refuse what would hurt later: deep nesting, nodes that contain themselves, aliases that blow up.

    Returns the number of nodes once aliases are written out; ``sizes`` remembers it by node (0: being visited).
    """
    place = f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise RecipeError("this contains itself", place=place)
        return sizes[id(node)]
    if depth > _MAX_DEPTH:
        raise RecipeError("nested too deeply for a recipe", place=place)
    sizes[id(node)], size = 0, 1
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            mark = f"{name}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError("a key must be text", place=mark)
            if key.value in keys:
                duplicates.append(f"{mark}: '{key.value}' is given twice; the last one counts")
            keys.add(key.value)
            size += 1 + _check(value, name, duplicates, sizes, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(value, name, duplicates, sizes, depth + 1) for value in node.value)
    if size > _MAX_NODES:
        raise RecipeError("aliases make this recipe enormous", place=place)
    sizes[id(node)] = size
    return size


class ConfigYamlDumper(yaml.SafeDumper):
    """Writes lists of numbers on one line, everything else in blocks."""

    def represent_list(self, data: Any) -> yaml.Node:
        """A sequence node in flow style if every item is a number."""
        flow = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


ConfigYamlDumper.add_representer(list, ConfigYamlDumper.represent_list)
ConfigYamlDumper.add_representer(tuple, ConfigYamlDumper.represent_list)


def dump_yaml(value: Any) -> str:
    """``value`` as YAML text without a trailing newline, keys in their given order."""
    return str(yaml.dump(value, Dumper=ConfigYamlDumper, sort_keys=False, allow_unicode=True)).rstrip()
