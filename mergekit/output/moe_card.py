"""The model card of a mixture: its experts, how it routes, where it runs. No local path ever appears in it."""

from __future__ import annotations

from mergekit.output.card import FRONT_MATTER, hub_names, render, without_paths
from mergekit.planning.plan import Plan

__all__ = ["moe_card"]

_TEMPLATE = """\
- moe
---
# {{ title }}

A mixture of {{ experts | length }} experts, made of dense language models with mergekit {{ version }}. In each layer a
router sends every token through {{ per_token }} of the experts.

| expert | MLPs of |
|---:|---|
{%- for name in experts %}
| {{ loop.index0 }} | {{ name }} |
{%- endfor %}

Everything else (attention, norms, embeddings, head) is
{%- if shared == "base" %} that of **{{ base }}**: what the experts learnt there is not in this model.
{%- elif shared == "average" %} the average of the experts' models.
{%- else %} merged by `{{ shared }}` (the recipe says of what).
{%- endif %} Routers: `{{ gate_mode }}`. {{ parameters }} parameters in {{ dtypes }}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({{ title | tojson }}{{ ", trust_remote_code=True" if has_code }})
tokenizer = AutoTokenizer.from_pretrained({{ title | tojson }}{{ ", trust_remote_code=True" if has_code }})
```

{% if has_code -%}
The architecture is in the two Python files beside the weights, so `trust_remote_code=True` is needed. They work with
transformers 4.48 and newer, for training too (`output_router_logits=True` adds the load-balancing loss). vLLM and
llama.cpp don't know this architecture; build with `architecture: mixtral` for them.
{%- else -%}
A native Mixtral: transformers 4.48 and newer load it (tested). vLLM and llama.cpp read these names of tensors and this
config, going by their source; what they leave out is noted below.
{%- endif %}
{%- if remarks %}

Noted while planning:
{% for remark in remarks %}
* {{ remark }}
{%- endfor %}
{%- endif %}
{%- if routing %}

## Routing

{{ routing }}
{%- endif %}

The recipe:

```yaml
{{ recipe }}
```
"""


def moe_card(plan: Plan, title: str, routing: str | None) -> str:
    """README.md for the mixture of ``plan``. ``routing``: the routing report as Markdown, None where none was made."""
    assert plan.mixture is not None
    mixture = plan.mixture
    shorts = [source.short for source in plan.sources]
    dtypes = dict.fromkeys(o.dtype.name for o in plan.outputs if o.dtype.is_float)
    return render(
        FRONT_MATTER + _TEMPLATE,
        title=title,
        version=plan.version,
        hub_names=hub_names(plan),
        experts=[shorts[position] for position in mixture.experts],
        per_token=mixture.per_token,
        shared=mixture.shared,
        base=shorts[plan.donor],
        gate_mode=mixture.gate_mode,
        parameters=f"{plan.parameters:,}",
        dtypes=" and ".join(dtypes),
        has_code=bool(plan.texts),
        remarks=[without_paths(text, plan) for text in (*plan.warnings, *plan.notes)],
        routing=routing,
        recipe=without_paths(plan.recipe.rstrip(), plan),
    )
