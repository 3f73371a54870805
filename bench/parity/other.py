"""Run a batch of recipes in the other tool. Started by ``run.py`` with the interpreter of its environment.

Usage: other.py JOBS.json RESULTS.json. A job is ``{"id", "recipe", "out", "draws"}``; ``draws`` names a file of random
words (uint32, ``<output tensor>|<place of the fine-tune>``) that replace torch's draws: an entry is kept if its word
is below 2^32 times its probability, and entries of equal magnitude in a row share the mean of their probabilities. A
result is ``{"id", "error", "config", "shared"}``; ``shared`` counts the entries whose probability that changed.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import generalized_task_arithmetic
from mergekit.options import MergeOptions


class Draws:
    """Stands in for ``torch.bernoulli``: knows which tensor and which fine-tune is at work, and looks its words up."""

    def __init__(self) -> None:
        self.words: Any = None
        self.tensor = ""
        self.place = -1
        self.delta = torch.empty(0)
        self.shared = 0
        self.real = torch.bernoulli
        execute, sparsify = ExecuteMergeMethodTask.execute, generalized_task_arithmetic.sparsify

        def execute_tensor(task: Any, *args: Any, **kwargs: Any) -> Any:
            self.tensor, self.place = task.output_weight.name, -1
            return execute(task, *args, **kwargs)

        def sparsify_model(delta: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.place += 1
            self.delta = delta
            return sparsify(delta, *args, **kwargs)

        ExecuteMergeMethodTask.execute = execute_tensor
        generalized_task_arithmetic.sparsify = sparsify_model
        torch.bernoulli = self

    def __call__(self, chance: torch.Tensor) -> torch.Tensor:
        """A mask in the type of ``chance``."""
        if self.words is None:
            return self.real(chance)
        words = torch.from_numpy(self.words[f"{self.tensor}|{self.place}"].astype(np.float64))
        size = self.delta.abs().reshape(chance.shape)
        if size.dim() == 2:
            same = (size[:, :, None] == size[:, None, :]).double()
            mean = (same @ chance.double()[:, :, None])[..., 0] / same.sum(2)
            self.shared += int(((mean - chance).abs() > 1e-6).sum())
            chance = torch.where(same.sum(2) > 1, mean, chance.double())
        return (words.reshape(chance.shape) < torch.round(chance.double() * 2**32)).to(self.delta.dtype)


def main() -> None:
    """Run every job; one that fails tells why and does not stop the others."""
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    draws = Draws()
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    told = []
    for job in json.loads(jobs.read_text()):
        draws.words = np.load(job["draws"]) if job.get("draws") else None
        error, draws.shared = None, 0
        if job["recipe"] is not None:
            try:
                run_merge(MergeConfiguration.model_validate(job["recipe"]), job["out"], options)
            except Exception as fault:
                error = f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:300]
        settings = None if error else config(job["out"])
        told.append({"id": job["id"], "error": error, "config": settings, "shared": draws.shared})
    results.write_text(json.dumps(told))


def config(folder: str) -> dict[str, Any]:
    """What a config.json means to transformers: every field, with defaults filled in."""
    return transformers.AutoConfig.from_pretrained(folder).to_dict()


if __name__ == "__main__":
    main()
