"""Errors of configs, safetensors files and their indices that are damaged or hostile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from error_cases_build import Build, Case, Group, config, header, several, text, without
from files import llama, write_safetensors

__all__ = ["GROUPS"]

WEIGHTS, INDEX = "models/b/model.safetensors", "models/b/model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
QUERY = "model.layers.0.self_attn.q_proj.weight"


def _cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _index(lost: str = "", **more: Any) -> Build:
    """One shard with an index that says ``more``."""

    def build(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "models/b" / SHARD)
        weight_map = {**{name: SHARD for name in llama(1) if name != lost}, **more}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return build


def _twice(folder: Path) -> None:
    """The head in two shards, of which the index lists the first."""
    norm, head = "model.norm.weight", "lm_head.weight"
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    found = llama(1)
    write_safetensors(folder / "models/b" / files[0], {n: array for n, array in found.items() if n != norm})
    write_safetensors(folder / "models/b" / files[1], {n: found[n] for n in (norm, head)})
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: files[n == norm] for n in found}}))


def _large(folder: Path) -> None:
    os.truncate(folder / "models/b/config.json", 1 << 31)


SMALL = [
    Case(
        title="A JSON file is damaged",
        build=text("models/b/config.json", "{"),
        code=1,
        message=(
            "models/b/config.json: not valid JSON (Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)); download it again, or mend it"
        ),
        meaning="Mostly a download that broke off; the small files of a model are quickly fetched again.",
    ),
    Case(
        title="A JSON file holds something else",
        build=text("models/b/config.json", "[]"),
        code=1,
        message="models/b/config.json: expected a JSON object; download it again",
        meaning="Fetch the file again: it is another one under this name.",
    ),
    Case(
        title="A JSON file is enormous",
        build=_large,
        code=1,
        message="models/b/config.json: too large for a JSON file of a model",
        meaning="Fetch the file again: configs and tokenizers have a few megabytes at most.",
    ),
    Case(
        title="The config names its architectures wrongly",
        build=config(architectures=5),
        code=1,
        message="models/b/config.json: 'architectures' is not a list of names; download it again, or mend it",
        meaning='`architectures` is a list such as `["LlamaForCausalLM"]`.',
    ),
]
HEADERS = [
    Case(
        title="The file is a git-lfs pointer",
        build=text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        code=1,
        message="models/b/model.safetensors: this is a git-lfs pointer, not the weights; run `git lfs pull`",
        meaning="The model was cloned without git-lfs: install it and run the command in the model's folder.",
    ),
    Case(
        title="The file is a web page",
        build=text(WEIGHTS, "<!DOCTYPE html><html>Not found</html>"),
        code=1,
        message=(
            "models/b/model.safetensors: this is a web page or a server's answer, not the weights; download it again"
        ),
        meaning="The server answered with a page instead of the file: open it to read what it says.",
    ),
    Case(
        title="The file is a pickle",
        build=text(WEIGHTS, b"PK\x03\x04" + bytes(50)),
        code=1,
        message=(
            "models/b/model.safetensors: this is a pickle under the name of a safetensors file; call it "
            "pytorch_model.bin"
        ),
        meaning="Pickles are read under their own name, carefully.",
    ),
    Case(
        title="The file is nearly empty",
        build=text(WEIGHTS, b"abcd"),
        code=1,
        message="models/b/model.safetensors: 4 bytes are too few for a safetensors file; download it again",
        meaning="The download broke off.",
    ),
    Case(
        title="The header is longer than the file",
        build=text(WEIGHTS, b"GGUF\x03\x00\x00\x00" + bytes(50)),
        code=1,
        message=(
            "models/b/model.safetensors: the header claims 14064895815 bytes in a file of 58; the file is "
            "truncated or not safetensors, download it again"
        ),
        meaning="The download broke off, or the file is of another format.",
    ),
    Case(
        title="The header is no JSON",
        build=header(b"hello, world"),
        code=1,
        message=(
            "models/b/model.safetensors: the header is not valid (Expecting value: line 1 column 1 (char 0)); "
            "download the file again"
        ),
        meaning="The file is damaged.",
    ),
    Case(
        title="The header is no JSON object",
        build=header([1], b""),
        code=1,
        message="models/b/model.safetensors: the header is not a JSON object; download the file again",
        meaning="The file was not written by safetensors.",
    ),
    Case(
        title="A tensor goes beyond the file",
        build=_cut,
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'lm_head.weight' claims bytes 2086 to 2520 of 2420; the file "
            "is truncated or hostile, download it again"
        ),
        meaning="The download broke off.",
    ),
    Case(
        title="A tensor has an unknown type",
        build=header({"w": {**W, "dtype": "F33"}}),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w' has the unknown dtype 'F33'; update mergekit, or download "
            "the file again"
        ),
        meaning="The file is damaged, or newer than this mergekit.",
    ),
    Case(
        title="A tensor has a type that can't be merged",
        build=header({"w": {**W, "dtype": "F4", "shape": [16]}}),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w' has the packed dtype F4, which can't be merged; use a "
            "bfloat16 or float16 version"
        ),
        meaning="Numbers of 4 bits are too coarse to be averaged.",
    ),
    Case(
        title="A tensor is described wrongly",
        build=header({"w": {**W, "shape": [-2]}}),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w' has a malformed shape or offsets; the file is damaged or "
            "hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="A tensor has no description",
        build=header({"w": 3}),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w' has no description; the file is damaged or hostile, "
            "download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="A tensor has too few bytes",
        build=header({"w": {**W, "shape": [3]}}),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w' has 8 bytes but [3] float32 needs 12; the file is damaged "
            "or hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="A name holds control characters",
        build=header({"w\x1b[31m": W}),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w\\x1b[31m' has a name with control characters; the file is "
            "damaged or hostile, download it again"
        ),
        meaning="Such a name could steer the terminal that shows it.",
    ),
    Case(
        title="Two tensors overlap",
        build=header({"v": W, "w": W}),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w' overlaps the tensor before it; the file is damaged or "
            "hostile, download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="There is a hole between tensors",
        build=header({"w": {**W, "data_offsets": [4, 12]}}, bytes(12)),
        code=1,
        message=(
            "models/b/model.safetensors: tensor 'w' is preceded by a hole; the file is damaged or hostile, "
            "download it again"
        ),
        meaning="The file is damaged, or made to harm.",
    ),
    Case(
        title="The file holds bytes of no tensor",
        build=header({"w": W}, bytes(12)),
        code=1,
        message=(
            "models/b/model.safetensors: the tensors end at byte 77 but the file has 81; it holds bytes that "
            "no tensor owns, download it again"
        ),
        meaning="Two downloads may have been written into one file.",
    ),
    Case(
        title="There are no tensors",
        build=header({}, b""),
        code=1,
        message="models/b: the weight files hold no tensors; download the model again",
        meaning="The model was saved without weights.",
    ),
]
INDICES = [
    Case(
        title="An index has no map",
        build=several(without(WEIGHTS), text(INDEX, "{}")),
        code=1,
        message="models/b/model.safetensors.index.json: no weight_map in this index; download it again",
        meaning="The index says which shard holds which tensor; without it shards can't be read.",
    ),
    Case(
        title="An index names a file elsewhere",
        build=_index(**{"lm_head.weight": "../a/model.safetensors"}),
        code=1,
        message=(
            "models/b/model.safetensors.index.json: tensor 'lm_head.weight' is said to be in "
            "'../a/model.safetensors', which is not a file name; the index is damaged or hostile"
        ),
        meaning="Shards lie beside their index. Don't trust this model.",
    ),
    Case(
        title="An index names a file of another kind",
        build=_index(**{"lm_head.weight": "pytorch_model.bin"}),
        code=1,
        message=(
            "models/b/model.safetensors.index.json: 'pytorch_model.bin' is not the kind of file that this index is for"
        ),
        meaning="Shards of safetensors and of pickles have an index each: fetch both again.",
    ),
    Case(
        title="An index lists what no shard holds",
        build=_index(ghost=SHARD),
        code=1,
        message=(
            "models/b: the index lists tensor 'ghost', but model-00001-of-00001.safetensors lacks it; download "
            "the model again"
        ),
        meaning="Index and shards are of different versions of the model.",
    ),
    Case(
        title="A shard holds what the index does not list",
        build=_index(lost="lm_head.weight"),
        code=1,
        message=(
            "models/b/model-00001-of-00001.safetensors: the index does not list tensor 'lm_head.weight' for "
            "this file; download the model again"
        ),
        meaning="Index and shards are of different versions of the model.",
    ),
    Case(
        title="Two shards hold one tensor",
        build=several(without(WEIGHTS), _twice),
        code=1,
        message=(
            "models/b: tensor 'lm_head.weight' is in both model-00001-of-00002.safetensors and "
            "model-00002-of-00002.safetensors; download the model again"
        ),
        meaning="Shards of two versions of the model are mixed.",
    ),
]
GROUPS = (
    Group("Small files of models", "Configs, indices and tokenizers are JSON.", SMALL),
    Group("Safetensors files", "Headers are read with suspicion, before a weight is.", HEADERS),
    Group("Shards", "Several weight files, and an index that says what is where.", INDICES),
)
