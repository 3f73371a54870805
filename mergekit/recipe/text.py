"""Recipe text: YAML read with the place of every node, so that messages can point at it; and YAML written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from mergekit.errors import RecipeError

__all__ = ["ConfigYamlDumper", "RecipeText", "dump_yaml", "read_recipe_text", "text_of"]

_MAX_BYTES = 4 * 1024 * 1024
_MAX_DEPTH = 32
_MAX_NODES = 100_000
_MAX_BITS = 1024
"""More than any number that a recipe can mean; Python refuses to print those of more than 4,300 digits."""
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
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

    @property
    def file(self) -> Path | None:
        """The file that it was read from, or None."""
        return None if self.node is None else Path(self.name)

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
        return _at(self.name, mark)


def _at(name: str, mark: Any) -> str:
    """``file:line:column``, counted from 1."""
    return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name


def text_of(source: str | Path | Mapping[str, Any]) -> RecipeText:
    """The text of a recipe given as a path to YAML or as a mapping.

    ``name.yaml`` also finds ``name.yml``, and the other way round: manuals mix them up.
    """
    if isinstance(source, Mapping):
        value = dict(source)
        try:
            return RecipeText("recipe", dump_yaml(value), value, None)
        except Exception as error:  # yaml refuses objects it has no form for
            raise RecipeError(f"the recipe holds something that YAML can't: {error}", place="recipe") from None
    path = Path(source)
    twin = path.with_suffix({".yml": ".yaml", ".yaml": ".yml"}.get(path.suffix, path.suffix)) if path.name else path
    return read_recipe_text(twin if not path.exists() and twin.is_file() else path)


_NEW = "; `mergekit new` writes one to start from"


def read_recipe_text(source: str | Path, name: str | None = None) -> RecipeText:
    """Parse the YAML file ``source`` (a Path) or YAML text (a str); RecipeError points at what is wrong."""
    if isinstance(source, Path):
        name = name or str(source)
        try:
            with source.open("rb") as stream:
                raw = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise RecipeError(_unread(source, error), place=name) from None
        if len(raw) > _MAX_BYTES:
            raise RecipeError(f"more than {_MAX_BYTES >> 20} MiB are too much for a recipe", place=name)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"not UTF-8 text (byte {error.start}); is this a recipe?", place=name) from None
    else:
        name, text = name or "recipe", source
    try:
        loader = _Loader(text)
        try:
            _check_size(text, name)
            node = loader.get_single_node()
            check = _Check(name, loader)
            if node is not None:
                check.node(node)
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = _at(name, error.problem_mark or error.context_mark)
        raise RecipeError(f"not valid YAML: {_explain(error, text)}", place=place) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"not valid YAML: {str(error).splitlines()[0]}", place=name) from None
    if value is None:
        raise RecipeError(f"the recipe is empty{_NEW}", place=name)
    if not isinstance(value, dict):
        raise RecipeError("a recipe is a mapping such as 'merge_method: linear'", place=f"{name}:1:1")
    return RecipeText(name, text, value, node, check.duplicates())


def _unread(path: Path, error: OSError) -> str:
    """Why there is no recipe at ``path``, and what to do."""
    if (path / "config.json").is_file():
        return f"this is a model's folder, and a recipe is a file; `mergekit inspect {path}` shows what the model is"
    if path.is_dir():
        return f"this is a folder, and a recipe is a file{_NEW}"
    return f"cannot read the recipe: {error.strerror or error}{_NEW if isinstance(error, FileNotFoundError) else ''}"


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    """What the YAML reader says, with the place where the construct in question begins (an unclosed bracket)."""
    at = error.problem_mark
    lines = text.split("\n")
    if at and at.line < len(lines) and "\t" in lines[at.line][: at.column + 1]:
        return "a tab stands where YAML takes spaces only; indent with spaces"
    context, mark = error.context or "", error.context_mark
    if context and mark and error.problem_mark and mark.line != error.problem_mark.line:
        context += f" (begun at {mark.line + 1}:{mark.column + 1})"
    return ", ".join(part for part in (context, error.problem) if part)


def _check_size(text: str, name: str) -> None:
    """Refuse deep nesting before nodes are composed: libyaml composes by recursion, and crashes with the stack."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if number > _MAX_NODES:
            raise RecipeError(f"more than {_MAX_NODES:,} entries are too many for a recipe", place=name)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise RecipeError("nested too deeply for a recipe", place=_at(name, event.start_mark))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Check:
    """Refuse what would hurt later: nodes that contain themselves, aliases that blow up, keys that are not text."""

    def __init__(self, name: str, loader: Any) -> None:
        self._duplicates: list[tuple[int, int, str]] = []
        self._name, self._loader = name, loader
        self._known: dict[int, tuple[int, int] | None] = {}

    def node(self, node: yaml.Node) -> tuple[int, int]:
        """The number of nodes below ``node`` and its height, with aliases written out."""
        if id(node) in self._known:
            known = self._known[id(node)]
            if known is None:
                raise RecipeError("this contains itself", place=self._place(node))
            return known
        self._known[id(node)] = None
        size, height = 1, 0
        for child in self._children(node):
            more, below = self.node(child)
            size, height = size + more, max(height, below + 1)
        if size > _MAX_NODES:
            raise RecipeError("aliases make this recipe enormous", place=self._place(node))
        if height > _MAX_DEPTH:
            raise RecipeError("nested too deeply for a recipe", place=self._place(node))
        self._known[id(node)] = size, height
        return size, height

    def _children(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            self._keys([key for key, _ in node.value])
            return [child for pair in node.value for child in pair]
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        if node.tag != _MERGE:
            try:
                value = self._loader.construct_object(node)
            except yaml.YAMLError:
                raise
            except Exception as error:  # the constructors raise whatever int(), re.match() and others do
                kind = node.tag.rsplit(":", 1)[-1]
                text = f"'{node.value:.40}' can't be read as {kind}; put text in quotes"
                raise RecipeError(text, place=self._place(node)) from error
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise RecipeError(f"'{node.value:.40}...' is too large a number", place=self._place(node))
        return []

    def _keys(self, keys: Sequence[yaml.Node]) -> None:
        seen: set[str] = set()
        for key in keys:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                quoted = f"; write '{key.value}' in quotes" if isinstance(key, yaml.ScalarNode) else ""
                raise RecipeError(f"a key must be text{quoted}", place=self._place(key))
            if key.value in seen:
                mark = key.start_mark
                self._duplicates.append((mark.line, mark.column, f"{self._place(key)}: '{key.value}'"))
            seen.add(key.value)

    def duplicates(self) -> tuple[str, ...]:
        """A warning for each key that is given twice, in the order of the document."""
        return tuple(f"{text} is given twice; the last one counts" for *_, text in sorted(self._duplicates))

    def _place(self, node: yaml.Node) -> str:
        return _at(self._name, node.start_mark)


class ConfigYamlDumper(yaml.SafeDumper):
    """Writes lists of numbers on one line, everything else in blocks; no anchors, though objects may be shared."""

    def ignore_aliases(self, data: Any) -> bool:
        """What occurs twice is written twice."""
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        """A sequence node in flow style if every item is a number."""
        flow = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)

    def represent_text(self, data: str) -> yaml.ScalarNode:
        """A scalar, in quotes and with escapes if it holds characters that readers take for ends of lines or drop."""
        plain = data.replace("\n", "").isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')


ConfigYamlDumper.add_representer(str, ConfigYamlDumper.represent_text)
ConfigYamlDumper.add_representer(list, ConfigYamlDumper.represent_list)
ConfigYamlDumper.add_representer(tuple, ConfigYamlDumper.represent_list)
ConfigYamlDumper.add_multi_representer(float, lambda dumper, value: dumper.represent_float(float(value)))
ConfigYamlDumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_text(str(path)))


def dump_yaml(value: Any) -> str:
    """``value`` as YAML text without a trailing newline, keys in their given order."""
    return str(yaml.dump(value, Dumper=ConfigYamlDumper, sort_keys=False, allow_unicode=True)).rstrip()
