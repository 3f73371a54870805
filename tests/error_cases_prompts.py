"""Errors of the prompts that experts are found by."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from error_cases_build import Build, Case, Group, several, text
from error_cases_mixtures import HIDDEN, LAYERS, PLAN, RECIPE, mixture, says

__all__ = ["GROUPS"]

MAKE = "mergekit moe recipe.yml out --no-verify"


def _file(content: str | bytes, name: str = "prompts.jsonl") -> Build:
    """The first expert's prompts in a file."""
    words = RECIPE.replace('positive_prompts: ["w1 w2"]', f"positive_prompts_file: {name}")
    return mixture(text(name, content), words=words)


class _Tokenizer:
    """What transformers would make of a tokenizer that knows the words w1, w2, ...: their numbers are the ids."""

    bos_token, all_special_ids = "<s>", (0,)

    def __init__(self, chat_template: str | None = None, shift: int = 0) -> None:
        self.chat_template, self._shift = chat_template, shift

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        found = [word[1:] for word in text.replace("<s>", " ").split()]
        return {"input_ids": [int(word) + self._shift if word.isdecimal() else 0 for word in found]}

    def apply_chat_template(self, messages: object, **options: Any) -> str:
        raise ValueError("only assistants may speak")


def _reads(tokenizer: _Tokenizer | None = None) -> Callable[[], AbstractContextManager[object]]:
    """transformers, of which loading takes longer than all these tests, reads ``tokenizer``, or fails."""

    def read(*args: object, **options: object) -> _Tokenizer:
        if tokenizer is None:
            raise ValueError("Couldn't instantiate the backend tokenizer")
        return tokenizer

    module = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=read))
    return lambda: patch.dict(sys.modules, {"transformers": module})


@contextmanager
def _nan() -> Iterator[None]:
    """The layers of the base compute NaN."""
    rows = np.full((2, HIDDEN), np.nan, np.float32)
    with _reads(_Tokenizer())(), patch("mergekit.moe.calibrate._prompt_directions", lambda *a: iter([rows] * LAYERS)):
        yield


CHAT = RECIPE + "apply_chat_template: true\n"
PROMPTS = [
    Case(
        title="A prompt file has another ending",
        build=_file("w1", "prompts.csv"),
        command=PLAN,
        message=(
            "recipe.yml:5:5: prompts.csv is no prompt file; name it .txt (one prompt a line) or .jsonl (one "
            "object a line)"
        ),
        meaning="The ending says how the file is read.",
    ),
    Case(
        title="A prompt file is not there",
        build=says('positive_prompts: ["w1 w2"]', "positive_prompts_file: nowhere.txt"),
        command=PLAN,
        message="recipe.yml:5:5: cannot read the prompt file nowhere.txt: No such file or directory",
        meaning="Paths of prompt files are relative to the recipe's folder.",
    ),
    Case(
        title="A prompt file is no file",
        build=several(
            says('positive_prompts: ["w1 w2"]', "positive_prompts_file: folder.txt"),
            lambda folder: (folder / "folder.txt").mkdir(),
        ),
        command=PLAN,
        message="recipe.yml:5:5: cannot read the prompt file folder.txt: it is no regular file",
        meaning="Name one file; a folder or a pipe can't be read again when the merge continues.",
    ),
    Case(
        title="A prompt file is far too large",
        build=several(_file("w1", "prompts.txt"), lambda folder: os.truncate(folder / "prompts.txt", (64 << 20) + 1)),
        command=PLAN,
        message="recipe.yml:5:5: prompts.txt has more than 64 MB; a few hundred prompts are enough",
        meaning="Routers need a few prompts that are typical of an expert's field, not its training data.",
    ),
    Case(
        title="A prompt file is empty",
        build=_file("\n", "prompts.txt"),
        command=PLAN,
        message="recipe.yml:5:5: prompts.txt holds no prompt; write one a line, or leave the file out",
        meaning="Write prompts into it, one a line.",
    ),
    Case(
        title="A prompt file is not UTF-8",
        build=_file(b"caf\xe9\n", "prompts.txt"),
        command=PLAN,
        message="prompts.txt:1: not UTF-8 text; save the file as UTF-8",
        meaning="Save the file anew in that encoding.",
    ),
    Case(
        title="A prompt file is no text",
        build=_file(b"w1\0w2\n", "prompts.txt"),
        command=PLAN,
        message="prompts.txt:1: a NUL character: this is no text file",
        meaning="Give a text file.",
    ),
    Case(
        title="A line of prompts is no JSON",
        build=_file('{"prompt": \n'),
        command=PLAN,
        message="prompts.jsonl:1: not JSON (Expecting value); write one object a line",
        meaning="Each line of a .jsonl file is a JSON value of its own.",
    ),
    Case(
        title="A line of prompts has no prompt",
        build=_file('{"question": "w1"}\n'),
        command=PLAN,
        message=(
            'prompts.jsonl:1: a line is a string, or an object with one of "prompt", "text" and "messages"; '
            "found none of them"
        ),
        meaning="Other keys may stand beside it.",
    ),
    Case(
        title="A prompt is no text",
        build=_file('{"prompt": 3}\n'),
        command=PLAN,
        message="prompts.jsonl:1: a prompt is text; found int",
        meaning="Put it in quotes.",
    ),
    Case(
        title="A prompt is empty",
        build=_file('{"prompt": " "}\n'),
        command=PLAN,
        message="prompts.jsonl:1: an empty prompt; write one, or take the entry out",
        meaning="An empty prompt shows nothing of an expert's field.",
    ),
    Case(
        title="A prompt is broken Unicode",
        build=_file('"\\ud800"\n'),
        command=PLAN,
        message="prompts.jsonl:1: half of a surrogate pair (\\ud800 to \\udfff alone), which is no character",
        meaning="The file was cut in the middle of a character.",
    ),
    Case(
        title="Messages are no list",
        build=_file('{"messages": "w1"}\n'),
        command=PLAN,
        message='prompts.jsonl:1: "messages" is a list of {"role": ..., "content": ...}',
        meaning="A conversation is written as chat programs write it.",
    ),
    Case(
        title="A message lacks its role or content",
        build=_file('{"messages": [{"role": "user"}]}\n'),
        command=PLAN,
        message='prompts.jsonl:1: message 0 needs a "role" and a "content", both text',
        meaning="A conversation is written as chat programs write it.",
    ),
    Case(
        title="All messages are empty",
        build=_file('{"messages": [{"role": "user", "content": " "}]}\n'),
        command=PLAN,
        message="prompts.jsonl:1: all messages are empty",
        meaning="An empty prompt shows nothing of an expert's field.",
    ),
    Case(
        title="The base's tokenizer can't be read",
        build=mixture(),
        command=MAKE,
        during=_reads(),
        message=(
            "models/base: its tokenizer can't be read, which prompts need (Couldn't instantiate the backend "
            "tokenizer); gate_mode: random needs none"
        ),
        meaning="Download the tokenizer's files again.",
    ),
    Case(
        title="The base has no chat template",
        build=mixture(words=CHAT),
        command=MAKE,
        during=_reads(_Tokenizer()),
        message=(
            "recipe.yml:5:5: this prompt needs a chat template, and the base model's tokenizer has none; leave "
            "out 'apply_chat_template', or write the prompt as plain text"
        ),
        meaning="A base that was not trained for chats needs plain prompts.",
    ),
    Case(
        title="The chat template refuses a prompt",
        build=mixture(words=CHAT),
        command=MAKE,
        during=_reads(_Tokenizer("{{ messages }}")),
        message="recipe.yml:5:5: the chat template of the base model refuses this prompt: only assistants may speak",
        meaning="The template says what it does not take; write the prompt otherwise.",
    ),
    Case(
        title="A prompt has no token that counts",
        build=says("w1 w2", "unknown"),
        command=MAKE,
        during=_reads(_Tokenizer()),
        message="recipe.yml:5:5: the prompt has no token that counts: only special tokens, or none",
        meaning="The base's tokenizer knows none of the words.",
    ),
    Case(
        title="A prompt has a token without embedding",
        build=says("gate_mode: hidden", "gate_mode: cheap_embed"),
        command=MAKE,
        during=_reads(_Tokenizer(shift=30)),
        message=(
            "the base's tokenizer makes token 34 of a prompt, but the model has 31 embeddings; put the "
            "tokenizer that belongs to the model into its folder"
        ),
        meaning="Model and tokenizer in the folder are of two models.",
    ),
    Case(
        title="The base computes NaN for the prompts",
        build=mixture(),
        command=MAKE,
        code=1,
        during=_nan,
        message="layer 0 of the base model computes NaN or infinity for the prompts",
        meaning="The base's weights are damaged, or too large for float32.",
    ),
]
GROUPS = (Group("Prompts of experts", "In the recipe, or in files that it names.", PROMPTS),)
