"""How well mixtures of the tiny experts route and predict: every gate mode, beside dense models and an oracle.

    python bench/moe_quality.py                  # everything; writes docs/moe-quality.md
    python bench/moe_quality.py --only strong    # one set of experts; prints its tables

Experts that are missing are trained first (`bench/moe_experts.py`).
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import mergekit

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "models"), str(ROOT / "bench")]

from corpus import SEED, Corpus, read_corpora  # noqa: E402
from evaluate import DOMAINS, HELD_OUT, text_loss  # noqa: E402
from moe_experts import BASE, SETS, expert_folders, train_experts  # noqa: E402
from train import delta_norm, load  # noqa: E402

NUM_WINDOWS = 24  # of held-out text per domain, spread evenly: about 6,000 tokens
NUM_SNIPPETS = 32
SNIPPET_TOKENS = (24, 64)
GATE_MODES = ("random", "uniform_random", "cheap_embed", "hidden", "hidden_avg", "router_input")
RANDOM_MODES = GATE_MODES[:2]
PERPLEXITIES = [*(f"{domain} ppl" for domain in DOMAINS), "mean"]
SHARED = ("base", "average")
TOP = (1, 2)
MERGED = {
    "task_arithmetic, weight 0.17": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.17}},
    "task_arithmetic, weight 0.5": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}},
    "ties, density 0.5": {"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}},
}
"""Merge methods for the shared weights; task_arithmetic at a third is the average."""

EXAMPLES = {
    "code": [
        "def area(width, height):\n    return width * height\n",
        "import os\n\nfor name in names:\n    print(name)\n",
    ],
    "prose": [
        "The train was late, so we waited on the platform.",
        "Each chapter begins with a short summary of the last.",
    ],
    "calc": ["12+7=19\n58-9=49\n", "230+4=234\n71-36=35\n"],
}
"""Two short texts of each domain, written by hand."""

REQUESTS = {
    "code": ["Write a Python function that sorts a list.", "Fix the bug in this program."],
    "prose": ["Explain how this works in plain English.", "Write a short summary of the report."],
    "calc": ["What is 17 plus 25?", "Subtract 9 from 58."],
}
"""Two requests for each domain, as recipes for chat models hold them."""

ABOUT = {
    "gentle": "The bundled experts: fully fine-tuned, close to the base.",
    "strong": "Fully fine-tuned on their own domain alone, far from the base.",
    "mlp": "Only the MLPs trained, on their own domain alone.",
}


@dataclass(frozen=True, slots=True)
class Score:
    """A model's figures by domain.

    `routed` is a mixture's share of tokens in [0, 1] whose first expert is the domain's, for each layer; a dense model
    has no layers there.
    """

    perplexity: Mapping[str, float]
    routed: Mapping[str, tuple[float, ...]]

    @property
    def mean(self) -> float:
        """Geometric mean of the perplexities."""
        return math.prod(self.perplexity.values()) ** (1 / len(self.perplexity))

    @property
    def by_domain(self) -> list[float]:
        """Routing accuracy on each domain, the mean over layers."""
        return [sum(layers) / len(layers) for layers in self.routed.values()]

    @property
    def by_layer(self) -> list[float]:
        """Routing accuracy of each layer, the mean over domains."""
        return [sum(layer) / len(layer) for layer in zip(*self.routed.values(), strict=True)]

    @property
    def accuracy(self) -> float:
        """Routing accuracy, the mean over domains and layers."""
        return sum(self.by_layer) / len(self.by_layer)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The settings of one mixture; `prompts` names a kind of prompts, nothing for a random gate."""

    gate_mode: str
    prompts: str
    attention: str
    top: int

    def recipe(self, experts: Mapping[str, Path], prompts: Mapping[str, Mapping[str, list[str]]]) -> dict[str, Any]:
        """The recipe for `mergekit.run_moe`."""
        entries: list[dict[str, Any]] = [{"source_model": str(folder)} for folder in experts.values()]
        if self.prompts:
            for entry, domain in zip(entries, experts, strict=True):
                entry["positive_prompts"] = prompts[self.prompts][domain]
        return {
            "base_model": str(BASE),
            "gate_mode": self.gate_mode,
            "experts_per_token": self.top,
            "attention": MERGED.get(self.attention, self.attention),
            "architecture": "mixtral",
            "dtype": "bfloat16",
            "experts": entries,
        }


# Scores ---------------------------------------------------------------------------------------------------


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domains: Sequence[str] = DOMAINS) -> Score:
    """Perplexity on held-out text and, of a mixture whose expert i is domain i's, where its tokens are routed."""
    perplexity, routed = {}, {}
    for domain in domains:
        text = (HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8")
        with first_choices(model, tokenizer.bos_token_id) as counts:
            loss, _ = text_loss(model, tokenizer, text, max_windows=NUM_WINDOWS)
        perplexity[domain] = math.exp(loss)
        routed[domain] = tuple((counts[:, DOMAINS.index(domain)] / counts.sum(1)).tolist())
    return Score(perplexity, routed)


@contextmanager
def first_choices(model: PreTrainedModel, start: int) -> Iterator[torch.Tensor]:
    """Count, for each layer and expert, the tokens whose first choice it is; start tokens do not count.

    Yields the counts [layer, expert], filled by the forward passes inside; they have no row if the model is dense.
    """
    routers = [module for name, module in model.named_modules() if name.endswith((".mlp.gate", "_moe.gate"))]
    counts = torch.zeros(len(routers), len(DOMAINS))
    is_text = torch.zeros(0, dtype=torch.bool)

    def see_tokens(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal is_text
        is_text = (inputs[0] != start).flatten()

    def count(layer: int, output: Any) -> None:
        # transformers 5 returns (logits, weights, experts), version 4 the logits.
        logits = output[0] if isinstance(output, tuple) else output
        chosen = logits.reshape(-1, logits.shape[-1]).argmax(-1)[is_text]
        counts[layer] += torch.bincount(chosen, minlength=len(DOMAINS))

    hooks = [model.get_input_embeddings().register_forward_pre_hook(see_tokens)]
    hooks += [
        router.register_forward_hook(lambda _, inputs, output, layer=layer: count(layer, output))
        for layer, router in enumerate(routers)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def oracle(shared: Path, experts: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase) -> Score:
    """Each domain scored with its own expert's MLPs between the weights of `shared`."""
    perplexity = {}
    for domain, folder in experts.items():
        model = load(shared).eval()
        mlps = {name: tensor for name, tensor in load(folder).state_dict().items() if ".mlp." in name}
        model.load_state_dict({**model.state_dict(), **mlps})
        perplexity.update(score(model, tokenizer, [domain]).perplexity)
    return Score(perplexity, dict.fromkeys(experts, (1.0,) * model.config.num_hidden_layers))


# Prompts --------------------------------------------------------------------------------------------------


def snippets(corpora: Mapping[str, Corpus], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """For each domain, `NUM_SNIPPETS` pieces of training text, none of which stands in any held-out text."""
    held_out = "".join((HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8") for domain in DOMAINS)
    rng = np.random.default_rng(SEED)
    drawn: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    for domain, found in drawn.items():
        documents = corpora[domain].train
        while len(found) < NUM_SNIPPETS:
            text = documents[rng.integers(len(documents))].text
            start = int(rng.choice([0, *(at + 1 for at, letter in enumerate(text[:-1]) if letter == "\n")]))
            piece = cut(text[start : start + 1000].lstrip("\n"), int(rng.integers(*SNIPPET_TOKENS)), tokenizer)
            if piece and not any(line in held_out for line in (piece, *piece.split("\n")) if len(line) >= 40):
                found.append(piece)
    return drawn


def cut(text: str, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first `num_tokens` tokens of a text; nothing if it has less than the least length of a snippet."""
    tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)[:num_tokens]
    return tokenizer.decode(tokens) if len(tokens) >= SNIPPET_TOKENS[0] else ""


# Rows -----------------------------------------------------------------------------------------------------


def dense_rows(
    experts: Mapping[str, Path], linear: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Score]]:
    """Name and score of what a mixture has to beat, and of what perfect routing gives."""
    scores = {}
    for name, folder in {"base": BASE, **experts, "linear merge": linear}.items():
        scores[name] = score(load(folder).eval(), tokenizer)
        yield name, scores[name]
    own = {domain: scores[domain].perplexity[domain] for domain in experts}
    yield "each domain by its own expert, whole", Score(own, {})
    for shared, folder in zip(SHARED, (BASE, linear), strict=True):
        yield f"oracle routing, attention: {shared}", oracle(folder, experts, tokenizer)


def mixtures() -> list[Mixture]:
    """Every setting for snippets and random gates; hand-written prompts with the base's attention and two experts."""
    found = [
        Mixture(mode, "" if mode in RANDOM_MODES else "snippets", shared, top)
        for shared in SHARED
        for top in TOP
        for mode in GATE_MODES
    ]
    written = ("examples", "requests")
    found += [Mixture(m, kind, "base", 2) for kind in written for m in GATE_MODES if m not in RANDOM_MODES]
    return found + [Mixture("router_input", "snippets", name, 2) for name in MERGED]


def mixture_rows(
    experts: Mapping[str, Path], prompts: Mapping[str, Mapping[str, list[str]]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Mixture, Score]]:
    """Each mixture, built and scored."""
    for mixture in mixtures():
        with tempfile.TemporaryDirectory() as folder:
            out = mergekit.run_moe(mixture.recipe(experts, prompts), Path(folder) / "out", verify=False)
            model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype=torch.float32)
            yield mixture, score(model.eval(), tokenizer)


# Page -----------------------------------------------------------------------------------------------------


def measure(kind: str, prompts: Mapping[str, Mapping[str, list[str]]], tokenizer: PreTrainedTokenizerBase) -> str:
    """All tables of one set of experts."""
    experts = expert_folders(kind)
    with tempfile.TemporaryDirectory() as folder:
        models = [{"model": str(expert), "parameters": {"weight": 1}} for expert in experts.values()]
        recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
        linear = mergekit.run_merge(recipe, Path(folder) / "linear")
        dense = dict(_told(dense_rows(experts, linear, tokenizer)))
    mixed = dict(_told(mixture_rows(experts, prompts, tokenizer)))
    norms = ", ".join(f"{domain} {delta_norm(path, BASE):.2f}" for domain, path in experts.items())
    lines = [f"## {kind}", "", f"{ABOUT[kind]} Norm of the change relative to the base: {norms}.", ""]
    lines += table(["", *PERPLEXITIES], [[name, *figures(result)] for name, result in dense.items()])
    for shared in SHARED:
        lines += [
            "",
            f"Mixtures with `attention: {shared}`, prompts of {NUM_SNIPPETS} snippets:",
            "",
            *full(mixed, shared),
        ]
    lines += [
        "",
        "Share of tokens routed right, and mean perplexity, by what the prompts are (`attention: base`, top 2):",
        "",
        *written(mixed),
        "",
        "`router_input`, top 2, snippets, by where the shared weights come from:",
        "",
        *merged(mixed),
        "",
    ]
    return "\n".join(lines)


def _told(rows: Iterator[tuple[Any, Score]]) -> Iterator[tuple[Any, Score]]:
    for name, result in rows:
        routed = f"{100 * result.accuracy:5.1f} %" if any(result.routed.values()) else ""
        print(f"{name!s:90}", *(f"{cell:>7}" for cell in figures(result)), routed, flush=True)
        yield name, result


def figures(result: Score) -> list[str]:
    """The perplexities and their mean as text."""
    return [f"{value:.2f}" for value in (*result.perplexity.values(), result.mean)]


def full(mixed: Mapping[Mixture, Score], shared: str) -> list[str]:
    """One row a mixture: perplexities, and routing accuracy in percent by domain and by layer."""
    head = ["gate_mode", "top", *PERPLEXITIES, "routed right", *DOMAINS, "by layer"]
    rows = []
    for mixture, result in mixed.items():
        if mixture.attention == shared and mixture.prompts in ("", "snippets"):
            shares = [f"{100 * share:.0f}" for share in (result.accuracy, *result.by_domain)]
            by_layer = " ".join(f"{100 * share:.0f}" for share in result.by_layer)
            rows.append([mixture.gate_mode, str(mixture.top), *figures(result), *shares, by_layer])
    return table(head, rows)


def merged(mixed: Mapping[Mixture, Score]) -> list[str]:
    """One row for each way of making the shared weights."""
    names = (*SHARED, *MERGED)
    rows = [[name, *figures(mixed[Mixture("router_input", "snippets", name, 2)])] for name in names]
    return table(["attention", *PERPLEXITIES], rows)


def written(mixed: Mapping[Mixture, Score]) -> list[str]:
    """One row a gate mode: routing accuracy and mean perplexity for each kind of prompts."""
    kinds = ("requests", "examples", "snippets")
    rows = []
    for mode in GATE_MODES:
        if mode not in RANDOM_MODES:
            results = [mixed[Mixture(mode, kind, "base", 2)] for kind in kinds]
            rows.append([mode, *(f"{100 * result.accuracy:.0f} %, {result.mean:.2f}" for result in results)])
    return table(["gate_mode", *kinds], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def main(argv: list[str] | None = None) -> int:
    """Command line: measure the sets, print or write their tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SETS, metavar="SET", help="print these sets, write nothing")
    options = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("mergekit").setLevel(logging.ERROR)  # every run warns of the same
    train_experts(f"{kind}/{domain}" for kind in SETS if kind != "gentle" for domain in DOMAINS)
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    prompts = {"snippets": snippets(read_corpora(), tokenizer), "examples": EXAMPLES, "requests": REQUESTS}
    text = "\n".join(measure(kind, prompts, tokenizer) for kind in options.only or SETS)
    if options.only:
        print(text)
        return 0
    page = ROOT / "docs" / "moe-quality.md"
    whole = page.read_text(encoding="utf-8")
    start, end = whole.index("<!-- tables -->"), whole.index("<!-- /tables -->")
    page.write_text(f"{whole[:start]}<!-- tables -->\n{text}{whole[end:]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
