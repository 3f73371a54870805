"""Random cases for ``soak.py``: tiny models, recipes on them, recipes with something wrong in them, and interruptions.

A case depends on the random numbers that it is given and on nothing else.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import mergekit
from mergekit.methods import Choice, Flag, Integer, Method, get_method, method_names
from mergekit.methods.spec import REQUIRED
from mergekit.output import staging

ROOT = Path(mergekit.__file__).parent.parent
DTYPES = ("float32", "bfloat16", "float16")
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
RANGES = {"weight": (0.1, 1.5), "density": (0.3, 0.7), "gamma": (0.0, 0.2), "t": (0.0, 1.0), "lambda": (0.3, 1.5),
          "epsilon": (1e-4, 0.2), "lines_alpha": (0.2, 1.2), "lines_beta": (0.0, 0.5), "svc": (0.1, 1.0),
          "r": (0.0, 0.5), "eta": (5.0, 60.0), "learning_rate": (1e-5, 1e-3), "tol": (1e-6, 1e-3), "eps": (1e-9, 1e-6),
          "scale": (0.5, 2), "steps": (0, 12), "max_iter": (1, 12), "n": (1, 16), "m": (16, 64)}  # fmt: skip
"""Where values make sense and merges are quick."""
FILTERS = ("mlp", "attn", "norm", "embed", "layers.0", ".1.", "w", "nothing", "*")


@dataclass
class Case:
    """A recipe and what is known of it: ``loads``, what auto class reads the result; ``same``, what model comes out."""

    program: str
    kind: str
    recipe: dict[str, Any]
    folders: list[Path]
    options: dict[str, Any] = field(default_factory=dict)
    small_ranges: bool = False
    loads: str | None = None
    reads: str = "text"
    depth: int | None = None
    same: Path | None = None

    @property
    def method(self) -> str:
        """What counts as the method of this case."""
        return self.recipe["merge_method"] if self.program == "merge" else "moe"


class Pool:
    """Models by name, made when first asked for, and what their files held then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[Path, str] = {}

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder ``name``, which ``make`` fills."""
        path = self.folder / name
        if path not in self.digests:
            if not path.exists():
                make(part := self.folder / f"{name}.part")
                part.rename(path)
            self.digests[path] = digest(path)
        return path

    def bundled(self, name: str) -> Path:
        """One of the models that come with the repository."""
        path = ROOT / "models" / name
        self.digests.setdefault(path, digest(path))
        return path

    def tiny(self, family: str, number: int, dtype: str) -> Path:
        """A model of a family of transformers; 1 and 2 are near 0, and 3 is in several files."""
        import torch

        from tiny import edited, save_tiny, tensors_of

        def make(path: Path) -> None:
            if number in (0, 3):
                size = "20KB" if number else "5GB"
                save_tiny(family, path, seed=number, dtype=getattr(torch, dtype), max_shard_size=size)
                return
            base = self.tiny(family, 0, dtype)
            draw = torch.Generator().manual_seed(number)
            noisy = tensors_of(base)
            for tensor in filter(torch.is_floating_point, noisy.values()):
                tensor += 0.01 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
            edited(base, path, add=noisy)

        return self.get(f"{family}-{number}-{dtype}", make)

    def plain(self, shape: int, number: int, dtype: str) -> Path:
        """A model that is nothing but arrays, some of several blocks; ``shape`` chooses their sizes."""
        from mergekit.dtypes import BF16, F16, F32
        from models import family

        random = Random(shape)
        w = (random.randrange(1, 700), random.randrange(1, 130))
        shapes = {"embed.weight": (random.randrange(1, 1200), random.randrange(1, 30)), "norm": (3,), "one": ()}
        shapes |= {f"layers.{layer}.{name}.w": w for layer in range(3) for name in ("mlp", "attn")}
        kind = {"float32": F32, "bfloat16": BF16, "float16": F16}[dtype]
        return self.get(f"plain{shape}-{dtype}", lambda path: family(path, 4, kind, shapes, 0.1)) / f"m{number}"

    def words(self, kind: str, number: int, dtype: str) -> Path:
        """A Llama with a tokenizer of ``kind``; each number has another vocabulary."""
        from tokenizer_files import TEXTS, train, write_tokenized

        def make(path: Path) -> None:
            tokenizer = train(kind, TEXTS[: 4 - number], size=300 - 10 * number)
            added = ["<|im_end|>", "<extra>", "<more>"][:number]
            write_tokenized(path, tokenizer, number, added, code=CODES[dtype], rows=None)

        return self.get(f"{kind}-{number}-{dtype}", make)

    def adapted(self, number: int, dtype: str) -> tuple[Path, Path]:
        """A Llama and an adapter for it."""
        from files import write_model
        from lora_files import low_rank, write_adapter

        base = self.get(f"lora-base{number}-{dtype}", lambda p: write_model(p, number, code=CODES[dtype]))
        dora = number == 2
        tensors = low_rank(number, code=CODES[dtype], magnitude=dora)
        return base, self.get(f"adapter{number}-{dtype}", lambda p: write_adapter(p, tensors, use_dora=dora))

    def dense(self, name: str, number: int, dtype: str) -> Path:
        """A model that can become an expert."""
        import torch

        from dense import MEMBERS, OTHERS, save_dense

        config, kind = {**MEMBERS, **OTHERS}[name], getattr(torch, dtype)
        return self.get(f"dense-{name}-{number}-{dtype}", lambda p: save_dense(p, config, number, kind))


def digest(folder: Path) -> str:
    """One digest over the names and bytes of all files of a folder."""
    found = blake2b()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def value(random: Random, method: Method, name: str) -> Any:
    """A value of a parameter, by its declaration: one for all tensors, a gradient, or conditions."""
    kind = method.parameter(name).kind  # type: ignore[union-attr]

    def one() -> Any:
        if isinstance(kind, Flag):
            return random.random() < 0.5
        if isinstance(kind, Choice):
            return random.choice(kind.words)
        low, high = RANGES.get(name, (0.1, 1.0))
        if isinstance(kind, Integer):
            return random.randint(int(low), int(high))
        number = random.uniform(max(low, kind.low or low), min(high, kind.high or high))
        return float(f"{number:.4g}")

    form = random.random()
    if form < 0.2 and not isinstance(kind, Flag | Choice | Integer):
        return [one() for _ in range(random.randint(2, 4))]
    if form < 0.4 and name != "weighting":
        return [{"filter": random.choice(FILTERS), "value": one()}, {"value": one()}]
    return one()


def parameters(random: Random, method: Method, scope: str, share: float = 0.5) -> dict[str, Any]:
    """Values for the parameters that have one ``scope`` (once or each): all that are required, others at random."""
    found = {}
    for parameter in (*method.params, *method.options):
        if (parameter.scope == "once") == (scope == "once") and parameter.used:
            rare = 0.15 if parameter in method.options else share
            if parameter.default is REQUIRED or parameter.name in ("steps", "n") or random.random() < rare:
                found[parameter.name] = value(random, method, parameter.name)
    return found


def merge_recipe(random: Random, method: Method, models: list[Any], layers: int | None) -> tuple[dict[str, Any], int]:
    """A recipe for as many of ``models`` as the method takes; slices if ``layers`` is known. And the result's depth."""
    most = len(models) if method.most is None else min(method.most, len(models))
    models = models[: random.randint(min(max(method.least, 1 + (method.base == "required")), most), most)]
    record: dict[str, Any] = {"merge_method": method.name, "parameters": parameters(random, method, "once")}
    may = method.base == "optional" and len(models) > method.least
    has_base = method.base == "required" or (may and random.random() < 0.5)
    record |= {"base_model": models[0]} if has_base else {}
    if layers and random.random() < 0.35:
        record["slices"], depth = [], 0
        for _ in range(random.randint(1, 3)):
            start = random.randrange(layers)
            end = random.randint(start + 1, layers)
            sources: list[dict[str, Any]] = [{"model": m, "layer_range": [start, end]} for m in models]
            for source in sources:
                source["parameters"] = parameters(random, method, "each")
            record["slices"].append({"sources": sources})
            depth += end - start
        return record, depth
    skip = has_base and (method.most == 2 or method.base == "optional" or random.random() < 0.7)
    record["models"] = [{"model": m, "parameters": parameters(random, method, "each")} for m in models[skip:]]
    return record, layers or 0


def settings(random: Random, recipe: dict[str, Any]) -> dict[str, Any]:
    """Put settings of the whole merge into ``recipe``; returns options of the run."""
    dtypes = (*DTYPES, "float64")
    for key, share, choices in (("dtype", 0.4, dtypes), ("out_dtype", 0.25, dtypes), ("seed", 0.4, range(1 << 40)),
                                ("rounding", 0.3, ("stochastic", "nearest"))):  # fmt: skip
        if random.random() < share:
            recipe[key] = random.choice(choices)
    options: dict[str, Any] = {"shard_size": random.choice([0, 5 * 10**9, 3 * 10**3, 30 * 10**3])}
    for key in ("copy_tokenizer", "write_model_card", "statistics"):
        if random.random() < 0.2:
            options[key] = False
    if random.random() < 0.15:
        options["seed"] = random.randrange(1 << 62)
    return options


def make_case(random: Random, pool: Pool, kind: str | None = None) -> Case:
    """A random case; ``kind`` is drawn unless given."""
    kinds = {"tiny": 45, "plain": 20, "words": 12, "lora": 8, "moe": 9, "bundled": 3, "bundled moe": 2}
    kind = kind or random.choices(list(kinds), list(kinds.values()))[0]
    if kind.endswith("moe"):
        return moe_case(random, pool, kind)
    method, dtype = get_method(random.choice(method_names())), random.choice(DTYPES)
    dtypes = [random.choice(DTYPES) if random.random() < 0.1 else dtype for _ in range(4)]
    loads, reads, layers = None, "text", 3
    if kind == "tiny":
        from mergekit.families.config import layer_count
        from tiny import FAMILIES, config_of

        family = random.choice(list(FAMILIES))
        folders = [pool.tiny(family, n, dtypes[n]) for n in random.sample(range(4), 4)]
        loads, reads = FAMILIES[family].auto_class, FAMILIES[family].reads
        # Families of two stacks, and those whose layers are of several kinds, have tests of their own.
        layers = layer_count(config_of(folders[0])) if family in ("llama", "gpt2", "phi3", "qwen2", "gemma2") else None
    elif kind == "plain":
        shape = random.randrange(8)
        folders, layers = [pool.plain(shape, n, dtypes[n]) for n in random.sample(range(4), 4)], None
    elif kind == "words":
        tokens = random.choice(("byte_bpe", "piece_bpe", "unigram", "wordpiece"))
        folders = [pool.words(tokens, n, dtypes[n]) for n in random.sample(range(3), 3)]
    elif kind == "bundled":
        folders, loads, layers = [pool.bundled(n) for n in ("base", "code", "calc", "prose")], "AutoModelForCausalLM", 4
    else:
        pairs = [pool.adapted(n, dtypes[n]) for n in random.sample(range(3), 3)]
        folders = [path for pair in pairs for path in pair]
    models = [str(f) for f in folders]
    if kind == "lora":
        models = [f"{base}+{adapter}" if random.random() < 0.7 else str(base) for base, adapter in pairs]
    recipe, depth = merge_recipe(random, method, models, layers)
    options = settings(random, recipe)
    if kind == "words":
        source = random.choice(["union", "union", "base", models[0]])
        if random.random() < 0.3:
            recipe["tokenizer"] = {"source": source, "pad_to_multiple_of": random.choice([8, 64])}
        else:
            recipe["tokenizer_source"] = source
        if random.random() < 0.4:
            recipe["chat_template"] = random.choice(["chatml", "llama3", "auto", "{% if messages %}x{% endif %}"])
    if kind == "lora" and random.random() < 0.3:
        recipe["base_quantization"] = random.choice(["nf4", "nf4-double", "fp4", "auto"])
    return Case("merge", kind, recipe, folders, options, random.random() < 0.5, loads, reads, depth or None)


def moe_case(random: Random, pool: Pool, kind: str) -> Case:
    """A mixture of experts, of tiny dense models or of those that come with the repository."""
    from dense import MEMBERS, OTHERS

    recipe: dict[str, Any] = {"gate_mode": random.choice(["random", "uniform_random"])}
    form = random.choice(["mixtral", "phi3moe"])
    count = random.randint(2, 4)
    if kind == "moe":
        name = random.choice(list(MEMBERS) + (list(OTHERS) if form == "mixtral" else []))
        dtype = random.choice(DTYPES)
        folders = [pool.dense(name, n, dtype) for n in range(count + 1)]
    else:
        folders = [pool.bundled(n) for n in ("base", "code", "prose", "calc")]
        recipe["gate_mode"] = random.choice(["cheap_embed", "hidden", "router_input"])
    base, *others = map(str, folders)
    experts: list[dict[str, Any]] = [{"source_model": m} for m in others]
    for expert, text in zip(experts, ("def main(", "12+30=", "Once upon", "never"), strict=False):
        if "random" not in recipe["gate_mode"]:
            expert["positive_prompts"] = [f"{text}{i}" for i in range(3)]
        for key in ("noise_scale", "residual_scale"):
            if random.random() < 0.2:
                expert[key] = round(random.uniform(0.01, 1), 3)
    recipe |= {"base_model": base, "architecture": form, "experts": experts}
    recipe["experts_per_token"] = random.randint(1, len(experts))
    method = get_method(random.choice(method_names()))
    values = parameters(random, method, "once") | parameters(random, method, "each")
    recipe["attention"] = random.choice(["base", "average", {"merge_method": method.name, "parameters": values}])
    options = settings(random, recipe)
    for key in ("out_dtype", "rounding", *(["dtype"] if recipe.get("dtype") == "float64" else [])):
        recipe.pop(key, None)
    return Case("moe", kind, recipe, folders, options, loads="AutoModelForCausalLM")


def equal_case(random: Random, pool: Pool) -> Case:
    """A merge of copies of one model, by a method that promises to give it back."""
    method = get_method(random.choice([n for n in method_names() if "equal" in get_method(n).laws]))
    from tiny import FAMILIES

    family, dtype, is_plain = random.choice(list(FAMILIES)), random.choice(DTYPES), random.random() < 0.5
    model = pool.plain(random.randrange(8), 0, dtype) if is_plain else pool.tiny(family, 0, dtype)
    name = f"{model.parent.name}-{model.name}" if model.name == "m0" else model.name
    copies = [model, *(pool.get(f"{name}-copy{i}", lambda path: shutil.copytree(model, path)) for i in range(3))]
    recipe, _ = merge_recipe(random, method, [str(path) for path in copies], None)
    recipe["parameters"] |= {key: True for key in ("normalize", "normalize_weights") if method.parameter(key)}
    if random.random() < 0.3:
        recipe["out_dtype"] = "float32"
    return Case("merge", "equal", recipe, copies, {}, small_ranges=random.random() < 0.5, same=model)


ODD = (None, "", "x", "no/such-model", -1, 0, 2, 0.5, 1e30, -1e38, float("nan"), float("inf"), True, [], {}, [None],
       [1, "x"], {"value": 1}, {"filter": "w", "value": "y"}, [[1, 2]], 1 << 70, "1e-3", "\u4f60\ud7ff", "a\x00b",
       "../..", "/", "union", "bfloat16", "int8", "ties", [0, 99], [2, 1])  # fmt: skip


def mutate(random: Random, recipe: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with one or two things changed, taken out, doubled or renamed."""
    recipe = copy.deepcopy(recipe)
    for _ in range(random.choice([1, 1, 2])):
        places = list(_places(recipe))
        holder, key = random.choice(places)
        deed = random.choice(["odd", "odd", "nudge", "nudge", "drop", "double", "rename", "borrow", "method"])
        if deed == "nudge" and isinstance(holder[key], int | float):
            holder[key] *= random.choice([-1, 0, 3, 0.01, 1e6])
        elif deed in ("odd", "nudge"):
            holder[key] = copy.deepcopy(random.choice(ODD))
        elif deed == "drop":
            del holder[key]
        elif deed == "method":
            recipe["merge_method"] = random.choice(method_names())
        elif deed == "borrow":
            other, name = random.choice(places)
            holder[key] = copy.deepcopy(other[name])
        elif deed == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif isinstance(holder, dict):
            holder[random.choice([f"{key}s", str(key)[:-1], "parameters", "base_model"])] = holder.pop(key)
    return recipe


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a node."""
    for key, below in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(below, dict | list):
            yield from _places(below)


FAULTS: dict[str, Callable[[], BaseException]] = {
    "interrupt": KeyboardInterrupt,
    "full disk": lambda: OSError(errno.ENOSPC, "no space left on device"),
    "bad disk": lambda: OSError(errno.EIO, "input/output error"),
}


@contextmanager
def broken(moment: str, count: int, fault: str, out: Path) -> Iterator[list[str]]:
    """Let the ``count``-th write, finished tensor, or renaming into ``out`` fail by ``fault``, or kill this process.

    Gives a list that is no longer empty once that has happened.
    """
    seen, struck = [0], []

    def tick() -> None:
        seen[0] += 1
        if seen[0] == count:
            struck.append(moment)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise FAULTS[fault]()

    def before(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        if moment != "rename" or Path(args[1]).parent == out:
            tick()
        return function(*args, **more)

    finish = staging.Staging.finish
    target, name, new = {
        "write": (staging, "write_at", partial(before, staging.write_at)),
        "finish": (staging.Staging, "finish", lambda *args: (finish(*args), tick())[0]),
        "rename": (os, "replace", partial(before, os.replace)),
    }[moment]
    with patch.object(target, name, new):
        yield struck
