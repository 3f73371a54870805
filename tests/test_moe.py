"""Mixtures load everywhere and compute what they should: the identity law for each member of the family."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergekit
from dense import MEMBERS, OTHERS, load, logits, save_dense
from mergekit.methods import method_names
from tiny import recipe_for

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
LENGTHS = (16, 40, 100)
"""Below and above the window of 20, and below and above the original context of 32."""
FAMILIES = [("mixtral", name) for name in (*MEMBERS, *OTHERS)] + [("phi3moe", name) for name in MEMBERS]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype.*")


def mixture(base: Path, out: Path, *experts: Path, **words: object) -> Path:
    """Make a mixture with random routers; of the base alone if no experts are given."""
    models = [{"source_model": str(e)} for e in experts or (base, base, base)]
    recipe = {"base_model": str(base), "gate_mode": "random", "experts": models, **words}
    return mergekit.run_moe(recipe, out, allow_all_same=True, verify=False)


def can_run(name: str) -> bool:
    """Whether this release's own Phi-3 can do partial rotary embeddings."""
    return VERSION >= (4, 49) or "partial_rotary_factor" not in {**MEMBERS, **OTHERS}[name]


def opened(folder: Path) -> object:
    return load(folder, trust_remote_code=(folder / "modeling_phi3_moe.py").exists())


@pytest.mark.parametrize(("form", "name"), FAMILIES)
def test_with_the_base_for_every_expert_a_mixture_is_its_base(form, name, tmp_path):
    if not can_run(name):
        pytest.skip("this release of transformers has no partial rotary embeddings in Phi-3")
    base = save_dense(tmp_path / "base", {**MEMBERS, **OTHERS}[name])
    out = mixture(base, tmp_path / "out", architecture=form)
    dense, mixed = load(base), opened(out)
    # Releases before 4.49 refresh Mixtral's rotary factors for other kinds of scaling only.
    longest = 32 if form == "mixtral" and VERSION < (4, 49) and "128k" in name else max(LENGTHS)
    for length in (n for n in LENGTHS if n <= longest):
        expected = logits(dense, length)
        difference = (logits(mixed, length) - expected).abs().max().item()
        print(f"{form} {name} {length} tokens: {difference:.1e} of {expected.abs().max():.1f}")
        assert difference <= 1e-5


@pytest.mark.parametrize(
    ("name", "change", "length"),
    [
        ("mini-4k", {"sliding_window": None}, 40),
        ("mini-128k", {"rope_scaling": None}, 40),
        ("phi-4", {"rope_theta": 1e6}, 16),
        ("phi-4-mini", {"rope_scaling": None}, 16),
    ],
)
def test_the_law_fails_where_the_config_lies(name, change, length, tmp_path):
    """Negative controls: each setting of the config matters in these tests."""
    if not can_run(name):
        pytest.skip("this release of transformers has no partial rotary embeddings in Phi-3")
    base = save_dense(tmp_path / "base", MEMBERS[name])
    out = mixture(base, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    difference = (logits(load(out), length) - logits(load(base), length)).abs().max().item()
    print(f"{name} with {change}: {difference:.2g}")
    assert difference > 0.05


@pytest.mark.parametrize("form", ["mixtral", "phi3moe"])
def test_a_token_sent_to_one_expert_gets_that_experts_mlp(form, tmp_path):
    base = save_dense(tmp_path / "base", MEMBERS["medium"])
    other = save_dense(tmp_path / "other", MEMBERS["medium"], seed=1)
    out = mixture(base, tmp_path / "out", base, other, experts_per_token=1, architecture=form)
    path = out / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("gate.weight"):
            tensors[name] = torch.zeros_like(tensors[name])  # a draw goes to the first expert
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})
    assert torch.allclose(logits(opened(out), 16), logits(load(base), 16), atol=1e-4)


@pytest.mark.parametrize("name", ["mini-4k", "phi-4-mini"])
def test_both_forms_compute_the_same_mixture(name, tmp_path):
    """Different experts, two of three per token: two implementations of routing, ours and Mixtral's, agree."""
    if not can_run(name):
        pytest.skip("this release of transformers has no partial rotary embeddings in Phi-3")
    base, *others = (save_dense(tmp_path / str(i), MEMBERS[name], seed=i) for i in range(3))
    native, own = (mixture(base, tmp_path / f, base, *others, architecture=f) for f in ("mixtral", "phi3moe"))
    found = logits(opened(native), 40)
    assert (found - logits(opened(own), 40)).abs().max().item() <= 1e-5
    assert (found - logits(load(base), 40)).abs().max().item() > 0.01


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 2e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("form", ["mixtral", "phi3moe"])
def test_in_half_precision_only_rewritten_rows_are_rounded_again(form, dtype, limit, tmp_path):
    if not can_run("phi-4-mini"):
        pytest.skip("this release of transformers has no partial rotary embeddings in Phi-3")
    base = save_dense(tmp_path / "base", MEMBERS["phi-4-mini"], dtype=getattr(torch, dtype))
    out = mixture(base, tmp_path / "out", architecture=form)
    difference = (logits(opened(out), 40) - logits(load(base), 40)).abs().max().item()
    print(f"{form} {dtype}: {difference:.1e}")
    assert difference <= (limit if form == "mixtral" else 1e-5)


def test_the_stored_names_are_those_of_published_mixtrals(tmp_path):
    base = save_dense(tmp_path / "base", MEMBERS["mini-4k"])
    names = set(load_file(mixture(base, tmp_path / "out") / "model.safetensors"))
    layer = {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")}
    experts = {f"block_sparse_moe.experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w2", "w3")}
    attention = {f"self_attn.{p}_proj.weight" for p in "qkvo"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert layer == experts | attention | norms | {"block_sparse_moe.gate.weight"}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < names


def test_parts_of_fused_matrices_are_their_rows(tmp_path):
    base = save_dense(tmp_path / "base", MEMBERS["medium"])
    out = load_file(mixture(base, tmp_path / "out") / "model.safetensors")
    dense = load_file(base / "model.safetensors")
    qkv = [out[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(torch.cat(qkv), dense["model.layers.1.self_attn.qkv_proj.weight"])
    halves = [out[f"model.layers.1.block_sparse_moe.experts.2.{w}.weight"] for w in ("w1", "w3")]
    assert torch.equal(torch.cat(halves), dense["model.layers.1.mlp.gate_up_proj.weight"])


@pytest.mark.parametrize("shared", ["average", {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}])
def test_shared_weights_can_come_from_the_experts(shared, tmp_path):
    base, one, two = (save_dense(tmp_path / str(i), MEMBERS["medium"], seed=i) for i in range(3))
    out = load_file(mixture(base, tmp_path / "out", one, two, attention=shared) / "model.safetensors")
    b, x, y = (load_file(f / "model.safetensors") for f in (base, one, two))
    name = "model.layers.2.self_attn.qkv_proj.weight"
    expected = b[name] + 0.5 * (x[name] - b[name]) + 0.5 * (y[name] - b[name])
    expected = expected if isinstance(shared, dict) else (x[name] + y[name]) / 2
    found = torch.cat([out[f"model.layers.2.self_attn.{p}_proj.weight"] for p in "qkv"])
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(
        out["model.layers.0.block_sparse_moe.experts.1.w2.weight"], y["model.layers.0.mlp.down_proj.weight"]
    )


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trio")
    return [save_dense(folder / str(i), MEMBERS["medium"], seed=i) for i in range(3)]


@pytest.mark.parametrize("method", sorted(set(method_names()) - {"passthrough"}))
def test_merged_attention_is_what_merging_gives_in_both_forms(method, trio, tmp_path):
    """Angles, trimming and random masks are those of the whole fused matrix, though Mixtral stores its parts."""
    base, one, two = trio
    words = recipe_for(method, [base, one, two])
    dense = load_file(mergekit.run_merge(words, tmp_path / "dense") / "model.safetensors")
    shared = {key: words[key] for key in ("merge_method", "parameters", "models")}
    native, own = (
        load_file(mixture(base, tmp_path / f, one, two, attention=shared, architecture=f) / "model.safetensors")
        for f in ("mixtral", "phi3moe")
    )
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        parts = [native[f"model.layers.{layer}.self_attn.{p}_proj.weight"] for p in "qkv"]
        assert torch.equal(torch.cat(parts), own[name])
        # Random masks follow the order of the models, where a mixture has its base first.
        if not method.startswith(("dare", "della")):
            assert torch.equal(own[name], dense[name])


def test_residual_scale_and_noise(tmp_path):
    base = save_dense(tmp_path / "base", MEMBERS["medium"])
    experts = [
        {"source_model": str(base), "residual_scale": 0.5},
        {"source_model": str(base), "noise_scale": 0.01},
        {"source_model": str(base), "noise_scale": 0.01},
    ]
    recipe = {"base_model": str(base), "gate_mode": "random", "experts": experts}
    out, again = (
        mergekit.run_moe(recipe, tmp_path / name, verify=False, threads=t) for name, t in (("a", 1), ("b", 3))
    )
    one, dense = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    down = dense["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(one["model.layers.0.block_sparse_moe.experts.0.w2.weight"], down * 0.5)
    noise = [one[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"] - down for e in (1, 2)]
    for draw in noise:
        assert abs(draw.std().item() - 0.01) < 1e-3
        assert abs(draw.mean().item()) < 1e-3
    assert not torch.equal(*noise)


def test_every_input_tensor_is_used_or_listed(tmp_path):
    base, one = (save_dense(tmp_path / str(i), MEMBERS["medium"], seed=i) for i in range(2))
    recipe = {"base_model": str(base), "gate_mode": "random", "experts": [{"source_model": str(one)}] * 2}
    from mergekit.api import MoeOptions, plan_moe
    from mergekit.planning.expression import leaves

    plan = plan_moe(recipe, choices=MoeOptions(allow_all_same=True)).plan
    used = {(read.source, read.info.name) for o in plan.outputs for read in leaves(o.expression)}
    listed = {(source, name) for source, name, _ in plan.left_out}
    for position, folder in enumerate((base, one)):
        names = set(load_file(folder / "model.safetensors"))
        assert {n for s, n in used | listed if s == position} == names
    assert not used & listed


@pytest.mark.skipif(
    "MERGEKIT_TRANSFORMERS4" not in os.environ,
    reason="needs a second Python with another transformers; set MERGEKIT_TRANSFORMERS4 to it",
)
def test_the_same_on_another_release_of_transformers():
    """Runs this file with the Python that MERGEKIT_TRANSFORMERS4 names, in whose environment mergekit is installed."""
    python = os.environ["MERGEKIT_TRANSFORMERS4"]
    environment = {k: v for k, v in os.environ.items() if k != "MERGEKIT_TRANSFORMERS4"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "tests/test_phi3moe.py"]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parent.parent)
