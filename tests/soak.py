"""Random merges until the time is over, and what must be true of each: ``python tests/soak.py --minutes N``.

A merge of random models by a random recipe must leave its inputs alone, write a whole model, write the same bytes on
any number of threads and after any interruption, and give equal models back where the method promises it. A recipe with
something wrong in it must work or be refused in a few lines. Everything follows from ``--seed`` and the number of the
iteration; ``--only N`` repeats one.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
import yaml
from huggingface_hub import constants
from safetensors import safe_open

import command
import mergekit
from dense import load, logits
from mergekit import api, execute
from mergekit.api.verify import verify_model
from mergekit.errors import MergekitError
from mergekit.execute import work
from mergekit.families.config import layer_count
from mergekit.output import staging
from mergekit.output.staging import STAGING
from soak_cases import FAULTS, Case, Pool, broken, digest, equal_case, make_case, mutate
from tiny import load_checked, outputs_of, tensors_of, unaccounted

THREADS = 2  # of torch, on which decompositions depend, here and in processes of their own
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
BLOCKS = (None, 1024, 3072, 4096, 12288)
MOST_BYTES, HANGS_AFTER = 100_000_000, 300  # bytes of a result; seconds that no iteration takes


def run(case: Case, out: Path, *, threads: int | None = None, block: int | None = None) -> Any:
    """Run a case into ``out`` inside this process; returns the plan that was followed."""
    torch.set_num_threads(THREADS)
    plans: list[Any] = []
    options = {**case.options, "on_plan": plans.append, "threads": threads}
    threads_of = partial(execute.run_threads, block=block)
    elements = 1 << 13 if case.small_ranges else work.RANGE
    with patch.object(execute, "run_threads", threads_of), patch.object(work, "RANGE", elements):
        if case.program == "merge":
            mergekit.run_merge(case.recipe, out, **options)
        else:
            mergekit.run_moe(case.recipe, out, allow_all_same=True, verify=False, **options)
    return plans[0] if case.program == "merge" else plans[0].plan


def arguments(case: Case, recipe: Path, out: Path) -> list[str]:
    """The command line that does what ``run`` does."""
    words = [case.program, str(recipe), str(out), "--quiet"]
    words += ["--no-verify", "--i-understand-this-is-not-useful-without-training"] * (case.program == "moe")
    flags = {"copy_tokenizer": "--no-copy-tokenizer", "write_model_card": "--no-write-model-card"}
    flags |= {"statistics": "--no-stats", "shard_size": "--out-shard-size", "seed": "--random-seed"}
    for key, option in case.options.items():
        words += [flags[key]] if option is False else [flags[key], str(option)]
    return words


def python(*words: str | Path) -> command.Result:
    """Run Python on ``words`` in a process of its own."""
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    return command.Result(done.returncode, done.stdout, done.stderr)


def weights(folder: Path) -> dict[str, bytes]:
    """The files of a model that must be the same whenever the recipe is."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json")
            and (p.name == "config.json" or "model" in p.name)}  # fmt: skip


def assert_same(one: dict[str, bytes], two: dict[str, bytes], what: str) -> None:
    """Two results are the same, byte for byte."""
    assert one.keys() == two.keys(), f"{what}: files {sorted(one)} and {sorted(two)}"
    for name, data in one.items():
        other = two[name]
        if data != other:
            place = next((i for i, (a, b) in enumerate(zip(data, other, strict=False)) if a != b), None)
            raise AssertionError(f"{what}: {name} differs first at byte {place} of {len(data)} and {len(other)}")


def check_output(case: Case, plan: Any, out: Path) -> None:
    """The folder holds the planned model, whole, and nothing else."""
    planned = {o.name: o for o in plan.outputs}
    found: dict[str, str] = {}
    for shard in plan.shards:
        with safe_open(out / shard.name, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor, output = opened.get_tensor(name), planned[name]
                assert name not in found, f"{name} is in two files"
                found[name] = shard.name
                assert tuple(tensor.shape) == output.shape, f"{name}: {tuple(tensor.shape)}, planned {output.shape}"
                assert tensor.dtype == getattr(torch, output.dtype.name), f"{name}: {tensor.dtype}"
                assert tensor.isfinite().all(), f"{name} is not finite"
    assert found.keys() == planned.keys(), f"not as planned: {found.keys() ^ planned.keys()}"
    index = out / "model.safetensors.index.json"
    if index.exists():
        record = json.loads(index.read_text())
        assert record["weight_map"] == found
        assert record["metadata"]["total_size"] == sum(o.nbytes for o in plan.outputs)
    limit = case.options.get("shard_size") or 1 << 62
    for shard in plan.shards:
        sizes = [planned[name].nbytes for name, file in found.items() if file == shard.name]
        assert sum(sizes) <= limit or len(sizes) == 1, f"{shard.name} has {sum(sizes)} bytes"
    files = {*found.values(), *(name for _, name in plan.files), *(name for name, _ in plan.texts), "config.json"}
    files |= {"README.md", plan.recipe_name} if case.options.get("write_model_card", True) else set()
    extra = {p.name for p in out.iterdir()} ^ (files | ({index.name} if plan.index else set()))
    written = {"merge_manifest.json"} if case.options.get("write_model_card", True) else set()
    may = {*written, *["merge_stats.json"] * plan.statistics, *["routing.json"] * bool(plan.mixture)}
    assert written <= extra <= may, f"files too many or missing: {extra}"
    assert not (faults := verify_model(out).faults), f"verify: {faults}"
    layers = layer_count(json.loads((out / "config.json").read_text()))
    assert case.depth is None or layers in (case.depth, None), f"{layers} layers, not {case.depth}"
    wanted = case.recipe.get("out_dtype") or case.recipe.get("dtype")
    kinds = {str(o.dtype) for o in plan.outputs if o.dtype.is_float}
    assert wanted is None or case.program == "moe" or kinds <= {wanted}, f"{kinds}, not {wanted}"


def check_accounted(plan: Any) -> None:
    """Every tensor of every input is read, or listed as left out."""
    assert not unaccounted(plan), f"forgotten: {unaccounted(plan)}"


def check_equal(case: Case, out: Path) -> None:
    """What came of equal models is that model, but for rounding."""
    got, wanted = tensors_of(out), tensors_of(case.same)  # type: ignore[arg-type]
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        mine, theirs = got[name].double(), tensor.double()
        step = {2: 2.0**-8 if "bfloat16" in str(got[name].dtype) else 2.0**-11}.get(got[name].element_size(), 2.0**-23)
        top = float(theirs.abs().max()) if theirs.numel() else 0.0
        far = (mine - theirs).abs() - 3e-6 * top - step * theirs.abs() - 2.0**-25
        assert (far <= 0).all(), f"{name} moved by {float((mine - theirs).abs().max()):.3g} of {top:.3g}"


def check_loads(case: Case, out: Path) -> None:
    """Transformers loads the result without a remark, and it computes."""
    if case.program == "moe":
        assert logits(load(out, trust_remote_code=True), 16).isfinite().all()
    elif (model := load_checked(out, case.loads or "AutoModel")).dtype == torch.float32:
        assert outputs_of(model, case.reads).isfinite().all()


def assert_told_shortly(error: BaseException) -> None:
    """A refusal is ours, and short."""
    lines = str(error).splitlines()
    assert isinstance(error, MergekitError), f"{type(error).__name__}: {error}"
    assert 1 <= len(lines) <= 5, f"a long message: {error}"
    assert max(map(len, lines)) <= 1000, f"a long line: {error}"


def child(spec: dict[str, Any]) -> int:
    """Run the case of ``spec`` until this process is killed."""
    staging._COMMIT_SECONDS = 0.01
    case = Case(spec["program"], "child", spec["recipe"], [], spec["options"], spec["small_ranges"])
    with broken(spec["moment"], spec["count"], "kill", Path(spec["out"])):
        run(case, Path(spec["out"]), threads=spec["threads"])
    return 0


class Soak:
    """The loop: cases, checks, counts, and what failed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.pool = Pool(folder / "models")
        self.counts: dict[str, Counter[str]] = {key: Counter() for key in ("methods", "kinds", "checks")}
        self.refused: Counter[str] = Counter()
        self.failures: list[str] = []

    def iterate(self, number: int) -> None:
        """One iteration; what fails in it is printed, kept and counted."""
        place = self.folder / "now"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        draw = lambda what: Random(f"{self.seed}/{number}/{what}")  # noqa: E731
        no_wait = patch.object(os, "fsync", lambda descriptor: None)
        no_hub = patch.object(constants, "HF_HUB_OFFLINE", True)  # a wrong recipe may name a model of the hub
        with (self.folder / "hang.txt").open("w") as hang, no_wait, no_hub:
            print(f"--seed {self.seed} --only {number} hangs", file=hang, flush=True)
            faulthandler.dump_traceback_later(HANGS_AFTER, exit=True, file=hang)
            case: Case | None = None
            try:
                case = make_case(draw("case"), self.pool)
                self.checks(case, number, draw, place)
            except Exception:
                self.fail(number, "iteration", case, place)
            finally:
                faulthandler.cancel_dump_traceback_later()
                torch.set_num_threads(1)

    def checks(self, case: Case, number: int, draw: Callable[[str], Random], place: Path) -> None:
        """The checks of one case; each has its own random numbers, so that they can change one by one."""
        self.counts["methods"][case.method] += 1
        self.counts["kinds"][case.kind] += 1

        def attempt(what: str, function: Callable[..., Any], *args: Any, of: Case = case) -> Any:
            self.counts["checks"][what] += 1
            try:
                return function(of, draw(what), place / what.replace(" ", "-"), *args)
            except Exception:
                self.fail(number, what, of, place)

        plan = attempt("whole", self.whole)
        if plan is not None:
            expected, out = weights(place / "whole"), place / "whole"
            if case.program == "merge":
                attempt("accounted", lambda *_: check_accounted(plan))
            attempt("same bytes", self.same_bytes, expected)
            if draw("choice").random() < 0.6:
                attempt("interrupted", self.interrupted, expected, plan)
            if draw("kill").random() < 0.03:
                attempt("killed", self.killed, expected, plan)
            if draw("shell").random() < 0.15:
                attempt("command line", self.command_line, expected)
            if case.loads and draw("load").random() < 0.08:
                attempt("loads", lambda of, *_: check_loads(of, out))
        if draw("mutate").random() < 0.6:
            attempt("mutated", self.mutated)
        if draw("equal").random() < 0.3:
            equal = equal_case(draw("equal case"), self.pool)
            self.counts["methods"][equal.method] += 1
            attempt("equal", self.equal, of=equal)
        for path in {*case.folders}:
            root = path if path in self.pool.digests else path.parent
            if digest(root) != self.pool.digests[root]:
                self.pool.digests[root] = digest(root)
                raise AssertionError(f"the input {root} was changed")
        left = [p for p in Path("/proc/self/fd").glob("*") if os.path.realpath(p).startswith(str(place))]
        assert not left, f"{len(left)} files are still open"

    def whole(self, case: Case, random: Random, out: Path) -> Any:
        """Run a sound recipe; returns its plan, or None if it is refused, which is no fault if it is told well."""
        try:
            plan = run(case, out, threads=random.randint(1, 4), block=random.choice(BLOCKS))
        except MergekitError as error:
            assert_told_shortly(error)
            assert not out.exists(), f"a refused run left {[p.name for p in out.iterdir()]}"
            self.refused[f"{case.kind}: {str(error).replace(str(self.folder), '')[:150]}"] += 1
            return None
        check_output(case, plan, out)
        return plan

    def same_bytes(self, case: Case, random: Random, out: Path, expected: dict[str, bytes]) -> None:
        """Other threads, other blocks."""
        run(case, out, threads=random.randint(1, 6), block=random.choice(BLOCKS))
        assert_same(expected, weights(out), "other threads and blocks")

    def interrupted(self, case: Case, random: Random, out: Path, expected: dict[str, bytes], plan: Any) -> None:
        """Once or twice something goes wrong; then the same again."""
        for _ in range(random.choice([1, 1, 2])):
            moment = random.choice(["write", "write", "finish", "rename"])
            most = len(plan.shards) + 4 if moment == "rename" else len(plan.outputs)
            fault = random.choice(list(FAULTS)) if moment != "finish" else "interrupt"
            try:
                with broken(moment, random.randint(1, most), fault, out) as struck:
                    run(case, out, threads=random.randint(1, 3), block=random.choice(BLOCKS))
            except KeyboardInterrupt:
                assert fault == "interrupt"
            except MergekitError as error:
                assert_told_shortly(error)
            else:
                assert not struck, f"{moment}, {fault}: nobody noticed"
                break
            assert not (out / "config.json").exists(), f"{moment}, {fault}: this looks like a model"
        else:
            run(case, out, threads=random.randint(1, 3), block=random.choice(BLOCKS))
        assert_same(expected, weights(out), f"resumed after {moment}, {fault}")
        check_output(case, plan, out)

    def killed(self, case: Case, random: Random, out: Path, expected: dict[str, bytes], plan: Any) -> None:
        """A process that gets SIGKILL in the middle; then the same again in this one."""
        spec = {"program": case.program, "recipe": case.recipe, "options": case.options, "out": str(out)}
        spec |= {"small_ranges": case.small_ranges, "moment": random.choice(["write", "finish", "rename"])}
        spec |= {"count": random.randint(1, len(plan.outputs)), "threads": random.randint(1, 3)}
        (path := out.with_suffix(".json")).write_text(json.dumps(spec))
        done = python(__file__, "--child", path)
        assert done.code in (0, -signal.SIGKILL), done.err[-2000:]
        if done.code:
            assert not (out / "config.json").exists(), f"killed at {spec['moment']}: this looks like a model"
            run(case, out, threads=random.randint(1, 3))
            check_output(case, plan, out)
        assert_same(expected, weights(out), f"killed at {spec['moment']} {spec['count']}")

    def command_line(self, case: Case, random: Random, out: Path, expected: dict[str, bytes]) -> None:
        """The command does what the function does; now and then in a process of its own."""
        recipe = out.with_suffix(".yml")
        recipe.write_text(yaml.safe_dump(case.recipe, sort_keys=False))
        words = arguments(case, recipe, out)
        result = python("-m", "mergekit", *words) if random.random() < 0.15 else command.mergekit(*words)
        assert result.code == 0, result
        if not case.small_ranges:
            assert_same(expected, weights(out), "command line")

    def mutated(self, case: Case, random: Random, out: Path) -> None:
        """A recipe with something changed works, or is refused well."""
        wrong = Case(case.program, case.kind, mutate(random, case.recipe), case.folders, case.options)
        recipe, text = out.with_suffix(".yml"), yaml.safe_dump(wrong.recipe, sort_keys=False, allow_unicode=True)
        is_text = random.random() < 0.4
        if is_text and random.random() < 0.4:
            start, new = random.randrange(len(text)), random.choice([*":'{]\t\x01", "", "- ", "&a ", "*a", "!!x "])
            text = text[:start] + new + text[start + random.randint(0, 9) :]
        recipe.write_text(text, encoding="utf-8")
        try:
            source = recipe if is_text else wrong.recipe
            moe = partial(api.plan_moe, choices=api.MoeOptions(allow_all_same=True))
            plan = mergekit.plan(source) if case.program == "merge" else moe(source).plan
            if plan.bytes_written > MOST_BYTES or _is_slow(plan):
                return
            if is_text:
                result = command.mergekit(*arguments(wrong, recipe, out))
                if result.code:
                    command.assert_refused(result, result.code)
            else:
                run(wrong, out)
        except MergekitError as error:
            assert_told_shortly(error)
            self.counts["checks"]["mutated: refused"] += 1
        if out.is_dir() and not (out / STAGING).is_dir():
            assert not list(out.glob("*.safetensors")) or (out / "config.json").exists()

    def equal(self, case: Case, random: Random, out: Path) -> None:
        """Copies of one model give that model."""
        if self.whole(case, random, out) is not None:
            check_equal(case, out)

    def fail(self, number: int, what: str, case: Case | None, place: Path) -> None:
        """Print and keep a failure."""
        told, again = traceback.format_exc(), f"--seed {self.seed} --only {number}"
        last = told.strip().splitlines()[-1]
        self.failures.append(f"{number} {what}: {last[:300]}")
        kept = self.folder / "failures" / f"{number}-{what.replace(' ', '-')}"
        shutil.copytree(place, kept, dirs_exist_ok=True)
        (kept / "recipe.yml").write_text(yaml.safe_dump(case.recipe, sort_keys=False) if case else "")
        (kept / "report.txt").write_text(f"python tests/soak.py {again}\n{what}\n{case}\n\n{told}")
        print(f"FAILED {what}: {again}\n    {case and case.method}, {case and case.kind}: {last[:600]}", flush=True)

    def summary(self) -> str:
        """What was done and found."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        lines = [f"{self.counts['kinds'].total()} iterations, {len(self.failures)} failures, {peak} MB of memory"]
        lines += [f"{key}: {', '.join(f'{n} {c}' for n, c in some.most_common())}" for key, some in self.counts.items()]
        lines += [f"refused {count} times: {text}" for text, count in self.refused.most_common(30)]
        return "\n".join([*lines, *(f"failure: {text}" for text in self.failures)])


def _is_slow(plan: Any) -> bool:
    """Whether a method was told to take very many steps."""
    applied = [dict(getattr(output.expression, "parameters", ())) for output in plan.outputs]
    return any((values.get(key) or 0) > 2000 for values in applied for key in ("steps", "max_iter"))


def main() -> int:
    """Loop until the time is over; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where models and failures go (default: a temporary folder)")
    parser.add_argument("--only", type=int, help="repeat this one iteration")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(json.loads(given.child.read_text()))
    logging.getLogger("mergekit").setLevel(logging.CRITICAL)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(given.seed, folder.resolve())
    end = time.monotonic() + 60 * given.minutes
    for number in count() if given.only is None else [given.only]:
        if given.only is None and time.monotonic() > end:
            break
        soak.iterate(number)
    print(f"{soak.summary()}\nmodels and failures are in {folder}")
    return int(bool(soak.failures))


if __name__ == "__main__":
    sys.exit(main())
