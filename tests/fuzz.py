"""Feed mergekit with mutated hostile and sound files, and say which of its promises break.

    python tests/fuzz.py --minutes 3                     # all targets, another seed each time
    python tests/fuzz.py --minutes 3 --seed 7 --target yaml

Inputs are read in forked workers, hundreds in each: only a MergekitError may come of them, within 30 seconds and
500 MB, with nothing run and nothing written. Of each batch some also go through the whole command line. An input that
breaks a promise is saved below ``--save`` and repeated by ``--seed S --target T --number N``. The exit code is 1 if
there was any. Not a part of the test suite.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random, SystemRandom

sys.path.insert(0, str(Path(__file__).parent))

from hostile import mutate, sandbox
from hostile.stage import KINDS, cases, sound, stage, write_stage

MAX_SEED = 20_000
"""Bytes of the largest file of the corpus that is mutated: larger ones are slow to copy and no richer."""


# What is read, and how


def _checkpoint() -> None:
    from mergekit.checkpoint import open_checkpoint

    open_checkpoint(Path("x"))


def _plan() -> None:
    import mergekit

    mergekit.plan("r.yml")


def _tokenizer() -> None:
    from mergekit.vocab.maps import token_map
    from mergekit.vocab.templates import chat_template, syntax_fault
    from mergekit.vocab.union import as_text, unite
    from mergekit.vocab.vocabulary import read_vocabulary

    x, b = (read_vocabulary(Path(name), name) for name in "xb")
    template = chat_template(Path("x"))
    if template is not None:
        syntax_fault(template)
    token_map(x, b)
    for pair in ([x, b], [b, x]):
        as_text(unite(pair, [None, None])[0])


def _adapter() -> None:
    import mergekit

    mergekit.plan({"merge_method": "passthrough", "models": [{"model": "b+adapter"}]})


def _moe() -> None:
    from mergekit.api import plan_moe

    plan_moe("r.yml")


CONFIG = ("architectures", "model_type", "num_hidden_layers", "n_layer", "vocab_size", "tie_word_embeddings",
          "torch_dtype", "dtype", "quantization_config", "text_config", "rope_scaling", "rope_parameters",
          "layer_types", "rope_theta", "partial_rotary_factor", "head_dim", "sliding_window", "eos_token_id",
          "max_position_embeddings", "original_max_position_embeddings", "auto_map")  # fmt: skip
RECIPE = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "tokenizer", "tokenizer_source",
          "chat_template", "modules", "input_model_parameters", "layer_range", "filter", "value", "lora", "tokens",
          "pad_to_multiple_of", "force", "seed", "rounding", "base_quantization", "out_dtype")  # fmt: skip
MOE = ("experts", "gate_mode", "attention", "merge_method", "experts_per_token", "shared_experts", "noise_scale",
       "positive_prompts_file", "held_out_prompts", "architecture", "residual_scale")  # fmt: skip
ADAPTER = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "fan_in_fan_out",
           "modules_to_save", "target_modules", "init_lora_weights", "peft_type", "bias", "layers_pattern")  # fmt: skip
TOKENIZER = ("model", "vocab", "merges", "added_tokens", "type", "content", "id", "special", "normalizer",
             "byte_fallback", "pre_tokenizer", "decoder", "unk_token", "continuing_subword_prefix")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Kinds of files that one function reads. ``batch``: how many inputs a worker takes."""

    kinds: tuple[str, ...]
    check: Callable[[], None]
    batch: int
    keys: tuple[str, ...] = ()


TARGETS = {
    "header": Target(("header",), _checkpoint, 1000),
    "index": Target(("index",), _checkpoint, 500),
    "pickle": Target(("pickle",), _checkpoint, 500),
    "yaml": Target(("recipe", "reference"), _plan, 300, RECIPE),
    "config": Target(("config", "generation"), _plan, 150, CONFIG),
    "tokenizer": Target(("tokenizer", "tokenizer_config", "template"), _tokenizer, 500, TOKENIZER),
    "adapter": Target(("adapter", "adapter_weights"), _adapter, 200, ADAPTER),
    "moe": Target(("moe", "moe_config", "prompts"), _moe, 100, (*MOE, *CONFIG)),
}
YAML_KINDS = ("recipe", "reference", "moe")
HEADER_KINDS = ("header", "adapter_weights")


def seeds() -> dict[str, list[tuple[bytes, bool]]]:
    """Files to start from, by kind, each with whether it is sound."""
    found: dict[str, list[tuple[bytes, bool]]] = {kind: [(raw, True) for raw in sound(kind)] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases()):
            path = Path(folder, str(number))
            case.write(path)
            if path.is_file() and path.stat().st_size <= MAX_SEED:
                found[case.kind].append((path.read_bytes(), False))
        found["pickle"] += [(raw, True) for raw in _sound_pickles(Path(folder, "p"))]
    return found


def _sound_pickles(path: Path) -> Iterator[bytes]:
    import torch

    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        yield path.read_bytes()


def make(target: str, number: int, seed: int, files: dict[str, list[tuple[bytes, bool]]]) -> tuple[str, bytes]:
    """Input ``number`` of a target: its kind, and its bytes. The same for the same seed and corpus."""
    random = Random(f"{seed}:{target}:{number}")
    spec = TARGETS[target]
    kind = random.choice(spec.kinds)
    pool = [entry for entry in files[kind] if entry[1]] if random.random() < 0.5 else files[kind]
    raw, is_sound = random.choice(pool or files[kind])
    if kind in YAML_KINDS:
        return kind, mutate.yaml_file(raw, random, spec.keys, is_sound=is_sound)
    if kind in HEADER_KINDS:
        return kind, mutate.header(raw, random)
    if kind == "pickle":
        return kind, mutate.pickled(raw, random)
    if kind == "prompts":
        return kind, mutate.json_lines(raw, random)
    if kind == "template":
        return kind, mutate.damage(raw, random)
    return kind, mutate.json_file(raw, random, spec.keys)


# Running


@dataclass
class Tally:
    """What happened to one target."""

    read: int = 0
    refused: int = 0
    commands: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Fuzzer:
    """Batches of inputs, each in a worker, and the inputs that broke a promise."""

    def __init__(self, root: Path, seed: int, save: Path) -> None:
        self.root, self.seed, self.save = root, seed, save
        self.files = seeds()
        for kind in KINDS.values():
            stage(kind)  # before the forks, so that each finds it made
        self.next = Counter[str]()
        self.tally = {name: Tally() for name in TARGETS}
        self.known: dict[str, set[str]] = {name: set() for name in TARGETS}
        self._shared = mmap.mmap(-1, 4096)  # number of the input in hand, when it was begun, accepted, refused

    def batch(self, name: str, commands: int = 2) -> None:
        """Read one batch of a target in a worker, then run some of it through the command line."""
        begun, first = time.monotonic(), self.next[name]
        last = first + TARGETS[name].batch
        position = first
        while position < last:
            position = self._read(name, position, last)
        self.next[name] = last
        for number in Random(f"{self.seed}:{name}:{first}").sample(range(first, last), commands):
            self.command(name, number)
        self.tally[name].seconds += time.monotonic() - begun

    def _read(self, name: str, first: int, last: int, again: bool = False) -> int:
        """Read inputs until ``last`` or a fault; the number of the next one.

        An input that takes long gets a second chance (``again``): the machine may have been busy with something else.
        """
        reader, writer = os.pipe()
        self._shared[:32] = struct.pack("<QdQQ", first, time.monotonic(), 0, 0)
        child = os.fork()
        if child == 0:
            os.close(reader)
            self._worker(name, first, last, writer)
        os.close(writer)
        late = self._wait(reader, child)
        with open(reader, "rb") as stream:
            told = stream.read().decode("utf-8", "surrogateescape")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        number, _, read, refused = struct.unpack("<QdQQ", self._shared[:32])
        self.tally[name].read += read
        self.tally[name].refused += refused
        if late and not again:
            return self._read(name, number, number + 1, again=True)
        if late:
            self.fault(name, number, f"took more than {sandbox.SECONDS} s")
        elif told:
            self.fault(name, number, told)
        elif status:
            self.fault(name, number, f"killed its process ({status})")
        else:
            return last
        return number + 1

    def _wait(self, reader: int, child: int) -> bool:
        """Wait for a worker to end or to tell something; True if it had to be killed because an input takes long."""
        while not select.select([reader], [], [], 1.0)[0]:
            _, since, _, _ = struct.unpack("<QdQQ", self._shared[:32])
            if time.monotonic() - since > sandbox.SECONDS:
                os.kill(child, signal.SIGKILL)
                return True
        return False

    def _worker(self, name: str, first: int, last: int, writer: int) -> None:
        """In a child: read inputs one after the other; end at the first fault, and tell it. Never returns."""
        from mergekit.errors import MergekitError

        told = ""
        try:
            root = self._stage("worker")
            self._quiet()
            sandbox.limit(3600)
            events: list[str] = []
            sandbox.watch(root, events.append)
            spec, kind_there, read, refused = TARGETS[name], None, 0, 0
            for number in range(first, last):
                kind, raw = make(name, number, self.seed, self.files)
                if kind != kind_there:
                    os.chdir(root)
                    shutil.rmtree(root / "work", ignore_errors=True)
                    write_stage(root / "work", KINDS[kind])
                    os.chdir(root / "work")
                    kind_there = kind
                Path(KINDS[kind].place).write_bytes(raw)
                before = sandbox.resident()
                events.clear()
                struct.pack_into("<QdQQ", self._shared, 0, number, time.monotonic(), read, refused)
                try:
                    spec.check()
                    read += 1
                except MergekitError as error:
                    read, refused = read + 1, refused + 1
                    if len(str(error).splitlines()) > 5:
                        told = f"a message of many lines: {type(error).__name__}"
                except OSError as error:  # the command line says what the system said
                    read, refused = read + 1, refused + 1
                    told = "" if error.strerror else f"OSError: {error}"
                except BaseException as error:
                    told = self._described(error)
                if events:
                    told = f"did what it never may: {events[0]}"
                elif not told and sandbox.grown(before) > sandbox.MEMORY:
                    told = f"took {sandbox.grown(before) >> 20} MB"
                struct.pack_into("<QdQQ", self._shared, 0, number, time.monotonic(), read, refused)
                if told:
                    break
        except BaseException as error:
            told = f"the worker itself failed: {self._described(error)}"
        finally:
            os.write(writer, told.encode("utf-8", "backslashreplace")[:4000])
            os._exit(0)

    def _stage(self, name: str) -> Path:
        root = self.root / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        for part in ("home", "tmp"):
            (root / part).mkdir()
        return root

    def _quiet(self) -> None:
        """No output: jinja, torch and others may have things to say."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)

    def _described(self, error: BaseException) -> str:
        """Type, text and place of an exception; the first line tells one fault from another."""
        import traceback

        frames = [f for f in traceback.extract_tb(error.__traceback__) if "mergekit" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}\n{error!s:.500}"

    def command(self, name: str, number: int) -> None:
        """Run one input through the whole command line."""
        kind, raw = make(name, number, self.seed, self.files)
        root = self._stage("command")
        write_stage(root / "work", KINDS[kind])
        (root / "work" / KINDS[kind].place).write_bytes(raw)
        words = [word for word in KINDS[kind].command if word != "--dry-run"]
        outcome = sandbox.run(words, root)
        if outcome.timed_out:  # a second chance, as above
            outcome = sandbox.run(words, root)
        self.tally[name].commands += 1
        faults = sandbox.broken(outcome)
        if faults:
            self.fault(name, number, "command line: " + "\n".join(faults))

    def fault(self, name: str, number: int, text: str) -> None:
        """Note a broken promise, once, and save its input."""
        first = text.splitlines()[0][:160]
        if first in self.known[name]:
            return
        self.known[name].add(first)
        kind, raw = make(name, number, self.seed, self.files)
        folder = self.save / f"{name}-{self.seed}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(KINDS[kind].place).name).write_bytes(raw)
        again = f"python tests/fuzz.py --seed {self.seed} --target {name} --number {number}"
        record = {"kind": kind, "place": KINDS[kind].place, "fault": text, "again": again, "digest": self.digest()}
        (folder / "fault.json").write_text(json.dumps(record, indent=1))
        self.tally[name].failures.append(f"{first}\n    {folder}: {kind}, {len(raw)} bytes\n    {again}")
        print(f"FAULT {name} {number}: {text[:1500]}", flush=True)

    def digest(self) -> str:
        """A number that tells one corpus from another: a seed means the same input only with the same corpus."""
        total = 0
        for kind in sorted(self.files):
            for raw, _ in self.files[kind]:
                total = zlib.crc32(raw, total)
        return f"{total:08x}"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="repeats a run (default: another one each time)")
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--number", type=int, help="only this input of one target")
    folder = Path(tempfile.gettempdir(), "mergekit-fuzz-failures")
    parser.add_argument("--save", type=Path, default=folder, help=f"where bad inputs go (default: {folder})")
    return parser.parse_args()


def main() -> int:
    """Fuzz until the time is over; the exit code."""
    options = arguments()
    names = list(TARGETS) if options.target == "all" else [options.target]
    seed = SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="mergekit-fuzz-") as folder:
        os.environ.update(sandbox.environment(Path(folder)))
        tempfile.tempdir = None
        sandbox.preload()
        fuzzer = Fuzzer(Path(folder), seed, options.save)
        print(f"seed {seed}, corpus {fuzzer.digest()}", flush=True)
        if options.number is not None:
            fuzzer._read(names[0], options.number, options.number + 1)
            fuzzer.command(names[0], options.number)
        else:
            end = time.monotonic() + 60 * options.minutes
            while time.monotonic() < end:
                fuzzer.batch(min(names, key=lambda name: fuzzer.tally[name].seconds))
    return report(fuzzer)


def report(fuzzer: Fuzzer) -> int:
    """Print the runs and faults of each target; the exit code."""
    print(f"{'target':10} {'inputs':>8} {'refused':>8} {'commands':>8} {'per second':>10} {'faults':>6}")
    for name, tally in fuzzer.tally.items():
        if tally.read or tally.failures:
            rate = tally.read / tally.seconds if tally.seconds else 0
            counts = f"{tally.read:8} {tally.refused:8} {tally.commands:8} {rate:10.0f} {len(tally.failures):6}"
            print(f"{name:10} {counts}")
    failures = [failure for tally in fuzzer.tally.values() for failure in tally.failures]
    for failure in failures:
        print(failure)
    print(f"seed {fuzzer.seed}: {len(failures)} faults" if failures else f"seed {fuzzer.seed}: no faults")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
