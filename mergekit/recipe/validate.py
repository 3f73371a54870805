"""Hold a recipe's text against a schema, and say what is wrong with it in words of recipes."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mergekit.errors import RecipeError, nearest
from mergekit.recipe.text import RecipeText

__all__ = ["validate"]

Path_ = tuple[str | int, ...]
Schema = TypeVar("Schema", bound=BaseModel)


def validate(text: RecipeText, schema: type[Schema]) -> Schema:
    """The recipe as an object of ``schema``; RecipeError points at the first fault and says what was expected."""
    try:
        return schema.model_validate(text.value)
    except ValidationError as error:
        faults = error.errors()
        # A misspelt key is both unknown and missing: the unknown one says more.
        first = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
        path = tuple(step for step in first["loc"] if not (isinstance(step, str) and step.startswith("function-")))
        path += first.get("ctx", {}).get("path", ())
        raise RecipeError(_explain(schema, first, path), place=text.place(path)) from None
    except RecursionError:
        raise RecipeError("nested too deeply", place=text.name) from None


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "two numbers, [first, one past the last]",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "too_short": "at least one entry",
}
"""What the faults that pydantic finds say about the value that was expected, in words of recipes."""


def _explain(model: type[BaseModel], fault: Any, path: Path_) -> str:
    """A pydantic fault in our words."""
    kind, key = fault["type"], str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        keys = _keys_at(model, path[:-1])
        if "parameters" in keys and _is_parameter(key):
            return f"'{key}' is a parameter; put it under 'parameters'"
        return f"there is no '{key}' here. {nearest(key, keys)}"
    if kind == "missing" and "layer_range" in path[:-1]:
        return f"expected {_EXPECTED['tuple_type']}"
    if kind == "missing":
        return f"'{key}' is missing"
    if kind == "setting":
        return str(fault["ctx"]["text"])
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    where = f"'{key}': " if path and isinstance(path[-1], str) else ""
    if kind == "too_long" and key == "layer_range":
        kind = "tuple_type"
    if kind == "model_type" and isinstance(fault["input"], str) and "models" in path[-2:]:
        name = re.sub(r"^model\s+", "", fault["input"])  # a colon was forgotten
        return f"expected a mapping: write 'model: {name:.60}'"
    if kind in _EXPECTED:
        got = "nothing" if fault["input"] is None else f"{fault['input']!r:.60}"
        return f"{where}expected {_EXPECTED[kind]}, got {got}"
    return f"{where}{fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r:.60}"


def _is_parameter(key: str) -> bool:
    """Whether some method has a parameter of this name."""
    from mergekit.methods import get_method, method_names

    return any(p.name == key for name in method_names() for p in get_method(name).params)


def _keys_at(model: type[BaseModel], path: Path_) -> list[str]:
    """The valid keys of the mapping at ``path``, read off the schema."""
    schema = model.model_json_schema()
    node: Any = schema
    for step in path:
        node = _resolve(schema, node)
        node = (
            node.get("items", {})
            if isinstance(step, int)
            else node.get("properties", {}).get(step) or node.get("additionalProperties", {})
        )
    return list(_resolve(schema, node).get("properties", {}))


def _resolve(schema: Any, node: Any) -> Any:
    while isinstance(node, dict):
        if "anyOf" in node:
            mappings = [n for n in node["anyOf"] if "$ref" in n or "properties" in n]
            node = next((n for n in [*mappings, *node["anyOf"]] if n.get("type") != "null"), {})
        elif "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        else:
            return node
    return {}
