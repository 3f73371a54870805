"""The model card: what was merged, how, and whom to cite. No local path ever appears in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.methods import get_method
from mergekit.output import card_parts as parts
from mergekit.output.front_matter import front_matter
from mergekit.output.markdown import escape, fenced
from mergekit.output.paths import without_paths
from mergekit.planning.licences import licence_notes, licence_warnings
from mergekit.planning.plan import Plan

__all__ = ["in_words", "model_card", "remarks", "render"]

_TEMPLATE = """\
# {{ title }}

{{ what }}

## Models

{{ models }}
{%- if others %}

For all of them: {{ others }}.
{%- endif %}

## Use

{{ use }}
{%- if statistics %}

## What the merge did

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


def model_card(
    plan: Plan,
    title: str,
    summary: Mapping[str, Any] | None = None,
    command: parts.Command | None = None,
) -> str:
    """README.md for the result of ``plan``. ``title`` is usually the name of the output folder.

    ``summary`` holds the figures of the whole merge, as merge_stats.json has them; None where none were gathered.
    ``command`` is what makes it again, if that is more than the defaults.
    """
    return front_matter(plan, [plan.method]) + render(
        _TEMPLATE,
        title=escape(title),
        what=_what(plan),
        models=parts.models(plan),
        others=parts.others(plan),
        use=parts.use(plan, title),
        statistics=parts.statistics(summary, plan),
        licences=parts.licences(plan.cards),
        remarks=remarks(plan, plan.warnings),
        recipe=fenced(without_paths(plan.recipe, plan), "yaml"),
        again=parts.again(plan, command or parts.Command()),
        citations=parts.citations(plan),
    )


def _what(plan: Plan) -> str:
    """A paragraph: what this is, by which method, of which size, with whose config and tokenizer."""
    method = get_method(plan.method)
    positions = [i for i, source in enumerate(plan.sources) if not (source.prepared or source.adapter)]
    onto = plan.base if method.form.space == "deltas" and method.base != "ignored" else None
    merged = [f"**{parts.model_name(plan, i)}**" for i in positions if i != onto]
    names = in_words(merged) if len(merged) <= 6 else f"{len(merged)} models"
    base = "" if onto is None else f" onto the base model **{parts.model_name(plan, onto)}**"
    made = f"a merge of {names}{base}" if len(merged) > 1 or base else f"made from {names}"
    title = f"[{escape(method.title)}]({method.url})" if method.url else escape(method.title)
    summary = "`".join(map(escape, method.summary.rstrip(".").split("``")))  # code in docstrings has two backticks
    dtypes = dict.fromkeys(o.dtype.name for o in plan.outputs if o.dtype.is_float)
    return (
        f"This model is {made}, with mergekit by {title}: {summary[:1].lower()}{summary[1:]}. It has "
        f"{plan.parameters:,} parameters in {in_words(list(dtypes)) or 'integers'}; its config {_origin(plan)}."
    )


def _origin(plan: Plan) -> str:
    """Whose config and tokenizer the result has."""
    donor = parts.model_name(plan, plan.donor)
    owners = [source for source, name in plan.files if name in parts.TOKENIZER_FILES]
    if any(name in parts.TOKENIZER_FILES and name.startswith("tokenizer") for name, _ in plan.texts):
        return f"is that of {donor}, its tokenizer was made for it"
    if not owners:
        return f"is that of {donor}, and it has no tokenizer"
    if plan.donor in owners:
        return f"and tokenizer are those of {donor}"
    return f"is that of {donor}, its tokenizer that of {parts.model_name(plan, owners[0])}"


def remarks(plan: Plan, texts: Sequence[str]) -> str:
    """Warnings and notes of a plan as a list; what the card says of licences elsewhere is left out."""
    told = {*licence_warnings(plan.cards), *licence_notes(plan.cards)}
    return "\n".join(f"* {escape(without_paths(text, plan))}" for text in texts if text not in told)


def in_words(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def render(template: str, **facts: Any) -> str:
    """A jinja2 template with every name that it uses given."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    return str(environment.from_string(template).render(**facts))
