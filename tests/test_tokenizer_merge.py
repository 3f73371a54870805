"""Merging models whose tokenizers differ: rows, ids, files and settings of the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from command import assert_refused, mergekit, mergekit_yaml
from files import read_model, write_safetensors
from mergekit.vocab.templates import built_in
from tokenizer_files import KINDS, TEXTS, embeddings, train, write_tokenized, write_tokenizer

NAMES = ("model.embed_tokens.weight", "lm_head.weight")
Ids = dict[str, int]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe(models: list[str], method: str = "linear", base: str | None = "a", **more: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m, "parameters": {"weight": i + 1.0}} for i, m in enumerate(models)],
        "parameters": {"normalize": False},
        **more,
    }
    if base:
        record["base_model"] = base
    return record


def merge(record: dict[str, Any], out: str = "out", *options: str) -> Any:
    Path("r.yml").write_text(yaml.safe_dump(record, sort_keys=False))
    result = mergekit_yaml("r.yml", out, "--quiet", *options)
    assert result.code == 0, result
    assert "check: " not in result.err
    return result


def refused(record: dict[str, Any], code: int, *phrases: str) -> None:
    Path("r.yml").write_text(yaml.safe_dump(record, sort_keys=False))
    assert_refused(mergekit_yaml("r.yml", "out"), code, *phrases)
    assert not Path("out").exists() or not list(Path("out").glob("*.safetensors"))


def config(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "config.json").read_text())


def output_ids(folder: str = "out") -> Ids:
    return Tokenizer.from_file(f"{folder}/tokenizer.json").get_vocab(with_added_tokens=True)


def aligned(models: list[tuple[Ids, np.ndarray]], base: int | None, output: Ids, rows: int) -> list[np.ndarray]:
    """The models' rows in the order of ``output``, token by token as the manual of the format says."""
    found = [np.zeros((rows, m.shape[1])) for _, m in models]
    for token, row in output.items():
        own = [matrix[ids[token]] if ids.get(token, 1 << 30) < len(matrix) else None for ids, matrix in models]
        known = [o for o in own if o is not None]
        fallback = None
        if len(known) == 1:
            fallback = known[0]
        elif known:
            first = None if base is None else own[base]
            fallback = first if first is not None else np.mean(known, axis=0)
        for matrix, mine in zip(found, own, strict=True):
            row_of = mine if mine is not None else fallback
            assert row_of is not None, token
            matrix[row] = row_of
    return found


def three(kind: str, **options: Any) -> list[Ids]:
    """Models a, b, c: b has other special tokens, c a tokenizer trained on other text."""
    first, other = train(kind, TEXTS[:3]), train(kind, TEXTS[1:])
    return [
        write_tokenized(Path("a"), first, 1, ["<|end|>"], **options),
        write_tokenized(Path("b"), first, 2, ["<|im_start|>", "<|end|>"], **options),
        write_tokenized(Path("c"), other, 3, ["<|im_start|>"], **options),
    ]


@pytest.mark.parametrize("source", ["union", "base", "c", "model:b"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_the_merge_of_the_rows_of_its_token(kind, source):
    ids = three(kind)
    merge(recipe(["a", "b", "c"], tokenizer_source=source))
    output = output_ids()
    rows = config()["vocab_size"]
    assert rows == max(output.values()) + 1
    for name in NAMES:
        models = [(i, embeddings(Path(m), name)) for i, m in zip(ids, "abc", strict=True)]
        parts = aligned(models, 0, output, rows)
        want = 1 * parts[0] + 2 * parts[1] + 3 * parts[2]
        got = embeddings(Path("out"), name)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_the_plan_says_that_rows_are_gathered():
    three("byte_bpe")
    Path("r.yml").write_text(yaml.safe_dump(recipe(["a", "b", "c"], tokenizer_source="union")))
    result = mergekit("plan", "r.yml")
    assert result.code == 0
    assert "gather rows, linear [0] [1] [2]" in result.out
    assert "tokenizer.json, tokenizer_config.json written anew" in result.out


def test_without_a_base_what_several_have_is_averaged():
    first, other = train("byte_bpe", TEXTS[:2]), train("byte_bpe", TEXTS[2:])
    ids = [
        write_tokenized(Path("a"), first, 1),
        write_tokenized(Path("b"), other, 2),
        write_tokenized(Path("c"), other, 3),
    ]
    merge(recipe(["a", "b", "c"], base=None, tokenizer_source="union"))
    output = output_ids()
    models = [(i, embeddings(Path(m))) for i, m in zip(ids, "abc", strict=True)]
    parts = aligned(models, 0, output, config()["vocab_size"])
    np.testing.assert_allclose(embeddings(Path("out")), parts[0] + 2 * parts[1] + 3 * parts[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("slerp", {"t": 0.3}),
        ("task_arithmetic", {}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5}),
        ("sce", {}),
        ("nearswap", {"t": 0.1}),
        ("passthrough", {}),
    ],
)
def test_any_method_merges_aligned_rows(method, parameters):
    """The same as merging models that were brought into the output's vocabulary by hand."""
    ids = three("byte_bpe")
    names = {"slerp": "ab", "nearswap": "ab", "passthrough": "b"}.get(method, "abc")
    record = {
        "merge_method": method,
        "models": [{"model": m} for m in names],
        "parameters": {
            **parameters,
            **({"weight": 0.5} if method in ("linear", "task_arithmetic", "ties", "dare_linear") else {}),
        },
    }
    if method != "passthrough":
        record["base_model"] = "a"
    merge({**record, "tokenizer_source": "union"})
    output, rows = output_ids(), config()["vocab_size"]
    chosen = ["abc".index(m) for m in names]
    from files import encode, write_safetensors

    for name in NAMES:
        models = [(ids[i], embeddings(Path("abc"[i]), name)) for i in chosen]
        base = 0 if method != "passthrough" else None
        for i, part in zip(chosen, aligned(models, base, output, rows), strict=True):
            folder = Path(f"by-hand-{'abc'[i]}")
            folder.mkdir(exist_ok=True)
            tensors = read_model(folder) if (folder / "model.safetensors").exists() else read_model(Path("abc"[i]))
            write_safetensors(folder / "model.safetensors", {**tensors, name: encode("F32", part)})
            folder.joinpath("config.json").write_text(json.dumps({**config("a"), "vocab_size": rows}))
    by_hand = json.loads(json.dumps(record).replace('"model": "', '"model": "by-hand-'))
    if "base_model" in by_hand:
        by_hand["base_model"] = "by-hand-a"
    merge(by_hand, "by-hand")
    mine, theirs = read_model(Path("out")), read_model(Path("by-hand"))
    for name in NAMES:
        np.testing.assert_array_equal(mine[name][1], theirs[name][1])


def test_embed_slerp():
    ids = three("byte_bpe")[:2]
    record = recipe(["a", "b"], tokenizer_source="union")
    record["parameters"] = {"embed_slerp": True, "t": 0.25, "normalize": True}
    merge(record)
    output, rows = output_ids(), config()["vocab_size"]
    for name in NAMES:
        x, y = aligned([(ids[0], embeddings(Path("a"), name)), (ids[1], embeddings(Path("b"), name))], 0, output, rows)
        theta = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        want = (np.sin(0.75 * theta) * x + np.sin(0.25 * theta) * y) / np.sin(theta)
        np.testing.assert_allclose(embeddings(Path("out"), name), want, rtol=1e-5, atol=1e-6)
    Path("out/model.safetensors").unlink()
    three("byte_bpe")
    record = {**recipe(["a", "b", "c"], tokenizer_source="union"), "parameters": {"embed_slerp": True}}
    refused(record, 2, "'embed_slerp' interpolates between two models")


def test_tied_and_untied_heads():
    tokenizer = train("byte_bpe")
    a = write_tokenized(Path("a"), tokenizer, 1, ["<x>"], tied=True)
    b = write_tokenized(Path("b"), tokenizer, 2, ["<y>"])
    merge(recipe(["a", "b"], tokenizer_source="union"))
    output, rows = output_ids(), config()["vocab_size"]
    assert config()["tie_word_embeddings"] is False
    tied, own = embeddings(Path("a")), embeddings(Path("b"), "lm_head.weight")
    x, y = aligned([(a, tied), (b, own)], 0, output, rows)
    np.testing.assert_allclose(embeddings(Path("out"), "lm_head.weight"), x + 2 * y, rtol=1e-6, atol=1e-6)


class TestTokenEntries:
    """``tokenizer: tokens:``."""

    def setup_method(self) -> None:
        self.ids: list[Ids] = []

    def merged(self, tokens: dict[str, Any], source: str = "base") -> tuple[Ids, np.ndarray]:
        self.ids = three("byte_bpe")
        merge(recipe(["a", "b"], tokenizer={"source": source, "tokens": tokens}))
        return output_ids(), embeddings(Path("out"))

    def test_a_new_token_from_another(self):
        output, got = self.merged({"<new>": {"source": {"kind": "model_token", "model": "b", "token": "<|im_start|>"}}})
        want = embeddings(Path("b"))[self.ids[1]["<|im_start|>"]]
        np.testing.assert_allclose(got[output["<new>"]], 3 * want, rtol=1e-6)

    def test_by_id(self):
        output, got = self.merged({"<new>": {"source": {"kind": "model_token", "model": "a", "token_id": 7}}})
        np.testing.assert_allclose(got[output["<new>"]], 3 * embeddings(Path("a"))[7], rtol=1e-6)

    def test_zero(self):
        output, got = self.merged({"<new>": {"source": {"kind": "zero"}}})
        assert not got[output["<new>"]].any()

    def test_forced(self):
        output, got = self.merged({"<|end|>": {"source": "b", "force": True}})
        want = embeddings(Path("b"))[self.ids[1]["<|end|>"]]
        np.testing.assert_allclose(got[output["<|end|>"]], 3 * want, rtol=1e-6)

    def test_not_forced_is_used_where_it_is_missing(self):
        output, got = self.merged(
            {"<|im_start|>": {"source": {"kind": "model_token", "model": "a", "token": "<s>"}}}, "union"
        )
        missing, own = embeddings(Path("a"))[self.ids[0]["<s>"]], embeddings(Path("b"))[self.ids[1]["<|im_start|>"]]
        np.testing.assert_allclose(got[output["<|im_start|>"]], missing + 2 * own, rtol=1e-6)

    def test_one_that_nobody_has_needs_a_source(self):
        self.ids = three("byte_bpe")
        record = recipe(["a", "b"], tokenizer={"source": "base", "tokens": {"<new>": {"source": None}}})
        refused(record, 2, "r.yml:", "needs a 'source'")

    @pytest.mark.parametrize(
        ("entry", "phrases"),
        [
            ({"source": "nobody"}, ["'nobody' is not a model that this recipe names so"]),
            ({"source": "a"}, ["a has no token '<new>'"]),
            ({"source": {"kind": ["zero"]}}, ["is no kind of token source"]),
            ({"source": {"kind": "magic"}}, ["'magic' is no kind of token source"]),
            ({"source": {"kind": "model_token", "model": "a"}}, ["exactly one of 'token' and 'token_id'"]),
            ({"source": {"kind": "model_token", "token": "x"}}, ["needs a 'model'"]),
            ({"source": {"kind": "model_token", "model": "a", "token_id": 99999}}, ["token_id 99999 is outside"]),
            ({"source": {"kind": "model_token", "model": "a", "token": "<nope>"}}, ["has no token '<nope>'"]),
            ({"source": {"kind": "zero", "extra": 1}}, ["there is no 'extra' here"]),
        ],
    )
    def test_faults(self, entry, phrases):
        three("byte_bpe")
        tokens = {"<new>": entry}
        refused(recipe(["a", "b"], tokenizer={"source": "base", "tokens": tokens}), 2, "r.yml:", *phrases)


def test_padding_rows_are_kept_and_merged_with_their_like():
    tokenizer = train("byte_bpe")
    a = write_tokenized(Path("a"), tokenizer, 1, rows=320)
    write_tokenized(Path("b"), tokenizer, 2, ["<b>"], rows=313)
    merge(recipe(["a", "b"], tokenizer_source="union"))
    size = max(a.values()) + 1
    assert config()["vocab_size"] == 320
    assert output_ids()["<b>"] == size
    got, x, y = embeddings(Path("out")), embeddings(Path("a")), embeddings(Path("b"))
    np.testing.assert_allclose(got[size + 1 : 313], x[size + 1 : 313] + 2 * y[size + 1 : 313], rtol=1e-6)
    np.testing.assert_allclose(got[313:], 3 * x[313:], rtol=1e-6)


def test_padding_to_a_multiple_is_the_mean_of_the_rest():
    a, *_ = three("byte_bpe")
    merge(recipe(["a", "b"], tokenizer={"source": "base", "pad_to_multiple_of": 64}))
    rows, size = config()["vocab_size"], max(a.values()) + 1
    assert rows % 64 == 0
    assert rows - 64 < size < rows
    got = embeddings(Path("out"))
    np.testing.assert_allclose(got[size:], np.tile(got[:size].mean(axis=0), (rows - size, 1)), rtol=1e-4, atol=1e-6)


def test_ids_beyond_the_rows_are_missing():
    """A pad token that somebody put into the tokenizer without giving it a row."""
    tokenizer = train("byte_bpe")
    size = tokenizer.get_vocab_size()
    write_tokenized(Path("a"), tokenizer, 1, ["<pad>"], rows=size)
    ids = write_tokenized(Path("b"), tokenizer, 2, ["<pad>"])
    merge(recipe(["a", "b"], tokenizer_source="base"))
    assert config()["vocab_size"] == size + 1
    np.testing.assert_allclose(embeddings(Path("out"))[size], 3 * embeddings(Path("b"))[ids["<pad>"]], rtol=1e-6)


class TestFiles:
    """The small files of the output."""

    def test_nothing_changes_nothing_is_rewritten(self):
        tokenizer = train("byte_bpe")
        settings = {"padding_side": "left", "chat_template": "{{ messages }}"}
        for seed, name in enumerate("ab"):
            write_tokenized(Path(name), tokenizer, seed, ["<x>"], settings=settings)
        extra = ("special_tokens_map.json", "merges.txt", "vocab.json", "tokenizer.model", "added_tokens.json",
                 "preprocessor_config.json", "chat_template.jinja")  # fmt: skip
        for name in extra:
            Path("a", name).write_text('{ "odd":   "spacing" }')
        for source in ("union", "base", "a"):
            merge(recipe(["a", "b"], tokenizer_source=source), f"out-{source}")
            for name in ("tokenizer.json", "tokenizer_config.json", *extra):
                assert Path(f"out-{source}", name).read_bytes() == Path("a", name).read_bytes(), name

    def test_a_new_vocabulary_leaves_no_file_of_the_old(self):
        three("byte_bpe")
        Path("a/merges.txt").write_text("a b")
        result = merge(recipe(["a", "b"], tokenizer_source="union"))
        assert "merges.txt" in result.err
        assert not Path("out/merges.txt").exists()
        decoder = json.loads(Path("out/tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert decoder[str(output_ids()["<|im_start|>"])]["content"] == "<|im_start|>"

    def test_transformers_sees_the_same_tokens(self):
        import transformers

        three("byte_bpe")
        merge(recipe(["a", "b", "c"], tokenizer_source="union"))
        found = transformers.PreTrainedTokenizerFast.from_pretrained("out")
        assert found.get_vocab() == output_ids()
        assert len(found) == config()["vocab_size"]
        text = "<|im_start|>the quick fox<|end|>"
        assert found.decode(found(text, add_special_tokens=False).input_ids) == text

    def test_special_ids_come_with_the_tokenizer(self):
        first, other = train("byte_bpe"), train("byte_bpe", special=("<unk>", "<pad>", "<s>", "</s>"))
        write_tokenized(Path("a"), first, 1, pad_token_id=1)
        ids = write_tokenized(Path("b"), other, 2)
        Path("a/generation_config.json").write_text('{"eos_token_id": [1, 0], "temperature": 0.7}')
        merge(recipe(["a", "b"], tokenizer_source="b"))
        found = config()
        assert (found["bos_token_id"], found["eos_token_id"]) == (ids["<s>"], ids["</s>"]) == (2, 3)
        assert found["pad_token_id"] == ids["</s>"], "what was </s> in a is </s> in b"
        written = json.loads(Path("out/generation_config.json").read_text())
        assert written == {"bos_token_id": 2, "eos_token_id": 3, "temperature": 0.7}

    def test_special_ids_that_only_the_owner_has(self):
        write_tokenized(Path("a"), train("byte_bpe"), 1)
        write_tokenized(Path("b"), train("byte_bpe"), 2, pad_token_id=1)
        Path("b/generation_config.json").write_text('{"eos_token_id": [1, 0], "temperature": 0.7}')
        merge(recipe(["a", "b"], tokenizer_source="b"))
        assert config()["pad_token_id"] == 1
        written = json.loads(Path("out/generation_config.json").read_text())
        assert written["eos_token_id"] == [1, 0]
        assert "temperature" not in written

    def test_a_tokenizer_that_can_not_be_compared_is_told(self):
        for seed, name in enumerate("ab"):
            write_tokenized(Path(name), train("byte_bpe"), seed)
        Path("b/tokenizer.json").write_text('{"model": {"vocab": {"x": "y"}}}')
        assert "can't be compared" in merge(recipe(["a", "b"])).err

    def test_no_copy_tokenizer_writes_one_that_is_asked_for(self):
        three("byte_bpe")
        merge(recipe(["a", "b"], tokenizer_source="union"), "out", "--no-copy-tokenizer")
        assert Path("out/tokenizer.json").exists()


def test_both_chat_formats_work_after_a_union():
    """A ChatML model and one in the manner of Llama 3, made from the bundled ones: special tokens stay whole."""
    import torch
    import transformers

    bundled = Path(__file__).parent.parent / "models"
    formats = {
        "code": ["<|im_start|>", "<|im_end|>"],
        "prose": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    }
    for name, tokens in formats.items():
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(bundled / name)
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        model = transformers.AutoModelForCausalLM.from_pretrained(bundled / name, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    record = {"merge_method": "linear", "models": [{"model": m} for m in formats], "parameters": {"weight": 1}}
    merge({**record, "tokenizer_source": "union", "chat_template": "chatml"})
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("out")
    model = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    assert len(tokenizer) == 2048 + 5 == model.config.vocab_size == model.lm_head.weight.shape[0]
    talk = [{"role": "user", "content": "def main("}]
    for template, special in ((None, formats["code"]), (built_in("llama3"), formats["prose"])):
        text = tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        found = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        for token in special:
            assert found.count(token) == text.count(token) > 0
        assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


class TestWithoutConfiguration:
    """No word of tokenizers in the recipe."""

    def test_other_sizes_are_refused_with_both_remedies(self):
        three("byte_bpe")
        refused(
            recipe(["a", "b"]), 2, "vocabularies differ in size", "tokenizer_source", "--unsafe-truncate-embeddings"
        )

    def test_the_flag_cuts_and_keeps_the_config_true(self):
        a, *_ = three("byte_bpe")
        Path("r.yml").write_text(yaml.safe_dump(recipe(["a", "b"])))
        result = mergekit_yaml("r.yml", "out", "--unsafe-truncate-embeddings")
        assert result.code == 0, result
        size = max(a.values()) + 1
        assert config()["vocab_size"] == size == len(embeddings(Path("out")))

    def test_other_tokens_of_the_same_size_are_told(self):
        write_tokenized(Path("a"), train("byte_bpe", TEXTS[:2]), 1, rows=300)
        write_tokenized(Path("b"), train("byte_bpe", TEXTS[2:]), 2, rows=300)
        result = merge(recipe(["a", "b"]))
        assert "rows of different tokens are merged" in result.err


def test_biases_of_heads_and_second_tables_are_aligned():
    """Told by the embeddings, whatever the config says; per-layer embeddings have a row for each token, too."""
    tokenizer = train("byte_bpe")
    ids = [
        write_tokenized(Path("a"), tokenizer, 1, ["<x>", "<y>"]),
        write_tokenized(Path("b"), tokenizer, 2, ["<y>", "<x>"]),
    ]
    names = ("lm_head.bias", "model.embed_tokens_per_layer.weight")
    for name, seed in (("a", 5), ("b", 6)):
        tensors = read_model(Path(name))
        rows = len(tensors[NAMES[0]][1])
        values = np.random.default_rng(seed).standard_normal((rows, 3)).astype("f4")
        write_safetensors(
            Path(name, "model.safetensors"), {**tensors, names[0]: ("F32", values[:, 0]), names[1]: ("F32", values)}
        )
        record = config(name)
        Path(name, "config.json").write_text(json.dumps({**record, "vocab_size": 999}))
    merge(recipe(["a", "b"], tokenizer_source="union"))
    output = output_ids()
    for name in names:
        got, x, y = (embeddings(Path(f), name) for f in ("out", "a", "b"))
        for token in ("<x>", "<y>"):
            want = x[ids[0][token]] + 2 * y[ids[1][token]]
            np.testing.assert_allclose(got[output[token]], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "phrases"),
    [
        ({"tokenizer_source": "nobody"}, ["r.yml:", "'nobody' is not a tokenizer source"]),
        ({"tokenizer_source": "unoin"}, ["Did you mean 'union'?"]),
        ({"tokenizer": {"sources": "base"}}, ["Did you mean 'source'?"]),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, ["pad_to_multiple_of"]),
        ({"tokenizer": {"pad_to_multiple_of": 1 << 70}}, ["pad_to_multiple_of"]),
    ],
)
def test_words_that_are_not_understood(change, phrases):
    three("byte_bpe")
    refused(recipe(["a", "b"], **change), 2, *phrases)


def test_tokenizers_that_can_not_be_read():
    three("byte_bpe")
    record = recipe(["a", "b"], tokenizer_source="union")
    Path("b/tokenizer.json").rename("b/tokenizer.model")
    refused(record, 2, "b has only a slow tokenizer", "AutoTokenizer")
    Path("b/tokenizer.model").unlink()
    refused(record, 2, "b has no tokenizer")
    Path("b/tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}')
    refused(record, 1, "both have id 0")


def test_the_same_bytes_whatever_the_hash_seed_and_threads(tmp_path):
    import hashlib
    import os
    import subprocess
    import sys

    three("byte_bpe")
    Path("r.yml").write_text(yaml.safe_dump(recipe(["a", "b", "c"], tokenizer_source="union")))
    found = set()
    for seed in range(4):
        out = f"out-{seed}"
        command = [sys.executable, "-m", "mergekit", "merge", "r.yml", out, "--quiet", "-j", str(1 + seed % 3)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": str(seed)})
        files = [Path(out, n).read_bytes() for n in ("model.safetensors", "tokenizer.json", "config.json")]
        found.add(hashlib.sha256(b"".join(files)).hexdigest())
    assert len(found) == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_vocabularies(tmp_path_factory, data):
    """Word-level vocabularies with holes, padding, and ids beyond the rows: each row is what its token says."""
    from files import config as describe
    from files import llama, write_safetensors

    folder = tmp_path_factory.mktemp("random")
    words = [f"w{i}" for i in range(12)]
    models = []
    for number, name in enumerate("abc"):
        chosen = data.draw(st.lists(st.sampled_from(words), unique=True, min_size=1, max_size=10))
        ids = data.draw(st.lists(st.integers(0, 20), unique=True, min_size=len(chosen), max_size=len(chosen)))
        rows = data.draw(st.integers(1, 24))
        vocab = dict(zip(chosen, ids, strict=True))
        path = folder / name
        path.mkdir()
        tokenizer = {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
        }
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        tensors = llama(number, code="F32", vocab=rows, layers=1)
        write_safetensors(path / "model.safetensors", tensors)
        record = describe(vocab_size=rows, num_hidden_layers=1, torch_dtype="float32")
        (path / "config.json").write_text(json.dumps(record))
        models.append((vocab, tensors["model.embed_tokens.weight"][1].astype(np.float64)))
    import mergekit as program

    source = data.draw(st.sampled_from(["union", "base", str(folder / "b")]))
    made = recipe([str(folder / n) for n in "abc"], base=str(folder / "a"), tokenizer_source=source)
    program.run_merge(made, folder / "out", quiet=True)
    output = json.loads((folder / "out/tokenizer.json").read_text())["model"]["vocab"]
    got = embeddings(folder / "out")
    assert len(got) == json.loads((folder / "out/config.json").read_text())["vocab_size"] > max(output.values())
    known = [{t: i for t, i in ids.items() if i < len(m)} for ids, m in models]
    some = {token: row for token, row in output.items() if any(token in ids for ids in known)}
    parts = aligned([(ids, m) for ids, (_, m) in zip(known, models, strict=True)], 0, some, len(got))
    rows = list(some.values())
    want = parts[0] + 2 * parts[1] + 3 * parts[2]
    np.testing.assert_allclose(got[rows], want[rows], rtol=1e-5, atol=1e-5)
    assert np.isfinite(got).all()


class TestDiff:
    """``mergekit tokenizer diff``."""

    def test_for_people(self):
        write_tokenized(Path("a"), train("byte_bpe"), 1, ["<x>", "<z>"])
        write_tokenizer(Path("b"), train("byte_bpe"), ["<y>", "<z>"], {"chat_template": "{{ 1 }}", "eos_token": "<y>"})
        result = mergekit("tokenizer", "diff", "a", "b")
        assert result.code == 0, result
        for phrase in ("1 token only in a", "1 token only in b", "'<y>'  special", "eos_token: '</s>' -> '<y>'",
                       "chat template: only b has one"):  # fmt: skip
            assert phrase in result.out

    def test_for_programs(self):
        write_tokenizer(Path("a"), train("byte_bpe"), ["<x>", "<z>"])
        ids = write_tokenizer(Path("b"), train("byte_bpe"), ["<z>"])
        record = json.loads(mergekit("tokenizer", "diff", "a", "b", "--json").out)
        assert record["moved"] == {"<z>": [ids["<z>"] + 1, ids["<z>"]]}
        assert list(record["only_first"]) == ["<x>"]

    def test_what_splits_text_otherwise(self):
        for name in "ab":
            write_tokenizer(Path(name), train("byte_bpe"))
        record = json.loads(Path("b/tokenizer.json").read_text())
        written = [merge if isinstance(merge, list) else merge.split(" ") for merge in record["model"]["merges"]]
        record["model"]["merges"] = [" ".join(merge) for merge in written]
        Path("b/tokenizer.json").write_text(json.dumps(record))
        assert "no difference" in mergekit("tokenizer", "diff", "a", "b").out
        record["model"]["merges"] = written[::-1]
        record["added_tokens"][0]["lstrip"] = True
        Path("b/tokenizer.json").write_text(json.dumps(record))
        out = mergekit("tokenizer", "diff", "a", "b").out
        assert "order of merges" in out
        assert "added token '<s>'" in out

    def test_no_difference(self):
        for name in "ab":
            write_tokenizer(Path(name), train("byte_bpe"))
        assert "no difference" in mergekit("tokenizer", "diff", "a", "b").out

    def test_no_tokenizer(self):
        Path("a").mkdir()
        assert_refused(mergekit("tokenizer", "diff", "a", "./none"), 2, "none")
