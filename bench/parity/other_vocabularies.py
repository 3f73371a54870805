"""Run recipes with tokenizers in the other tool. Started by ``vocabularies.py`` with that environment's interpreter."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    """Usage: other_vocabularies.py JOBS.json TOLD.json; a fault for each job, or null."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    options = MergeOptions(copy_tokenizer=True, write_model_card=False, quiet=True)
    told: list[str | None] = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run_merge(MergeConfiguration.model_validate(job["recipe"]), job["out"], options)
            told.append(None)
        except Exception as fault:
            told.append(f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:200])
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
