"""The JSON Schemas of recipes, and the reference of their keys, from the declarations that also validate them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.methods import get_method, method_names
from mergekit.methods.describe import default
from mergekit.methods.spec import Parameter
from mergekit.moe.schema import GATE_MODES, MoeConfiguration
from mergekit.recipe.schema import _SETTING, MergeConfiguration

__all__ = ["merge_schema", "moe_schema", "reference_page"]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def merge_schema() -> str:
    """docs/recipe.schema.json."""
    schema = MergeConfiguration.model_json_schema()
    schema["properties"]["merge_method"] |= {"enum": list(method_names())}
    forms = ("models", "slices", "modules")
    schema["oneOf"] = [{"required": [form]} for form in forms]
    return _finished(schema, "Recipe of a merge")


def moe_schema() -> str:
    """docs/moe.schema.json."""
    schema = MoeConfiguration.model_json_schema()
    schema["properties"]["gate_mode"] |= {"enum": list(GATE_MODES)}
    schema["properties"]["architecture"] |= {"anyOf": [{"enum": ["mixtral", "phi3moe"]}, {"type": "null"}]}
    schema["$defs"]["SharedMerge"]["properties"]["merge_method"] |= {"enum": list(method_names())}
    return _finished(schema, "Recipe of a mixture of experts")


def _finished(schema: dict[str, Any], title: str) -> str:
    """A schema as a file: known parameters by name wherever there are ``parameters``."""
    for part in (schema, *schema.get("$defs", {}).values()):
        properties = part.get("properties", {})
        for key, name in (("parameters", "Parameters"), ("input_model_parameters", "ParametersByModel")):
            if key in properties:
                reference = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
                properties[key] = {"description": properties[key]["description"], **reference}
    schema.setdefault("$defs", {}).update(
        Setting=_SETTING,
        Parameters=_parameters(),
        ParametersByModel={"type": "object", "additionalProperties": {"$ref": "#/$defs/Parameters"}},
    )
    return json.dumps({"$schema": _DRAFT, **schema, "title": title}, indent=1, ensure_ascii=False) + "\n"


def _parameters() -> dict[str, Any]:
    """Every parameter of every method."""
    properties = {
        name: {"description": "; ".join(_told(users)), "$ref": "#/$defs/Setting"}
        for name, users in known_parameters().items()
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def known_parameters() -> dict[str, list[tuple[str, Parameter]]]:
    """The parameters of all methods by name, with the methods that have them."""
    found: dict[str, list[tuple[str, Parameter]]] = {"embed_slerp": []}
    for method in map(get_method, method_names()):
        for parameter in (*method.params, *method.options):
            if not parameter.name.startswith("_"):
                found.setdefault(parameter.name, []).append((method.name, parameter))
    return found


def _told(users: list[tuple[str, Parameter]]) -> Iterator[str]:
    """What a parameter does, once for each meaning, with the methods that mean it so."""
    meanings: dict[str, list[str]] = {}
    for method, parameter in users:
        meanings.setdefault(parameter.help.replace("``", ""), []).append(method)
    if not users:
        yield "merge embeddings of united vocabularies of two models by slerp"
    for text, methods in meanings.items():
        yield f"{text} ({', '.join(methods) if len(methods) < 6 else f'{len(methods)} methods'})"


def reference_page(head: str) -> str:
    """docs/recipe-reference.md: every key of a recipe, and every parameter."""
    parts = [head, "# All keys of a recipe\n"]
    parts.append(
        "[recipe.md](recipe.md) explains the language. Editors check and complete recipes with "
        "`recipe.schema.json` and `moe.schema.json`, which lie beside this page: see "
        "[there](recipe.md#in-an-editor).\n"
    )
    for title, model in (("A merge", MergeConfiguration), ("A mixture of experts", MoeConfiguration)):
        schema = model.model_json_schema()
        parts += [f"## {title}\n", *_keys(schema, schema.get("required", ()))]
        for name, part in schema.get("$defs", {}).items():
            if part.get("properties") and name in _PLACES:
                parts += [f"\n### {_PLACES[name]}\n", *_keys(part, part.get("required", ()))]
        parts.append("")
    parts += ["## Parameters\n", "A scalar, a gradient, or conditions; see [recipe.md](recipe.md#parameters).\n"]
    parts += ["| parameter | values | default | meaning |", "|---|---|---|---|"]
    for name, users in sorted(known_parameters().items()):
        kinds = dict.fromkeys(str(p.kind) for _, p in users)
        defaults = dict.fromkeys(default(p) if p.used else "no effect" for _, p in users)
        meaning = "; ".join(_told(users))
        values = f"{' or '.join(kinds) or 'true or false'} | {' or '.join(defaults) or 'false'}"
        parts.append(f"| `{name}` | {values} | {meaning} |")
    return "\n".join(parts) + "\n"


_PLACES = {
    "InputModelDefinition": "An entry of `models`",
    "OutputSliceDefinition": "An entry of `slices`",
    "InputSliceDefinition": "An entry of `sources` in a slice",
    "TokenizerConfig": "`tokenizer`",
    "TokenEntry": "A token in `tokenizer.tokens`",
    "Expert": "An entry of `experts`",
    "SharedMerge": "`attention`, as a mapping",
}


def _keys(schema: Mapping[str, Any], required: Any) -> list[str]:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, entry in schema["properties"].items():
        value = entry.get("default")
        shown = "required" if name in required else "" if value is None else f"`{json.dumps(value).strip(chr(34))}`"
        lines.append(f"| `{name}` | {shown} | {entry.get('description', '')} |")
    return lines
