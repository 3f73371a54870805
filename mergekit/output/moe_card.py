"""The model card of a mixture: its experts, how it routes, where it runs. No local path ever appears in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit.output import card_parts as parts
from mergekit.output.card import in_words, remarks, render
from mergekit.output.front_matter import front_matter
from mergekit.output.markdown import escape, fenced, table
from mergekit.output.paths import without_paths
from mergekit.planning.plan import Plan

__all__ = ["moe_card"]

_TEMPLATE = """\
# {{ title }}

A mixture of {{ experts }} experts, made of dense language models by mergekit. In each layer a router sends every token
through {{ per_token }} of the experts.

## Experts

{{ table }}

Everything else (attention, norms, embeddings, head) is
{%- if shared == "base" %} that of **{{ base }}**: what the experts learnt there is not in this model.
{%- elif shared == "average" %} the average of the experts' models.
{%- else %} merged by `{{ shared }}` (the recipe says of what).
{%- endif %} Routers: `{{ gate_mode }}`. {{ parameters }} parameters in {{ dtypes }}.

## Use

{{ use }}

{% if has_code -%}
The architecture is in the two Python files beside the weights, so `trust_remote_code=True` is needed. They work with
transformers 4.48 and newer, for training too (`output_router_logits=True` adds the load-balancing loss). vLLM and
llama.cpp don't know this architecture; build with `architecture: mixtral` for them.
{%- else -%}
A native Mixtral: transformers 4.48 and newer load it (tested). vLLM and llama.cpp read these names of tensors and this
config, going by their source; what they leave out is noted below.
{%- endif %}
{%- if routing %}

## Routing

{{ routing }}
{%- endif %}
{%- if statistics %}

## What the merge of the shared weights did

{{ statistics }}
{%- endif %}
{%- if licences %}

## Licences

{{ licences }}
{%- endif %}
{%- if remarks %}

## Noted while planning

{{ remarks }}
{%- endif %}

## Recipe

{{ recipe }}

{{ again }}
{%- if citations %}

## Citation

{{ citations }}
{%- endif %}
"""


def moe_card(
    plan: Plan,
    title: str,
    routing: str | None,
    summary: Mapping[str, Any] | None = None,
    command: parts.Command | None = None,
) -> str:
    """README.md for the mixture of ``plan``.

    ``routing``: the routing report as Markdown, ``summary``: the figures of what was merged; None where there are none.
    ``command`` is what makes it again, if that is more than the defaults.
    """
    assert plan.mixture is not None
    mixture = plan.mixture
    is_merged = mixture.shared not in ("base", "average")
    rows = [[str(number), parts.model_name(plan, position)] for number, position in enumerate(mixture.experts)]
    dtypes = dict.fromkeys(o.dtype.name for o in plan.outputs if o.dtype.is_float)
    return front_matter(plan, ["moe", *([mixture.shared] if is_merged else [])]) + render(
        _TEMPLATE,
        title=escape(title),
        experts=len(mixture.experts),
        per_token=mixture.per_token,
        table=table(["expert", "MLPs of"], rows),
        shared=mixture.shared,
        base=parts.model_name(plan, plan.donor),
        gate_mode=mixture.gate_mode,
        parameters=f"{plan.parameters:,}",
        dtypes=in_words(list(dtypes)),
        use=parts.use(plan, title),
        has_code=bool(plan.texts),
        statistics=parts.statistics(summary, plan) if is_merged else "",
        licences=parts.licences(plan.cards),
        remarks=remarks(plan, [*plan.warnings, *plan.notes]),
        routing=routing.rstrip() if routing else None,
        recipe=fenced(without_paths(plan.recipe, plan), "yaml"),
        again=parts.again(plan, command or parts.Command("mergekit moe")),
        citations=parts.citations(plan) if is_merged else "",
    )
