"""Chat templates: those that come with us against known renderings, and what recipes may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from command import assert_refused, mergekit_yaml
from mergekit.vocab.render import render
from mergekit.vocab.templates import BUILT_IN, built_in, chat_template, template_fault
from tokenizer_files import train, write_tokenized, write_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
]

RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello."
        "<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nHi.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nBye.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi. [/INST] Hello.</s>[INST] Bye. [/INST]",
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi.\n\n### Response:\nHello.\n\n### Instruction:\nBye.\n\n### Response:\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi.\n[|assistant|]Hello.[|endofturn|]\n[|user|]Bye.\n[|assistant|]"
    ),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name):
    assert render(built_in(name), [SYSTEM, *TALK], TOKENS, prompt=True) == RENDERED[name]
    assert template_fault(built_in(name), TOKENS) is None


@pytest.mark.parametrize("name", BUILT_IN)
def test_transformers_renders_them_alike(name, tmp_path):
    import transformers

    write_tokenizer(tmp_path, train("byte_bpe"))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = built_in(name)
    found = tokenizer.apply_chat_template([SYSTEM, *TALK], tokenize=False, add_generation_prompt=True)
    assert found == RENDERED[name]


def test_exaone_puts_an_empty_system_first():
    assert render(built_in("exaone"), TALK[:1], TOKENS).startswith("[|system|][|endofturn|]\n[|user|]Hi.\n")


def test_mistral_wants_turns():
    with pytest.raises(Exception, match="take turns"):
        render(built_in("mistral"), [TALK[0], TALK[0]], TOKENS)


FAULTY = {
    "syntax": ("{% for m in messages %}{{ m.content }", "line 1"),
    "unknown filter": ("{{ messages | frobnicate }} and more", "frobnicate"),
    "undefined call": ("{{ frobnicate(messages) }} and more", "undefined"),
    "memory": ("{{ 'x' * 10000000000 }} and some more", "memory"),
    "time": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_templates_that_can_not_be_used(name):
    text, phrase = FAULTY[name]
    assert phrase in (template_fault(text, TOKENS) or "")


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = train("byte_bpe")
    own = {"a": "{{ 'a' }}{{ messages }}", "b": "{{ 'b' }}{{ messages }}", "c": "{{ 'b' }}{{ messages }}"}
    for seed, (name, text) in enumerate(own.items()):
        write_tokenized(Path(name), tokenizer, seed, settings={"chat_template": text})


def merged(template: str, **more: object) -> str | None:
    record = {"merge_method": "linear", "models": [{"model": m} for m in "abc"], "parameters": {"weight": 1}, **more}
    Path("r.yml").write_text(yaml.safe_dump({**record, "chat_template": template}))
    result = mergekit_yaml("r.yml", "out", "--overwrite")
    assert result.code == 0, result
    return chat_template(Path("out"))


@pytest.mark.parametrize("more", [{}, {"tokenizer_source": "union"}])
def test_what_recipes_ask_for(models, more):
    assert merged("chatml", **more) == built_in("chatml").strip()
    assert (
        json.loads(Path("out/tokenizer_config.json").read_text())["chat_template"].strip() == built_in("chatml").strip()
    )
    assert merged("auto", **more) == "{{ 'b' }}{{ messages }}", "what most models have"
    for text in ("{{ bos_token }}{{ messages[0].content }}", "{{ x }}", "{%if 1%}a{%endif%}"):
        assert merged(text, **more) == text


def test_tokens_that_a_template_needs_and_the_vocabulary_lacks(models):
    record = {"merge_method": "linear", "models": [{"model": m} for m in "abc"], "parameters": {"weight": 1}}
    Path("r.yml").write_text(yaml.safe_dump({**record, "chat_template": "chatml"}))
    assert "<|im_start|>, <|im_end|>, which the vocabulary does not have" in mergekit_yaml("r.yml", "out").err
    Path("a/tokenizer.json").write_text("{}")
    assert mergekit_yaml("r.yml", "out2").code == 0, "nothing else asks for the vocabulary"


@pytest.mark.parametrize(
    "template",
    ["chatlm", "no template at all, but long enough", "{ no template, either }", "{{ messages", FAULTY["syntax"][0]],
)
def test_what_recipes_may_not_say(models, template):
    record = {"merge_method": "linear", "models": [{"model": m} for m in "abc"], "parameters": {"weight": 1}}
    Path("r.yml").write_text(yaml.safe_dump({**record, "chat_template": template}))
    assert_refused(mergekit_yaml("r.yml", "out"), 2, "r.yml:", "chat template")
