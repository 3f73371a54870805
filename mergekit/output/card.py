"""The model card: what was merged, how, and whom to cite. No local path ever appears in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit.methods import get_method
from mergekit.planning.plan import Plan

__all__ = ["hub_names", "model_card", "render", "without_paths"]

_TEMPLATE = """\
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
    dtypes = dict.fromkeys(o.dtype.name for o in plan.outputs if o.dtype.is_float)
    return render(
        _TEMPLATE,
        title=title,
        version=plan.version,
        method=method,
        method_name=f"[{method.title}]({method.url})" if method.url else method.title,
        models=shorts,
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
    """The sources that are repositories on the hub."""
    return [s.short for s in plan.sources if "/" in s.short and not Path(s.reference).exists()]


def without_paths(text: str, plan: Plan) -> str:
    """``text`` with each local path of a source replaced by the model's short name."""
    for source in plan.sources:
        if source.reference != source.short:
            text = text.replace(source.reference, source.short)
        if len(source.folder) > 1:
            text = text.replace(source.folder, source.short)
    return text
