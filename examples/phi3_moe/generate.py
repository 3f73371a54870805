"""Load a mixture and let it continue some texts.

python examples/phi3_moe/generate.py phi3-moe-out "def main(" "12+30="
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print each prompt with what the model makes of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the mixture")
    parser.add_argument("prompts", nargs="+", help="texts to continue")
    parser.add_argument("--tokens", type=int, default=24, help="how many tokens to write")
    options = parser.parse_args()

    # The phi3moe form brings its own code, which lies in the folder that we have just made ourselves.
    has_code = "auto_map" in json.loads((options.model / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left", trust_remote_code=has_code)
    model = AutoModelForCausalLM.from_pretrained(options.model, torch_dtype=torch.float32, trust_remote_code=has_code)

    inputs = tokenizer(options.prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
    for tokens in written:
        print(repr(tokenizer.decode(tokens, skip_special_tokens=True)))


if __name__ == "__main__":
    main()
