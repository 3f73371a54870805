"""The model card of a mixture: its experts, how it routes, where it runs. No local path ever appears in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit.output import card_parts as parts
from mergekit.output.card import compose, in_words
from mergekit.output.markdown import table
from mergekit.planning.plan import Mixture, Plan

__all__ = ["moe_card"]

_OWN_CODE = """\
The architecture is in the two Python files beside the weights, so `trust_remote_code=True` is needed. They work with
transformers 4.48 and newer, for training too (`output_router_logits=True` adds the load-balancing loss). vLLM and
llama.cpp don't know this architecture; build with `architecture: mixtral` for them."""
_NATIVE = """\
A native Mixtral: transformers 4.48 and newer load it (tested). vLLM and llama.cpp read these names of tensors and this
config, going by their source; what they leave out is noted below."""


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
    what = (
        f"A mixture of {len(mixture.experts)} experts, made of dense language models by mergekit. In each layer a "
        f"router sends every token through {mixture.per_token} of the experts."
    )
    own = {
        "Experts": _experts(plan, mixture),
        "Use": f"{parts.use(plan, title)}\n\n{_OWN_CODE if plan.texts else _NATIVE}",
        "Routing": (routing or "").rstrip(),
        "What the merge of the shared weights did": parts.statistics(summary, plan) if is_merged else "",
    }
    tags = ["moe", *([mixture.shared] if is_merged else [])]
    remarks = [*plan.warnings, *plan.notes]
    return compose(plan, tags, title, what, own, remarks=remarks, command=command, has_citations=is_merged)


def _experts(plan: Plan, mixture: Mixture) -> str:
    """A table of the experts, and where everything else comes from."""
    rows = [[str(number), parts.model_name(plan, position)] for number, position in enumerate(mixture.experts)]
    dtypes = dict.fromkeys(o.dtype.name for o in plan.outputs if o.dtype.is_float)
    base = f"that of **{parts.model_name(plan, plan.donor)}**: what the experts learnt there is not in this model"
    others = {"base": base, "average": "the average of the experts' models"}
    shared = others.get(mixture.shared, f"merged by `{mixture.shared}` (the recipe says of what)")
    return (
        f"{table(['expert', 'MLPs of'], rows)}\n\nEverything else (attention, norms, embeddings, head) is {shared}. "
        f"Routers: `{mixture.gate_mode}`. {plan.parameters:,} parameters in {in_words(list(dtypes))}."
    )
