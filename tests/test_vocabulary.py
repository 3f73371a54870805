"""Vocabularies: read, united, mapped; nothing of a tensor."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from command import refusal
from mergekit.vocab.alphabet import as_bytes
from mergekit.vocab.maps import token_map
from mergekit.vocab.union import as_text, unite, with_tokens
from mergekit.vocab.vocabulary import Vocabulary, read_vocabulary, vocabulary_of
from tokenizer_files import KINDS, TEXTS, train, write_tokenizer


def vocabulary(tmp_path: Path, name: str, tokenizer: Tokenizer, added: Any = ()) -> Vocabulary:
    write_tokenizer(tmp_path / name, tokenizer, added)
    return read_vocabulary(tmp_path / name, name)


def loaded(found: Vocabulary) -> Tokenizer:
    """The tokenizer that the library makes of a vocabulary; it has the same ids."""
    tokenizer = Tokenizer.from_str(as_text(found))
    assert tokenizer.get_vocab(with_added_tokens=True) == dict(found.ids)
    return tokenizer


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_library_reads_we_read(tmp_path, kind):
    found = vocabulary(tmp_path, "a", train(kind), ["<|im_start|>"])
    assert loaded(found).token_to_id("<|im_start|>") == found.ids["<|im_start|>"]
    assert found.by_id[found.ids["<s>"]] == "<s>"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_alone_change_nothing_else(tmp_path, kind):
    tokenizer = train(kind)
    a = vocabulary(tmp_path, "a", tokenizer, ["<|im_start|>", "<|im_end|>"])
    b = vocabulary(tmp_path, "b", tokenizer, ["<|eot_id|>", "<|im_end|>"])
    found, warnings = unite([a, b], [None, None])
    assert warnings == []
    assert found.ids == {**a.ids, "<|eot_id|>": a.size}
    union = loaded(found)
    for text in TEXTS:
        assert split(union, text) == split(tokenizer, text)
    talk = "<|im_start|>seven<|eot_id|>fox<|im_end|>"
    assert [t for t in split(union, talk) if t.startswith("<|")] == ["<|im_start|>", "<|eot_id|>", "<|im_end|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_stay_out_of_the_model_where_they_can(tmp_path, kind):
    """There, they would change how text is split: as pieces, as beginnings of words, in other cases of letters."""
    tokenizer = train(kind)
    a = vocabulary(tmp_path, "a", tokenizer, ["<x>"])
    b = vocabulary(tmp_path, "b", tokenizer, ["qui", "<x>"])
    found, _ = unite([a, b], [None, None])
    assert found.record["model"]["vocab"] == a.record["model"]["vocab"]
    loaded(found)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_first_stay_and_all_tokens_are_there(tmp_path, kind):
    a = vocabulary(tmp_path, "a", train(kind, TEXTS[:2]), ["<a>"])
    b = vocabulary(tmp_path, "b", train(kind, TEXTS[2:]), ["<b>"])
    found, warnings = unite([a, b], [None, None])
    assert dict(found.ids).items() >= dict(a.ids).items()
    assert set(found.ids) == set(a.ids) | set(b.ids)
    fresh = [t for t, _ in sorted(b.ids.items(), key=lambda x: x[1]) if t not in a.ids]
    assert [found.by_id[i] for i in range(a.size, found.size)] == fresh, "in the order of ids there"
    assert any("of its own" in text for text in warnings)
    union = loaded(found)
    if kind in ("byte_bpe", "piece_bpe"):  # those that can spell everything
        for text in TEXTS:
            assert union.decode(union.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize("kind", ["byte_bpe", "piece_bpe"])
def test_bpe_splits_as_both_did_where_they_agree(tmp_path, kind):
    a = vocabulary(tmp_path, "a", train(kind, TEXTS[:3], 320))
    b = vocabulary(tmp_path, "b", train(kind, TEXTS[1:], 320))
    union = loaded(unite([a, b], [None, None])[0])
    same = 0
    for word in {word for text in TEXTS for word in text.split()}:
        if split(loaded(a), word) == split(loaded(b), word):
            same += 1
            assert split(union, word) == split(loaded(a), word)
    assert same > 10


def test_a_grown_tokenizer_is_united_to_itself(tmp_path):
    small, large = train("byte_bpe", TEXTS, 280), train("byte_bpe", TEXTS, 330)
    a, b = vocabulary(tmp_path, "a", small), vocabulary(tmp_path, "b", large)
    assert set(a.ids) < set(b.ids)
    union = loaded(unite([a, b], [None, None])[0])
    for text in TEXTS:
        assert split(union, text) == split(large, text)


def test_tokens_of_another_alphabet_are_matched_by_what_they_spell(tmp_path):
    a = vocabulary(tmp_path, "a", train("byte_bpe"))
    b = vocabulary(tmp_path, "b", train("piece_bpe"), ["<|end|>"])
    places = token_map(a, b)
    shared = [t for t in a.ids if t.startswith("\u0120") and len(t) > 1 and "\u2581" + t[1:] in b.ids]
    assert len(shared) > 3
    for token in shared:
        assert places[a.ids[token]] == b.ids["\u2581" + token[1:]]
    assert places[a.ids["\u010a"]] == b.ids.get("\n", b.ids["<0x0A>"])
    assert places[a.ids["\u00c3"]] == b.ids["<0xC3>"]
    found, warnings = unite([a, b], [None, None])
    assert "\u2581" + shared[0][1:] not in found.ids, "it is there in another spelling"
    assert "<|end|>" in found.ids
    assert any("become added tokens" in text for text in warnings)
    loaded(found)


def test_a_letter_is_its_own_piece_before_it_is_a_byte(tmp_path):
    a = vocabulary(tmp_path, "a", train("byte_bpe"))
    b = vocabulary(tmp_path, "b", train("piece_bpe"))
    places = token_map(a, b)
    assert places[a.ids["e"]] == b.ids["e"]
    assert places[a.ids["\u0120"]] == b.ids["\u2581"]


@pytest.mark.parametrize("kinds", list(itertools.permutations(["byte_bpe", "piece_bpe", "unigram"], 2)))
def test_every_token_of_a_union_has_a_row(tmp_path, kinds):
    """Whatever is taken over from a model, that model has a row for; what spells one text is one token."""
    made = [
        vocabulary(tmp_path, k, train(k, t), [f"<{k}>"]) for k, t in zip(kinds, (TEXTS[:3], TEXTS[1:]), strict=True)
    ]
    found, _ = unite(made, [None, None])
    has = np.stack([token_map(found, one) >= 0 for one in made])
    lonely = [found.by_id[i] for i in np.flatnonzero(~has.any(axis=0)).tolist()]
    assert lonely == []
    loaded(found)


def test_what_is_joined_is_not_added_once_more(tmp_path):
    other = vocabulary(tmp_path, "b", train("byte_bpe", TEXTS[1:], 330))
    a, piece = (
        vocabulary(tmp_path, "a", train("byte_bpe", TEXTS[:1], 280)),
        vocabulary(tmp_path, "c", train("piece_bpe")),
    )
    for order in ([a, other, piece], [a, piece, other]):
        found, _ = unite(order, [None] * 3)
        spelt = {as_bytes(t, "bytes") for t in found.ids if t not in found.added}
        assert not [t for t, e in found.added.items() if not e["special"] and t.encode() in spelt]


def test_files_without_a_type_and_tokens_beside_them(tmp_path):
    for kind, expected in (("unigram", "Unigram"), ("wordpiece", "WordPiece"), ("byte_bpe", "BPE")):
        write_tokenizer(tmp_path / kind, train(kind))
        path = tmp_path / kind / "tokenizer.json"
        record = json.loads(path.read_text())
        del record["model"]["type"]
        path.write_text(json.dumps(record))
        assert read_vocabulary(tmp_path / kind, kind).kind == expected
    beside = tmp_path / kind / "added_tokens.json"
    beside.write_text('{"[PAD]": 9000, "<s>": 77, "odd": "x"}')
    found = read_vocabulary(tmp_path / kind, kind)
    assert found.ids["[PAD]"] == 9000
    assert found.ids["<s>"] == 0
    for text, phrase in (('{"[PAD]": 16777214}', "mostly empty"), ('{"\\ud800": 9000}', "half of a surrogate pair")):
        beside.write_text(text)
        assert phrase in str(refusal(read_vocabulary, tmp_path / kind, kind))


def test_what_has_no_union_is_refused(tmp_path):
    a = vocabulary(tmp_path, "a", train("wordpiece"))
    b = vocabulary(tmp_path, "b", train("byte_bpe"))
    assert "have no union" in str(refusal(unite, [a, b], [None, None]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_new_gives_the_first_itself(tmp_path, kind):
    tokenizer = train(kind)
    a = vocabulary(tmp_path, "a", tokenizer, ["<x>", "<y>"])
    b = vocabulary(tmp_path, "b", tokenizer, ["<y>"])
    assert unite([a, b], [None, None])[0] is a
    ordinary = next(token for token in a.ids if token not in a.added)
    assert with_tokens(a, ["<x>", ordinary]) is a, "an ordinary token stays one"


def test_ids_beyond_the_embeddings_are_missing(tmp_path):
    tokenizer = train("byte_bpe")
    a = vocabulary(tmp_path, "a", tokenizer)
    b = vocabulary(tmp_path, "b", tokenizer, ["<in>", "<out>"])
    found, _ = unite([a, b], [None, b.ids["<out>"]])
    assert "<in>" in found.ids
    assert "<out>" not in found.ids


def test_settings_that_differ_are_told(tmp_path):
    tokenizer = train("byte_bpe")
    a = vocabulary(tmp_path, "a", tokenizer, [AddedToken("<x>", lstrip=True, special=True)])
    b = vocabulary(tmp_path, "b", tokenizer, [AddedToken("<x>", lstrip=False, special=True)])
    found, warnings = unite([a, b], [None, None])
    assert found.added["<x>"]["lstrip"] is True
    assert warnings == ["the added token '<x>' is set up otherwise by b; as in a, lstrip is true"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_maps_say_which_row_has_the_token(data):
    letters = st.text("abcdef", min_size=1, max_size=3)
    tokens = [data.draw(st.lists(letters, unique=True, min_size=1, max_size=30)) for _ in range(2)]
    made = []
    for number, words in enumerate(tokens):
        ids = data.draw(st.lists(st.integers(0, 60), unique=True, min_size=len(words), max_size=len(words)))
        record = {"model": {"type": "WordLevel", "vocab": dict(zip(words, ids, strict=True)), "unk_token": "a"}}
        made.append(vocabulary_of(record, str(number), "here"))
    found, _ = unite(made, [None, None])
    for one in made:
        places = token_map(found, one)
        assert len(places) == found.size
        for token, number in found.ids.items():
            assert places[number] == one.ids.get(token, -1)
        assert (places >= 0).sum() == len(one.ids)


def test_a_large_union():
    """150,000 tokens and three models."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(200_000)]
    made = []
    for number in range(3):
        chosen = rng.permutation(len(words))[:150_000]
        vocab = {words[w]: i for i, w in enumerate(chosen.tolist())}
        made.append(vocabulary_of({"model": {"type": "WordLevel", "vocab": vocab}}, str(number), "here"))
    found, _ = unite(made, [None] * 3)
    assert found.size == len({token for one in made for token in one.ids})
    for one in made:
        assert (token_map(found, one) >= 0).sum() == 150_000


HOSTILE: dict[str, tuple[Any, str]] = {
    "no model": ({}, "no 'model'"),
    "unknown type": ({"model": {"type": "Magic", "vocab": {}}}, "type 'Magic'"),
    "vocab is a list": ({"model": {"type": "BPE", "vocab": [1], "merges": []}}, "does not map tokens to ids"),
    "ids are text": ({"model": {"type": "WordLevel", "vocab": {"a": "1"}}}, "does not map tokens to ids"),
    "negative id": ({"model": {"type": "WordLevel", "vocab": {"a": -1}}}, "does not map tokens to ids"),
    "huge id": ({"model": {"type": "WordLevel", "vocab": {"a": 1 << 40}}}, "does not map tokens to ids"),
    "two tokens of one id": ({"model": {"type": "WordLevel", "vocab": {"a": 1, "b": 1}}}, "both have id 1"),
    "pieces without scores": ({"model": {"type": "Unigram", "vocab": ["a"]}}, "list of pieces and scores"),
    "merges are a number": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}}, "'merges' is not a list"),
    "a merge of three": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a a"]}}, "not a merge of two"),
    "a merge of strangers": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a z"]}}, "not in the vocabulary"),
    "added tokens are text": ({"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": "x"}, "is not a list"),
    "an added token without id": (
        {"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": [{"content": "x"}]},
        "is not an added token",
    ),
    "an added token with two ids": (
        {
            "model": {"type": "WordLevel", "vocab": {}},
            "added_tokens": [{"content": "x", "id": 1}, {"content": "x", "id": 2}],
        },
        "has two ids, 1 and 2",
    ),
    "a merge into nothing": (
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}},
        "not in the vocabulary",
    ),
    "a score that is no number": ({"model": {"type": "Unigram", "vocab": [["a", float("nan")]]}}, "pieces and scores"),
    "a huge score": ({"model": {"type": "Unigram", "vocab": [["a", -(10**400)]]}}, "hundreds of digits"),
    "an id far away": ({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 16777214}}}, "mostly empty"),
    "half a surrogate pair": ({"model": {"type": "WordLevel", "vocab": {"\ud800": 0}}}, "half of a surrogate pair"),
    "a prefix that is a number": (
        {"model": {"type": "WordPiece", "vocab": {}, "continuing_subword_prefix": 5}},
        "is no text",
    ),
    "a flag that is text": (
        {"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": [{"content": "x", "id": 0, "special": "no"}]},
        "is not true or false",
    ),
    "an added token that is another": (
        {"model": {"type": "WordLevel", "vocab": {"x": 0}}, "added_tokens": [{"content": "x", "id": 1}]},
        "but the vocabulary gives it 0",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_contradicts_itself_is_refused(tmp_path, name):
    record, phrase = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert phrase in str(refusal(read_vocabulary, tmp_path, "m"))
