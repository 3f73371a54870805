"""Which files of a folder hold its weights: single files, sharded ones with an index, safetensors or pickles."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

from mergekit.checkpoint.json_text import parse_json
from mergekit.errors import CheckpointError, ModelNotFoundError
from mergekit.refs import no_folder

__all__ = ["WEIGHT_SUFFIXES", "find_weights", "is_weight_file", "read_config", "read_json", "read_weight_map"]

_CANDIDATES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")
_MAX_JSON = 256 * 1024 * 1024


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights, or says which files do."""
    return name.lower().endswith((*WEIGHT_SUFFIXES, ".safetensors.index.json", ".bin.index.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; CheckpointError names the file and the fault."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path}: too large for a JSON file of a model")
        record = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error!s:.120}); download it again, or mend it") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: expected a JSON object; download it again")
    return record


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, empty where there is none; what it says of architectures is checked."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path}: 'architectures' is not a list of names; download it again, or mend it")
    return config


def find_weights(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The weight files of ``folder`` (sorted), and the index's map of tensor to file where there is one.

    ``model.safetensors`` goes before ``pytorch_model.bin``; an index goes before the single file of its name. A
    folder without either but with exactly one safetensors file is taken to hold its weights there.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(no_folder(str(folder)))
    for name in _CANDIDATES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_weight_map(index)
            files = sorted(set(weight_map.values()))
            missing = [f for f in files if not (folder / f).is_file()]
            if missing:
                raise ModelNotFoundError(
                    f"{folder}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}; "
                    f"download the model again"
                )
            return files, weight_map
        if (folder / name).is_file():
            return [name], None
    present = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(WEIGHT_SUFFIXES))
    single = [name for name in present if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if len(single) == 1:
        return single, None
    if any(name.endswith(".gguf") for name in present):
        raise CheckpointError(f"{folder}: GGUF files can't be merged; use the safetensors version of this model")
    if any(name.startswith("adapter_") for name in present):
        raise CheckpointError(f"{folder}: this is an adapter, not a model; write base+adapter in the recipe")
    found = f"found {', '.join(present[:4])}" if present else "it holds no weights"
    raise ModelNotFoundError(f"{folder}: no model.safetensors, no pytorch_model.bin and no index of either; {found}")


def read_weight_map(index: Path) -> dict[str, str]:
    """The map from tensor to file of an index; CheckpointError for a file name that is not one."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in this index; download it again")
    is_safetensors = index.name == "model.safetensors.index.json"
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file) or file in (".", ".."):
            raise CheckpointError(
                f"{index}: tensor {tensor!r:.200} is said to be in {file!r:.200}, which is not a file name; "
                f"the index is damaged or hostile"
            )
        if file.lower().endswith(".safetensors") != is_safetensors:
            raise CheckpointError(f"{index}: {file!r} is not the kind of file that this index is for")
    return weight_map
