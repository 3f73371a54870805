"""The inputs and the commands of the kill matrix: tiny real models, every merge method, every form of output."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit.methods import Whole, get_method, method_names

sys.path.append(str(Path(__file__).resolve().parents[1]))

from checkpoints import build, llama_shapes

__all__ = ["FORMS", "SLOW", "Case", "cases", "write_inputs"]

ROOT = Path(__file__).resolve().parents[2]
FORMS = ("whole merge, shards", "slices", "union vocabulary", "mixture, phi3moe", "mixture, Mixtral", "overwrite")
_EXPERTS = ("code", "prose", "calc")
_OTHER = "prose-own"
"""The prose expert with a vocabulary of its own."""
_SHARDS = ("--out-shard-size", "700K")
_OVERWRITTEN = ("linear", "ties", "dare_ties", "slerp", "passthrough")
_SLICED = ("passthrough", "linear", "slerp")
_JOINED = ("linear", "ties", "task_arithmetic")
SLOW = ("mixtral-prompts",)
"""Cases that are run less often: they load transformers."""
_LAYERS = 4
_TINY = {"layers": 3, "hidden": 64, "ffn": 96, "vocabulary": 509, "key_value": 32}
"""Models for methods of whole tensors."""


@dataclass(frozen=True, slots=True)
class Case:
    """One recipe and how it is run. ``old``: the name of the case whose result stood in the output folder before."""

    name: str
    form: str
    verb: str
    recipe: Path
    options: tuple[str, ...]
    old: str | None = None

    def arguments(self, out: Path) -> list[str]:
        """The words after ``mergekit``."""
        return [self.verb, str(self.recipe), str(out), "--quiet", *self.options]


def write_inputs(folder: Path) -> Path:
    """Copies of the bundled models, and one with another tokenizer, below ``folder``."""
    inputs = folder / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    for name in ("base", *_EXPERTS):
        shutil.copytree(ROOT / "models" / name, inputs / name)
    shutil.copytree(inputs / "prose", inputs / _OTHER)
    shutil.copytree(ROOT / "examples" / "phi3_moe" / "prompts", inputs / "prompts")
    _change_tokenizer(inputs / _OTHER / "tokenizer.json")
    build(inputs / "tiny", llama_shapes(**_TINY), ("base", *_EXPERTS), layers=_TINY["layers"])
    return inputs


def _change_tokenizer(path: Path, removed: int = 150, swapped: int = 40) -> None:
    """Take the last tokens out of a BPE vocabulary, exchange the ids of some, and add two special ones."""
    record = json.loads(path.read_text(encoding="utf-8"))
    by_id = sorted(record["model"]["vocab"], key=record["model"]["vocab"].__getitem__)
    gone = set(by_id[-removed:])
    merges = [m if isinstance(m, list) else m.split(" ") for m in record["model"]["merges"]]
    kept = by_id[:-removed]
    kept[-swapped:] = reversed(kept[-swapped:])
    record["model"]["merges"] = [m for m in merges if not gone & {*m, "".join(m)}]
    record["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    special = record["added_tokens"][-1]
    for number, content in enumerate(("<|im_start|>", "<|im_end|>")):
        record["added_tokens"].append({**special, "id": len(kept) + number, "content": content})
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def cases(folder: Path, inputs: Path) -> list[Case]:
    """All cases, those of ``old`` models (never killed: their form is empty) first."""
    recipes = folder / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)

    def case(
        name: str, form: str, record: dict[str, Any], *options: str, old: str | None = None, verb: str = "merge"
    ) -> Case:
        path = recipes / f"{name}.yml"
        path.write_text(yaml.safe_dump(record, sort_keys=False))
        return Case(name, form, verb, path, options, old)

    old = {**_whole("linear", inputs, _EXPERTS[1:]), "dtype": "float32"}
    made = [case("old-shards", "", old, "--out-shard-size", "600K"), case("old-file", "", old)]
    for name in method_names():
        tiny = isinstance(get_method(name).form, Whole)
        record, size = _whole(name, inputs / "tiny" if tiny else inputs), "90K" if tiny else _SHARDS[1]
        made.append(case(f"whole-{name}", FORMS[0], record, "-j", "2", _SHARDS[0], size))
    made += [case(f"slices-{n}", FORMS[1], _sliced(n, inputs), "-j", "2", *_SHARDS) for n in _SLICED]
    for name in _JOINED:
        record = {**_whole(name, inputs, ("code", _OTHER)), "tokenizer_source": "union"}
        made.append(case(f"union-{name}", FORMS[2], record, "-j", "2", *_SHARDS))
    for form, architecture in zip(FORMS[3:5], ("phi3moe", "mixtral"), strict=True):
        record = {"architecture": architecture, "gate_mode": "random", **_mixture(inputs)}
        ties = {"attention": {"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}}}
        options = ("-j", "2", "--no-verify", "--out-shard-size", "900K")
        made.append(case(f"{architecture}-random", form, record, *options, verb="moe"))
        made.append(case(f"{architecture}-ties", form, {**record, **ties}, *options, verb="moe"))
    record = {"architecture": "mixtral", **_mixture(inputs, prompts=True), "attention": "average"}
    made.append(case("mixtral-prompts", FORMS[4], record, *options, verb="moe"))
    for position, name in enumerate(_OVERWRITTEN):
        shards, before = (_SHARDS, "old-file") if position % 2 else ((), "old-shards")
        record = _whole(name, inputs)
        made.append(case(f"overwrite-{name}", FORMS[5], record, "-j", "2", "--overwrite", *shards, old=before))
    return made


def _whole(name: str, inputs: Path, experts: Sequence[str] = _EXPERTS) -> dict[str, Any]:
    """A recipe of a method over the bundled models."""
    method = get_method(name)
    base = method.base == "required"
    names = ["base", *experts] if base and len(experts) == len(_EXPERTS) else list(experts)
    if base and names[0] != "base":
        names = ["base", *names]
    weighted: dict[str, float] = {k: v for k, v in {"weight": 0.5, "density": 0.4}.items() if method.parameter(k)}
    models: list[dict[str, Any]] = [{"model": str(inputs / n)} for n in names]
    for entry in models[base:]:
        entry |= {"parameters": weighted} if weighted else {}
    given = {"t": 0.4, "select_topk": 0.3}
    record: dict[str, Any] = {"merge_method": name, "models": models[: method.most]}
    record["parameters"] = {k: v for k, v in given.items() if method.parameter(k)}
    if name == "wudi":
        record["parameters"]["steps"] = 5
    if base:
        record["base_model"] = str(inputs / "base")
    return record


def _sliced(name: str, inputs: Path) -> dict[str, Any]:
    """Layers put on top of each other; of two models each, unless the method is for one."""
    record: dict[str, Any] = {"merge_method": name, "dtype": "bfloat16", "slices": []}
    pairs = (("code",), ("prose",)) if name == "passthrough" else (("base", "code"), ("base", "prose"))
    for models, (first, last) in zip(pairs, ((0, 3), (1, _LAYERS)), strict=True):
        sources = [{"model": str(inputs / m), "layer_range": [first, last]} for m in models]
        record["slices"].append({"sources": sources})
    if name == "linear":
        record["parameters"] = {"weight": 0.5}
    if name == "slerp":
        record |= {"base_model": str(inputs / "base"), "parameters": {"t": 0.4}}
    return record


def _mixture(inputs: Path, prompts: bool = False) -> dict[str, Any]:
    experts: list[dict[str, Any]] = []
    for name, suffix in zip(_EXPERTS, ("jsonl", "txt", "txt"), strict=True):
        file = {"positive_prompts_file": str(inputs / "prompts" / f"{name}.{suffix}")}
        experts.append({"source_model": str(inputs / name), **(file if prompts else {"positive_prompts": [name]})})
    return {"base_model": str(inputs / "base"), "experts_per_token": 2, "dtype": "bfloat16", "experts": experts}
