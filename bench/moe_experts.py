"""Experts for the mixture benchmark, trained from the bundled base: far from it, or in their MLPs only.

    python bench/moe_experts.py                        # both sets, about half an hour on one core
    python bench/moe_experts.py --only strong/calc     # this one

A folder that was trained with the schedule below is left as it is. The gentle set needs no training: it is
`models/code`, `models/prose` and `models/calc`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))

from corpus import read_corpora  # noqa: E402
from evaluate import DOMAINS, evaluate, format_table  # noqa: E402
from train import MODELS, Schedule, delta_norm, encode, load, save, train  # noqa: E402

CACHE = ROOT / "bench" / "cache"
BASE = MODELS / "base"
SETS = ("gentle", "strong", "mlp")
NUM_THREADS = 1  # part of the result: another number sums in another order


def schedule(kind: str, domain: str) -> Schedule:
    """How an expert of the strong or the MLP set is trained: on its own domain alone, which forgets the others."""
    mixture = {other: float(other == domain) for other in DOMAINS}
    rate = {"strong": 4e-3, "mlp": 6e-3}[kind]
    return Schedule(300, rate, 0.0, mixture, warm_up=20)


def expert_folders(kind: str, cache: Path = CACHE) -> dict[str, Path]:
    """Domain -> checkpoint folder of one of `SETS`."""
    return {domain: MODELS / domain if kind == "gentle" else cache / kind / domain for domain in DOMAINS}


def train_experts(names: Iterable[str], cache: Path = CACHE) -> None:
    """Train the experts `{set}/{domain}` that are missing or were trained with another schedule."""
    missing = [name for name in names if not _is_trained(name, cache)]
    if not missing:
        return
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    streams = encode(tokenizer, read_corpora())
    for name in missing:
        train_expert(name, tokenizer, streams, cache)


def train_expert(name: str, tokenizer: Tokenizer, streams: Mapping[str, np.ndarray], cache: Path) -> None:
    """Train one expert and save it; the mark of a finished run is written last."""
    kind, domain = name.split("/")
    model = load(BASE)
    if kind == "mlp":
        for tensor, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in tensor)
    train(model, tokenizer, streams, schedule(kind, domain), name)
    save(model, tokenizer, cache / name)
    (cache / name / "schedule.json").write_text(_mark(name), encoding="utf-8")


def _is_trained(name: str, cache: Path) -> bool:
    mark = cache / name / "schedule.json"
    return mark.is_file() and mark.read_text(encoding="utf-8") == _mark(name)


def _mark(name: str) -> str:
    return json.dumps(dataclasses.asdict(schedule(*name.split("/"))), indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line: train what is missing, then show what the experts can do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [f"{kind}/{domain}" for kind in SETS if kind != "gentle" for domain in DOMAINS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SET/DOMAIN")
    parser.add_argument("--out", type=Path, default=CACHE, help="folder of the sets")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    train_experts(options.only, options.out)
    print(format_table({name: evaluate(options.out / name) for name in options.only}))
    for name in options.only:
        print(f"{name}: delta norm {delta_norm(options.out / name, BASE):.3f} of the base's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
