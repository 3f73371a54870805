"""Train the tiny models: a base that knows code, prose and arithmetic, and one expert for each.

    python models/train.py                     # everything, about 20 minutes on two idle cores
    python models/train.py --only code calc    # these experts again, from the base that is there

Every model is trained in float32 and saved in bfloat16; experts start from the *saved* base, so that an
expert minus the base is exactly what its training did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from corpus import SEED, Corpus, read_corpora, write_held_out
from evaluate import DOMAINS, WINDOW, evaluate, format_table

MODELS = Path(__file__).resolve().parent
NUM_THREADS = 2  # part of the result: another number sums in another order
BATCH = 16  # windows of WINDOW tokens
ANSWER_WEIGHT = 3.0

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, START, END = range(3)
VOCAB_SIZE = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# The keys of transformers 4: version 5 reads them too, the other way round fails.
CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "rms_norm_eps": 1e-05,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """One training run: how many steps, how fast, and the part of the windows that each domain gives."""

    num_steps: int
    learning_rate: float
    weight_decay: float
    mixture: Mapping[str, float]
    warm_up: int = 50

    def rate(self, step: int) -> float:
        """Learning rate at `step`: linear warm-up, then a cosine down to a twentieth."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.num_steps - self.warm_up)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


BASE = Schedule(1700, 4e-3, 0.1, {"code": 0.4, "prose": 0.35, "calc": 0.25})


def expert_schedule(domain: str) -> Schedule:
    """Mostly the own domain, some of the others, at a low rate: a merge needs experts that stay near the base.

    No weight decay: a row of the embedding that training does not touch keeps the base's bytes.
    """
    others = [other for other in DOMAINS if other != domain]
    return Schedule(400, 1e-3, 0.0, {domain: 0.7, **dict.fromkeys(others, 0.15)}, warm_up=20)


# Tokenizer ------------------------------------------------------------------------------------------------


def train_tokenizer(corpora: Mapping[str, Corpus], characters: int = 1_200_000) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens, from as much code as prose; each digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's pattern with single digits, so that a place in a number is a token.
    pattern = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = []
    for domain in ("code", "prose"):
        size = sum(len(document.text) for document in corpora[domain].train)
        every = max(1, round(size / characters))
        texts += [document.text for document in corpora[domain].train[::every]]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", START)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the three tokenizer files, as transformers 4 names and fills them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)},
        **names,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)


# Training -------------------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, corpora: Mapping[str, Corpus]) -> dict[str, np.ndarray]:
    """The training documents of each domain as one array: start token, text, end token, and so on."""
    streams = {}
    for domain, corpus in corpora.items():
        texts = [document.text for document in corpus.train]
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [token for item in encoded for token in (START, *item.ids, END)]
        streams[domain] = np.array(ids, dtype=np.int64)
    return streams


def draw_batch(
    streams: Mapping[str, np.ndarray], schedule: Schedule, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows from random places and their domains. Each begins with the start token, as in evaluation and use.

    A window begins at the last document start if that is near, so that a short document is seen whole.
    """
    domains = rng.choice(len(DOMAINS), size=BATCH, p=[schedule.mixture[domain] for domain in DOMAINS])
    rows = np.empty((BATCH, WINDOW), dtype=np.int64)
    for row, index in zip(rows, domains, strict=True):
        stream = streams[DOMAINS[index]]
        at = int(rng.integers(64, len(stream) - WINDOW))
        starts = np.flatnonzero(stream[at - 64 : at + 1] == START)
        at = at - 64 + int(starts[-1]) if starts.size else at
        row[:] = stream[at : at + WINDOW]
        row[0] = START
    return torch.from_numpy(rows), torch.from_numpy(domains)


def token_weights(tokens: torch.Tensor, domains: torch.Tensor, equals: int, newline: int) -> torch.Tensor:
    """The weight of each token's loss: `ANSWER_WEIGHT` for the answers in arithmetic, 1 elsewhere.

    The digits of a problem are random; without the weight they drown what can be learnt from a line.
    """
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    last_equals = torch.where(tokens == equals, place, -1).cummax(1).values
    last_newline = torch.where(tokens == newline, place, -1).cummax(1).values.roll(1, dims=1)  # it ends an answer
    last_newline[:, 0] = -1
    is_answer = (last_equals > last_newline) & (tokens != equals) & (domains == DOMAINS.index("calc"))[:, None]
    return torch.where(is_answer, ANSWER_WEIGHT, 1.0)


def train(
    model: Phi3ForCausalLM, tokenizer: Tokenizer, streams: Mapping[str, np.ndarray], schedule: Schedule, name: str
) -> None:
    """Train in place with AdamW; the batches depend on the seed and `name` only."""
    equals, newline = (tokenizer.encode(text, add_special_tokens=False).ids[0] for text in "=\n")
    seed = int.from_bytes(hashlib.sha256(f"{SEED} {name}".encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=True)
    model.train()
    began, losses = time.monotonic(), torch.zeros(len(DOMAINS), 2)
    for step in range(schedule.num_steps):
        tokens, domains = draw_batch(streams, schedule, rng)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == START, -100)  # nothing predicts a new document
        by_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        by_token = by_token.view(BATCH, -1)
        weights = token_weights(tokens, domains, equals, newline)[:, 1:]
        loss = (by_token * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[:, 0].index_add_(0, domains, by_token.detach().mean(1))
        losses[:, 1].index_add_(0, domains, torch.ones(BATCH))
        if (step + 1) % 50 == 0:
            sums = zip(DOMAINS, losses.tolist(), strict=True)
            means = " ".join(f"{domain} {a / b:.3f}" for domain, (a, b) in sums if b)
            print(f"{name:5} step {step + 1:5}  {means}  {time.monotonic() - began:6.0f} s", flush=True)
            losses.zero_()


def save(model: Phi3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder, its tensors rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file makes it private to its owner
    _write_json(folder / "config.json", CONFIG)
    tokens = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    _write_json(folder / "generation_config.json", tokens)
    save_tokenizer(tokenizer, folder)


def load(folder: Path) -> Phi3ForCausalLM:
    """A saved checkpoint in float32, ready to train on."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def delta_norm(model: Path, base: Path) -> float:
    """|model - base| / |base| over all tensors together."""
    one, other = load(model).state_dict(), load(base).state_dict()
    squares = [((one[name] - other[name]).double().square().sum(), other[name].double().square().sum()) for name in one]
    return math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))


def write_manifest(folder: Path = MODELS) -> None:
    """`MANIFEST.sha256`, in the format of `sha256sum --check`."""
    paths = sorted(path for name in ("base", *DOMAINS, "heldout") for path in (folder / name).glob("*.*"))
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in paths
    ]
    (folder / "MANIFEST.sha256").write_text("".join(lines))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line: train the base and the experts, or some of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ("base", *DOMAINS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="train these; the base must exist")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder of the checkpoint folders")
    options = parser.parse_args(argv)
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    began = time.monotonic()
    corpora = read_corpora()
    base = options.out / "base"
    if "base" in options.only:
        if options.out == MODELS:  # a trial elsewhere leaves the committed questions alone
            write_held_out(corpora)
        tokenizer = train_tokenizer(corpora)
    else:
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    streams = encode(tokenizer, corpora)
    print({domain: len(stream) for domain, stream in streams.items()}, "training tokens", flush=True)
    for name in (name for name in names if name in options.only):
        if name == "base":
            torch.manual_seed(SEED)
            model = Phi3ForCausalLM(Phi3Config(**CONFIG))
        else:
            model = load(base)
        train(model, tokenizer, streams, BASE if name == "base" else expert_schedule(name), name)
        save(model, tokenizer, options.out / name)
        print(format_table({name: evaluate(options.out / name)}), flush=True)
        if name != "base":
            print(f"{name}: delta norm {delta_norm(options.out / name, base):.4f} of the base's", flush=True)
    if options.out == MODELS:
        write_manifest()
    print(f"{time.monotonic() - began:.0f} s, Python {sys.version.split()[0]}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
