"""Prompt sets: files good and hostile, held-out splits, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit.errors import RecipeError, UsageError
from mergekit.moe.prompts import MAX_TOKENS, Prompt, PromptSet, hold_out, prompt_set, read_prompts, tokenise
from mergekit.moe.schema import Expert

BASE = Path(__file__).parent.parent / "models" / "base"


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path)]


# Files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\ntwo", ["one", "two"]),
        ("\n\n  one\ntwo\n\n \n", ["  one", "two"]),
        ("def f():\n    return 1\n\n\nsecond\n", ["def f():\n    return 1", "second"]),
        ("\ufeffwith a mark\n", ["with a mark"]),
        ("form\ffeed and \u2028 separators stay\nnext", ["form\ffeed and \u2028 separators stay", "next"]),
    ],
)
def test_text_files(tmp_path, content, expected):
    assert texts(written(tmp_path, "p.txt", content)) == expected


def test_places_are_lines(tmp_path):
    path = written(tmp_path, "p.txt", "\na\nb\n\n\nc\n")
    assert [p.place for p in read_prompts(path)] == [f"{path}:2", f"{path}:6"]
    path = written(tmp_path, "p.txt", "\na\nb\n")
    assert [p.place for p in read_prompts(path)] == [f"{path}:2", f"{path}:3"]
    path = written(tmp_path, "p.jsonl", '\n"a"\n\n"b"')
    assert [p.place for p in read_prompts(path)] == [f"{path}:2", f"{path}:4"]


def test_json_lines(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "x"}]
    lines = [{"prompt": "a", "answer": 1}, {"text": "b\nc"}, "d", {"messages": chat}]
    found = read_prompts(written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines))))
    assert [p.text for p in found] == ["a", "b\nc", "d", ""]
    assert found[3].messages == (("system", "Be brief."), ("user", "Hi"))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 10_000, "not JSON"),
        ("[1]", "found none of them"),
        ("null", "found none of them"),
        ("{}", "found none of them"),
        ('{"prompt": "a", "text": "b"}', 'found "prompt" and "text"'),
        ('{"prompt": 7}', "a prompt is text; found int"),
        ('{"prompt": ["a"]}', "a prompt is text; found list"),
        ('{"prompt": "  "}', "an empty prompt"),
        ('"\\ud800"', "surrogate"),
        ('"a\0b"', "NUL"),
        ('{"messages": []}', '"messages" is a list'),
        ('{"messages": "hi"}', '"messages" is a list'),
        ('{"messages": ["hi"]}', 'message 0 needs a "role"'),
        ('{"messages": [{"role": "user"}]}', 'message 0 needs a "role"'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "both text"),
        ('{"messages": [{"role": "user", "content": " "}]}', "all messages are empty"),
        ('{"messages": [{"role": "\\udfff", "content": "a"}]}', "surrogate"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_json_lines(tmp_path, line, fault):
    path = written(tmp_path, "p.jsonl", f'"good"\n{line}\n')
    with pytest.raises(RecipeError) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.jsonl", "\n", "holds no prompt"),
        ("p.txt", b"good\n\xff\xfeU\0", "p.txt:2: not UTF-8"),
        ("p.txt", "one\ntwo".encode("utf-16"), "p.txt:1: not UTF-8"),
        ("p.txt", b"good\nb\0d", "p.txt:2: a NUL"),
        ("p.csv", "a", "is no prompt file"),
        ("p", "a", "is no prompt file"),
    ],
)
def test_bad_files(tmp_path, name, content, fault):
    path = written(tmp_path, name, content)
    with pytest.raises(RecipeError, match=fault) as error:
        read_prompts(path, "r.yml:7:5")
    assert "\n" not in str(error.value)


def test_files_that_can_not_be_read(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name in ("missing.txt", "folder.txt", "nul\0.txt"):
        with pytest.raises(RecipeError, match=r"^r\.yml:7:5: cannot read the prompt file"):
            read_prompts(tmp_path / name, "r.yml:7:5")


def test_huge_files_are_refused_unread(tmp_path):
    path = tmp_path / "p.txt"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(RecipeError, match="has more than 64 MB"):
        read_prompts(path)


# Sets -----------------------------------------------------------------------------------------------------


def test_lines_of_a_recipe_and_of_files_together(tmp_path):
    written(tmp_path, "more.txt", "b\nc\n")
    expert = Expert.model_validate({"source_model": "m", "positive_prompts": ["a", "b", "a"],
                                    "positive_prompts_file": "more.txt", "negative_prompts": ["n"],
                                    "held_out_prompts": ["h"]})  # fmt: skip
    found = prompt_set(expert, tmp_path, lambda key: f"r.yml: {key}")
    assert [p.text for p in found.positive] == ["a", "b", "c"]
    assert [p.text for p in found.negative] == ["n"]
    assert [p.text for p in found.held_out] == ["h"]
    assert found.positive[0].place == "r.yml: positive_prompts"
    assert found.positive[2].place == f"{tmp_path / 'more.txt'}:2"


def test_faults_in_a_recipe_have_its_place(tmp_path):
    for entry in ({"positive_prompts": ["a", " "]}, {"negative_prompts_file": "none.txt"}):
        expert = Expert.model_validate({"source_model": "m", **entry})
        with pytest.raises(RecipeError, match=f"^r.yml {next(iter(entry))}: "):
            prompt_set(expert, tmp_path, lambda key: f"r.yml {key}")


def of(count: int, start: int = 0, held: int = 0) -> PromptSet:
    prompts = tuple(Prompt("here", f"prompt {start + i}") for i in range(count))
    return PromptSet(prompts, (), tuple(Prompt("there", f"held {start + i}") for i in range(held)))


def test_each_fourth_is_held_out():
    split, remarks = hold_out([of(8), of(11, 100)])
    assert [p.text for p in split[0].held_out] == ["prompt 3", "prompt 7"]
    assert len(split[0].positive) == 6
    assert [len(s.held_out) for s in split] == [2, 2]
    assert not {p.text for s in split for p in s.positive} & {p.text for s in split for p in s.held_out}
    assert remarks == ()


def test_nothing_is_held_out_of_few():
    sets = [of(8), of(7, 100)]
    split, remarks = hold_out(sets)
    assert split == tuple(sets)
    (remark,) = remarks
    assert "8 for expert 0, 7 for expert 1" in remark


def test_given_held_out_prompts_stay():
    split, remarks = hold_out([of(3, held=2), of(9, 100)])
    assert [len(s.held_out) for s in split] == [2, 2]
    assert [len(s.positive) for s in split] == [3, 7]
    assert remarks == ()
    leaking = PromptSet(of(3).positive, (), of(2).positive)
    assert "2 held-out prompts are calibration prompts too" in hold_out([leaking])[1][-1]


# Tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def prompt(text: str = "", *messages: tuple[str, str]) -> Prompt:
    return Prompt("p.txt:4", text, messages)


def shown(tokenizer: Any, one: Prompt, mode: str) -> tuple[str, str]:
    """The whole prompt as the model reads it, and the part of it that counts."""
    (tokens,), _ = tokenise(tokenizer, [one], mode)
    assert tokens.ids.dtype == np.int64
    assert tokens.counts.shape == tokens.ids.shape
    return tokenizer.decode(tokens.ids.tolist()), tokenizer.decode(tokens.ids[tokens.counts].tolist())


def test_modes(tokenizer):
    assert shown(tokenizer, prompt("1+2=3"), "plain") == ("<s>1+2=3", "1+2=3")
    assert shown(tokenizer, prompt("1+2=3"), "legacy") == ("<s>1+2=3", "1+2=3")
    chat, counted = shown(tokenizer, prompt("1+2=3"), "chat")
    assert chat == "<|user|>\n1+2=3<|end|>\n<|assistant|>\n"
    assert counted == "\n1+2=3\n\n"


def test_messages_use_the_template_in_every_mode(tokenizer):
    for mode in ("plain", "legacy", "chat"):
        assert shown(tokenizer, prompt("", ("user", "a"), ("assistant", "b")), mode)[0] == (
            "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n"
        )


def test_legacy_adds_the_text_of_the_start_token_to_any_tokenizer(tokenizer):
    """Also to one that adds special tokens at both ends by itself."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    both = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    other.backend_tokenizer.post_processor = both
    assert shown(other, prompt("1+2"), "plain") == ("<s>1+2</s>", "1+2")
    assert shown(other, prompt("1+2"), "legacy") == ("<s>1+2", "1+2")


def test_special_tokens_written_in_a_prompt_do_not_count(tokenizer):
    assert shown(tokenizer, prompt("<|user|>1<pad>"), "plain") == ("<s><|user|>1<pad>", "1")
    with pytest.raises(RecipeError, match=r"^p\.txt:4: the prompt has no token that counts"):
        tokenise(tokenizer, [prompt("<|user|></s>")])


def test_long_prompts_are_cut_with_a_remark(tokenizer):
    (first, second), remarks = tokenise(tokenizer, [prompt("1 2 " * 5_000_000), prompt("3")])
    assert len(first.ids) == MAX_TOKENS
    assert len(second.ids) == 2
    assert remarks == (f"prompts cut to their first {MAX_TOKENS} tokens: 1, first at p.txt:4",)


def test_no_template_is_said(tokenizer):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    bare.chat_template = None
    for one, mode in ((prompt("a"), "chat"), (prompt("", ("user", "a")), "plain")):
        with pytest.raises(UsageError, match=r"^p\.txt:4: this prompt needs a chat template"):
            tokenise(bare, [one], mode)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('system first\nplease') }}", "{% for %}", "{{ messages.x.y }}", "{{ 1 / 0 }}"]
)
def test_templates_that_refuse(tokenizer, template):
    from transformers import AutoTokenizer

    strict = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    strict.chat_template = template
    with pytest.raises(RecipeError, match=r"^p\.txt:4: the chat template of the base model refuses .*: .") as error:
        tokenise(strict, [prompt("a")], "chat")
    assert "\n" not in str(error.value)
