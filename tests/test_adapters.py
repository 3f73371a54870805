"""LoRA adapters baked into models: numbers against plain NumPy, every form of the files, what is refused and how."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergekit
from command import Result, assert_refused, mergekit_yaml, warm_up
from command import mergekit as program
from files import (
    HIDDEN,
    VOCAB,
    Array,
    encode,
    llama,
    raw_safetensors,
    read_model,
    to_float,
    write_model,
    write_recipe,
)  # fmt: skip
from lora_files import MODULES, PREFIX, dora, expected, lora, low_rank, write_adapter
from mergekit.execute import run_threads, work
from mergekit.output.staging import STAGING
from test_cli import FLAGS, flags, same_as_snapshot
from test_same_bytes import Collect, interrupt_after
from tiny import unaccounted

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Work in a folder with a model in float32."""
    warm_up()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_model(Path("base"), 1, code="F32", settings={"torch_dtype": "float32"})


def bake(*args: str, out: str = "out") -> Result:
    return program("lora", "bake", "base", "adapter", out, "--quiet", *args)


def baked(*args: str, out: str = "out") -> dict[str, np.ndarray]:
    """The values of ``base`` with ``adapter``."""
    result = bake(*args, out=out)
    assert result.code == 0, result.err
    return {name: to_float(array) for name, array in read_model(Path(out)).items()}


def assert_close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert np.abs(found[name] - value).max() <= tolerance * max(np.abs(value).max(), 1), name


# What is computed


def test_lora_adds_the_scaled_product():
    tensors = low_rank(2)
    write_adapter(Path("adapter"), tensors)
    assert_close(baked(), expected(llama(1, code="F32"), tensors, 2.0))


@pytest.mark.parametrize("code", ["F16", "BF16", "F64"])
def test_adapters_of_any_floating_type(code):
    tensors = low_rank(2, code=code)
    write_adapter(Path("adapter"), tensors)
    assert_close(baked(), expected(llama(1, code="F32"), tensors, 2.0))


def test_the_sum_is_float32_and_rounded_once():
    """Into bfloat16: the nearest to the exact sum, which a product rounded to bfloat16 first would miss."""
    write_model(Path("base"), 1)
    tensors = low_rank(2, code="BF16")
    write_adapter(Path("adapter"), tensors)
    wanted = {
        name: to_float(encode("BF16", value.astype(np.float32)))
        for name, value in expected(llama(1), tensors, 2.0).items()
    }
    found = baked()
    off = sum(int((found[name] != value).sum()) for name, value in wanted.items())
    assert off <= 2  # where the exact sum is within a float32 rounding of the middle between two bfloat16
    assert {code for code, _ in read_model(Path("out")).values()} == {"BF16"}


@pytest.mark.parametrize(
    ("changes", "rank", "scale"),
    [
        ({"lora_alpha": 5.5}, 3, 5.5 / 3),
        ({"use_rslora": True}, 3, 6 / math.sqrt(3)),
        ({"r": 11, "lora_alpha": 16}, 11, 16 / 11),
        ({"r": 1, "lora_alpha": -2}, 1, -2.0),
        ({"lora_alpha": 0}, 3, 0.0),
    ],
)
def test_scales(changes, rank, scale):
    tensors = low_rank(2, rank=rank)
    write_adapter(Path("adapter"), tensors, **changes)
    assert_close(baked(), expected(llama(1, code="F32"), tensors, scale), 2e-6)


def test_patterns_of_rank_and_alpha():
    """The first pattern that is the end of a module's name, or matches it whole, counts; others get the general one."""
    tensors = low_rank(2)
    tensors |= low_rank(4, {"mlp.up_proj": MODULES["mlp.up_proj"]}, rank=5)
    tensors |= low_rank(5, {"self_attn.k_proj": MODULES["self_attn.k_proj"]}, rank=2, layers=1)
    write_adapter(
        Path("adapter"),
        tensors,
        rank_pattern={"up_proj": 5, r"model\.layers\.0\.self_attn\.k_proj": 2},
        alpha_pattern={r".*\.[0-9]+\.self_attn\.q_proj": 9, "k_proj": 4, "proj": 100, "down_proj": 1.5},
    )
    scale = {"q_proj": 9 / 3, "0.self_attn.k_proj": 4 / 2, "k_proj": 4 / 3, "up_proj": 6 / 5, "down_proj": 1.5 / 3}
    assert_close(baked(), expected(llama(1, code="F32"), tensors, scale), 2e-6)


@pytest.mark.parametrize("stabilised", [False, True])
def test_dora_brings_each_output_to_its_magnitude(stabilised):
    tensors = low_rank(2, magnitude=True)
    write_adapter(Path("adapter"), tensors, use_dora=True, use_rslora=stabilised)
    scale = 6 / math.sqrt(3) if stabilised else 2.0
    found = baked()
    assert_close(found, expected(llama(1, code="F32"), tensors, scale))
    lengths = np.sqrt((found[f"{Q}.weight"] ** 2).sum(axis=1))
    assert np.allclose(lengths, to_float(tensors[f"{PREFIX}{Q}.lora_magnitude_vector"]), rtol=1e-6)


def transposed_model(seed: int) -> dict[str, Array]:
    """Layers of GPT-2, whose matrices are stored [in, out]; one of them is square."""
    random = np.random.default_rng(seed)
    found = {"wte.weight": encode("F32", random.standard_normal((VOCAB, HIDDEN)))}
    for layer in range(2):
        for name, shape in (("attn.c_attn", (HIDDEN, 3 * HIDDEN)), ("attn.c_proj", (HIDDEN, HIDDEN))):
            found[f"h.{layer}.{name}.weight"] = encode("F32", random.standard_normal(shape))
    return found


@pytest.mark.parametrize("magnitude", [False, True])
def test_fan_in_fan_out(magnitude):
    """Matrices stored [in, out] get the product transposed; DoRA's lengths are those of their columns."""
    base = transposed_model(1)
    write_model(Path("base"), tensors=base, settings={"model_type": "gpt2", "num_hidden_layers": 2})
    random = np.random.default_rng(7)
    tensors, wanted = {}, {name: to_float(array) for name, array in base.items()}
    for layer in range(2):
        for name in ("attn.c_attn", "attn.c_proj"):
            target = f"h.{layer}.{name}"
            inputs, outputs = base[f"{target}.weight"][1].shape
            a, b = random.standard_normal((3, inputs)), random.standard_normal((outputs, 3))
            m = 1 + random.random(outputs)
            prefix = f"{PREFIX}transformer.{target}.lora_"
            tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = encode("F32", a), encode("F32", b)
            a, b = a.astype("f4"), b.astype("f4")
            weight = wanted[f"{target}.weight"].T
            wanted[f"{target}.weight"] = lora(weight, a, b, 2.0).T
            if magnitude:
                tensors[f"{prefix}magnitude_vector"] = encode("F32", m)
                wanted[f"{target}.weight"] = dora(weight, a, b, 2.0, m.astype("f4")).T
    write_adapter(Path("adapter"), tensors, fan_in_fan_out=True, use_dora=magnitude)
    assert_close(baked(), wanted)


def embedding_adapter(seed: int = 3) -> tuple[dict[str, Array], np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    a, b = encode("F32", random.standard_normal((3, VOCAB))), encode("F32", random.standard_normal((HIDDEN, 3)))
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    return {f"{name}A": a, f"{name}B": b}, to_float(a), to_float(b)


@pytest.mark.parametrize("magnitude", [False, True])
def test_adapters_of_embeddings(magnitude):
    tensors, a, b = embedding_adapter()
    weight = to_float(llama(1, code="F32")["model.embed_tokens.weight"])
    m = 1 + np.random.default_rng(1).random(HIDDEN).astype("f4")
    if magnitude:
        tensors[f"{PREFIX}model.embed_tokens.lora_magnitude_vector"] = encode("F32", m)
    write_adapter(Path("adapter"), tensors, use_dora=magnitude)
    found = baked()
    wanted = dora(weight.T, a, b, 2.0, m).T if magnitude else lora(weight.T, a, b, 2.0).T
    assert np.allclose(found["model.embed_tokens.weight"], wanted, rtol=0, atol=2e-6)
    assert np.array_equal(found["lm_head.weight"], to_float(llama(1, code="F32")["lm_head.weight"]))


def test_saved_modules_biases_and_base_layers_replace():
    base = {**llama(1, code="F32"), f"{Q}.bias": encode("F32", np.zeros(HIDDEN))}
    write_model(Path("base"), tensors=base)
    random = np.random.default_rng(5)
    head, norm = random.standard_normal((VOCAB, HIDDEN)), random.standard_normal(HIDDEN)
    bias, table = random.standard_normal(HIDDEN), random.standard_normal((VOCAB, HIDDEN))
    tensors, a, b = embedding_adapter()
    tensors |= {
        f"{PREFIX}lm_head.weight": encode("F32", head),
        f"{PREFIX}model.norm.modules_to_save.default.weight": encode("F32", norm),
        f"{PREFIX}{Q}.base_layer.bias": encode("F32", bias),
        f"{PREFIX}model.embed_tokens.base_layer.weight": encode("F32", table),
    }
    write_adapter(Path("adapter"), tensors, bias="all", modules_to_save=["lm_head", "norm"])
    found = baked()
    for name, value in (("lm_head.weight", head), ("model.norm.weight", norm), (f"{Q}.bias", bias)):
        assert np.array_equal(found[name], value.astype("f4")), name
    wanted = lora(table.astype("f4").T, a, b, 2.0).T
    assert np.allclose(found["model.embed_tokens.weight"], wanted, rtol=0, atol=2e-6)


def test_saved_modules_take_the_element_type_of_the_base():
    write_model(Path("base"), 1)
    write_adapter(Path("adapter"), {f"{PREFIX}lm_head.weight": encode("F32", np.ones((VOCAB, HIDDEN)))})
    baked()
    assert {code for code, _ in read_model(Path("out")).values()} == {"BF16"}


def test_an_adapter_on_a_base_in_fp8():
    weight = np.random.default_rng(0).integers(0, 0x78, (HIDDEN, HIDDEN)).astype("u1")
    tensors = llama(1, code="F32")
    tensors |= {f"{Q}.weight": ("F8_E4M3", weight), f"{Q}.weight_scale": encode("F32", np.array([0.25]))}
    write_model(Path("base"), tensors=tensors)
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: base}]\ndtype: float32")
    mergekit.run_merge("r.yml", "plain")
    added = low_rank(2)
    write_adapter(Path("adapter"), added)
    plain = {name: ("F32", to_float(array).astype("f4")) for name, array in read_model(Path("plain")).items()}
    assert_close(baked("--dtype", "float32"), expected(plain, added, 2.0))


# Vocabularies and tied heads


def resized(rows: int, *, head: bool = True) -> dict[str, Array]:
    random = np.random.default_rng(8)
    names = ["model.embed_tokens", *(["lm_head"] if head else [])]
    return {f"{PREFIX}{n}.weight": encode("F32", random.standard_normal((rows, HIDDEN))) for n in names}


@pytest.mark.parametrize("rows", [VOCAB + 6, VOCAB - 2])
def test_embeddings_with_other_rows_bring_their_number_and_tokenizer(rows):
    Path("base/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"old": 0}}}))
    Path("base/generation_config.json").write_text("{}")
    write_adapter(Path("adapter"), {**resized(rows), **low_rank(2)}, modules_to_save=["embed_tokens", "lm_head"])
    Path("adapter/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"new": rows - 1}}}))
    found = baked()
    assert found["model.embed_tokens.weight"].shape == found["lm_head.weight"].shape == (rows, HIDDEN)
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == rows
    assert "new" in Path("out/tokenizer.json").read_text()
    assert Path("out/generation_config.json").exists()


def test_embeddings_of_the_same_size_leave_the_tokenizer():
    Path("base/tokenizer.json").write_text("{}")
    write_adapter(Path("adapter"), resized(VOCAB))
    Path("adapter/tokenizer.json").write_text('{"model": {}}')
    baked()
    assert Path("out/tokenizer.json").read_text() == "{}"


def test_embeddings_and_head_must_have_one_number_of_rows():
    write_adapter(Path("adapter"), resized(VOCAB + 1, head=False))
    assert_refused(bake(), 2, "embeddings have 32 rows and 'lm_head.weight' 31", "save both")


def tied(stored: bool = False) -> dict[str, Array]:
    tensors = llama(1, code="F32")
    del tensors["lm_head.weight"]
    if stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_model(Path("base"), tensors=tensors, settings={"tie_word_embeddings": True})
    return tensors


@pytest.mark.parametrize("stored", [False, True])
def test_an_adapter_on_tied_embeddings_leaves_the_head_as_it_was(stored):
    base = tied(stored)
    tensors, a, b = embedding_adapter()
    write_adapter(Path("adapter"), tensors)
    result = bake()
    assert result.lines("warning") == [
        "warning: base+adapter: the adapter sets embeddings and head apart, so they are no longer tied"
    ]
    found = {name: to_float(array) for name, array in read_model(Path("out")).items()}
    table = to_float(base["model.embed_tokens.weight"])
    assert np.array_equal(found["lm_head.weight"], table)
    assert np.allclose(found["model.embed_tokens.weight"], lora(table.T, a, b, 2.0).T, rtol=0, atol=2e-6)
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_on_a_tied_head_leaves_the_embeddings_as_they_were():
    base = tied()
    a, b = (np.random.default_rng(i).standard_normal(s).astype("f4") for i, s in enumerate([(3, HIDDEN), (VOCAB, 3)]))
    name = f"{PREFIX}lm_head.lora_"
    write_adapter(Path("adapter"), {f"{name}A.weight": encode("F32", a), f"{name}B.weight": encode("F32", b)})
    found = baked()
    table = to_float(base["model.embed_tokens.weight"])
    assert np.array_equal(found["model.embed_tokens.weight"], table)
    assert np.allclose(found["lm_head.weight"], lora(table, a, b, 2.0), rtol=0, atol=2e-6)
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("settings", [{"ensure_weight_tying": True}, {}])
def test_what_stays_tied(settings):
    """The adapter says that both are one, or the embeddings were resized with the head tied to them."""
    tied()
    rows = VOCAB if settings else VOCAB + 3
    write_adapter(Path("adapter"), resized(rows, head=False), **settings)
    found = baked()
    assert "lm_head.weight" not in found
    assert found["model.embed_tokens.weight"].shape == (rows, HIDDEN)
    config = json.loads(Path("out/config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == rows


# Names and files


@pytest.mark.parametrize("form", ["default", "no prefix", "other wrapper", "pickle"])
def test_other_spellings_and_files(form):
    tensors = low_rank(2)
    wanted = expected(llama(1, code="F32"), tensors, 2.0)
    if form == "default":
        tensors = {re.sub(r"(lora_.)", r"\1.default", n): array for n, array in tensors.items()}
    elif form == "no prefix":
        tensors = {n.removeprefix(PREFIX): array for n, array in tensors.items()}
    elif form == "other wrapper":
        tensors = {n.replace("model.layers", "model.language_model.layers"): array for n, array in tensors.items()}
    write_adapter(Path("adapter"), tensors)
    if form == "pickle":
        import torch

        Path("adapter/adapter_model.safetensors").unlink()
        state = {name: torch.from_numpy(array.copy()) for name, (_, array) in tensors.items()}
        torch.save(state, "adapter/adapter_model.bin")
    assert_close(baked(), wanted)


def test_part_of_the_layers():
    tensors = low_rank(2, layers=1)
    write_adapter(Path("adapter"), tensors)
    assert_close(baked(), expected(llama(1, code="F32"), tensors, 2.0))


# In recipes


def with_baked(recipe: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """The result of a recipe with ``base+adapter`` and with the same model baked first."""
    write_adapter(Path("adapter"), low_rank(2, rank=3))
    write_adapter(Path("second"), low_rank(9, rank=3))
    for number, adapter in (("1", "adapter"), ("2", "second")):
        assert program("lora", "bake", "base", adapter, f"baked{number}", "--quiet").code == 0
    results = []
    for first, second, out in (("base+adapter", "base+second", "lazy"), ("baked1", "baked2", "eager")):
        write_recipe(Path("r.yml"), recipe.replace("FIRST", first).replace("SECOND", second))
        result = mergekit_yaml("r.yml", out, "--quiet")
        assert result.code == 0, result.err
        results.append(read_model(Path(out)))
    return results[0], results[1]


RECIPES = {
    "linear": """
merge_method: linear
models:
- {model: FIRST, parameters: {weight: 0.3}}
- {model: SECOND, parameters: {weight: 0.7}}
""",
    "ties": """
merge_method: ties
base_model: base
models:
- {model: FIRST, parameters: {weight: 1, density: 0.4}}
- {model: SECOND, parameters: {weight: 0.5, density: 0.6}}
""",
    "slerp": "merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: FIRST}]\nparameters: {t: 0.3}",
    "adapter on the base": """
merge_method: task_arithmetic
base_model: FIRST
models: [{model: SECOND, parameters: {weight: 0.5}}]
""",
    "slices": """
merge_method: passthrough
slices:
- sources: [{model: FIRST, layer_range: [0, 2]}]
- sources: [{model: SECOND, layer_range: [1, 3]}]
""",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_with_an_adapter_is_one_with_the_baked_model(name):
    lazy, eager = with_baked(RECIPES[name])
    assert lazy.keys() == eager.keys()
    for tensor, array in eager.items():
        assert np.array_equal(lazy[tensor][1], array[1]), tensor


def test_no_copy_on_disk_and_the_adapter_is_an_input(tmp_path):
    write_adapter(Path("adapter"), low_rank(2))
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    plan = mergekit.plan({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]})
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
    assert [(s.reference, s.adapter) for s in plan.sources] == [("base+adapter", False), ("adapter", True)]
    assert [f.name for f in plan.sources[1].files] == ["adapter_model.safetensors"]
    bake()
    left = sorted(str(p) for p in tmp_path.rglob("*") if p.is_file() and p not in before)
    assert [Path(p).parent.name for p in left] == ["out"] * 5
    digest = plan.digest()
    write_adapter(Path("adapter"), low_rank(2), lora_alpha=7)
    again = mergekit.plan({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]})
    assert again.digest() != digest


def test_one_adapter_on_two_models_is_one_source():
    write_model(Path("other"), 3, code="F32")
    write_adapter(Path("adapter"), low_rank(2))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("base+adapter", "other+adapter", "base")],
    }
    plan = mergekit.plan(recipe)
    assert [s.reference for s in plan.sources] == ["base+adapter", "other+adapter", "base", "adapter"]
    mergekit.run_merge(recipe, "out")
    found = to_float(read_model(Path("out"))[f"{Q}.weight"])
    one, other = (expected(llama(seed, code="F32"), low_rank(2), 2.0)[f"{Q}.weight"] for seed in (1, 3))
    assert np.allclose(found, (one + other + to_float(llama(1, code="F32")[f"{Q}.weight"])) / 3, atol=2e-6)


def test_models_and_folders_have_names_that_cards_can_show():
    write_adapter(Path("adapter"), low_rank(2))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(Path("base+adapter").absolute())}]}
    recipe["models"] = [{"model": {"model": str(Path("base").absolute()), "lora": str(Path("adapter").absolute())}}]
    mergekit.run_merge(recipe, "out")
    card = Path("out/README.md").read_text()
    assert str(Path.cwd()) not in card
    assert "\n| base+adapter |\n" in card
    assert "base_model" not in card.partition("# out")[0]


# Same bytes

BIG = {"embed.weight": (1031, 17), "layers.0.w.weight": (521, 127), "layers.1.w.weight": (127, 521), "tail": (3,)}


def big_adapter(**changes: Any) -> None:
    from models import write_model as write_plain

    random = np.random.default_rng(4)
    write_plain(Path("base"), {name: random.standard_normal(shape) for name, shape in BIG.items()})
    tensors = {}
    for module in ("layers.0.w", "layers.1.w"):
        outputs, inputs = BIG[f"{module}.weight"]
        prefix = f"{PREFIX}{module}.lora_"
        tensors[f"{prefix}A.weight"] = encode("F32", random.standard_normal((3, inputs)))
        tensors[f"{prefix}B.weight"] = encode("F32", random.standard_normal((outputs, 3)))
        tensors[f"{prefix}magnitude_vector"] = encode("F32", random.random(outputs))
    write_adapter(Path("adapter"), tensors, use_dora=True, **changes)


@pytest.mark.parametrize("quantised", ["none", "nf4", "nf4-double"])
def test_threads_and_blocks_do_not_matter(monkeypatch, quantised):
    monkeypatch.setattr(work, "RANGE", 1 << 13)  # several ranges a tensor
    big_adapter()
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}], "base_quantization": quantised}
    plan = mergekit.plan(recipe)
    results = []
    for threads, block in ((1, None), (2, 1024), (5, 3072), (2, None)):
        sink = Collect(plan)
        run_threads(plan, sink, threads=threads, block=block)
        results.append((sink.data, sink.sums))
    assert all(result == results[0] for result in results)


def test_interrupted_and_resumed(monkeypatch):
    big_adapter()
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}], "base_quantization": "nf4-double"}
    mergekit.run_merge(recipe, "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(recipe, "out", threads=1)
    assert Path("out", STAGING).exists()
    mergekit.run_merge(recipe, "out")
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_a_changed_adapter_is_noticed_by_a_resumed_run(monkeypatch):
    big_adapter()
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(recipe, "out", threads=1)
    big_adapter(lora_alpha=7)
    with pytest.raises(mergekit.MergekitError, match="--restart"):
        mergekit.run_merge(recipe, "out")


# Refused


def damaged(**changes: Any) -> Mapping[str, Any]:
    return {"settings": changes}


REFUSED: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "another kind": ({"peft_type": "IA3"}, 1, ("is of the kind 'IA3'", "only LoRA")),
    "no kind": ({"peft_type": None}, 1, ("only LoRA",)),
    "rank zero": ({"r": 0}, 1, ("'r' is 0", "a whole number from 1")),
    "rank of text": ({"r": "3"}, 1, ("'r' is '3'",)),
    "rank true": ({"r": True}, 1, ("'r' is True",)),
    "no rank": ({"r": None}, 1, ("'r' is None",)),
    "another rank": ({"r": 4}, 1, ("rank 3 and 3", "the settings say 4")),
    "alpha of text": ({"lora_alpha": "x"}, 1, ("'lora_alpha' is 'x'", "a finite number")),
    "alpha infinite": ({"lora_alpha": math.inf}, 1, ("'lora_alpha' is inf",)),
    "alpha of many digits": ({"lora_alpha": 10**400}, 1, ("a number of hundreds of digits",)),
    "alpha not a number": ({"lora_alpha": math.nan}, 1, ("'lora_alpha' is nan",)),
    "alpha in a pattern": ({"alpha_pattern": {"q_proj": None}}, 1, ("alpha_pattern: q_proj",)),
    "rank in a pattern": ({"rank_pattern": {"q_proj": -1}}, 1, ("rank_pattern: q_proj",)),
    "patterns no mapping": ({"rank_pattern": [1]}, 1, ("'rank_pattern' is [1]", "a mapping")),
    "a pattern that runs away": ({"alpha_pattern": {"(a+)+b": 1}}, 1, ("no name or simple pattern",)),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, 1, ("no name or simple pattern",)),
    "switch of text": ({"use_dora": "yes"}, 1, ("'use_dora' is 'yes'", "true or false")),
    "saved modules of numbers": ({"modules_to_save": [1]}, 1, ("'modules_to_save'", "a list of names")),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, 1, ("changed the base model before training", "PEFT")),
    "olora": ({"init_lora_weights": "olora"}, 1, ("changed the base model",)),
    "loftq": ({"init_lora_weights": "loftq"}, 1, ("changed the base model",)),
    "corda": ({"init_lora_weights": "corda"}, 1, ("changed the base model",)),
    "unknown initialisation": ({"init_lora_weights": "zzz"}, 1, ("'zzz' is unknown",)),
    "layer replication": ({"layer_replication": [[0, 2]]}, 1, ("repeats layers", "can't be baked")),
    "target parameters": ({"target_parameters": ["x"]}, 1, ("target_parameters", "can't be baked")),
    "trainable tokens": ({"trainable_token_indices": [1]}, 1, ("trainable_token_indices", "can't be baked")),
    "lora bias": ({"lora_bias": True}, 1, ("lora_bias", "can't be baked")),
    "activated": ({"alora_invocation_tokens": [1]}, 1, ("some tokens only",)),
    "unknown variant": ({"use_new_thing": True}, 1, ("'use_new_thing'", "unknown here")),
    "DoRA without magnitudes": ({"use_dora": True}, 1, ("has no 'lora_magnitude_vector'",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case):
    changes, code, phrases = REFUSED[case]
    write_adapter(Path("adapter"), low_rank(2), **changes)
    assert_refused(bake(), code, "adapter", *phrases)
    assert not Path("out").exists()


A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
ZEROS = {shape: encode("F32", np.zeros(shape)) for shape in [(3, 8), (9, 3), (3,), (3, 7, 1, 1), (7, 4), (5, 5)]}
OTHER = f"{PREFIX}model.layers.7.mlp.up_proj.lora_"
TENSORS: dict[str, tuple[dict[str, Array | None], int, tuple[str, ...]]] = {
    "inputs that don't fit": ({A: ZEROS[3, 8]}, 2, (f"'{Q}.weight' is [7, 7]", "[7, 3] and [3, 8]", "trained on")),
    "outputs that don't fit": ({B: ZEROS[9, 3]}, 2, (f"'{Q}.weight' is [7, 7]", "[9, 3] and [3, 7]")),
    "ranks that differ": ({B: ZEROS[7, 4]}, 1, ("rank 3 and 4",)),
    "no B": ({B: None}, 1, (f"'{Q}' has no 'lora_B'", "download it again")),
    "no A": ({A: None}, 1, (f"'{Q}' has no 'lora_A'",)),
    "a vector": ({A: ZEROS[3,]}, 1, ("only adapters of linear layers",)),
    "a convolution": ({A: ZEROS[3, 7, 1, 1]}, 1, ("only adapters of linear layers",)),
    "integers": ({A: ("I32", np.zeros((3, 7), "<i4"))}, 1, ("only floating adapters",)),
    "another model's": (
        {f"{OTHER}A.weight": ZEROS[3, 8], f"{OTHER}B.weight": ZEROS[9, 3]}, 2,
        ("model.layers.7.mlp.up_proj.weight", "the model does not have", "every tensor of an adapter", "'org/base'"),
    ),
    "a classifier": ({f"{PREFIX}score.weight": ZEROS[5, 5]}, 2, ("'score.weight'", "does not have")),
    "a saved matrix that doesn't fit": ({f"{PREFIX}model.norm.weight": ZEROS[5, 5]}, 2, ("replaces it by [5, 5]",)),
    "a magnitude without DoRA": (
        {f"{PREFIX}{Q}.lora_magnitude_vector": ZEROS[3,]}, 1, ("although use_dora is off",),
    ),
    "an unknown part": ({f"{PREFIX}{Q}.lora_diag.weight": ZEROS[3,]}, 1, ("no way is known", "lora_diag")),
    "a bias of the product": ({f"{PREFIX}{Q}.lora_B.bias": ZEROS[3,]}, 1, ("no way is known",)),
    "two adapters": ({A.replace("A.w", "A.two.w"): ZEROS[3, 8]}, 1, ("are of two adapters",)),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case):
    changes, code, phrases = TENSORS[case]
    tensors = {name: array for name, array in {**low_rank(2), **changes}.items() if array is not None}
    write_adapter(Path("adapter"), tensors)
    assert_refused(bake(), code, *phrases)
    assert not Path("out").exists()


def test_files_that_are_refused():
    import torch  # noqa: F401  # takes seconds, and pickles need it

    write_adapter(Path("adapter"), low_rank(2))
    weights = Path("adapter/adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    assert_refused(bake(), 1, "adapter_model.safetensors", "truncated")
    weights.write_bytes(b"version https://git-lfs")
    assert_refused(bake(), 1, "git lfs pull")
    raw_safetensors(weights, {})
    assert_refused(bake(), 1, "holds no tensors")
    weights.unlink()
    assert_refused(bake(), 2, "neither adapter_model.safetensors nor adapter_model.bin")
    Path("adapter/adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert_refused(bake(), 1, "adapter_model.bin")
    weights.write_bytes(whole)
    for text in ("", "[]", "{", "[" * 5000):
        Path("adapter/adapter_config.json").write_text(text)
        assert_refused(bake(), 1, "adapter_config.json")
    Path("adapter/adapter_config.json").unlink()
    assert_refused(bake(), 2, "no adapter_config.json in 'adapter'")
    shutil.rmtree("adapter")
    assert_refused(program("lora", "bake", "base", "./adapter", "out"), 2, "no folder 'adapter'")
    assert not Path("out").exists()


def test_numbers_that_are_not_finite_stop_the_merge():
    tensors = low_rank(2)
    tensors[A] = encode("F32", np.full((3, HIDDEN), np.nan))
    write_adapter(Path("adapter"), tensors)
    assert_refused(bake(), 1, f"tensor {Q}.weight came out with NaN or infinity")


def test_a_length_of_zero_stops_the_merge():
    """DoRA divides by the length of each output's weights."""
    base = llama(1, code="F32")
    base[f"{Q}.weight"] = encode("F32", np.zeros((HIDDEN, HIDDEN)))
    write_model(Path("base"), tensors=base)
    tensors = low_rank(2, magnitude=True)
    tensors[B] = encode("F32", np.zeros((HIDDEN, 3)))
    write_adapter(Path("adapter"), tensors, use_dora=True)
    assert_refused(bake(), 1, f"tensor {Q}.weight came out with NaN or infinity")


def test_faults_in_recipes_point_at_the_model():
    write_adapter(Path("adapter"), {**low_rank(2), f"{PREFIX}score.weight": ZEROS[5, 5]})
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels:\n- model: base+adapter")
    where = "error: r.yml:3:3: base+adapter: the adapter changes 'score.weight'"
    assert_refused(mergekit_yaml("r.yml", "out"), 2, where)
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels:\n- model: base+base")
    assert_refused(mergekit_yaml("r.yml", "out"), 2, "r.yml:3:3: no adapter_config.json in 'base'")


def test_an_adapter_is_no_model():
    write_adapter(Path("adapter"), low_rank(2))
    assert_refused(program("lora", "bake", "adapter", "adapter", "out"), 1, "this is an adapter, not a model")


# What is said


def test_notices_of_what_has_no_effect():
    write_adapter(Path("adapter"), low_rank(2), modules_to_save=["lm_head"], some_new_setting={"a": 1})
    result = program("lora", "bake", "base", "adapter", "out")
    assert result.lines("note") == [
        "note: base+adapter: the adapter's setting 'some_new_setting' is unknown and has no effect",
        "note: base+adapter: the adapter saves nothing of 'lm_head' (modules_to_save); the base's is kept",
    ]


@pytest.mark.parametrize(("name", "args"), [("lora", ["lora", "--help"]), ("lora-bake", ["lora", "bake", "--help"])])
def test_help(name, args):
    result = program(*args)
    assert result.code == 0
    same_as_snapshot(f"help-{name}", result.out.partition("\nOutput:")[0])  # those of a merge are tested elsewhere


def test_what_bake_prints():
    write_adapter(Path("adapter"), low_rank(2), base_model_name_or_path="org/base-bnb-4bit")
    result = program("lora", "bake", "base", "adapter", "out", "--dry-run")
    same_as_snapshot("lora-bake", result.out + result.err)
    result = program("lora", "bake", "base", "adapter", "out", "--base-quantization", "auto", "--dtype", "float16")
    assert result.code == 0
    same_as_snapshot("lora-bake-auto", re.sub(r"in [0-9.]+ s", "in TIME s", result.err))


def test_options_of_old_commands_are_accepted():
    write_adapter(Path("adapter"), low_rank(2))
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: base+adapter}]")
    result = mergekit_yaml("r.yml", "out", "--lora-merge-cache", "cache", "--lora-merge-dtype", "float32")
    assert result.code == 0
    assert not Path("cache").exists()
    assert [line.split(":")[1].split()[0] for line in result.lines("note")] == [
        "--lora-merge-cache",
        "--lora-merge-dtype",
    ]


def test_the_flags_of_bake_are_frozen():
    from mergekit.cli.lora import bake as command

    assert flags(command) == {*FLAGS, "--base-quantization", "--dtype", "--dry-run", "--json"}


def test_memory_counts_what_is_held_of_an_adapter():
    from mergekit.api import memory

    big_adapter()
    plans = [mergekit.plan({"merge_method": "passthrough", "models": [{"model": m}]}) for m in ("base", "base+adapter")]
    assert memory(plans[1]) > memory(plans[0])


def test_names_of_bases_that_say_they_are_quantised():
    from mergekit.adapters import is_four_bit_name

    assert is_four_bit_name("unsloth/llama-3-8b-bnb-4bit")
    assert is_four_bit_name("org/model-4Bit")
    assert not is_four_bit_name("org/model-8b")
    assert not is_four_bit_name("org/model-GPTQ-4bit")


def test_parts_of_an_adapter_outside_the_slices_are_listed(tmp_path):
    write_model(tmp_path / "base", 1)
    write_adapter(tmp_path / "lora", low_rank(1))
    sources = [{"model": f"{tmp_path}/base+{tmp_path}/lora", "layer_range": [0, 1]}]
    plan = mergekit.plan({"merge_method": "passthrough", "slices": [{"sources": sources}]})
    assert not unaccounted(plan)
    lost = [name for source, name, reason in plan.left_out if source == 1 and reason == "outside the slices"]
    assert len(lost) == 16
    assert not plan.warnings
