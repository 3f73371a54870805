"""The model card: what was merged, how, and whom to cite. No local path ever appears in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.methods import get_method
from mergekit.output import card_parts as parts
from mergekit.output.front_matter import front_matter
from mergekit.output.markdown import escape, fenced
from mergekit.output.paths import without_paths
from mergekit.planning.licences import told_by_card
from mergekit.planning.plan import Plan

__all__ = ["compose", "in_words", "model_card"]


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
    more = parts.others(plan)
    own = {
        "Models": parts.models(plan) + (f"\n\nFor all of them: {more}." if more else ""),
        "Use": parts.use(plan, title),
        "What the merge did": parts.statistics(summary, plan),
    }
    return compose(plan, [plan.method], title, _what(plan), own, remarks=plan.warnings, command=command)


def compose(
    plan: Plan,
    tags: Sequence[str],
    title: str,
    what: str,
    own: Mapping[str, str],
    *,
    remarks: Sequence[str],
    command: parts.Command | None,
    has_citations: bool = True,
) -> str:
    """A card: metadata with ``tags``, ``what`` under the title, its ``own`` sections, and those of every card.

    Sections without text are left out, and of ``remarks`` what is said of licences elsewhere.
    """
    told = told_by_card(plan.cards)
    sections = {
        **own,
        "Licences": parts.licences(plan.cards),
        "Noted while planning": "\n".join(f"* {escape(without_paths(r, plan))}" for r in remarks if r not in told),
        "Recipe": f"{fenced(without_paths(plan.recipe, plan), 'yaml')}\n\n{parts.again(plan, command)}",
        "Citation": parts.citations(plan) if has_citations else "",
    }
    texts = [f"# {escape(title)}", what, *(f"## {head}\n\n{text}" for head, text in sections.items() if text)]
    return front_matter(plan, tags) + "\n\n".join(texts) + "\n"


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


def in_words(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
