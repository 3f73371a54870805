"""An adapter on disk: what it does to each tensor of its model. No weight is read here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from mergekit.adapters.config import AdapterConfig, read_adapter_config
from mergekit.checkpoint import FileIdentity, TensorInfo
from mergekit.checkpoint.header import read_header
from mergekit.errors import CheckpointError, ModelNotFoundError

__all__ = ["WEIGHTS", "Adapter", "LowRank", "Patch", "open_adapter"]

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Where the tensors of an adapter are, the preferred form first."""

_PREFIX = "base_model.model."
_PRODUCT = re.compile(r"^(?P<module>.+?)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_EMBEDDING = re.compile(r"^(?P<module>.+?)\.(?P<part>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+?))??(?:\.weight)?$")
_MAGNITUDE = re.compile(r"^(?P<module>.+?)\.(?P<part>lora_magnitude_vector)(?:\.(?P<adapter>[^.]+?))??(?:\.weight)?$")
_SAVED = re.compile(r"^(?P<module>.+?)\.modules_to_save(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?\.(?P<rest>.+)$")
_STRANGE = re.compile(r"(^|\.)(lora_|modules_to_save|original_module|token_adapter|trainable_tokens)")


@dataclass(frozen=True, slots=True)
class LowRank:
    """The product that is added to one matrix: ``scale`` times ``b`` [out, rank] times ``a`` [rank, in].

    With a ``magnitude`` [out], each row of the sum is brought to that length (Liu et al. 2024, "DoRA").
    ``is_embedding``: the matrix is stored [in, out], for certain.
    """

    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None
    scale: float
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class Patch:
    """What an adapter does to one tensor: puts ``saved`` in its place, if given, then adds ``product``, if given."""

    saved: TensorInfo | None = None
    product: LowRank | None = None

    def tensors(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors that the patch is made of."""
        product = () if self.product is None else (self.product.a, self.product.b, self.product.magnitude)
        return tuple(info for info in (self.saved, *product) if info is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter: its settings, and its patches by the name of the tensor, as PEFT calls it."""

    folder: Path
    config: AdapterConfig
    patches: Mapping[str, Patch]
    files: tuple[FileIdentity, ...]
    pickled: bool
    notices: tuple[str, ...]


def open_adapter(folder: Path, remote: tuple[dict[str, TensorInfo], FileIdentity] | None = None) -> Adapter:
    """Read the settings and the header of the adapter in ``folder``; every one of its tensors is accounted for.

    ``remote`` is the header, where the tensors are not in the folder. ModelNotFoundError if there is no adapter,
    CheckpointError if it is damaged, hostile or can't be baked.
    """
    config = read_adapter_config(folder)
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    notices = [f"the adapter's setting {key!r} is unknown and has no effect" for key in config.unknown]
    if remote is not None:
        tensors, identity = remote
        name = identity.name
    elif name is None:
        raise ModelNotFoundError(f"{folder}: neither {WEIGHTS[0]} nor {WEIGHTS[1]}; download the adapter again")
    elif name.endswith(".bin"):
        from mergekit.checkpoint.pickles import pickle_header

        tensors, digest, notice = pickle_header(folder / name)
        notices += [notice] if notice else []
        identity = _identity(folder / name, digest)
    else:
        tensors, digest = read_header(folder / name)
        identity = _identity(folder / name, digest)
    patches = _patches(folder / name, tensors, config)
    for module in config.saves:
        if not any(patch.saved and f".{module}." in f".{target}" for target, patch in patches.items()):
            notices.append(f"the adapter saves nothing of {module!r:.80} (modules_to_save); the base's is kept")
    return Adapter(folder, config, MappingProxyType(patches), (identity,), name.endswith(".bin"), tuple(notices))


def _identity(path: Path, digest: str) -> FileIdentity:
    status = path.stat()
    return FileIdentity(path.name, status.st_size, status.st_mtime_ns, digest)


def _patches(path: Path, tensors: Mapping[str, TensorInfo], config: AdapterConfig) -> dict[str, Patch]:
    """What the tensors of an adapter do, by target."""
    found: dict[str, Patch] = {}
    products: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if not info.dtype.is_float:
            raise CheckpointError(f"{path}: tensor '{name}' is {info}; only floating adapters can be baked")
        short = name.removeprefix(_PREFIX)
        match = _PRODUCT.match(short) or _EMBEDDING.match(short) or _MAGNITUDE.match(short)
        if match:
            parts = products.setdefault(match["module"], {})
            if match["part"] in parts:
                raise CheckpointError(
                    f"{path}: '{name}' and '{parts[match['part']].name}' are of two adapters; keep one in a file"
                )
            parts[match["part"]] = info
            continue
        match = _SAVED.match(short)
        target = f"{match['module']}.{match['rest']}" if match else short.replace(".base_layer.", ".")
        if match is None and _STRANGE.search(short):
            raise CheckpointError(
                f"{path}: no way is known to bake tensor '{name}' {info}; is this a plain LoRA adapter?"
            )
        if target in found:
            raise CheckpointError(f"{path}: two tensors replace '{target}'; the adapter is damaged, download it again")
        found[target] = Patch(info)
    for module, parts in products.items():
        target = f"{module}.weight"
        found[target] = replace(found.get(target, Patch()), product=_product(path, module, parts, config))
    if not found:
        raise CheckpointError(f"{path}: the adapter holds no tensors; download it again")
    return found


def _product(path: Path, module: str, parts: Mapping[str, TensorInfo], config: AdapterConfig) -> LowRank:
    """The product of one module; CheckpointError if its parts don't fit each other or the settings."""
    is_embedding = any(part.startswith("lora_embedding") for part in parts)
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    wanted = [*names, *(["lora_magnitude_vector"] if config.has_magnitude else [])]
    missing = [name for name in wanted if name not in parts]
    extra = [name for name in parts if name not in wanted]
    if missing:
        raise CheckpointError(f"{path}: '{module}' has no '{missing[0]}'; the adapter is damaged, download it again")
    if extra:
        why = " although use_dora is off" if extra[0] == "lora_magnitude_vector" else ""
        raise CheckpointError(f"{path}: '{module}' has a '{extra[0]}'{why}; the adapter is damaged, download it again")
    a, b = parts[names[0]], parts[names[1]]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"{path}: '{a.name}' is {a}; only adapters of linear layers and embeddings can be baked")
    rank = config.rank_of(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{path}: '{module}' has matrices of rank {a.shape[0]} and {b.shape[1]}, but the settings say {rank}; "
            f"adapter_config.json belongs to another adapter, or was edited"
        )
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.size != b.shape[0]:
        raise CheckpointError(f"{path}: '{magnitude.name}' is {magnitude}, but '{module}' has {b.shape[0]} outputs")
    return LowRank(a, b, magnitude, config.scale_of(module), is_embedding)
