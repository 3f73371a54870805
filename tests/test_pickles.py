"""Pickled checkpoints: the same result as from safetensors, byte for byte; and no pickle ever runs code."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import Result, assert_refused, mergekit_yaml
from files import llama, write_model, write_recipe, write_safetensors
from mergekit.checkpoint import open_checkpoint
from mergekit.checkpoint.pickle_bombs import is_bomb

LEGACY = {"_use_new_zipfile_serialization": False}
PICKLE = "x/pytorch_model.bin"
RECIPE = """
merge_method: linear
models:
- model: x
  parameters: {weight: 1}
- model: b
  parameters: {weight: 2}
"""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Work in a folder with two small models; ``x`` has a config but no weights yet."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("x"), 1)
    Path("x/model.safetensors").unlink()
    write_model(Path("b"), 2)
    write_recipe(Path("r.yml"), RECIPE)


def tensors(seed: int = 1, code: str = "BF16") -> dict[str, torch.Tensor]:
    """The tensors of ``files.llama`` as torch's, by reinterpreting their bytes."""
    found = {}
    for name, (kind, array) in llama(seed, code=code).items():
        flat = torch.frombuffer(bytearray(array.tobytes()), dtype=DTYPES[kind])
        found[name] = flat.reshape(array.shape)
    return found


def merged(out: str = "out") -> bytes:
    result = mergekit_yaml("r.yml", out)
    assert result.code == 0, result.err
    return Path(out, "model.safetensors").read_bytes()


def reference(code: str = "BF16") -> bytes:
    """The result from safetensors."""
    write_model(Path("y"), 1, code=code)
    write_recipe(Path("s.yml"), RECIPE.replace("model: x", "model: y"))
    assert mergekit_yaml("s.yml", "expected").code == 0
    return Path("expected/model.safetensors").read_bytes()


def shared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor a view of one storage."""
    whole = torch.cat([value.reshape(-1) for value in state.values()])
    sizes = [value.numel() for value in state.values()]
    return {name: part.view(value.shape) for (name, value), part in zip(state.items(), whole.split(sizes), strict=True)}


SAVED: dict[str, Any] = {
    "as it is": dict,
    "an ordered dictionary": OrderedDict,
    "inside state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "inside two": lambda state: {"state_dict": {"state_dict": state}},
    "parameters": lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
    "transposed": lambda state: {n: v.t().contiguous().t() if v.dim() == 2 else v for n, v in state.items()},
    "every other element": lambda state: {n: torch.stack([v + 1, v], -1)[..., 1] for n, v in state.items()},
    "views of one storage": shared,
    "among other things": lambda state: {"step": 3, **state, "name": "x", "none": None},
}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", SAVED)
def test_the_result_is_that_of_safetensors(form, options):
    torch.save(SAVED[form](tensors()), PICKLE, **options)
    assert merged() == reference()


@pytest.mark.parametrize("code", ["F16", "F32", "F64"])
def test_the_result_is_that_of_safetensors_in_every_dtype(code):
    torch.save(tensors(code=code), PICKLE)
    assert merged() == reference(code)


def test_tensors_without_axes_and_without_elements():
    more = {
        "model.scale": ("F32", np.array(0.7, "<f4")),
        "model.steps": ("I64", np.array(12345, "<i8")),
        "model.none": ("F32", np.zeros((0, 3), "<f4")),
    }
    write_model(Path("b"), tensors={**llama(2), **more})
    write_model(Path("y"), tensors={**llama(1), **more})
    state = {name: torch.from_numpy(array.copy()) for name, (_, array) in more.items()}
    torch.save({**tensors(), **state}, PICKLE)
    write_recipe(Path("s.yml"), RECIPE.replace("model: x", "model: y"))
    assert mergekit_yaml("s.yml", "expected").code == 0
    assert merged() == Path("expected/model.safetensors").read_bytes()
    assert open_checkpoint(Path("x")).tensors["model.scale"].shape == ()


def test_negated_views_are_read_as_they_are_meant():
    state = tensors()
    torch.save({name: value.neg()._neg_view() for name, value in state.items()}, PICKLE)
    assert merged() == reference()


def test_two_names_for_one_tensor():
    """Tied weights share a storage: both names are there, each with the whole tensor."""
    state = tensors()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, PICKLE)
    write_model(Path("y"), tensors={**llama(1), "lm_head.weight": llama(1)["model.embed_tokens.weight"]})
    write_recipe(Path("s.yml"), RECIPE.replace("model: x", "model: y"))
    assert mergekit_yaml("s.yml", "expected").code == 0
    assert merged() == Path("expected/model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_shards_with_an_index(options):
    items = list(tensors().items())
    parts = {"pytorch_model-00001-of-00002.bin": items[:5], "pytorch_model-00002-of-00002.bin": items[5:]}
    for name, part in parts.items():
        torch.save(dict(part), Path("x", name), **options)
    weight_map = {tensor: name for name, part in parts.items() for tensor, _ in part}
    Path("x/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert merged() == reference()


def test_safetensors_go_before_pickles():
    Path(PICKLE).write_bytes(b"never looked at")
    write_safetensors(Path("x/model.safetensors"), llama(1))
    assert merged() == reference()


def test_only_legacy_pickles_are_read_whole_and_say_so():
    torch.save(tensors(), PICKLE, **LEGACY)
    notes = mergekit_yaml("r.yml", "out").lines("note")
    assert notes == [
        "note: x: pytorch_model.bin is an old pickle without a table of contents: it is read whole into memory"
    ]
    torch.save(tensors(), PICKLE)
    assert mergekit_yaml("r.yml", "out2").lines("note") == []


def test_a_pickle_that_changes_is_read_anew():
    torch.save(tensors(1), PICKLE)
    first = merged()
    torch.save(tensors(7), PICKLE)
    assert merged("out2") != first


# Hostile


class Runs:
    """Unpickled by plain ``pickle``, this makes a file called ``marker``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def refused(*phrases: str) -> Result:
    result = mergekit_yaml("r.yml", "out")
    assert_refused(result, 1, PICKLE, *phrases)
    assert not Path("out").exists()
    assert not Path("marker").exists()
    assert "\x1b" not in result.err
    return result


CODE = {
    "os.system": Runs(os.system, "touch marker"),
    "eval": Runs(eval, "open('marker', 'w')"),
    "exec": Runs(exec, "open('marker', 'w')"),
    "os.mkdir": Runs(os.mkdir, "marker"),
    "open": Runs(io.open, "marker", "w"),
    "getattr": Runs(getattr, os, "system"),
    "import": Runs(__import__, "os"),
}


def test_the_pickles_here_do_run_code_when_they_are_let():
    pickle.loads(pickle.dumps(CODE["os.mkdir"]))
    assert Path("marker").exists()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", [n for n in CODE if n != "getattr"])
def test_pickles_that_run_code_are_refused(name, options):
    torch.save({"a": CODE[name], **tensors()}, PICKLE, **options)
    refused("this pickle asks for '", "could run code: refused; use the safetensors version")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["os.system", "eval", "os.mkdir"])
def test_bare_pickles_that_run_code_are_refused(name, protocol):
    Path(PICKLE).write_bytes(pickle.dumps(CODE[name], protocol))
    refused("use the safetensors version")


@pytest.mark.parametrize("raw", [
    b"cposix\nsystem\n(S'touch marker'\ntR.",
    b"c__builtin__\neval\n(S'open(\"marker\", \"w\")'\ntR.",
    b"(S'touch marker'\nios\nsystem\n.",
    b"ctorch\nload\n(S'/etc/passwd'\ntR.",
    b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
])  # fmt: skip
def test_handwritten_pickles_are_refused(raw):
    Path(PICKLE).write_bytes(raw)
    refused("use the safetensors version")


OTHERS = {
    b"": "damaged, or not a pickle of tensors",
    b"junk": "damaged, or not a pickle of tensors",
    b"<!DOCTYPE html><html></html>": "a web page or a server's answer",
    b'{"error": "not found"}': "a web page or a server's answer",
    b"version https://git-lfs.github.com/spec/v1\n": "a git-lfs pointer, not the weights; run `git lfs pull`",
}


@pytest.mark.parametrize("content", OTHERS, ids=repr)
def test_files_that_are_something_else(content):
    Path(PICKLE).write_bytes(content)
    refused(OTHERS[content])


def test_safetensors_under_the_name_of_a_pickle():
    write_safetensors(Path(PICKLE), llama(1))
    refused("damaged, or not a pickle of tensors")


@pytest.mark.parametrize("lost", [1, 100, 3000])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_truncated_pickle(options, lost):
    torch.save(tensors(), PICKLE, **options)
    Path(PICKLE).write_bytes(Path(PICKLE).read_bytes()[:-lost])
    refused("damaged, or not a pickle of tensors; download it again")


def rezip(change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the pickle anew, with each record changed by ``change(name, bytes)``."""
    with zipfile.ZipFile(PICKLE) as old:
        records = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(PICKLE, "w", compression) as new:
        for name, content in records:
            new.writestr(name, change(name, content))


def test_a_record_that_is_shorter_than_its_tensor():
    torch.save(tensors(), PICKLE)
    rezip(lambda name, content: content[:4] if name.endswith("/data/3") else content)
    refused("its tensors overlap", "download it again")


def test_a_compressed_archive():
    """Mapped, its bytes would be taken for numbers; unpacked, they might have no end."""
    torch.save(tensors(), PICKLE)
    rezip(lambda name, content: bytes(50 << 20) if name.endswith("data.pkl") else content, zipfile.ZIP_DEFLATED)
    refused("a compressed archive")


def test_a_tar_archive():
    with tarfile.open(PICKLE, "w") as archive:
        archive.add("b/config.json", "pickle")
    refused("a tar archive", "use the safetensors version")


CONTENTS: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "expected a dictionary of tensors, found list"),
    "a tensor": (torch.zeros(3), "expected a dictionary of tensors, found Tensor"),
    "sparse": ({"q": torch.eye(3).to_sparse()}, "tensor 'q' is torch.sparse_coo"),
    "on no device": ({"q": torch.ones(3, device="meta")}, "tensor 'q' is torch.strided on meta"),
    "complex": ({"q": torch.ones(3, dtype=torch.complex64)}, "complex64, which can't be merged"),
    "numbers for names": ({0: torch.ones(3)}, "0 is not the name of a tensor"),
    "controls in a name": ({"q\x1b[31m": torch.ones(3)}, "'q\\x1b[31m' is not the name of a tensor"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_what_is_no_plain_tensor_is_refused(case):
    content, phrase = CONTENTS[case]
    torch.save({**tensors(), **content} if isinstance(content, dict) else content, PICKLE)
    refused(phrase)


def test_a_pickle_without_tensors():
    torch.save({"step": 3}, PICKLE)
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "x: the weight files hold no tensors")


def test_a_few_bytes_that_claim_to_be_terabytes():
    """An expanded tensor: counted in full while planning, never allocated."""
    torch.save({**tensors(), "q": torch.ones(1).expand(10**13)}, PICKLE)
    assert_refused(mergekit_yaml("r.yml", "out", "--quiet"), 1, "free some space")
    assert not Path("out").exists()


def test_a_missing_shard_of_pickles():
    Path("x/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    assert_refused(mergekit_yaml("r.yml", "out"), 2, "r.yml:3:3: x: 1 of 1 shards are missing", "download the model")


def nested(kind: Callable[[Any], Any]) -> Any:
    value: Any = []
    for _ in range(60):
        value = kind(value)
    return value


def a_list_in_itself() -> list[Any]:
    value: list[Any] = []
    value.append({"x": value})
    return value


BOMBS = {
    "lists": lambda: nested(lambda value: [value] * 8),
    "tuples": lambda: nested(lambda value: (value, value)),
    "values": lambda: nested(lambda value: {"a": value, "b": value}),
    "itself": a_list_in_itself,
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", BOMBS)
def test_pickles_without_end_are_refused(name, protocol):
    """Small files, and no code in them: but walking through what they describe would take for ever."""
    raw = pickle.dumps(BOMBS[name](), protocol)
    assert is_bomb(io.BytesIO(raw))
    assert is_bomb(io.BytesIO(raw[:-1] + b"R"))  # what comes before a damage counts
    Path(PICKLE).write_bytes(raw)
    refused("its objects contain each other")


@pytest.mark.parametrize("protocol", range(6))
def test_shared_objects_are_no_bombs(protocol):
    shared = ["float32", (1, 2)]
    value = {f"layer {i}": [shared, {"a": shared}, ("x", {1, 2})] for i in range(2000)}
    assert not is_bomb(io.BytesIO(pickle.dumps(value, protocol)))
