"""Tiny tokenizers of every kind, trained by the tokenizers library, and models whose embeddings belong to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from files import config, llama, read_model, to_float, write_safetensors

__all__ = ["KINDS", "TEXTS", "embeddings", "train", "write_tokenized", "write_tokenizer"]

TEXTS = (
    "the quick brown fox jumps over the lazy dog while the slow cat watches the quick fox jumping again and again",
    "def main(argument):\n    return [argument for argument in range(12)]\n\nprint(main(argument=3))\n" * 3,
    "seven plus eight is fifteen; fifteen minus six is nine; nine times nine is 81; caf\u00e9 na\u00efve \u4f60\u597d",
    "once upon a midnight dreary, while I pondered, weak and weary, over many a quaint and curious volume",
)
KINDS = ("byte_bpe", "piece_bpe", "unigram", "wordpiece")


def train(
    kind: str, texts: Sequence[str] = TEXTS, size: int = 300, special: Sequence[str] = ("<s>", "</s>")
) -> Tokenizer:
    """A tokenizer of ``kind`` with about ``size`` tokens, ``special`` first."""
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(special), initial_alphabet=sorted(alphabet), show_progress=False
        )
    elif kind == "piece_bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=size + 257, special_tokens=["<unk>", *special, *fallback], show_progress=False
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", *special], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    record = json.loads(tokenizer.to_str())
    # The trainer makes the bytes special tokens, to have them in the vocabulary; they are ordinary ones.
    record["added_tokens"] = [token for token in record["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(record))


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    added: Sequence[str | AddedToken] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """The tokenizer's two files, with ``added`` special tokens; returns the ids of all tokens."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([t if isinstance(t, AddedToken) else AddedToken(t, special=True) for t in added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    record = json.loads((folder / "tokenizer.json").read_text())
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in record["added_tokens"]
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, **named, **(settings or {})}, indent=2)
    )
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def write_tokenized(
    folder: Path,
    tokenizer: Tokenizer,
    seed: int,
    added: Sequence[str | AddedToken] = (),
    *,
    rows: int | None = None,
    code: str = "F32",
    settings: Mapping[str, Any] | None = None,
    tied: bool = False,
    **changes: Any,
) -> dict[str, int]:
    """A tiny Llama whose embeddings have a row for each token (or ``rows``); returns the ids of its tokens."""
    ids = write_tokenizer(folder, tokenizer, added, settings)
    rows = rows or max(ids.values()) + 1
    tensors = llama(seed, code=code, vocab=rows)
    if tied:
        del tensors["lm_head.weight"]
    record = config(
        vocab_size=rows,
        tie_word_embeddings=tied,
        torch_dtype={"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[code],
        bos_token_id=ids.get("<s>"),
        eos_token_id=ids.get("</s>"),
        **changes,
    )
    (folder / "config.json").write_text(json.dumps(record))
    write_safetensors(folder / "model.safetensors", tensors)
    return ids


def embeddings(folder: Path, name: str = "model.embed_tokens.weight") -> np.ndarray:
    """The embedding rows of a model, float64."""
    return to_float(read_model(folder)[name])
