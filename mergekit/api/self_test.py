"""Self-test of a mixture: the identity law, reloading, a short text. For models that fit in memory."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit.api.loading import first_line, load_model, silent_transformers
from mergekit.api.options import RunOptions
from mergekit.dtypes import BF16, F16, DType
from mergekit.errors import RunError

if TYPE_CHECKING:
    from mergekit.moe.build import MoePlan

__all__ = ["check_identity", "check_reload"]

_TOKENS = 64
_EXACT = 1e-5
"""Largest difference of logits, relative to the largest logit, where the bytes of all weights are the same."""
_ROUNDED = {F16: 1e-3, BF16: 8e-3}
"""The same where weights had to be scaled before they were rounded: a few units in the last place."""


def check_identity(made: MoePlan, folder: Path, options: RunOptions) -> str:
    """Hold the identity law: with every expert replaced by the base's MLP, the mixture computes what the base does.

    Writes both models below ``folder`` and removes them. Returns a line with the figure; RunError if the law fails.
    """
    import torch

    from mergekit.api.merge import plan
    from mergekit.api.run import run_plan

    quiet = dataclasses.replace(
        options, overwrite=False, restart=False, write_model_card=False, copy_tokenizer=False, shard_size=0
    )
    dtype = made.dtype
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mergekit-verify-") as temporary:
        mixed, dense = Path(temporary) / "mixture", Path(temporary) / "dense"
        _run_mixture(made, mixed, quiet)
        base = made.recipe.config.base_model.dump()
        recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": base}], "dtype": dtype.name}
        if made.recipe.config.base_quantization != "none":
            recipe["base_quantization"] = made.recipe.config.base_quantization
        run_plan(plan(recipe, quiet, fetch=True), dense, quiet)
        tokens = _some_tokens(made)
        with silent_transformers(), torch.no_grad():
            theirs = _logits(dense, tokens)
            mine = _logits(mixed, tokens, ours=bool(made.target.code))
    largest = float(theirs.abs().max())
    difference = float((mine - theirs).abs().max())
    limit = _limit(made, dtype) * max(largest, 1.0)
    figure = f"largest difference of logits {difference:.1e} where the largest is {largest:.3g}"
    if not difference <= limit:
        raise RunError(
            f"the self-test failed: with every expert replaced by the base's MLP the mixture differs from the base "
            f"({figure}, at most {limit:.1e} is right); please report this, or pass --no-verify to write it anyway"
        )
    return f"identity law (every expert replaced by the base's MLP): {figure}, {tokens.shape[1]} tokens"


def _logits(folder: Path, tokens: Any, *, ours: bool = False) -> Any:
    import torch

    model, _ = _load(folder, torch.float32, ours=ours)
    logits = model(tokens).logits
    del model
    gc.collect()  # transformers' models hold themselves in cycles, and two at once are too many
    return logits


def _limit(made: MoePlan, dtype: DType) -> float:
    is_scaled = made.target.splits and made.dense.rope.partial < 1
    return _ROUNDED.get(dtype, _EXACT) if is_scaled else _EXACT


def _run_mixture(made: MoePlan, folder: Path, options: RunOptions) -> None:
    """The mixture of the same config whose experts are all the base."""
    from mergekit.api.merge import plan_options
    from mergekit.api.prepare import write_routers
    from mergekit.api.run import Hooks, run_plan
    from mergekit.moe.build import build_moe_plan
    from mergekit.moe.recipe import load_moe_recipe
    from mergekit.moe.routers import random_rows

    config = made.recipe.config
    experts = [{"source_model": config.base_model.dump()}] * len(config.experts)
    recipe = {
        "base_model": config.base_model.dump(),
        "experts": experts,
        "experts_per_token": config.experts_per_token,
        "gate_mode": "random",
        "dtype": made.dtype.name,
        "base_quantization": config.base_quantization,
    }

    def rows() -> np.ndarray:
        return random_rows(*made.router_shape, seed=0)

    twin = build_moe_plan(load_moe_recipe(recipe, allow_all_same=True), made.target, plan_options(options, fetch=True))
    run_plan(twin.plan, folder, options, Hooks(prepare=lambda staging: write_routers(twin, staging, rows)))


def check_reload(made: MoePlan, folder: Path, tokenizer: Any | None) -> list[str]:
    """Load the written model as a user would and let it continue a text. Lines to show; RunError if it fails."""
    import torch
    import transformers

    with silent_transformers(), torch.no_grad():
        model, faults = _load(folder, getattr(torch, made.dtype.name), ours=bool(made.target.code))
        if faults:
            raise RunError(
                f"the self-test failed: the model is written, but {folder} does not load cleanly: {faults}; please "
                f"report this"
            )
        lines = [f"loads with transformers {transformers.__version__} as {type(model).__name__}, every tensor in place"]
        line = _continuation(model.float(), made, tokenizer)
    del model
    gc.collect()  # transformers' models hold themselves in cycles
    return [*lines, line]


def _continuation(model: Any, made: MoePlan, tokenizer: Any | None) -> str:
    """What the model writes, as a line."""
    prompt = _some_tokens(made)[:, :8]
    if tokenizer is not None:
        text = next((p.text for prompts in made.prompts for p in prompts.positive if p.text), "The")
        prompt = tokenizer(text, return_tensors="pt").input_ids[:, :16]
        if int(prompt.max()) >= int(made.dense.config["vocab_size"]):
            prompt, tokenizer = _some_tokens(made)[:, :8], None  # not this model's tokenizer
    try:
        out = model.generate(prompt, attention_mask=prompt.new_ones(prompt.shape), max_new_tokens=12, do_sample=False)
    except Exception as error:  # transformers raises whatever its parts do
        raise RunError(
            f"the self-test failed: the model is written, but it can't generate ({first_line(error)}); look at its "
            f"generation_config.json"
        ) from None
    more = out[0, prompt.shape[1] :]
    if tokenizer is None:
        return f"generates: token ids {more.tolist()}"
    return f"generates: {tokenizer.decode(prompt[0], skip_special_tokens=True)!r} -> {tokenizer.decode(more)!r}"


def _some_tokens(made: MoePlan) -> Any:
    """Token ids spread over the vocabulary, [1, at most 64]."""
    import torch

    size = int(made.dense.config["vocab_size"])
    count = min(_TOKENS, made.dense.positions)
    return (torch.arange(count) * 7919 % size).reshape(1, count)


def _load(folder: Path, dtype: Any, *, ours: bool = False) -> tuple[Any, dict[str, list[str]]]:
    """The model in ``folder``, and what is amiss. ``ours``: its code is what we put there, and may run."""
    try:
        return load_model(folder, dtype, trusted=ours)
    except RunError as error:
        raise RunError(f"the self-test failed: {error}") from None
