"""What a union of two vocabularies costs: bits per character of tiny real models, before and after merging.

    python bench/vocabulary_quality.py      # trains one model for some minutes, writes the table of docs/tokenizers.md

The bundled ``code`` expert is merged with a prose expert that has a tokenizer of its own, trained on prose only. Its
embeddings start as means of the base's rows for the pieces of each token, then the whole model is trained on. Bits per
character compare across tokenizers, perplexities per token don't.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
sys.path.insert(0, str(MODELS))

from corpus import read_corpora  # noqa: E402
from evaluate import DOCUMENT_END, DOMAINS, HELD_OUT, text_loss  # noqa: E402
from train import encode, expert_schedule, load, save, train, train_tokenizer  # noqa: E402


def own_tokenizer(corpora: Any) -> Tokenizer:
    """A byte-level BPE like the bundled one, that has only seen prose."""
    prose = corpora["prose"]
    return train_tokenizer({"code": prose, "prose": prose, "calc": corpora["calc"]})


def make_expert(folder: Path, corpora: Any) -> None:
    """The prose expert with a tokenizer of its own."""
    torch.set_num_threads(2)
    known, tokenizer = Tokenizer.from_file(str(MODELS / "base" / "tokenizer.json")), own_tokenizer(corpora)
    model = load(MODELS / "base")
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            before, rows = matrix.clone(), []
            for number in range(tokenizer.get_vocab_size()):
                text = tokenizer.decode([number], skip_special_tokens=False)
                pieces = known.encode(text, add_special_tokens=False).ids
                rows.append(before[pieces].mean(0) if pieces else before.mean(0))
            matrix.copy_(torch.stack(rows))
    train(model, tokenizer, encode(tokenizer, corpora), expert_schedule("prose"), "prose-own")
    save(model, tokenizer, folder)


def bits(folder: Path) -> list[float]:
    """Bits per character of the held-out texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    found = []
    for domain in DOMAINS:
        text = (HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8")
        documents = text.split(DOCUMENT_END)
        tokens = sum(len(tokenizer.encode(d, add_special_tokens=False, verbose=False)) for d in documents)
        loss, _ = text_loss(model, tokenizer, text)
        found.append(loss / math.log(2) * tokens / sum(map(len, documents)))
    return found


def main() -> None:
    """Train, merge, measure, and write the table into the page."""
    work = Path(tempfile.mkdtemp(prefix="mergekit-vocabulary-"))
    code, own = MODELS / "code", work / "prose-own"
    make_expert(own, read_corpora())

    def merged(name: str, weights: tuple[float, float], source: str | None) -> Path:
        recipe: dict[str, Any] = {
            "merge_method": "linear",
            "models": [
                {"model": str(m), "parameters": {"weight": w}} for m, w in zip((code, own), weights, strict=True)
            ],
        }
        if source:
            recipe["tokenizer_source"] = source
        return mergekit.run_merge(recipe, work / name, quiet=True)

    rows = {
        "`code`, its own tokenizer": code,
        "`code` in the union's vocabulary": merged("code-union", (1, 0), "union"),
        "prose expert, its own tokenizer": own,
        "prose expert in the union's vocabulary": merged("own-union", (0, 1), "union"),
        "both, averaged, `tokenizer_source: union`": merged("union", (1, 1), "union"),
        "both, averaged, `tokenizer_source: base`": merged("base", (1, 1), "base"),
        "both, averaged row by row (no tokenizer configured)": merged("rows", (1, 1), None),
    }
    lines = ["| | " + " | ".join(DOMAINS) + " |", "|---|" + "---|" * len(DOMAINS)]
    for name, folder in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{b:.3f}" for b in bits(folder)) + " |")
        print(lines[-1], flush=True)
    page = ROOT / "docs" / "tokenizers.md"
    head, _, rest = page.read_text().partition("<!-- table -->\n")
    _, _, tail = rest.partition("<!-- /table -->")
    page.write_text(f"{head}<!-- table -->\n" + "\n".join(lines) + f"\n<!-- /table -->{tail}")


if __name__ == "__main__":
    main()
