"""How good a tiny model is at code, prose and arithmetic: perplexity and exact answers.

    python models/evaluate.py models/base models/code [--json] [--quick]

Reads a checkpoint folder with transformers, so it scores any merge of these models (Phi-3, Llama or another
architecture), as long as its tokenizer is in the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOMAINS = ("code", "prose", "calc")
HELD_OUT = Path(__file__).resolve().parent / "heldout"
DOCUMENT_END = "\f\n"  # between the documents of a held-out text

WINDOW = 256  # tokens, the training length; each window begins with the start token
BATCH_TOKENS = 4096  # larger batches leave the cache of a small machine
QUICK_WINDOWS = 16  # of each domain, spread evenly over the text
QUICK_QUESTIONS = 60  # of each domain, the first ones


@dataclass(frozen=True, slots=True)
class DomainScore:
    """A model's score on one domain.

    `perplexity` is per token of the model's own tokenizer: compare it only between models that share one.
    `exact_answers` is the percentage of questions answered exactly, in [0, 100].
    """

    perplexity: float
    exact_answers: float
    num_tokens: int
    num_questions: int


def evaluate(path: Path, quick: bool = False) -> dict[str, DomainScore]:
    """Score the checkpoint folder `path` on every domain, in float32 on the CPU.

    `quick` scores a fixed subset: `QUICK_WINDOWS` windows and `QUICK_QUESTIONS` questions of each domain.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
    return evaluate_model(model, tokenizer, quick=quick)


def evaluate_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, quick: bool = False
) -> dict[str, DomainScore]:
    """Score a model that is already in memory."""
    scores = {}
    for domain in DOMAINS:
        text = (HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8")
        lines = (HELD_OUT / f"{domain}_questions.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines]
        if quick:
            questions = questions[:QUICK_QUESTIONS]
        loss, num_tokens = text_loss(model, tokenizer, text, max_windows=QUICK_WINDOWS if quick else None)
        correct = sum(answers_exactly(model, tokenizer, questions))
        scores[domain] = DomainScore(math.exp(loss), 100 * correct / len(questions), num_tokens, len(questions))
    return scores


def text_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, max_windows: int | None = None
) -> tuple[float, int]:
    """Mean negative log-likelihood per token (nats) and the number of tokens it is the mean of.

    The text is cut as in training: a start token before every document, windows across documents, and the start
    token in the first place of each window. Start tokens are not scored.
    """
    import torch

    start = _start_token(tokenizer)
    stream: list[int] = []
    for document in text.split(DOCUMENT_END):
        stream += [start, *tokenizer.encode(document, add_special_tokens=False, verbose=False)]
    # A short last window would need padding for a few tokens: left out.
    windows = [[start, *stream[at + 1 : at + WINDOW]] for at in range(0, len(stream) - WINDOW + 1, WINDOW)]
    if max_windows is not None and len(windows) > max_windows:
        windows = [windows[i * len(windows) // max_windows] for i in range(max_windows)]
    total, count = 0.0, 0
    batch = max(1, BATCH_TOKENS // WINDOW)
    with torch.inference_mode():
        for at in range(0, len(windows), batch):
            tokens = torch.tensor(windows[at : at + batch])
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            targets[targets == start] = -100  # cross_entropy's default ignore_index
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += int((targets >= 0).sum())
    return total / count, count


def answers_exactly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Iterable[dict[str, str]]
) -> list[bool]:
    """For each question, whether the greedy continuation of the prompt is the answer and then ends the word.

    One forward pass over prompt and answer decides it: the greedy continuation equals the answer exactly when
    every answer token is the most likely one after those before it. The token after the answer must not go on
    with a letter, digit or underscore (`8` is not an answer to a question whose answer is `85`, nor `853`).
    """
    import torch

    start = _start_token(tokenizer)
    rows = []
    for index, question in enumerate(questions):
        prompt = [start, *tokenizer.encode(question["prompt"], add_special_tokens=False)]
        answer = tokenizer.encode(question["answer"], add_special_tokens=False)
        rows.append((prompt, answer, index))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))  # rows of like length waste little padding
    goes_on = _continuation_mask(tokenizer, model.get_output_embeddings().weight.shape[0])
    correct = [False] * len(rows)
    with torch.inference_mode():
        for batch in _batches(rows):
            width = max(len(prompt) + len(answer) for prompt, answer, _ in batch)
            # Padding stands on the right: causal attention never looks at it, so no mask is needed.
            tokens = torch.tensor([(p + a + [start] * width)[:width] for p, a, _ in batch])
            best = model(input_ids=tokens, use_cache=False).logits.argmax(-1).tolist()
            for (prompt, answer, index), predicted in zip(batch, best, strict=True):
                first, after = len(prompt) - 1, len(prompt) + len(answer) - 1
                correct[index] = predicted[first:after] == answer and not goes_on[predicted[after]]
    return correct


def _batches(rows: list[tuple[list[int], list[int], int]]) -> Iterable[list[tuple[list[int], list[int], int]]]:
    batch: list[tuple[list[int], list[int], int]] = []
    for row in rows:  # sorted, so the newest row is the widest
        if batch and (len(batch) + 1) * (len(row[0]) + len(row[1])) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.bos_token_id
    return int(token if token is not None else tokenizer.eos_token_id)


def _continuation_mask(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[bool]:
    """True for each token whose text begins with a letter, digit or underscore."""
    mask = []
    for token in range(num_tokens):
        text = tokenizer.decode([token], skip_special_tokens=True) if token < len(tokenizer) else ""
        mask.append(bool(text) and (text[0].isalnum() or text[0] == "_"))
    return mask


def format_table(scores: dict[str, dict[str, DomainScore]]) -> str:
    """Scores of several models as a Markdown table: perplexity, then exact answers in percent."""
    header = [f"{domain} ppl" for domain in DOMAINS] + [f"{domain} exact %" for domain in DOMAINS]
    lines = ["| model | " + " | ".join(header) + " |", "|---|" + "---:|" * len(header)]
    for name, by_domain in scores.items():
        cells = [f"{by_domain[domain].perplexity:.2f}" for domain in DOMAINS]
        cells += [f"{by_domain[domain].exact_answers:.1f}" for domain in DOMAINS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line: score folders, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="checkpoint folder with a tokenizer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="score a fixed subset, about a third of the time")
    options = parser.parse_args(argv)
    missing = [folder for folder in options.folders if not (folder / "config.json").is_file()]
    if missing:
        parser.error(f"{missing[0]} holds no config.json; give the folder of a checkpoint")
    scores = {str(folder): evaluate(folder, quick=options.quick) for folder in options.folders}
    if options.json:
        plain = {name: {domain: asdict(score) for domain, score in row.items()} for name, row in scores.items()}
        print(json.dumps(plain, indent=2))
    else:
        print(format_table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
