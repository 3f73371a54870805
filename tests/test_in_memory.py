"""Merging tensors in memory: the bytes of a merge of files; parameters in all their forms; gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit
import oracles
from kernel_cases import CUDA
from mergekit import merge_state_dicts, merge_tensors
from mergekit.checkpoint.header import read_header
from mergekit.dtypes import BF16, F16, F32
from mergekit.errors import UsageError
from mergekit.methods import Elementwise, Real, Span, Whole, get_method, method_names, once
from mergekit.methods.spec import Method
from mergekit.seeds import stream_key
from models import family

SHAPES = {"a.weight": (3, 7), "b": (61, 29), "c": (2, 11, 3), "d": (), "e": (1,), "f": (5, 1, 3), "none": (0, 4)}
METHODS = [name for name in method_names() if get_method(name).function.__module__.startswith("mergekit.")]


def settings(name: str) -> tuple[int, dict[str, Any]]:
    """How many inputs to give to a method, the base included, and parameters."""
    method = get_method(name)
    count = 1 if method.most == 1 else 2 if (method.most == 2 and method.base != "optional") else 3
    values: dict[str, Any] = {}
    for p in method.params:
        if p.name == "weight":
            values["weight"] = [0.7, -0.2, 0.4][: count - (p.scope == "each")]
        if p.name == "density":
            values["density"] = 0.4
        if p.name == "t":
            values["t"] = 0.3
        if p.name == "steps":
            values["steps"] = 3
    return count, values


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a one-file checkpoint in their type, bit by bit."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    found = {}
    for name, info in read_header(path)[0].items():
        dtype = getattr(torch, info.dtype.name)
        empty = torch.empty(info.shape, dtype=dtype)
        part = raw[info.offset : info.offset + info.nbytes]
        found[name] = torch.frombuffer(part, dtype=dtype).reshape(info.shape) if part else empty
    return found


def recipe(name: str, folders: list[Path], values: dict[str, Any], **more: Any) -> dict[str, Any]:
    method = get_method(name)
    shared = {key: value for key, value in values.items() if not isinstance(value, list)}
    own = {key: value for key, value in values.items() if isinstance(value, list)}
    models: list[dict[str, Any]] = []
    for folder in folders:
        if folder == folders[0] and method.base != "ignored":
            models.append({"model": str(folder)})
            continue
        at = len(models) - (method.base != "ignored")
        models.append({"model": str(folder), "parameters": {key: value[at] for key, value in own.items()}})
    base = {"base_model": str(folders[0])} if method.base != "ignored" else {}
    return {"merge_method": name, **base, "models": models, "parameters": shared, **more}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("dtype", "out"), [(F32, None), (BF16, None), (F16, "bfloat16")], ids=str)
def test_the_bytes_are_those_of_a_merge_of_files(tmp_path, name, dtype, out):
    count, values = settings(name)
    folders = family(tmp_path, count, dtype, SHAPES)
    more = {"out_dtype": out} if out else {}
    written = mergekit.run_merge(
        recipe(name, folders, values, seed=7, **more), tmp_path / "out", write_model_card=False
    )
    states = [stored(f) for f in folders]
    base = None if get_method(name).base == "ignored" else 0
    got = merge_state_dicts(states, name, values, base=base, seed=7, out_dtype=out)
    want = stored(written)
    assert set(got) == set(want)
    for tensor in want:
        assert got[tensor].dtype == want[tensor].dtype
        assert got[tensor].shape == want[tensor].shape
        assert bits(got[tensor]) == bits(want[tensor]), tensor
        alone = merge_tensors([s[tensor] for s in states], name, values, None, base, tensor, None, out, seed=7)
        assert bits(alone) == bits(want[tensor])


def test_large_tensors_on_several_threads():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(5_000_001, np.float32)
    models = [base + np.float32(0.1) * rng.standard_normal(base.size, np.float32) for _ in range(2)]
    values = {"weight": 0.5, "density": 0.5}
    got = merge_tensors([base, *models], "dare_linear", values, base_index=0)
    state = merge_state_dicts([{"": model} for model in (base, *models)], "dare_linear", values, base=0)
    assert state[""].tobytes() == got.tobytes()
    share = np.mean(got != base)
    assert 0.74 < share < 0.76  # one of two masks, or both


# Inputs


def three(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 5)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def test_parameters_as_scalar_sequence_or_mapping():
    x = three()
    want = merge_tensors(x, "task_arithmetic", {"weight": [0.5, 0.5], "lambda": 2}, base_index=1)
    for weight in (0.5, (0.5, 0.5), np.array([0.5, 0.5]), torch.full((2,), 0.5), {0: 0.5, 2: 0.5}, np.float32(0.5)):
        assert torch.equal(merge_tensors(x, "task_arithmetic", {"weight": weight, "lambda": 2}, base_index=1), want)
    named = {"weight": {"y": 0.5, "z": torch.tensor(0.5)}, "lambda": 2}
    assert torch.equal(merge_tensors([x[0], x[1], x[2]], "task_arithmetic", named, ["y", "b", "z"], 1), want)
    parts = [merge_tensors(x, "linear", {"weight": w}, ids="abc") for w in ([3, 1, 0], {"a": 3, "b": 1, "c": 0})]
    assert torch.equal(parts[0], parts[1])


def test_a_mapping_may_leave_out_what_has_a_default():
    x = three()
    got = merge_tensors(x, "ties", {"weight": 1, "density": {2: 0.5}}, base_index=0)
    assert torch.equal(got, merge_tensors(x, "ties", {"weight": 1, "density": [1.0, 0.5]}, base_index=0))


def test_a_method_may_be_given_as_it_is():
    x = three()[:2]
    want = merge_tensors(x, "slerp", {"t": 0.3}, base_index=0)
    assert torch.equal(merge_tensors(x, get_method("slerp"), {"t": 0.3}, base_index=0), want)
    assert torch.equal(merge_tensors(x, get_method("slerp").function, {"t": 0.3}, base_index=0), want)
    whole = Method(
        "never registered", "", Whole("weights"), "ignored", 1, None, "merge", None, None, (), lambda x: x[0] - x[1]
    )
    assert torch.equal(merge_tensors(x, whole), x[0] - x[1])
    with pytest.raises(UsageError, match="no merge method"):
        merge_tensors(x, len)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16, np.float64])
def test_types_of_results(dtype):
    x = three(torch.bfloat16)
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else dtype.__name__
    for given in ({"dtype": dtype}, {"out_dtype": dtype}, {"dtype": "float16", "out_dtype": dtype}):
        assert merge_tensors(x, "linear", {"weight": 1}, **given).dtype == getattr(torch, name)
    mixed = [x[0], x[1].half()]
    assert merge_tensors(mixed, "linear", {"weight": 1}).dtype == torch.float32


def test_arrays_give_arrays():
    x = [t.numpy() for t in three()]
    got = merge_tensors([x[0].T, x[1].T], "linear", {"weight": 1})
    assert isinstance(got, np.ndarray)
    assert got.shape == (5, 3)
    assert np.allclose(got, (x[0] + x[1]).T / 2)
    assert merge_tensors([v.astype(np.float16) for v in x], "linear", {"weight": 1}).dtype == np.float16
    with pytest.raises(TypeError, match="numpy has no bfloat16"):
        merge_tensors(x, "linear", {"weight": 1}, dtype="bfloat16")


def test_inputs_are_left_alone_and_results_are_new():
    x = three()
    before = [t.clone() for t in x]
    for name in ("passthrough", "ties"):
        inputs = x[:1] if name == "passthrough" else x
        values = {} if name == "passthrough" else {"weight": 1}
        merge_tensors(inputs, name, values, base_index=0 if name == "ties" else None).add_(1)
    same = [torch.tensor([1, 2])] * 2
    merge_tensors(same, "linear", {"weight": 1}).add_(1)
    assert all(map(torch.equal, x, before))
    assert same[0].tolist() == [1, 2]


def test_whole_numbers_are_copied_if_they_agree():
    x = torch.arange(3)
    assert merge_tensors([x, x.clone()], "linear", {"weight": 1}, dtype="bfloat16").dtype == torch.int64
    assert merge_tensors([x.numpy(), x.numpy()], "linear", {"weight": 1}).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="int64 tensors are never averaged, and those of 0 and 1 differ"):
        merge_tensors([x, x + 1], "linear", {"weight": 1})
    with pytest.raises(ValueError, match="never averaged"):
        merge_tensors([x, x.to(torch.int32)], "linear", {"weight": 1})


def test_infinities_pass_and_neighbours_are_sound():
    x = three()
    x[1][0, 0] = torch.inf
    got = merge_tensors(x, "linear", {"weight": 1})
    assert got[0, 0].item() == torch.inf
    assert torch.isfinite(got.flatten()[1:]).all()


A, B, C = three()
FAULTS = [
    (TypeError, "has no parameter 'weigth'. Did you mean 'weight'", [A, B], "linear", {"weigth": 1}, {}),
    (TypeError, "'linear' needs 'weight' of input 0", [A, B], "linear", {}, {}),
    (TypeError, "needs 'weight' of input 'y'", [A, B], "linear", {"weight": {"x": 1}}, {"ids": ["x", "y"]}),
    (TypeError, "the inputs that have it are 'x', 'y'", [A, B], "linear", {"weight": {"q": 1}}, {"ids": ["x", "y"]}),
    (TypeError, "'slerp' needs 't'", [A, B], "slerp", {}, {"base_index": 0}),
    (TypeError, "option of recipes", [A, B], "ties", {"weighting": "nan"}, {"base_index": 0}),
    (TypeError, "not int", [1, 2], "linear", {"weight": 1}, {}),
    (TypeError, "complex64", [A.to(torch.complex64)] * 2, "linear", {"weight": 1}, {}),
    (TypeError, "dense", [A.to_sparse()] * 2, "linear", {"weight": 1}, {}),
    (TypeError, "can't be merged with each other", [A, B.numpy()], "linear", {"weight": 1}, {}),
    (TypeError, "'int8' is not a type", [A, B], "linear", {"weight": 1}, {"dtype": "int8"}),
    (ValueError, "'weight' has 1 values for 2 inputs", [A, B], "linear", {"weight": [1]}, {}),
    (ValueError, "'weight' of input 1: expected a number, got 'x'", [A, B], "linear", {"weight": [1, "x"]}, {}),
    (ValueError, "weights sum to zero", [A, B], "linear", {"weight": [1, -1]}, {}),
    (ValueError, "shapes differ: [3, 5] and [3, 4] (of 1)", [A, B[:, :4]], "linear", {"weight": 1}, {}),
    (ValueError, "needs base_index", [A, B], "slerp", {"t": 1}, {}),
    (ValueError, "takes 2 input(s), the base included", [A, B, C], "slerp", {"t": 1}, {"base_index": 0}),
    (ValueError, "counted from 0", [A, B], "slerp", {"t": 1}, {"base_index": 2}),
    (ValueError, "nothing to merge", [], "linear", {"weight": 1}, {}),
    (ValueError, "2 different names", [A, B], "linear", {"weight": 1}, {"ids": ["x", "x"]}),
    (ValueError, "float8", [A.to(torch.float8_e4m3fn)] * 2, "linear", {"weight": 1}, {}),
    (UsageError, "Did you mean 'linear'", [A, B], "liner", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "phrase", "tensors", "name", "values", "more"), FAULTS, ids=[f[1] for f in FAULTS])
def test_what_is_refused(kind, phrase, tensors, name, values, more):
    with pytest.raises(kind) as caught:
        merge_tensors(tensors, name, values, **more)
    assert phrase in str(caught.value)


# Models


def modules(count: int = 3) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(count)]


def test_modules_with_buffers():
    models = modules()
    got = merge_state_dicts(models, "ties", {"weight": 1, "density": 0.5}, base=0)
    assert list(got) == list(models[0].state_dict())
    assert not any(value.requires_grad for value in got.values())
    models[0].load_state_dict(got)
    states = [m.state_dict() for m in modules()]
    want = merge_tensors([s["0.weight"] for s in states], "ties", {"weight": 1, "density": 0.5}, None, 0, "0.weight")
    assert torch.equal(got["0.weight"], want)
    models[1][1].num_batches_tracked += 1
    with pytest.raises(ValueError, match=r"tensor '1\.num_batches_tracked': int64 tensors are never averaged"):
        merge_state_dicts(models, "ties", {"weight": 1}, base=0)


def test_a_mapping_of_models():
    a, b, c = modules()
    by_name = merge_state_dicts({"x": a, "y": b, "z": c}, "task_arithmetic", {"weight": {"x": 1, "z": 2}}, base="y")
    by_place = merge_state_dicts([a, b.state_dict(), c], "task_arithmetic", {"weight": [1, 2]}, base=1)
    assert all(torch.equal(by_name[k], by_place[k]) for k in by_place)
    with pytest.raises(ValueError, match="base='q' is none of the models: 'x', 'y'"):
        merge_state_dicts({"x": a, "y": b}, "slerp", {"t": 1}, base="q")
    with pytest.raises(TypeError, match="not list"):
        merge_state_dicts([[1], a], "linear", {"weight": 1})


def test_models_with_different_tensors(caplog):
    a, b, c = ({"w": t, "only": t} for t in three())
    for state in (b, c):
        del state["only"]
    with pytest.raises(ValueError, match=r"1, 2 lack\(s\) 'only'"):
        merge_state_dicts([a, b, c], "linear", {"weight": 1})
    got = merge_state_dicts([a, b, c], "linear", {"weight": [3, 1, 1]}, strict=False)
    assert torch.equal(got["only"], a["only"])
    assert torch.equal(
        merge_state_dicts([a, b, c], "ties", {"weight": 1}, base=0, strict=False)["only"], a["only"]
    )  # only the base has it
    with pytest.raises(ValueError, match="tensor 'only': 'ties' needs the base's tensor"):
        merge_state_dicts([a, b, c], "ties", {"weight": 1}, base=1, strict=False)
    assert torch.equal(merge_state_dicts([b, a], "slerp", {"t": 0.3}, base=0, strict=False)["only"], a["only"])
    del a["only"]
    d = {**b, "only": b["w"]}
    got = merge_state_dicts([a, d, d], "task_arithmetic", {"weight": [1, 2]}, base=1, strict=False)
    assert torch.equal(got["only"], d["only"])
    got = merge_state_dicts([d, a, d, d], "task_arithmetic", {"weight": [9, 1, 2]}, base=0, strict=False)
    assert torch.allclose(got["only"], d["only"])  # the weight of the model that lacks it is not used


def test_too_few_for_a_method_that_skips(caplog):
    x = three()
    found = Method(
        "skips", "", Span("deltas"), "required", 3, None, "skip", None, None, (), lambda gram: np.array([1.0, 1.0])
    )
    states = [{"w": x[0], "v": x[0]}, {"w": x[1], "v": x[1]}, {"w": x[2]}]
    got = merge_state_dicts(states, found, base=0, strict=False)
    assert list(got) == ["w"]
    assert "tensor 'v': too few models have it for 'skips'" in caplog.text


# Gradients


def check(
    name: Any, count: int, values: dict[str, Any], *, base: int | None = 0, delta: float = 0.3, coarse: bool = False
) -> None:
    """Hold derivatives to differences of results, in float64; ``coarse``: of results with parts in float32."""
    generator = torch.Generator().manual_seed(3)
    origin = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    x = [origin]
    x += [origin + delta * torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    for value in x:
        value.requires_grad_(True)

    def merge(*inputs: torch.Tensor) -> torch.Tensor:
        return merge_tensors(inputs, name, values, base_index=base, name="t", seed=1, out_dtype="float64")

    step, tolerance = (1e-4, 2e-3) if coarse else (1e-6, 1e-4)
    assert torch.autograd.gradcheck(merge, x, eps=step, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in METHODS if not isinstance(get_method(n).form, Whole)])
def test_gradients_are_those_of_differences(name):
    count, values = settings(name)
    check(name, count, values, base=None if get_method(name).base == "ignored" else 0, coarse=name == "sce")


@pytest.mark.parametrize("rescale", ["none", "l1", "density"])
@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "della"])
def test_gradients_of_rescaled_task_vectors(name, rescale):
    values = {"weight": [0.7, -0.2], "density": [0.5, 0.7], "rescale": rescale, "lambda": 0.8, "normalize": True}
    check(name, 3, values, coarse=rescale == "density")


def test_gradients_of_slerp_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    a, b, outer = rng.standard_normal((3, 4, 3))
    x = [torch.tensor(v, requires_grad=True) for v in (a, b)]
    merge_tensors(x, "slerp", {"t": 0.3}, base_index=0).backward(torch.tensor(outer))
    for which in range(2):
        for place in np.ndindex(a.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy(), b.copy()]
                moved[which][place] += step
                ends.append((oracles.slerp(*moved, 0.3) * outer).sum())
            assert abs((ends[0] - ends[1]) / 2e-6 - x[which].grad[place].item()) < 1e-7


def test_gradients_through_masks_are_those_of_the_engines_masks():
    x = three(torch.float64, (41, 53))
    for value in x:
        value.requires_grad_(True)
    values = {"weight": 1, "density": 0.3, "rescale": False}
    merge_tensors(x, "dare_linear", values, base_index=0, name="w", seed=5).sum().backward()
    for position in (1, 2):
        mask = oracles.random_mask((41, 53), 0.3, stream_key(5, "w", position))
        assert np.array_equal(x[position].grad.numpy(), mask.astype(float))
    x[1].grad = None
    merge_tensors(x, "ties", {**values, "normalize": False}, base_index=0).sum().backward()
    mask = oracles.top_magnitude((x[1] - x[0]).detach().float().numpy(), 0.3)
    assert not x[1].grad.numpy()[~mask].any()


def test_a_model_that_equals_the_base_still_gets_gradients():
    x = torch.ones(7)
    y = x.clone().requires_grad_(True)
    for name, want in (("task_arithmetic", 7), ("dare_linear", None), ("ties", None)):
        y.grad = None
        values = {"weight": 1.0, **({"density": 0.5, "rescale": False} if want is None else {})}
        merge_tensors([x, y], name, values, base_index=0).sum().backward()
        if name == "dare_linear":
            want = oracles.random_mask((7,), 0.5, stream_key(0, "", 1)).sum()
        if name != "ties":  # where no sign is elected, nothing agrees with it
            assert y.grad.sum().item() == want


def test_the_value_does_not_depend_on_gradients():
    for name in METHODS:
        count, values = settings(name)
        x = three()[:count]
        base = None if get_method(name).base == "ignored" else 0
        want = merge_tensors(x, name, values, None, base)
        leaves = [t.clone().requires_grad_(True) for t in x]
        with torch.no_grad():
            assert torch.equal(merge_tensors(leaves, name, values, None, base), want)
        got = merge_tensors(leaves, name, values, None, base)
        assert got.requires_grad
        assert torch.allclose(got, want, atol=1e-6), name


@pytest.mark.parametrize("name", ["ties", "dare_linear", "breadcrumbs", "della", "cabs", "tsv_m", "star"])
def test_gradients_through_calibrated_merges(name):
    torch.manual_seed(0)
    base = torch.randn(16, 16)
    models = [base + 0.1 * torch.randn(16, 16) for _ in range(3)]
    values = {"svc": 0.5, **({"weight": 1.0} if get_method(name).parameter("weight") else {})}
    values.update({"density": 0.5} if get_method(name).parameter("density") else {})
    plain = mergekit.merge_tensors([base, *models], name, values, base_index=0)
    models = [m.requires_grad_() for m in models]
    merged = mergekit.merge_tensors([base, *models], name, values, base_index=0)
    assert (merged - plain).abs().max() < 1e-5
    merged.square().sum().backward()
    assert all(torch.isfinite(m.grad).all() for m in models)


def test_gradients_of_state_dicts():
    models = modules()
    leaves = [dict(m.named_parameters()) for m in models]
    merged = merge_state_dicts(leaves, "task_arithmetic", {"weight": [0.25, 0.5]}, base=0)
    out = torch.func.functional_call(models[0], merged, torch.randn(8, 3)).square().sum()
    out.backward()
    grads = [m[0].weight.grad for m in models]
    assert torch.allclose(grads[0], grads[1])  # 1 - 0.25 - 0.5, and 0.25
    assert torch.allclose(grads[2], 2 * grads[1])


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_gradients_by_rows_and_columns(kind):
    def coefficients(gram: np.ndarray, *, t: float) -> np.ndarray:
        lengths = np.sqrt(np.stack([gram[..., 0, 0], gram[..., 1, 1]], axis=-1))
        return t * lengths / lengths.sum(axis=-1, keepdims=True)

    form = Span("weights", gram=True, vectors=lambda t: kind)
    params = (once("t", Real(), 2.0, help=""),)
    found = Method("by vectors", "", form, "ignored", 2, 2, "merge", None, None, params, coefficients)
    check(found, 2, {"t": 1.5}, base=None)
    x = three(torch.float64)[:2]
    a, b = (v.numpy() for v in x)
    axis = 1 if kind == "rows" else 0
    u, v = (np.sqrt((w**2).sum(axis=axis, keepdims=True)) for w in (a, b))
    want = 1.5 * (u * a + v * b) / (u + v)
    got = merge_tensors([w.requires_grad_(True) for w in x], found, {"t": 1.5})
    assert np.allclose(got.detach().numpy(), want)


def test_gradients_where_vectors_are_nearly_parallel():
    def coefficients(gram: np.ndarray) -> np.ndarray:
        cosine = gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1])
        assert abs(cosine) < 1, "asked for what is nobody's Gram matrix"
        return np.array([1.0, np.arccos(cosine)])

    found = Method("angle", "", Span("weights", gram=True), "ignored", 2, 2, "merge", None, None, (), coefficients)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, generator=generator, dtype=torch.float64)
    b = a + 1e-2 * torch.randn(50, generator=generator, dtype=torch.float64)
    x = [a.clone().requires_grad_(True), b.clone().requires_grad_(True)]
    merge_tensors(x, found).sum().backward()
    y = [a.clone().requires_grad_(True), b.clone().requires_grad_(True)]
    (y[0] + torch.arccos(y[0] @ y[1] / y[0].norm() / y[1].norm()) * y[1]).sum().backward()
    for mine, exact in zip(x, y, strict=True):
        assert torch.allclose(mine.grad, exact.grad, rtol=1e-3, atol=1e-3 * exact.grad.abs().max().item())


def test_gradients_through_selection_and_sums():
    def pick(xp: Any, x: Any) -> Any:
        return xp.abs(x[0])

    form = Elementwise(
        measure=lambda xp, x: xp.stack([xp.sum(d * d) for d in x]),
        key=pick,
        keep=lambda nonzero, size: size // 2,
    )
    found = Method(
        "half", "", form, "required", 2, None, "merge", None, None, (), lambda xp, x, s: x[0] / float(s[0]) ** 0.5
    )
    check(found, 2, {})
    x = three()[:2]
    delta = (x[1] - x[0]).numpy()
    kept = np.where(oracles.top_magnitude(delta, 7 / 15), delta, 0)
    want = x[0].numpy() + kept / np.linalg.norm(kept)
    got = merge_tensors([v.clone().requires_grad_(True) for v in x], found, base_index=0)
    assert np.allclose(got.detach().numpy(), want, atol=1e-6)
    assert np.allclose(merge_tensors(x, found, base_index=0).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in METHODS if isinstance(get_method(n).form, Whole)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whole_methods_have_gradients(name):
    count, values = settings(name)
    x = [value.requires_grad_(True) for value in three()[:count]]
    merge_tensors(x, name, values, base_index=0).sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in x)


def test_calibration_of_singular_values():
    x = three()
    plain = merge_tensors(x, "task_arithmetic", {"weight": 1}, base_index=0)
    calibrated = merge_tensors(x, "task_arithmetic", {"weight": 1, "svc": 1}, base_index=0)
    assert not torch.allclose(plain, calibrated, atol=1e-3)
    leaves = [v.clone().requires_grad_(True) for v in x]
    got = merge_tensors(leaves, "task_arithmetic", {"weight": 1, "svc": 1}, base_index=0)
    assert torch.allclose(got, calibrated, atol=1e-5)


@pytest.mark.parametrize("device", [CUDA])
def test_on_an_accelerator(device):
    for name in METHODS:
        count, values = settings(name)
        x = three(shape=(61, 29))[:count]
        base = None if get_method(name).base == "ignored" else 0
        want = merge_tensors(x, name, values, None, base, "t")
        there = [v.to(device) for v in x]
        got = merge_tensors(there, name, values, None, base, "t")
        assert got.device.type == device
        assert torch.allclose(got.cpu(), want, atol=1e-4), name
        leaves = [v.requires_grad_(True) for v in there]
        got = merge_tensors(leaves, name, values, None, base, "t")
        assert got.device.type == device
        assert torch.allclose(got.cpu(), want, atol=1e-4), name
        if not isinstance(get_method(name).form, Whole):
            got.sum().backward()
            assert leaves[0].grad.device.type == device
