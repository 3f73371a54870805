"""What a model is, from its headers and small files: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.errors import CheckpointError, MergekitError
from mergekit.html import html_table

if TYPE_CHECKING:
    from mergekit.adapters import Adapter
    from mergekit.planning.models import Model, Models

__all__ = ["ModelSummary", "Part", "inspect_model"]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_FORMATS = {
    "ChatML": ("<|im_start|>",),
    "Llama 3": ("<|start_header_id|>",),
    "Llama 2": ("[INST]", "<<SYS>>"),
    "Mistral": ("[INST]",),
    "Phi-3": ("<|user|>", "<|end|>"),
    "Gemma": ("<start_of_turn>",),
    "Alpaca": ("### Instruction",),
}
"""Chat formats by what stands in their templates, the more special first."""


@dataclass(frozen=True, slots=True)
class Part:
    """Like tensors: their name with ``{n}`` for numbers, role, shape, element type, and how many there are."""

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model, or an adapter by itself, in figures. Empty texts and None stand for what there is not.

    ``dtypes`` counts elements by type. ``nbytes`` is the size of the weight files. ``rows`` are those of the
    embeddings; ``tied``: the head is the embeddings (None: there is no head). ``chat`` names the format of the chat
    template. ``adapter`` and ``merge`` describe an adapter, and the merge that made the model. ``tensors`` are (name,
    shape, dtype, file).
    """

    name: str
    family: str
    architecture: str
    layers: int | None
    parameters: int
    dtypes: Mapping[str, int]
    nbytes: int
    files: tuple[str, ...]
    rows: int | None
    tied: bool | None
    experts: int | None
    vocabulary: str
    special: Mapping[str, str]
    chat: str
    quantization: str
    adapter: str
    merge: str
    notes: tuple[str, ...]
    parts: tuple[Part, ...]
    tensors: tuple[tuple[str, tuple[int, ...], str, str], ...]

    @property
    def headline(self) -> str:
        """The model in one line: ``llama, 22 layers, 1,100,048,384 parameters, bfloat16``."""
        layers = [] if self.layers is None else [f"{self.layers} layers"]
        return ", ".join([self.family, *layers, f"{self.parameters:,} parameters", " and ".join(self.dtypes)])

    def facts(self) -> list[tuple[str, str]]:
        """What is to be told, as (word, text); nothing that is not there."""
        head = {
            None: "there is no head",
            True: "the head is tied to the embeddings",
            False: "the head is a matrix of its own",
        }
        special = ", ".join(f"{name} {token!r}" for name, token in self.special.items())
        found = [
            ("family", f"{self.family}{f' ({self.architecture})' if self.architecture else ''}"),
            ("layers", "" if self.layers is None else str(self.layers)),
            ("experts", "" if self.experts is None else f"{self.experts} in each layer"),
            ("parameters", f"{self.parameters:,}"),
            ("types", ", ".join(f"{count:,} {name}" for name, count in self.dtypes.items())),
            ("size", f"{self.nbytes:,} bytes in {len(self.files)} file{'s' * (len(self.files) != 1)}"),
            ("quantization", self.quantization),
            ("embeddings", "" if self.rows is None else f"{self.rows:,} rows; {head[self.tied]}"),
            ("vocabulary", self.vocabulary),
            ("special", special),
            ("chat template", self.chat),
            ("adapter", self.adapter),
            ("merged", self.merge),
        ]  # fmt: skip
        return [(word, text) for word, text in found if text] + [("note", note) for note in self.notes]

    def record(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        record = asdict(self)
        record["tensors"] = [
            {"name": name, "shape": list(shape), "dtype": dtype, "file": file}
            for name, shape, dtype, file in self.tensors
        ]
        return {**record, "parts": [{**asdict(part), "shape": list(part.shape)} for part in self.parts]}

    def _repr_html_(self) -> str:
        """Tables for notebooks."""
        parts = [[p.name, p.role, " x ".join(map(str, p.shape)), p.dtype, f"{p.count:,}"] for p in self.parts]
        return html_table(self.name, ["", ""], self.facts()) + html_table(
            "Tensors", ["name", "role", "shape", "type", "count"], parts, numbers=1
        )


def inspect_model(reference: str | Path, *, cache_dir: Path | None = None) -> ModelSummary:
    """What the model (or adapter) ``reference`` is: a folder, or a name on the hub with ``@revision``, ``+adapter``.

    Reads headers and small files; of a model on the hub only those are fetched, and for a folder the network is never
    used. Raises a MergekitError if there is no such model, or a file of it is damaged.
    """
    from mergekit.planning.locate import reference_of, small_folder
    from mergekit.planning.models import open_models

    wanted = reference_of(str(reference))
    folder = small_folder(wanted.model, cache_dir)
    if wanted.lora is None and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _of_adapter(wanted.short, _open_adapter(wanted, cache_dir))
    models = open_models([wanted], cache_dir=cache_dir, fetch=False)
    return _of_model(models)


def _open_adapter(reference: Any, cache_dir: Path | None) -> Adapter:
    from mergekit.planning.locate import Locator

    return Locator(cache_dir=cache_dir, fetch=False).adapter(reference.model)


def _of_model(models: Models) -> ModelSummary:
    from mergekit.families.config import has_no_head, language_section

    model = models[0]
    infos = list(model.tensors.values())
    config, folder = model.config, model.checkpoint.folder
    experts = next((n for key in _EXPERTS if isinstance(n := language_section(config).get(key), int) and n > 1), None)
    embedding = model.tensors.get(model.embedding) if model.embedding else None
    vocabulary, special, notes = _vocabulary(folder, model.reference.short)
    return ModelSummary(
        name=model.reference.short,
        family=_text(config.get("model_type")) or "unknown family",
        architecture=_first_text(config.get("architectures")),
        layers=model.layout.main.count if model.layout.main else None,
        parameters=sum(info.size for info in infos),
        dtypes=_dtypes(model),
        nbytes=sum(file.size for file in model.checkpoint.files),
        files=tuple(file.name for file in model.checkpoint.files),
        rows=embedding.shape[0] if embedding is not None and embedding.shape else None,
        tied=None if has_no_head(config) else model.head is None,
        experts=experts,
        vocabulary=vocabulary,
        special=special,
        chat=_chat(folder),
        quantization=_quantization(model),
        adapter=_adapter_text(models.adapters[0][1]) if models.adapters else "",
        merge=_merge(folder),
        notes=(*notes, *models.warnings, *models.notes, *model.checkpoint.notices),
        parts=_parts(model),
        tensors=tuple((i.name, i.shape, i.dtype.name, i.file) for i in infos),
    )


def _of_adapter(name: str, adapter: Adapter) -> ModelSummary:
    """An adapter without its model: what it says of itself."""
    infos = [info for patch in adapter.patches.values() for info in patch.tensors()]
    sizes: dict[str, int] = {}
    for info in infos:
        sizes[info.dtype.name] = sizes.get(info.dtype.name, 0) + info.size
    return ModelSummary(
        name=name,
        family="LoRA adapter",
        architecture="",
        layers=None,
        parameters=sum(sizes.values()),
        dtypes=sizes,
        nbytes=sum(file.size for file in adapter.files),
        files=tuple(file.name for file in adapter.files),
        rows=None,
        tied=None,
        experts=None,
        vocabulary="",
        special={},
        chat=_chat(adapter.folder),
        quantization="",
        adapter=_adapter_text(adapter),
        merge="",
        notes=adapter.notices,
        parts=(),
        tensors=tuple((i.name, i.shape, i.dtype.name, i.file) for i in infos),
    )


def _parts(model: Model) -> tuple[Part, ...]:
    """The tensors by what they are, in the order of a model: embeddings, layers, head."""
    from mergekit.families.layout import numbers_out
    from mergekit.families.roles import role

    found: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, info in model.tensors.items():
        key = (numbers_out(name), info.shape, info.dtype.name)
        found[key] = found.get(key, 0) + 1
    parts = [Part(name, role(name), shape, dtype, count) for (name, shape, dtype), count in found.items()]
    # As a model computes: what stands before the layers, the layers, what comes after them.
    return tuple(
        sorted(parts, key=lambda p: 1 if "{n}" in p.name else 0 if model.layout.role(p.name) == "first" else 2)
    )


def _dtypes(model: Model) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for info in model.tensors.values():
        sizes[info.dtype.name] = sizes.get(info.dtype.name, 0) + info.size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _quantization(model: Model) -> str:
    if model.checkpoint.packed:
        return f"{len(model.checkpoint.packed):,} matrices packed into 4 bits (bitsandbytes), read through their tables"
    scaled = sum(info.dtype.kind == "fp8" for info in model.tensors.values())
    return f"{scaled:,} matrices in 8 bits with scales" if scaled else ""


def _vocabulary(folder: Path, name: str) -> tuple[str, Mapping[str, str], list[str]]:
    """The vocabulary in words, its special tokens, and what is wrong with it."""
    from mergekit.checkpoint import read_json
    from mergekit.vocab.templates import special_strings
    from mergekit.vocab.vocabulary import read_vocabulary

    try:
        special = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / file).is_file():
                special.update(special_strings(read_json(folder / file)))
        if not (folder / "tokenizer.json").is_file():
            return "", special, []
        found = read_vocabulary(folder, name)
    except MergekitError as error:
        return "", {}, [str(error)]
    return f"{found.kind}, {len(found.ids):,} tokens, {len(found.added):,} of them added", special, []


def _chat(folder: Path) -> str:
    """The format of the chat template, as far as it can be told by its marks."""
    from mergekit.vocab.templates import chat_template

    try:
        text = chat_template(folder)
    except (CheckpointError, OSError):
        return "can't be read"
    if not text:
        return ""
    return next((name for name, marks in _FORMATS.items() if all(mark in text for mark in marks)), "yes, of its own")


def _adapter_text(adapter: Adapter) -> str:
    config = adapter.config
    patched = [name for name, patch in adapter.patches.items() if patch.product and "." in name]
    kinds = dict.fromkeys(name.rsplit(".", 2)[-2] for name in patched)
    dora = "DoRA" if any(p.product and p.product.magnitude for p in adapter.patches.values()) else "LoRA"
    saved = sum(patch.saved is not None for patch in adapter.patches.values())
    text = f"{dora} of rank {config.rank}, alpha {config.alpha:g}, on {', '.join(kinds) or 'nothing'}"
    text += f", {saved} tensors replaced" if saved else ""
    return text + (f", for {config.base}" if config.base else "")


def _merge(folder: Path) -> str:
    """The merge that made the model, as its manifest tells."""
    from mergekit.output.manifest import read_manifest

    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return "by mergekit, but its merge_manifest.json is damaged"
    if manifest is None:
        return ""
    inputs = ", ".join(str(entry.get("model")) for entry in manifest.inputs)
    return f"by mergekit {manifest.version} from {inputs} ({manifest.recipe_name})"


def _first_text(value: object) -> str:
    return _text(value[0]) if isinstance(value, list) and value else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
