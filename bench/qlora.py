"""A QLoRA adapter, trained on a tiny base in 4 bits, then baked: with the base as it was in training, and without.

    python bench/qlora.py                # trains for a minute or two, writes the table into docs/adapters.md

Needs peft and bitsandbytes beside mergekit. bitsandbytes quantises the linear layers of `models/base`, as loaded in
bfloat16, and unpacks them again; over these numbers PEFT trains an adapter (rank 8 on every linear layer) on
arithmetic, in float32. That model is the reference: errors are of the logits of held-out text, relative to its.
(Packed layers would compute the same, and unpack their weights in every step, in bfloat16 at a tenth of the speed.)
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))

from corpus import generate_calc  # noqa: E402
from evaluate import DOMAINS, HELD_OUT, WINDOW, text_loss  # noqa: E402

BASE = ROOT / "models" / "base"
PAGE = ROOT / "docs" / "adapters.md"
STEPS, BATCH, RATE = 200, 8, 3e-3
SCHEMES = {"nf4": False, "nf4-double": True}


def load(folder: Path) -> Any:
    """A model of a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def quantised(scheme: str) -> Any:
    """The base as training meets it: the numbers that bitsandbytes unpacks, in float32."""
    model = load(BASE)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data.bfloat16()
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=SCHEMES[scheme])
            module.weight.data = dequantize_4bit(packed, state).float()
    return model


def train(folder: Path, scheme: str) -> None:
    """Train an adapter on the quantised base, and save it."""
    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(quantised(scheme), settings)
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    text = "".join(document.text for document in generate_calc(60_000).train[:8_000])
    stream = np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, betas=(0.9, 0.95))
    began = time.monotonic()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        starts = random.integers(0, len(stream) - WINDOW, BATCH)
        tokens = torch.from_numpy(np.stack([stream[at : at + WINDOW] for at in starts]))
        tokens[:, 0] = tokenizer.bos_token_id
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"{scheme} step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.save_pretrained(str(folder))


def windows() -> torch.Tensor:
    """Held-out text of every domain, [windows, WINDOW]."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    rows = []
    for domain in DOMAINS:
        text = (HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        rows += [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW, WINDOW)][:12]
    return torch.tensor(rows)


def scores(model: Any, tokens: torch.Tensor, wanted: torch.Tensor | None) -> tuple[str, torch.Tensor]:
    """A row of the table without its name: error of the logits, agreement, divergence, perplexity."""
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits.double()
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    text = (HELD_OUT / "calc.txt").read_text(encoding="utf-8")
    perplexity = math.exp(text_loss(model, tokenizer, text)[0])
    if wanted is None:
        return f"| 0 | 100 | 0 | {perplexity:.4f} |", logits
    error = float((logits - wanted).norm() / wanted.norm())
    same = 100 * float((logits.argmax(-1) == wanted.argmax(-1)).double().mean())
    log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return f"| {error:.1e} | {same:.1f} | {divergence:.1e} | {perplexity:.4f} |", logits


def table(folder: Path, scheme: str) -> list[str]:
    """Train, bake in several ways, and compare."""
    train(folder / "adapter", scheme)
    tokens = windows()
    reference = PeftModel.from_pretrained(quantised(scheme), str(folder / "adapter"))
    row, wanted = scores(reference.eval(), tokens, None)
    lines = [f"| quantised base + adapter ({scheme}): the reference {row}"]
    model = {"model": {"model": str(BASE), "lora": str(folder / "adapter")}}
    for asked, dtype in ((scheme, "float32"), (scheme, "float16"), (scheme, "bfloat16"), ("none", "float16")):
        recipe = {"merge_method": "passthrough", "models": [model], "base_quantization": asked, "dtype": dtype}
        out = mergekit.run_merge(recipe, folder / f"{asked}-{dtype}")
        name = f"`base_quantization: {asked}`, stored as {dtype}" if asked != "none" else f"naive (`none`), {dtype}"
        lines.append(f"| {name} {scores(load(out).eval(), tokens, wanted)[0]}")
    return lines


def main() -> None:
    """Print the table, and put it into the page."""
    warnings.simplefilter("ignore")
    lines = ["| model | relative error of logits | same first choice, % | KL divergence | perplexity (arithmetic) |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            lines += table(Path(folder), scheme)
    print("\n".join(lines))
    if PAGE.exists():
        before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- bench/qlora.py -->\n")
        after = rest.partition("<!-- end -->")[2]
        PAGE.write_text(f"{before}<!-- bench/qlora.py -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}", "utf-8")


if __name__ == "__main__":
    main()
