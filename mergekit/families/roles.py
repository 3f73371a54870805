"""What part of a model a tensor is (query, gate, norm, ...), told by its name: for people, who think in these words.

Merging does not depend on it; a name that is not known is ``other``.
"""

from __future__ import annotations

import re

from mergekit.families.layout import is_embedding, is_head

__all__ = ["ROLES", "role"]

ROLES = (
    "embedding",
    "norm",
    "q",
    "k",
    "v",
    "kv",
    "qkv",
    "o",
    "router",
    "gate",
    "up",
    "gate_up",
    "down",
    "other",
    "head",
)
"""All roles, in the order in which a layer computes."""
_NAMES = {
    "norm": r"\w*(norm|layer_norm)\d?|ln_\w+|ln\d",
    "router": r"router|gate|wg|gate\.wg|shared_expert_gate",
    "q": r"q_proj|q_[ab]_proj|query|wq|q",
    "k": r"k_proj|key|wk|k",
    "v": r"v_proj|value|wv|v",
    "kv": r"kv_[ab]_proj\w*|kv_proj|kv",
    "qkv": r"qkv_proj|qkv|c_attn|query_key_value|wqkv|in_proj_qkv",
    "o": r"o_proj|wo|o|(attn|attention)\.(c_proj|dense|out_proj)|(attn|attention|self_attention)\.output\.dense",
    "gate": r"gate_proj|w1",
    "up": r"up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h|intermediate\.dense|wi(_\d)?",
    "gate_up": r"gate_up_proj|wi_fused",
    "down": r"down_proj|w2|fc2|fc_out|dense_4h_to_h|mlp\.c_proj|output\.dense",
}
_PATTERNS = tuple(
    (name, re.compile(rf"(?:^|\.)(?:{pattern})(?:\.(?:weight|bias|weight_scale_inv))?$", re.I))
    for name, pattern in _NAMES.items()
)


def role(name: str) -> str:
    """The role of the tensor ``name``; a bias has that of its matrix.

    >>> role("model.layers.3.self_attn.q_proj.weight"), role("model.layers.3.mlp.gate.weight")
    ('q', 'router')
    """
    if is_embedding(name):
        return "embedding"
    if is_head(name):
        return "head"
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), "other")
