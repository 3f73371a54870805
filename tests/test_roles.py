"""Roles of tensors, on names as they stand in published checkpoints."""

import pytest

from mergekit.families.roles import ROLES, role


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norm"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("transformer.h.3.ln_1.bias", "norm"),
        ("model.layers.3.self_attn.q_proj.weight", "q"),
        ("model.layers.3.self_attn.k_proj.bias", "k"),
        ("model.layers.3.self_attn.v_proj.weight", "v"),
        ("model.layers.3.self_attn.o_proj.weight", "o"),
        ("model.layers.3.self_attn.qkv_proj.weight", "qkv"),
        ("transformer.h.3.attn.c_attn.weight", "qkv"),
        ("transformer.h.3.attn.c_proj.weight", "o"),
        ("transformer.h.3.mlp.c_proj.weight", "down"),
        ("transformer.h.3.mlp.c_fc.weight", "up"),
        ("bert.encoder.layer.2.attention.self.query.weight", "q"),
        ("bert.encoder.layer.2.attention.output.LayerNorm.weight", "norm"),
        ("bert.encoder.layer.2.attention.output.dense.weight", "o"),
        ("bert.encoder.layer.2.output.dense.weight", "down"),
        ("bert.encoder.layer.2.intermediate.dense.weight", "up"),
        ("model.layers.3.mlp.gate_proj.weight", "gate"),
        ("model.layers.3.mlp.up_proj.weight", "up"),
        ("model.layers.3.mlp.gate_up_proj.weight", "gate_up"),
        ("model.layers.3.mlp.down_proj.weight", "down"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.experts.5.gate_proj.weight", "gate"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.experts.0.w2.weight", "down"),
        ("model.layers.3.mlp.experts.gate_up_proj", "gate_up"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "kv"),
        ("model.layers.3.linear_attn.A_log", "other"),
        ("visual.patch_embed.proj.weight", "other"),
    ],
)
def test_role(name, expected):
    assert role(name) == expected
    assert expected in ROLES
