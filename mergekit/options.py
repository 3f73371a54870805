"""Every option of a merge, declared once: the command line, its help and ``MergeOptions`` come from this table.

The names are those of arcee mergekit. Options that it needs and we don't are accepted and say so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.errors import UsageError

if TYPE_CHECKING:
    from mergekit.api import RunOptions

__all__ = ["OPTIONS", "MergeOptions", "Option", "add_merge_options", "parse_kmb", "shaping_options"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: ``field`` of MergeOptions, ``flags`` for click, its default and help.

    ``unused`` says why it changes nothing here, for options that are accepted for the sake of old commands. ``shapes``
    is the field of RunOptions by which it changes what is written, if it does.
    """

    field: str
    flags: tuple[str, ...]
    default: Any
    help: str
    section: str
    kind: Any = None
    unused: str | None = None
    shapes: str | None = None


def parse_kmb(text: str | int) -> int:
    """A size in bytes: a whole number, with k, m or b for 10^3, 10^6 or 10^9. ``GB``, ``MB`` and decimals work too.

    >>> parse_kmb("5B"), parse_kmb("1.5gb")
    (5000000000, 1500000000)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(k|kb|m|mb|b|g|gb)?\s*", str(text).lower())
    if match is None:
        raise UsageError(f"'{text}' is not a size; write bytes, or a number with k, m or b: 500m, 5B")
    factor = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "": 1}[(match[2] or "")[:1]]
    return int(float(match[1]) * factor)


def _flag(
    field: str, default: bool, help: str, section: str, *, unused: str | None = None, shapes: str | None = None
) -> Option:
    name = field.replace("_", "-")
    return Option(field, (f"--{name}/--no-{name}",), default, help, section, bool, unused, shapes)


_STREAMS = "tensors are always read lazily, block by block"
OPTIONS: tuple[Option, ...] = (
    _flag(
        "copy_tokenizer",
        True,
        "Copy the tokenizer of the base (or first) model.",
        "Output",
        shapes="copy_tokenizer",
    ),
    Option(
        "out_shard_size",
        ("--out-shard-size",),
        "5B",
        "Most bytes of a shard: 500m, 5B (0: one file).",
        "Output",
        str,
        shapes="shard_size",
    ),
    _flag("write_model_card", True, "Write README.md, a copy of the recipe, and merge_manifest.json.", "Output"),
    _flag("stats", True, "Write merge_stats.json: figures about each merged tensor.", "Output", shapes="statistics"),
    _flag(
        "report",
        False,
        "Write merge_report.html: recipe, parameters and figures to look at.",
        "Output",
        shapes="report",
    ),
    _flag(
        "safe_serialization",
        True,
        "Write safetensors.",
        "Output",
        unused="safetensors are the only form there is, and --no-safe-serialization is refused",
    ),
    _flag("overwrite", False, "Replace a model that the output folder holds.", "Output"),
    _flag("restart", False, "Throw away unfinished work in the output folder.", "Output"),
    Option(
        "num_threads", ("-j", "--num-threads"), None, "Threads (default: one for each processor).", "Performance", int
    ),
    Option(
        "max_memory",
        ("--max-memory",),
        None,
        "Most memory to take: 300MB, 2GB (default: the machine's). Threads are left out as need be.",
        "Performance",
        str,
    ),
    Option(
        "device",
        ("--device",),
        None,
        "Device for the arithmetic: cpu, cuda, cuda:1, mps, auto.",
        "Performance",
        str,
        shapes="device",
    ),
    _flag("cuda", False, "Compute on the first CUDA device.", "Performance"),
    _flag("gpu_rich", False, "The same as --cuda.", "Performance"),
    _flag(
        "multi_gpu", False, "Use several GPUs.", "Performance", unused="one device computes; the disk is the bottleneck"
    ),
    _flag(
        "low_cpu_memory",
        False,
        "Keep results on the device.",
        "Performance",
        unused="a merge needs little memory anyway",
    ),
    _flag("read_to_gpu", False, "Read straight to the device.", "Performance", unused=_STREAMS),
    _flag(
        "lazy_unpickle",
        False,
        "Read pickled checkpoints lazily.",
        "Performance",
        unused="pickles are memory-mapped anyway",
    ),
    _flag(
        "async_write",
        False,
        "Write in the background.",
        "Performance",
        unused="results are written as they are computed",
    ),
    Option("write_threads", ("--write-threads",), 1, "Writing threads.", "Performance", int, "every worker writes"),
    _flag(
        "clone_tensors",
        False,
        "Clone tensors before saving.",
        "Performance",
        unused="nothing is shared between tensors",
    ),
    Option("transformers_cache", ("--transformers-cache",), None, "Cache folder for hub downloads.", "Storage", str),
    Option(
        "lora_merge_cache",
        ("--lora-merge-cache",),
        None,
        "Cache folder for merged adapters.",
        "Storage",
        str,
        "no copies of merged adapters are kept",
    ),
    Option(
        "lora_merge_dtype",
        ("--lora-merge-dtype",),
        None,
        "Element type for merging adapters.",
        "Storage",
        str,
        "adapters are computed in float32",
    ),
    Option(
        "random_seed",
        ("--random-seed",),
        None,
        "Seed of random methods (else the recipe's, else 0).",
        "Result",
        int,
        shapes="seed",
    ),
    Option(
        "method_file",
        ("--method-file",),
        (),
        "Python file that defines merge methods; it is run. May be repeated.",
        "Result",
        Path,
        shapes="method_files",
    ),
    _flag(
        "allow_nonfinite",
        False,
        "Go on when a computed tensor holds NaN or infinity.",
        "Dangerous",
        shapes="allow_nonfinite",
    ),
    _flag("allow_crimes", False, "Merge models of different architectures.", "Dangerous", shapes="allow_crimes"),
    _flag(
        "unsafe_truncate_embeddings",
        False,
        "Cut embeddings of different sizes to the smallest.",
        "Dangerous",
        shapes="unsafe_truncate_embeddings",
    ),
    _flag("trust_remote_code", False, "Run a tokenizer's own code (only mixtures use one).", "Dangerous"),
    Option("verbosity", ("-v", "--verbose"), 0, "Print the plan before the merge starts.", "Messages", "count"),
    _flag("quiet", False, "No progress and no notes; warnings and errors only.", "Messages"),
)


def shaping_options(options: RunOptions) -> list[str]:
    """What to type for the options that change what is written, where they are not the defaults.

    A method's file by an absolute path goes by its name: the words are for other people's eyes.
    """
    from mergekit.api import RunOptions

    defaults, words = RunOptions(), list[str]()
    for option in OPTIONS:
        value = getattr(options, option.shapes) if option.shapes else None
        if option.shapes is None or value == getattr(defaults, option.shapes):
            continue
        on, _, off = option.flags[-1].partition("/")
        if option.kind is bool:
            words.append(on if value else off)
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += [on, shlex.quote(one.name if isinstance(one, Path) and one.is_absolute() else str(one))]
    return words


class _MergeOptionsBase:
    """The behaviour of MergeOptions; its fields come from the table."""

    __slots__ = ()

    def apply_global_options(self) -> None:
        """Nothing is global here; kept for scripts that call it."""

    def given_without_effect(self) -> list[str]:
        """A note for each option that was changed from its default and changes nothing."""
        return [
            f"{o.flags[-1].split('/')[0]} changes nothing: {o.unused}"
            for o in OPTIONS
            if o.unused and getattr(self, o.field) != o.default
        ]

    def run_options(self) -> RunOptions:
        """The same, as the options of ``mergekit.run_merge``. UsageError for what can't be done."""
        from mergekit.api import RunOptions

        get: Callable[[str], Any] = lambda name: getattr(self, name)  # noqa: E731
        if not get("safe_serialization"):
            raise UsageError(
                "--no-safe-serialization: only safetensors are written; if you need a pickle, load the result with "
                "safetensors.torch.load_file() and torch.save() it"
            )
        threads = get("num_threads")
        if threads is not None and threads < 1:
            raise UsageError(f"--num-threads {threads}: give at least 1")
        seed = get("random_seed")
        if seed is not None and not 0 <= seed < 1 << 63:
            raise UsageError(f"--random-seed {seed}: give a whole number from 0 to 2^63 - 1")
        cache = get("transformers_cache")
        return RunOptions(
            shard_size=parse_kmb(get("out_shard_size")),
            threads=threads,
            max_memory=None if get("max_memory") is None else parse_kmb(get("max_memory")),
            device=resolve_device(get("device"), cuda=get("cuda") or get("gpu_rich")),
            seed=seed,
            copy_tokenizer=get("copy_tokenizer"),
            write_model_card=get("write_model_card"),
            overwrite=get("overwrite"),
            restart=get("restart"),
            allow_crimes=get("allow_crimes"),
            allow_nonfinite=get("allow_nonfinite"),
            unsafe_truncate_embeddings=get("unsafe_truncate_embeddings"),
            cache_dir=Path(cache) if cache else None,
            statistics=get("stats"),
            report=get("report"),
            method_files=tuple(Path(path) for path in get("method_file")),
            quiet=get("quiet"),
        )


MergeOptions: Any = make_dataclass(
    "MergeOptions",
    [(o.field, Any, o.default) for o in OPTIONS],
    bases=(_MergeOptionsBase,),
    frozen=True,
    kw_only=True,
    namespace={"__doc__": "Options of a merge under the names of arcee mergekit; see the table in mergekit.options."},
)


def resolve_device(name: str | None, *, cuda: bool) -> str:
    """The device to compute on; UsageError if torch has no such device here."""
    name = name or ("cuda" if cuda else "cpu")
    if name == "cpu":
        return name
    import torch

    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    found = accelerator.type if accelerator is not None and torch.accelerator.is_available() else None
    if name == "auto":
        return found or "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"'{name}' is not a device; write cpu, cuda, cuda:0, mps or auto") from None
    if device.type == "cpu":
        return "cpu"
    if device.type != found:
        raise UsageError(
            f"there is no {device.type} device on this machine (torch finds {found or 'none'}); use --device cpu"
        )
    return name


def add_merge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command every option of the table; it receives them as ``merge_options``."""
    import functools

    import click

    @functools.wraps(command)
    def collected(*args: Any, **kwargs: Any) -> Any:
        values = {f.name: kwargs.pop(f.name) for f in fields(MergeOptions)}
        return command(*args, merge_options=MergeOptions(**values), **kwargs)

    for option in reversed(OPTIONS):
        settings: dict[str, Any] = {"default": option.default, "help": option.help}
        if option.unused:
            settings["help"] += f" (Accepted, changes nothing: {option.unused}.)"
        if option.kind == "count":
            settings["count"] = True
        elif option.kind is bool:
            settings["show_default"] = False
        elif option.default == ():
            settings.update(multiple=True, type=option.kind)
        else:
            settings["type"] = option.kind
        collected = click.option(*option.flags, option.field, **settings)(collected)
    return collected
