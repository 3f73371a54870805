"""The JSON Schemas of recipes, and the reference of their keys, from the declarations that also validate them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.methods import Method, get_method, method_names
from mergekit.methods.describe import default, owners
from mergekit.methods.kinds import Choice, Flag, Integer, Kind, Real
from mergekit.methods.spec import Parameter
from mergekit.moe.schema import GATE_MODES, MoeConfiguration
from mergekit.moe.targets import MIXTRAL, PHI3MOE
from mergekit.recipe import EMBEDDING_OPTIONS
from mergekit.recipe.schema import MergeConfiguration, setting_schema
from mergekit.vocab.templates import BUILT_IN, JINJA

__all__ = ["merge_schema", "moe_schema", "reference_page"]

Json = dict[str, Any]
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_METHODS = tuple(map(get_method, method_names()))


def merge_schema() -> str:
    """docs/recipe.schema.json."""
    return _written(_merge(), "Recipe of a merge")


def moe_schema() -> str:
    """docs/moe.schema.json."""
    return _written(_moe(), "Recipe of a mixture of experts")


def _merge() -> Json:
    schema = _known(MergeConfiguration.model_json_schema())
    one = {"models": {"minItems": 1}, "slices": {"minItems": 1}, "modules": {"minProperties": 1}}
    schema["oneOf"] = [
        {"required": [form], "properties": {form: {"not": {"type": "null"}, **least}}} for form, least in one.items()
    ]
    named = {"enum": ["auto", *BUILT_IN]}
    schema["properties"]["chat_template"] |= {"anyOf": [named, {"type": "string", "pattern": JINJA}, {"type": "null"}]}
    keys = ("tokenizer", "tokenizer_source")
    schema["not"] = {"required": [*keys], "properties": {key: {"not": {"type": "null"}} for key in keys}}
    schema["allOf"] = [_when(m, {**_everywhere(m), **_base(m)}) for m in _METHODS]
    return schema


def _moe() -> Json:
    schema = _known(MoeConfiguration.model_json_schema())
    schema["properties"]["gate_mode"] |= {"enum": list(GATE_MODES)}
    schema["properties"]["architecture"] |= {"anyOf": [{"enum": [MIXTRAL.name, PHI3MOE.name]}, {"type": "null"}]}
    shared = schema["$defs"]["SharedMerge"]
    shared["allOf"] = [_when(m, {"properties": {"parameters": _ref(m.name)}}) for m in _METHODS]
    return schema


def _known(schema: Json) -> Json:
    """A schema that knows the methods and their parameters by name, wherever there are ``parameters``."""
    for part in (schema, *schema["$defs"].values()):
        properties = part.get("properties", {})
        if "merge_method" in properties:
            properties["merge_method"] |= {"enum": list(method_names())}
        for key, name in (("parameters", "Parameters"), ("input_model_parameters", "ParametersByModel")):
            if key in properties:
                reference = {"anyOf": [_ref(name), {"type": "null"}]}
                properties[key] = {"description": properties[key]["description"], **reference}
    kinds = {_slug(p.kind): setting_schema(_scalar(p.kind)) for p in _all_parameters()}
    scopes = {f"{m.name}{end}": _parameters(m, shared) for m in _METHODS for end, shared in (("", True), (_OWN, False))}
    schema["$defs"] |= {
        "Setting": setting_schema(),
        "Parameters": {
            "type": "object",
            "propertyNames": _matching("|".join(dict.fromkeys(p.name for p in _all_parameters())), _UNKNOWN),
            "additionalProperties": _ref("Setting"),
        },
        "ParametersByModel": {"type": "object", "additionalProperties": _ref("Parameters")},
        **kinds,
        **scopes,
    }
    return schema


_OWN = "-of-a-model"
_UNKNOWN = "no merge method has this parameter"


def _matching(pattern: str, otherwise: str) -> Json:
    """Text of a pattern, and what editors say of other text. (An enum would be offered whatever the method is.)"""
    return {"pattern": f"^({pattern})$", "patternErrorMessage": otherwise}


def _parameters(method: Method, shared: bool) -> Json:
    """The parameters of a method: all of them, or those that a model may have of its own.

    Others are let be: whoever reads the recipe ignores them with a warning, and editors know no warnings.
    """
    found = (*method.params, *method.options)
    return {"properties": {p.name: _described(p) for p in found if shared or p.scope != "once"}}


def _described(parameter: Parameter) -> Json:
    if not parameter.used:
        return {"description": _help(parameter), **_ref("Setting")}
    text = f"{_help(parameter)}\n\n{parameter.kind}; {owners(parameter)}; {_default(parameter)}"
    return {"description": text, **_ref(_slug(parameter.kind))}


def _default(parameter: Parameter) -> str:
    value = default(parameter)
    return value if value == "required" else f"default {value}"


def _when(method: Method, then: Json) -> Json:
    chosen = {"properties": {"merge_method": {"const": method.name}}, "required": ["merge_method"]}
    return {"if": chosen, "then": then}


def _everywhere(method: Method) -> Json:
    """The parameters of a method at all places that have some."""
    shared, own = ({"parameters": _ref(f"{method.name}{end}")} for end in ("", _OWN))
    sources = {"sources": {"items": {"properties": own}}}
    parts = {"models": {"items": {"properties": own}}, "slices": {"items": {"properties": {**shared, **sources}}}}
    modules = {"additionalProperties": {"properties": {**shared, **parts}}}
    by_model = {"additionalProperties": own["parameters"]}
    return {"properties": {**shared, "input_model_parameters": by_model, **parts, "modules": modules}}


def _base(method: Method) -> Json:
    """That a method needs a base: the recipe's, or one in each slice."""
    if method.base != "required":
        return {}
    need = {"required": ["base_model"]}
    return {"anyOf": [need, {"required": ["slices"], "properties": {"slices": {"items": need}}}]}


def _scalar(kind: Kind) -> Json:
    """What ``kind`` reads. Text is read as numbers, too, and numbers as flags: editors must not mark what works."""
    match kind:
        case Real() | Integer():
            bounds = {"minimum": kind.low, "maximum": kind.high}
            whole = {"multipleOf": 1} if isinstance(kind, Integer) else {}
            given = {key: value for key, value in bounds.items() if value is not None}
            return {
                "type": ["number", "boolean", "string"],
                **given,
                **whole,
                **_matching(r".*\d.*", f"expected {kind}"),
            }
        case Flag():
            return {"type": ["boolean", "integer", "string"], "minimum": 0, "maximum": 1, **_FLAG_WORDS}
        case Choice():
            words = {"enum": list(kind.words)}
            return {"anyOf": [words, _scalar(Flag())]} if kind.flags else words


_FLAG_WORDS = _matching(
    "[Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|[Yy][Ee][Ss]|[Nn][Oo]|[Oo][Nn]|[Oo][Ff][Ff]|[01]", f"expected {Flag()}"
)


def _slug(kind: Kind) -> str:
    return re.sub(r"[^\w.+-]+", "-", str(kind)).strip("-")


def _ref(name: str) -> Json:
    return {"$ref": f"#/$defs/{name}"}


def _written(schema: Json, title: str) -> str:
    """A schema as the text of a file."""
    return json.dumps({"$schema": _DRAFT, **schema, "title": title}, indent=1, ensure_ascii=False) + "\n"


def _all_parameters() -> Iterator[Parameter]:
    yield from EMBEDDING_OPTIONS
    for method in _METHODS:
        yield from (*method.params, *method.options)


def _help(parameter: Parameter) -> str:
    return parameter.help.replace("``", "")


def reference_page(head: str) -> str:
    """docs/recipe-reference.md: every key of a recipe, and every parameter."""
    parts = [head, "# All keys of a recipe\n"]
    parts.append(
        "[recipe.md](recipe.md) explains the language. Editors check and complete recipes with "
        "[recipe.schema.json](recipe.schema.json) and [moe.schema.json](moe.schema.json): see "
        "[there](recipe.md#in-an-editor).\n"
    )
    for title, schema in (("A merge", _merge()), ("A mixture of experts", _moe())):
        parts += [f"## {title}\n", *_keys(schema)]
        for name, part in schema["$defs"].items():
            if name in _PLACES:
                parts += [f"\n### {_PLACES[name]}\n", *_keys(part)]
        parts.append("")
    parts += ["## Parameters\n", "A scalar, a gradient, or conditions; see [recipe.md](recipe.md#parameters).\n"]
    parts += ["| parameter | values | default | meaning |", "|---|---|---|---|"]
    parts += [
        f"| {name} | {values} | {given} | {text} ({methods}) |" for (name, values, given, text), methods in _uses()
    ]
    return "\n".join(parts) + "\n"


Cells = tuple[str, str, str, str]


def _uses() -> list[tuple[Cells, str]]:
    """Every parameter in each of its meanings, by name, with the methods that mean it so."""
    found: dict[Cells, list[str]] = {}
    for method in _METHODS:
        for p in (*method.params, *method.options):
            found.setdefault(_cells(p), []).append(f"[{method.name}](methods/{method.name}.md)")
    for p in EMBEDDING_OPTIONS:
        found.setdefault(_cells(p), []).append("any method, with a tokenizer setting")
    return sorted(((cells, ", ".join(methods)) for cells, methods in found.items()), key=lambda use: use[0][0])


def _cells(p: Parameter) -> Cells:
    return f"`{p.name}`", f"{p.kind}; {owners(p)}", default(p) if p.used else "no effect", _help(p)


_PLACES = {
    "InputModelDefinition": "An entry of `models`",
    "OutputSliceDefinition": "An entry of `slices`",
    "InputSliceDefinition": "An entry of `sources` in a slice",
    "OutputModuleDefinition": "An entry of `modules`",
    "TokenizerConfig": "`tokenizer`",
    "TokenEntry": "A token in `tokenizer.tokens`",
    "Expert": "An entry of `experts`",
    "SharedMerge": "`attention`, as a mapping",
}


def _keys(schema: Mapping[str, Any]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, entry in schema["properties"].items():
        value = entry.get("default")
        needed = name in schema.get("required", ())
        shown = "required" if needed else "" if value is None else f"`{json.dumps(value).strip(chr(34))}`"
        lines.append(f"| `{name}` | {_type(entry)} | {shown} | {entry.get('description', '')} |")
    return lines


def _type(entry: Json) -> str:
    """The type of a key's values, in words."""
    return " or ".join(dict.fromkeys(_types(entry)))


def _types(entry: Json) -> Iterator[str]:
    match entry:
        case {"anyOf": several}:
            for one in several:
                yield from _types(one)
        case {"enum": words} if words == list(method_names()):
            yield "a [method](methods/README.md)"
        case {"enum": words}:
            yield from (f"`{word}`" for word in words if word is not None and not word.startswith("torch."))
        case {"$ref": "#/$defs/Parameters"}:
            yield "[parameters](#parameters)"
        case {"$ref": "#/$defs/ParametersByModel"}:
            yield "by model, [parameters](#parameters)"
        case {"$ref": ref}:
            title = _PLACES[ref.rpartition("/")[2]]
            yield f"a [mapping](#{re.sub(r'[^a-z -]', '', title.lower()).replace(' ', '-')})"
        case {"type": "array", "prefixItems": _}:
            yield "two whole numbers"
        case {"type": "array", "items": items}:
            yield f"a list, each {_type(items)}"
        case {"type": "object", "properties": _} | {"type": "string", "minLength": _}:
            yield "a model"
        case {"type": "object", "additionalProperties": dict(values)}:
            yield f"by name, {_type(values)}"
        case {"type": "object"}:
            yield "a mapping"
        case {"type": kind} if kind != "null":
            yield _TYPES[kind]


_TYPES = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
