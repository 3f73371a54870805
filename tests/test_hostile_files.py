"""Weight files that are damaged or made to harm: refused by name, with what is wrong and what to do, before any merge.

One test per way to be bad. (Pickles: test_pickles. Quantised files: test_quantized.)
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command import assert_refused, mergekit_yaml, refusal
from files import config, llama, raw_safetensors, write_model, write_recipe, write_safetensors, write_sharded
from mergekit.checkpoint import open_checkpoint
from mergekit.checkpoint.header import MAX_HEADER
from mergekit.errors import CheckpointError

WEIGHTS = "model.safetensors"
DAMAGED = "the file is damaged or hostile, download it again"
RECIPE = """
merge_method: linear
models:
- model: x
- model: b
parameters: {weight: 1}
"""


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Work in a folder with two small models, ``x`` (to be spoilt) and ``b``."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("x"), 1)
    write_model(Path("b"), 2)
    write_recipe(Path("r.yml"), RECIPE)


def refused(code: int, *phrases: str) -> None:
    assert_refused(mergekit_yaml("r.yml", "out"), code, *phrases)
    assert not Path("out").exists()


def entry(**changes: object) -> dict[str, object]:
    """A header with the one tensor ``w`` of 8 bytes."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


W = entry()["w"]
HEADERS: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"hello, world", bytes(8), "the header is not valid"),
    "not UTF-8": (b'{"\xff": 1}', bytes(8), "the header is not valid"),
    "empty": (b"", b"", "the header is not valid"),
    "half": (b'{"w": {"dtype": "F32", "sha', bytes(8), "the header is not valid"),
    "deep lists": (b"[" * 90_000, b"", "the header is not valid (nested too deeply)"),
    "deep objects": (b'{"a":' * 90_000, b"", "the header is not valid (nested too deeply)"),
    "a list": ([1], b"", "the header is not a JSON object"),
    "null": (None, b"", "the header is not a JSON object"),
    "no tensors": ({}, b"", "the weight files hold no tensors"),
    "only metadata": ({"__metadata__": {"format": "pt"}}, b"", "the weight files hold no tensors"),
    "a tensor that is a number": ({"w": 3}, bytes(8), "tensor 'w' has no description"),
    "end beyond the file": (entry(shape=[4], data_offsets=[0, 16]), bytes(8), "claims bytes 0 to 16 of 8"),
    "begin beyond the file": (entry(data_offsets=[1 << 60, (1 << 60) + 8]), bytes(8), "of 8; the file is truncated"),
    "negative": (entry(data_offsets=[-8, 0]), bytes(8), DAMAGED),
    "reversed": (entry(data_offsets=[8, 0]), bytes(8), "claims bytes 8 to 0 of 8"),
    "fractions for offsets": (entry(data_offsets=[0.0, 8.0]), bytes(8), "a malformed shape or offsets"),
    "truths for offsets": (entry(data_offsets=[False, 8]), bytes(8), "a malformed shape or offsets"),
    "text for offsets": (entry(data_offsets=["0", "8"]), bytes(8), "a malformed shape or offsets"),
    "three offsets": (entry(data_offsets=[0, 8, 8]), bytes(8), "a malformed shape or offsets"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "a malformed shape or offsets"),
    "offsets of more than 64 bits": (entry(data_offsets=[0, 1 << 64]), bytes(8), "a malformed shape or offsets"),
    "a negative shape": (entry(shape=[-2]), bytes(8), "a malformed shape or offsets"),
    "two negative sides": (entry(shape=[-1, -2]), bytes(8), "a malformed shape or offsets"),
    "a fraction in the shape": (entry(shape=[2.0]), bytes(8), "a malformed shape or offsets"),
    "a truth in the shape": (entry(shape=[True, 2]), bytes(8), "a malformed shape or offsets"),
    "NaN in the shape": (entry(shape=[float("nan")]), bytes(8), "a malformed shape or offsets"),
    "a shape that is a number": (entry(shape=2), bytes(8), "a malformed shape or offsets"),
    "a hundred axes": (entry(shape=[1] * 100 + [2]), bytes(8), "a malformed shape or offsets"),
    "an enormous side": (entry(shape=[10**400]), bytes(8), "a number of hundreds of digits"),
    "digits without end": (b'{"w":{"dtype":"F32","shape":[%s]}}' % (b"9" * 5000), bytes(8), "is not valid"),
    "a shape that overflows": (entry(shape=[1 << 40, 1 << 40]), bytes(8), "has 8 bytes but"),
    "a shape that wraps around to fit": (entry(shape=[1 << 62, 1 << 2, 2]), bytes(8), "has 8 bytes but"),
    "too few bytes for the shape": (entry(shape=[3]), bytes(8), "has 8 bytes but [3] float32 needs 12"),
    "unknown dtype": (entry(dtype="F33"), bytes(8), "the unknown dtype 'F33'"),
    "a dtype that is a number": (entry(dtype=3), bytes(8), "the unknown dtype 3"),
    "a dtype that is a list": (entry(dtype=["F32"]), bytes(8), "the unknown dtype ['F32']"),
    "complex numbers": (entry(dtype="C64", shape=[1]), bytes(8), "C64, which can't be merged"),
    "four-bit floats": (entry(dtype="F4", shape=[16]), bytes(8), "F4, which can't be merged"),
    "the same name twice": (
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16), "the name 'w' occurs twice",
    ),
    "the same key twice": (
        b'{"w":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8), "'dtype' occurs twice",
    ),
    "two tensors on the same bytes": ({"v": W, "w": W}, bytes(8), "overlaps the tensor before it"),
    "two tensors that overlap": (
        {**entry(), "v": {**entry()["w"], "data_offsets": [4, 12]}}, bytes(12), "'v' overlaps the tensor before it",
    ),
    "a hole at the start": (entry(data_offsets=[4, 12]), bytes(12), "'w' is preceded by a hole"),
    "a hole between": ({**entry(), "v": {**entry()["w"], "data_offsets": [16, 24]}}, bytes(24), "'v' is preceded by"),
    "bytes that no tensor owns": (entry(), bytes(12), "bytes that no tensor owns"),
    "controls in a name": ({"w\x1b[31m": W}, bytes(8), "tensor 'w\\x1b[31m' has a name with control characters"),
    "a name that turns around": (
        {"w\u202egnp.exe": W}, bytes(8), "tensor 'w\\u202egnp.exe' has a name with control characters"
    ),
    "a name that is no text": (b'{"\\ud800":%s}' % json.dumps(W).encode(), bytes(8), "half of a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case):
    header, data, phrase = HEADERS[case]
    raw_safetensors(Path("x", WEIGHTS), header, data)
    place = "x: " if phrase == "the weight files hold no tensors" else f"x/{WEIGHTS}: "
    remedy = "use a bfloat16 or float16 version" if "can't be merged" in phrase else "download"
    refused(1, place, phrase, remedy)


@pytest.mark.parametrize("length", [200, MAX_HEADER + 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_its_file(length):
    raw_safetensors(Path("x", WEIGHTS), entry(), bytes(8), length=length)
    refused(1, f"x/{WEIGHTS}: the header claims {length} bytes in a file of", "download it again")


def test_a_header_that_would_take_too_much_memory():
    """Bytes enough in the file, but more than anyone's list of tensors needs: not read at all."""
    with Path("x", WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER + 1))
        stream.truncate(MAX_HEADER + 100)
    refused(1, f"the header claims {MAX_HEADER + 1} bytes")


OTHERS = {
    b"": "0 bytes are too few",
    b"abcd": "4 bytes are too few",
    bytes(8): "the header is not valid",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "a git-lfs pointer, not the weights; run",
    b"<!DOCTYPE html><html>Not found</html>": "a web page or a server's answer",
    b"\n  <html>Not found</html>": "a web page or a server's answer",
    b'{"error": "Repository not found"}': "a web page or a server's answer",
    b"PK\x03\x04" + bytes(50): "a pickle under the name of a safetensors file; call it pytorch_model.bin",
    b"\x80\x02}q\x00." + bytes(50): "a pickle under the name of a safetensors file",
    b"GGUF\x03\x00\x00\x00" + bytes(50): "truncated or not safetensors",
}


@pytest.mark.parametrize("content", OTHERS, ids=OTHERS.values())
def test_files_that_are_something_else(content):
    Path("x", WEIGHTS).write_bytes(content)
    refused(1, f"x/{WEIGHTS}: ", OTHERS[content])


@pytest.mark.parametrize("length", [0x3C, 0x3C + 256, 0x7B, 0x7B + 256, 0x50, 0x80 + 256])
def test_a_sound_header_whose_length_looks_like_text_is_read(length):
    """A length is a number: its lowest byte may well be that of ``<`` or ``{``."""
    text = json.dumps(entry(), separators=(",", ":")).encode().ljust(length)
    raw_safetensors(Path("x", WEIGHTS), text, bytes(8))
    assert list(open_checkpoint(Path("x")).tensors) == ["w"]


@pytest.mark.parametrize("lost", [1, 100, 1900])
def test_a_truncated_file(lost):
    path = Path("x", WEIGHTS)
    path.write_bytes(path.read_bytes()[:-lost])
    refused(1, f"x/{WEIGHTS}: ", "truncated", "download it again")


def test_empty_and_scalar_tensors_and_any_order_are_sound():
    """Nothing to refuse: zero elements, no axes, metadata of any kind, names out of the order of their offsets."""
    header = {
        "__metadata__": {"format": "pt"},
        "c": {"dtype": "F32", "shape": [], "data_offsets": [8, 12]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]},
    }
    raw_safetensors(Path("x", WEIGHTS), header, bytes(12))
    tensors = open_checkpoint(Path("x")).tensors
    assert list(tensors) == ["a", "b", "c"]
    assert [info.shape for info in tensors.values()] == [(2,), (0, 5), ()]


@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_weights_that_are_no_file(kind):
    path = Path("x", WEIGHTS)
    path.unlink()
    {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}[kind]()
    refused(2, "r.yml:3:3: x: no model.safetensors", "it holds no weights")


# Indices

NAMES = list(llama(1))
SHARD = "s1.safetensors"


def index(weight_map: object, name: str = "model.safetensors.index.json") -> None:
    """Make ``x`` a checkpoint of one shard with an index."""
    Path("x", WEIGHTS).rename(Path("x", SHARD))
    Path("x", name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


WHOLE = dict.fromkeys(NAMES, SHARD)


def test_a_sound_index_is_read():
    index(WHOLE)
    assert sorted(open_checkpoint(Path("x")).tensors) == sorted(NAMES)


@pytest.mark.parametrize("file", [
    "../b/model.safetensors", "/etc/passwd", "sub/s1.safetensors", "./s1.safetensors", "..", ".", "",
    "..\\b\\model.safetensors", "s1.safetensors/", "a\0b.safetensors", "a\nb.safetensors", "a" * 300, 3, None, [SHARD],
    True, {"a": 1},
])  # fmt: skip
def test_an_index_names_only_files_beside_it(file):
    index({**WHOLE, NAMES[0]: file})
    refused(1, "x/model.safetensors.index.json: ", f"'{NAMES[0]}'", "which is not a file name", "damaged or hostile")


@pytest.mark.parametrize("file", ["x.bin", "config.json", "s1"])
def test_an_index_names_files_of_one_kind(file):
    index({**WHOLE, NAMES[0]: file})
    Path("x", file).touch()
    refused(1, "x/model.safetensors.index.json: ", f"'{file}' is not the kind of file")


def test_an_index_of_pickles_names_no_safetensors():
    index(WHOLE, "pytorch_model.bin.index.json")
    refused(1, "x/pytorch_model.bin.index.json: ", "is not the kind of file")


def test_an_index_lists_what_no_shard_holds():
    index({**WHOLE, "ghost": SHARD})
    refused(1, "x: the index lists tensor 'ghost', but s1.safetensors lacks it", "download the model again")


def test_an_index_leaves_out_what_a_shard_holds():
    index(dict.fromkeys(NAMES[1:], SHARD))
    refused(1, f"x/{SHARD}: the index does not list tensor '{NAMES[0]}'", "download the model again")


def test_a_tensor_in_two_shards():
    shutil.rmtree("x")
    write_model(Path("x"), tensors={})
    Path("x", WEIGHTS).unlink()
    write_sharded(Path("x"), [llama(1), {NAMES[0]: llama(2)[NAMES[0]]}])
    refused(1, f"'{NAMES[0]}'", "download the model again")


@pytest.mark.parametrize("weight_map", [[], {}, "x", None, 3])
def test_an_index_without_a_map(weight_map):
    index(weight_map)
    refused(1, "x/model.safetensors.index.json: no weight_map", "download it again")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"weight_map": 1, "weight_map": NaN}'])
def test_an_index_that_is_no_json_object(text):
    index(WHOLE)
    Path("x/model.safetensors.index.json").write_text(text)
    refused(1, "x/model.safetensors.index.json: ", "download it again")


# Anything at all

Json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats() | st.sampled_from(["", "F32", "BF16", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
Offsets = st.lists(st.integers(-2, 20) | Json, max_size=3)
Entry = Json | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3"]) | Json, "shape": Offsets | Json,
     "data_offsets": Offsets | st.sampled_from([[0, 8], [0, 4], [4, 8]])}
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=3), Entry, max_size=3), st.integers(0, 12))
def test_any_header_is_read_or_refused(header, size):
    raw_safetensors(Path("x", WEIGHTS), header, bytes(size))
    fault = refusal(open_checkpoint, Path("x"))
    if fault is not None:
        assert fault.exit_code == 1
    else:
        assert sum(info.nbytes for info in open_checkpoint(Path("x")).tensors.values()) == size


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_file_is_found_or_harmless(data):
    """Flipped, lost or added bytes: the file is refused, or each tensor still lies inside it."""
    write_safetensors(Path("y"), {"a": ("F32", np.zeros((3, 5), "<f4")), "b": ("BF16", np.zeros(7, "<u2"))})
    raw = bytearray(Path("y").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path = Path("x", WEIGHTS)
    path.write_bytes(raw)
    try:
        tensors = open_checkpoint(Path("x")).tensors
    except CheckpointError:
        return
    for info in tensors.values():
        assert 8 < info.offset <= info.offset + info.nbytes <= len(raw)


KEYS = [*config(), "rope_scaling", "rope_theta", "rope_parameters", "quantization_config", "text_config",
        "eos_token_id", "layer_types", "sliding_window"]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), Json, max_size=4))
def test_any_config_is_read_or_refused(changes):
    """What a config says is checked where it is used; nonsense in it is never a fault of the program."""
    import mergekit

    Path("x", "config.json").write_text(json.dumps({**config(), **changes}))
    refusal(mergekit.plan, "r.yml")
