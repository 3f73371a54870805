"""Time making a mixture of two Phi-3-mini-shaped models against the floor: moving the same bytes.

    python bench/moe_speed.py                        # all 32 layers, 3.8B parameters, both cold
    python bench/moe_speed.py --layers 10 --warm     # what fits in the page cache
    python bench/moe_speed.py --calibrate            # peak memory of a router_input calibration too

Random weights, routers from `random`: what is timed is the assembly. With ``--cold`` (the default) every file is
dropped from the page cache before each process; inputs and output together exceed the memory of a small machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from checkpoints import Shape, build
from merge_speed import HERE, Run, measure

HIDDEN, FFN, VOCABULARY = 3072, 8192, 32064
ROOT = HERE.parent


def phi3_shapes(layers: int) -> list[Shape]:
    """Names and shapes of Phi-3-mini with so many layers."""
    shapes: list[Shape] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes += [
            (prefix + "input_layernorm.weight", (HIDDEN,)),
            (prefix + "mlp.down_proj.weight", (HIDDEN, FFN)),
            (prefix + "mlp.gate_up_proj.weight", (2 * FFN, HIDDEN)),
            (prefix + "post_attention_layernorm.weight", (HIDDEN,)),
            (prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
            (prefix + "self_attn.qkv_proj.weight", (3 * HIDDEN, HIDDEN)),
        ]
    return [*shapes, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]


def config(layers: int) -> dict[str, object]:
    """Phi-3-mini-4k's config with so many layers."""
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32,
        "hidden_act": "silu", "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def settle(paths: list[Path], *, warm: bool) -> None:
    """Bring files into the page cache, or drop them from it."""
    for path in paths:
        with path.open("rb") as stream:
            if not warm:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and stream.read(1 << 24):
                pass


def peak_of(command: list[str]) -> int:
    """The largest resident size of a process in bytes, as the kernel counted it for that process alone."""
    code = (
        "import runpy, sys, atexit\n"
        "atexit.register(lambda: print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0], "
        "file=sys.stderr))\n"
        "runpy.run_module('mergekit', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return next(int(line.split()[1]) * 1024 for line in done.stderr.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    """Build the models, run the rounds, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergekit-bench-moe")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="files in the page cache")
    parser.add_argument("--calibrate", action="store_true", help="measure a router_input calibration")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    folder, shapes = args.folder / str(args.layers), phi3_shapes(args.layers)
    print("building checkpoints ...", file=sys.stderr)
    build(folder, shapes, models=("base", "one"))
    for name in ("base", "one"):
        (folder / name / "config.json").write_text(json.dumps(config(args.layers)))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "models" / "base" / file, folder / name / file)
    subprocess.run([sys.executable, "-m", "mergekit", "warmup"], check=True)
    weights = [folder / name / "model.safetensors" for name in ("base", "one")]
    base, mlp = weights[0].stat().st_size, args.layers * 3 * HIDDEN * FFN * 2
    router = args.layers * 2 * HIDDEN * 2
    print(f"{base / 1e9:.2f} GB a model; the mixture has {(base + mlp + router) / 1e9:.2f} GB", file=sys.stderr)
    recipe = write_recipe(folder, "random")
    make = ["moe", str(recipe), str(folder / "out"), "--no-verify", "--quiet", "--out-shard-size", "0"]
    floors: list[Run] = []
    runs: list[Run] = []
    for number in range(args.rounds):
        settle(weights, warm=args.warm)
        target = folder / "floor.bin"
        floor = [sys.executable, str(HERE / "floor.py"), str(target), str(base + mlp + router)]
        floors.append(measure([*floor, str(weights[0]), f"{weights[1]}:{mlp}"]))
        target.unlink()
        settle(weights, warm=args.warm)
        runs.append(measure([sys.executable, "-m", "mergekit", *make]))
        shutil.rmtree(folder / "out")
        print(
            f"round {number + 1}: {runs[-1].wall:.1f} s, {runs[-1].wall / floors[-1].wall:.2f} x floor", file=sys.stderr
        )
    lines = report(args.layers, warm=args.warm, floors=floors, runs=runs, peak=peak_of(make))
    shutil.rmtree(folder / "out")
    if args.calibrate:
        recipe = write_recipe(folder, "router_input")
        peak = peak_of(["moe", str(recipe), str(folder / "out"), "--no-verify", "--quiet", "--out-shard-size", "0"])
        lines.append(f"\nThe same with `router_input` calibration and routing report: peak {peak / 1e6:.0f} MB.")
        shutil.rmtree(folder / "out")
    text = "\n".join(lines) + "\n"
    print(text)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"moe_speed_{args.layers}_{'warm' if args.warm else 'cold'}.md").write_text(text)


def write_recipe(folder: Path, mode: str) -> Path:
    """A mixture of the two models."""
    prompts = (["def sort(values): return sorted(values)"], ["Once upon a time there was an old house by the sea"])
    experts = [
        {"source_model": str(folder / name), "positive_prompts": texts}
        for name, texts in zip(("base", "one"), prompts, strict=True)
    ]
    path = folder / f"{mode}.yml"
    record = {"base_model": str(folder / "base"), "gate_mode": mode, "experts_per_token": 1, "experts": experts}
    path.write_text(yaml.safe_dump(record, sort_keys=False))
    return path


def report(layers: int, *, warm: bool, floors: list[Run], runs: list[Run], peak: int) -> list[str]:
    """The table as Markdown."""
    lines = [
        f"# Making a mixture of two Phi-3-mini-shaped models, {layers} layers",
        "",
        f"bfloat16, page cache {'warm' if warm else 'cold'}, {os.cpu_count()} processors ({platform.machine()}), "
        f"Python {platform.python_version()}; medians of {len(runs)} rounds. Routers: `random`.",
        "",
        "| | wall s | cpu s | x floor |",
        "|---|---|---|---|",
    ]
    ratio = statistics.median(r.wall / f.wall for r, f in zip(runs, floors, strict=True))
    for name, done, note in (("floor", floors, ""), ("mixture", runs, f"{ratio:.2f}")):
        wall, cpu = (statistics.median(getattr(r, field) for r in done) for field in ("wall", "cpu"))
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {note} |")
    return [*lines, "", f"Peak memory of the mixture's process: {peak / 1e6:.0f} MB."]


if __name__ == "__main__":
    main()
