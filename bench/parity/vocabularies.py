"""Merges of models whose tokenizers differ, through this package and through arcee mergekit 0.1.5, row for row.

    python bench/parity/vocabularies.py --other-python ../arcee/bin/python

Tiny Llamas with tokenizers of each kind, merged by ``linear``; the other tool lives in an environment of its own (see
``run.py``). Rows are compared by their token, since 0.1.5 gives out other ids in a union. What differs on purpose is
counted by rule, and anything else makes the exit status 1:

* V1: a token that no model has a row for gets the mean of all rows here, zeros there;
* V2: rows that belong to no token (padding) are kept here, dropped there;
* V3: an id at or beyond a model's embeddings counts as missing in that model here; there the token is taken out of the
  base's tokenizer, or the merge fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_models import HIDDEN, shapes
from tokenizers import Tokenizer

import mergekit

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent.parent / "tests"))

from tokenizer_files import KINDS, TEXTS, train, write_tokenizer  # noqa: E402 (from the tests)

NAMES = ("model.embed_tokens.weight", "lm_head.weight")
TOLERANCE = 2e-6
NEW = {"kind": "model_token", "model": "{b}", "token": "<|b|>"}
TOKENS: dict[str, dict[str, Any]] = {
    "none": {},
    "forced": {"<|end|>": {"source": "{b}", "force": True}},
    "owner": {"<|b|>": {"source": "{b}"}},
    "new": {"<new>": {"source": NEW}},
    "new by id": {"<new>": {"source": {"kind": "model_token", "model": "{a}", "token_id": 9}}},
    "zero": {"<|b|>": {"source": {"kind": "zero"}}},
}


def write(folder: Path, tokenizer: Tokenizer, seed: int, added: list[str], rows: int | None = None) -> None:
    """A model whose embeddings have a row for each token, or ``rows``."""
    ids = write_tokenizer(folder, tokenizer, added)
    count = rows or max(ids.values()) + 1
    random = np.random.default_rng(seed)
    tensors = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes(count).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": count, "hidden_size": HIDDEN,
              "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
              "torch_dtype": "float32", "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def cases(work: Path) -> list[dict[str, Any]]:
    """Recipes over the models of each kind."""
    found = []
    for kind in KINDS:
        root = work / kind
        first, other = train(kind, TEXTS[:3]), train(kind, TEXTS[1:])
        size = first.get_vocab_size()
        write(root / "a", first, 1, ["<|end|>"])
        write(root / "b", first, 2, ["<|b|>", "<|end|>"])
        write(root / "c", other, 3, ["<|b|>"])
        write(root / "padded", first, 4, ["<|end|>"], rows=size + 30)
        write(root / "short", first, 5, ["<|end|>"], rows=size)
        for models, source, tokens, multiple in [
            *((m, s, "none", None) for m in ("ab", "abc", "ca") for s in ("base", "union", "{b}")),
            *(("ab", s, t, None) for s in ("base", "union") for t in TOKENS if t != "none"),
            ("ab", "union", "none", 64), ("abc", "base", "none", 32),
            (("padded", "b"), "base", "none", None), (("padded", "b"), "union", "none", None),
            (("b", "short"), "union", "none", None), (("short", "b"), "base", "none", None),
        ]:  # fmt: skip
            if source == "{b}" and "b" not in models:
                source = "{c}"
            entry: dict[str, Any] = {"source": source, "tokens": TOKENS[tokens]}
            text = json.dumps({**entry, **({"pad_to_multiple_of": multiple} if multiple else {})})
            for name in ("a", "b", "c"):
                text = text.replace(f"{{{name}}}", str(root / name))
            listed = [{"model": str(root / m), "parameters": {"weight": 1.0 + i}} for i, m in enumerate(models)]
            recipe = {
                "merge_method": "linear",
                "base_model": str(root / models[0]),
                "models": listed,
                "parameters": {"normalize": False},
                "tokenizer": json.loads(text),
            }
            about = f"{kind}: {' '.join(models)}, {Path(source).name}, {tokens}, {multiple or ''}"
            found.append({"about": about, "models": [root / m for m in models], "recipe": recipe})
    return found


def compare(case: dict[str, Any], ours: Path, theirs: Path) -> Counter[str]:
    """How many rows are equal, and how many differ by which rule ("" for none)."""
    ids = [Tokenizer.from_file(str(f / "tokenizer.json")).get_vocab(with_added_tokens=True) for f in (ours, theirs)]
    owned = []
    for folder in case["models"]:
        vocab = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
        rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        owned.append({token: number < rows for token, number in vocab.items()})
    told: Counter[str] = Counter()
    mine, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    for name in mine:
        if name not in NAMES:
            told["equal" if np.allclose(mine[name], other[name], atol=TOLERANCE) else "other tensor"] += 1
            continue
        told["V2"] += max(0, len(mine[name]) - len(other[name]))
        for token, place in ids[1].items():
            beyond = any(has.get(token) is False for has in owned)
            if token not in ids[0] or np.abs(mine[name][ids[0][token]] - other[name][place]).max() > TOLERANCE:
                known = any(has.get(token) for has in owned)
                told["V3" if beyond else "" if known or token not in ids[0] else "V1"] += 1
            else:
                told["equal"] += 1
        for token in set(ids[0]) - set(ids[1]):
            told["V3" if any(has.get(token) is False for has in owned) else "missing there"] += 1
    return told


def main() -> int:
    """Run all recipes in both tools and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--other-python", required=True)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="mergekit-vocabularies-"))
    made = cases(work)
    jobs = [{"recipe": c["recipe"], "out": str(work / "theirs" / str(i))} for i, c in enumerate(made)]
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [
        given.other_python,
        str(HERE / "other_vocabularies.py"),
        str(work / "jobs.json"),
        str(work / "told.json"),
    ]
    subprocess.run(command, check=True, env=environment, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    faults = json.loads((work / "told.json").read_text())
    total, wrong = Counter[str](), 0
    for i, case in enumerate(made):
        try:
            mergekit.run_merge(case["recipe"], work / "ours" / str(i), quiet=True)
            fault = None
        except mergekit.MergekitError as error:
            fault = str(error)
        if fault or faults[i]:
            print(f"{case['about']:50} ours: {fault or 'merged'}  0.1.5: {faults[i] or 'merged'}")
            total["refused by " + ("both" if fault and faults[i] else "ours" if fault else "0.1.5")] += 1
            continue
        told = compare(case, work / "ours" / str(i), work / "theirs" / str(i))
        total += told
        unexplained = {key: n for key, n in told.items() if key in ("", "other tensor", "missing there")}
        wrong += bool(unexplained)
        shown = ", ".join(f"{key or 'unexplained'} {n}" for key, n in sorted(told.items()))
        print(f"{case['about']:50} {shown}")
    print(f"{len(made)} recipes: {dict(total)}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
