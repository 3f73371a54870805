"""Prompt sets: what each expert of a mixture is for, read from recipes and prompt files, split and made into tokens.

A prompt file is `.txt` (one prompt a line; if blank lines stand between its lines, one prompt a block) or `.jsonl` (one
object a line with "prompt", "text" or "messages", or a bare JSON string). Nothing in a file is run or expanded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergekit.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from mergekit.moe.schema import Expert

__all__ = ["MAX_TOKENS", "MODES", "Prompt", "PromptSet", "Tokens", "hold_out", "prompt_set", "read_prompts", "tokenise"]

MAX_TOKENS = 512
"""A prompt is cut here: routers are per token, so more prompts tell more than longer ones."""
MODES = ("plain", "legacy", "chat")
_MAX_CHARACTERS = 64 * MAX_TOKENS
_MAX_BYTES = 64 << 20
_HELD_OUT_FROM, _HELD_OUT_EVERY = 8, 4
_KEYS = ("prompt", "text", "messages")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a text, or the (role, content) messages of a chat. ``place`` says where it was written."""

    place: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one expert: those that it is for, those that it is not for, and those kept for measuring."""

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...] = ()
    held_out: tuple[Prompt, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A prompt as a model reads it: ``ids`` int64 [tokens], and ``counts`` bool [tokens]: which of them say something.

    Special and padding tokens do not.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.bool_]


# Reading --------------------------------------------------------------------------------------------------


def prompt_set(expert: Expert, folder: Path, place: Callable[[str], str]) -> PromptSet:
    """The prompts that a recipe gives an expert, in line and in files, without repetitions.

    Files are relative to ``folder``; ``place`` maps a key of the expert to where it stands. RecipeError otherwise.
    """
    groups = {}
    for kind in ("positive", "negative", "held_out"):
        key = f"{kind}_prompts"
        found = [_prompt(text, place(key)) for text in getattr(expert, key) or ()]
        file = getattr(expert, f"{key}_file")
        if file is not None:
            found += read_prompts(folder / file, place(f"{key}_file"))
        distinct: dict[Any, Prompt] = {}
        for prompt in found:
            distinct.setdefault((prompt.text, prompt.messages), prompt)
        groups[kind] = tuple(distinct.values())
    return PromptSet(**groups)


def read_prompts(path: Path, place: str | None = None) -> tuple[Prompt, ...]:
    """The prompts of a file, in order; at least one. ``place`` is where the file is named.

    RecipeError gives file and line of what is wrong.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise RecipeError(
            f"{path.name} is no prompt file; name it .txt (one prompt a line) or .jsonl (one object a line)", place
        )
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"cannot read the prompt file {path}: it is no regular file", place)
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the prompt file {path}: {reason}", place) from None
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{path} has more than {_MAX_BYTES >> 20} MB; a few hundred prompts are enough", place)
    lines = _lines(raw, path)
    prompts = _from_json(lines, path) if path.suffix == ".jsonl" else _from_text(lines, path)
    if not prompts:
        raise RecipeError(f"{path} holds no prompt; write one a line, or leave the file out", place)
    return prompts


def _lines(raw: bytes, path: Path) -> list[str]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError("not UTF-8 text; save the file as UTF-8", f"{path}:{at}") from None
    # Not splitlines: that also cuts at form feeds and at separators inside JSON strings.
    lines = text.replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise RecipeError("a NUL character: this is no text file", f"{path}:{number}")
    return lines


def _from_text(lines: Sequence[str], path: Path) -> tuple[Prompt, ...]:
    blocks: list[tuple[int, list[str]]] = []
    is_open = False
    for number, line in enumerate(lines, 1):
        if line.strip() and not is_open:
            blocks.append((number, []))
        if line.strip():
            blocks[-1][1].append(line)
        is_open = bool(line.strip())
    if len(blocks) == 1:
        first, lines = blocks[0]
        blocks = [(first + i, [line]) for i, line in enumerate(lines)]
    return tuple(_prompt("\n".join(block), f"{path}:{at}") for at, block in blocks)


def _from_json(lines: Sequence[str], path: Path) -> tuple[Prompt, ...]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or "nested too deeply, or a number too long"
            raise RecipeError(f"not JSON ({reason}); write one object a line", place) from None
        prompts.append(_entry(value, place))
    return tuple(prompts)


def _entry(value: Any, place: str) -> Prompt:
    if isinstance(value, str):
        return _prompt(value, place)
    given = [key for key in _KEYS if key in value] if isinstance(value, dict) else []
    if len(given) != 1:
        found = " and ".join(f'"{key}"' for key in given) or "none of them"
        raise RecipeError(
            f'a line is a string, or an object with one of "prompt", "text" and "messages"; found {found}', place
        )
    content = value[given[0]]
    if given[0] != "messages":
        return _prompt(content, place)
    if not isinstance(content, list) or not content:
        raise RecipeError('"messages" is a list of {"role": ..., "content": ...}', place)
    messages = []
    for i, message in enumerate(content):
        entries = message if isinstance(message, dict) else {}
        role, said = entries.get("role"), entries.get("content")
        if not isinstance(role, str) or not role or not isinstance(said, str):
            raise RecipeError(f'message {i} needs a "role" and a "content", both text', place)
        messages.append((_encodable(role, place), _encodable(said, place)))
    if not any(said.strip() for _, said in messages):
        raise RecipeError("all messages are empty", place)
    return Prompt(place, messages=tuple(messages))


def _prompt(text: Any, place: str) -> Prompt:
    if not isinstance(text, str):
        raise RecipeError(f"a prompt is text; found {type(text).__name__}", place)
    if not text.strip():
        raise RecipeError("an empty prompt; write one, or take the entry out", place)
    return Prompt(place, _encodable(text, place))


def _encodable(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError("half of a surrogate pair (\\ud800 to \\udfff alone), which is no character", place) from None
    return text


# Splitting ------------------------------------------------------------------------------------------------


def hold_out(sets: Sequence[PromptSet]) -> tuple[tuple[PromptSet, ...], tuple[str, ...]]:
    """The sets with prompts kept for measuring, and remarks on how that went.

    Sets that bring held-out prompts keep them. If every other set has at least eight positive prompts, each fourth of
    them is held out; if one has fewer, nothing more is.
    """
    others = [s for s in sets if not s.held_out]
    enough = all(len(s.positive) >= _HELD_OUT_FROM for s in others)
    split = tuple(_every_fourth(s) if not s.held_out and enough else s for s in sets)
    remarks = []
    without = [e for e, one in enumerate(split) if not one.held_out]
    if without:
        counts = ", ".join(f"{len(split[e].positive)} for expert {e}" for e in without)
        remarks.append(
            f"too few positive prompts to hold some out for measuring ({counts}): give every expert {_HELD_OUT_FROM}, "
            f"or 'held_out_prompts'"
        )
    for e, one in enumerate(split):
        used = {(p.text, p.messages) for p in one.positive}
        same = sum((p.text, p.messages) in used for p in one.held_out)
        if same:
            remarks.append(f"expert {e}: {same} held-out prompts are calibration prompts too, so its figures flatter")
    return split, tuple(remarks)


def _every_fourth(one: PromptSet) -> PromptSet:
    last = _HELD_OUT_EVERY - 1
    return dataclasses.replace(
        one,
        positive=tuple(p for i, p in enumerate(one.positive) if i % _HELD_OUT_EVERY != last),
        held_out=one.positive[last::_HELD_OUT_EVERY],
    )


# Tokens ---------------------------------------------------------------------------------------------------


def tokenise(
    tokenizer: Any, prompts: Iterable[Prompt], mode: str = "plain"
) -> tuple[tuple[Tokens, ...], tuple[str, ...]]:
    """The tokens of each prompt by a `transformers` tokenizer, and remarks on those that were cut at MAX_TOKENS.

    ``mode`` is ``plain`` (the special tokens that the tokenizer adds by itself), ``legacy`` (the text of the start
    token before the prompt and nothing by itself, as arcee mergekit does) or ``chat`` (the model's chat template, a
    text being the user's message). Prompts that are messages always go through the template. RecipeError if a prompt
    has no token that counts or the template refuses it, UsageError if there is no template.
    """
    assert mode in MODES, mode
    special = _special_ids(tokenizer)
    found, cut = [], []
    for prompt in prompts:
        templated = mode == "chat" or bool(prompt.messages)
        text = _chat(tokenizer, prompt) if templated else prompt.text
        if mode == "legacy" and not templated:
            text = (tokenizer.bos_token or "") + text
        add = mode == "plain" and not templated
        encoded = tokenizer(text[:_MAX_CHARACTERS], add_special_tokens=add, verbose=False)["input_ids"]
        ids = np.asarray(encoded[:MAX_TOKENS], np.int64)
        if len(encoded) > MAX_TOKENS or len(text) > _MAX_CHARACTERS:
            cut.append(prompt.place)
        counts = ~np.isin(ids, special)
        if not counts.any():
            raise RecipeError("the prompt has no token that counts: only special tokens, or none", prompt.place)
        found.append(Tokens(ids, counts))
    remarks = [f"prompts cut to their first {MAX_TOKENS} tokens: {len(cut)}, first at {cut[0]}"] if cut else []
    return tuple(found), tuple(remarks)


def _special_ids(tokenizer: Any) -> NDArray[np.int64]:
    """Ids of special tokens, those included that only the tokenizer's own table marks (Phi-3's `<|user|>`)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(number) for number, token in added.items() if getattr(token, "special", False)}
    return np.asarray(sorted(marked | {int(i) for i in tokenizer.all_special_ids}), np.int64)


def _chat(tokenizer: Any, prompt: Prompt) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{prompt.place}: this prompt needs a chat template, and the base model's tokenizer has none; "
            f"leave out 'apply_chat_template', or write the prompt as plain text"
        )
    messages = [{"role": role, "content": said} for role, said in prompt.messages or (("user", prompt.text),)]
    try:
        # The text, not its tokens: what the latter come wrapped in differs between versions of transformers.
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] != "assistant"
        )
    except Exception as error:  # templates raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"the chat template of the base model refuses this prompt: {reason}", prompt.place) from None
    assert isinstance(text, str)
    return text
