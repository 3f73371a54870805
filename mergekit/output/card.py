"""The model card: what was merged, how, and whom to cite. No local path ever appears in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mergekit.methods import get_method
from mergekit.planning.plan import Plan, Source

__all__ = ["FRONT_MATTER", "hub_names", "model_card", "render", "without_paths"]

FRONT_MATTER = """\
---
{%- if hub_names %}
base_model:
{%- for name in hub_names %}
- {{ name | tojson }}
{%- endfor %}
{%- endif %}
library_name: transformers
tags:
- mergekit
- merge
"""
"""The head of a card, to be followed by more tags and closed."""

_TEMPLATE = """\
---
# {{ title }}

This model was made by merging pretrained language models with mergekit {{ version }}.

## How it was made

Method: {{ method_name }}{% if base %}, with **{{ base }}** as the base model{% endif %}.
{{ method.summary }}

Models:
{% for name in models %}
* {{ name }}
{%- endfor %}

{{ parameters }} parameters in {{ dtypes }}; config and tokenizer are those of {{ donor }}.
{%- if warnings %}

Noted while planning:
{% for warning in warnings %}
* {{ warning }}
{%- endfor %}
{%- endif %}

The recipe:

```yaml
{{ recipe }}
```

{%- if method.paper %}

## Reference

{{ method.paper }}. <{{ method.url }}>
{%- endif %}
"""


def model_card(plan: Plan, title: str) -> str:
    """README.md for the result of ``plan``. ``title`` is usually the name of the output folder."""
    method = get_method(plan.method)
    shorts = [source.short for source in plan.sources]
    models = [source.short for source in plan.sources if not source.adapter]
    dtypes = dict.fromkeys(o.dtype.name for o in plan.outputs if o.dtype.is_float)
    return render(
        FRONT_MATTER + _TEMPLATE,
        title=title,
        version=plan.version,
        method=method,
        method_name=f"[{method.title}]({method.url})" if method.url else method.title,
        models=models,
        hub_names=hub_names(plan),
        base=None if plan.base is None else shorts[plan.base],
        donor=shorts[plan.donor],
        parameters=f"{plan.parameters:,}",
        dtypes=" and ".join(dtypes) or "integers",
        warnings=[without_paths(w, plan) for w in plan.warnings],
        recipe=without_paths(plan.recipe.rstrip(), plan),
    )


def render(template: str, **facts: Any) -> str:
    """A jinja2 template with every name that it uses given."""
    from jinja2 import Environment, StrictUndefined

    return str(Environment(undefined=StrictUndefined, autoescape=False).from_string(template).render(**facts))


def hub_names(plan: Plan) -> list[str]:
    """The models and adapters that are repositories on the hub."""
    found = [_first(source) for source in plan.sources if not source.prepared]
    return list(dict.fromkeys(short for path, short in found if "/" in short and not Path(path).exists()))


def without_paths(text: str, plan: Plan | None) -> str:
    """``text`` with each local path of a source replaced by the model's short name, any other by its last part.

    Without a plan no source is known.
    """
    sources = plan.sources if plan else ()
    names = {source.reference: source.short for source in sources}
    for source in sources:
        path, short = _first(source)
        names.update({path: short, source.folder: short})
    paths = sorted((p for p in names if len(p) > 1 and p != names[p]), key=len, reverse=True)
    # Not inside another word or path: a folder may be called "base".
    found = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, paths))})(?![\w/-])")
    return _ABSOLUTE.sub(lambda match: match[1], found.sub(lambda match: names[match[1]], text) if paths else text)


_ABSOLUTE = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s'\",:;()]+/)*([^\s'\",:;()/]+)")


def _first(source: Source) -> tuple[str, str]:
    """The path of a source, and the short form of that: of a model with an adapter, the model's own."""
    return source.reference.partition("+")[0], source.short.partition("+")[0]
