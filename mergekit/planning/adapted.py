"""A model with an adapter: which of its tensors change and how, and what becomes of its config."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit.adapters import Adapter, LowRank, Patch, is_four_bit_name
from mergekit.checkpoint import TensorInfo
from mergekit.dtypes import F32, DType, recipe_dtype
from mergekit.errors import IncompatibleError
from mergekit.families.align import align
from mergekit.families.config import has_no_head, is_tied, language_section, set_tied, set_vocabulary
from mergekit.families.layout import is_embedding, is_head

if TYPE_CHECKING:
    from mergekit.planning.models import Model

__all__ = ["Change", "FourBit", "adapt"]

_NOT_LINEAR = re.compile(r"embed|wte|wpe|position|token_type|norm|bias_table|(^|\.)(score|classifier|shared)\.weight$")
"""Matrices of modules that are no linear layers, or that bitsandbytes leaves as they are."""
_EXPERTS = re.compile(r"\.experts\.")
_TRANSPOSED_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True, slots=True)
class Change:
    """What gives a tensor of a model with an adapter.

    ``saved``, a tensor of the adapter, or else ``of``, a tensor of the model below; and the ``product`` added to it, of
    which ``transposed`` says whether the matrix is stored [in, out].
    """

    of: str
    saved: TensorInfo | None = None
    product: LowRank | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class FourBit:
    """The quantisation of the base under an adapter: its scheme, and the element type of each tensor concerned."""

    scheme: str
    dtypes: Mapping[str, DType]


def adapt(model: Model, adapter: Adapter, base_quantization: str) -> tuple[Model, list[str], list[str]]:
    """``model`` with ``adapter``; warnings; and notes. IncompatibleError if the adapter does not fit the model."""
    names = _names(model, adapter)
    changes = {names[name]: _change(model, adapter, names[name], patch) for name, patch in adapter.patches.items()}
    config: dict[str, Any] = copy.deepcopy(dict(model.config))
    warnings = _settle_tying(model, adapter, config, changes)
    tensors = {name: _info(model, name, changes.get(name)) for name in [*model.tensors, *changes]}
    _settle_vocabulary(model, config, tensors)
    four_bit, notes = _quantisation(model, adapter, base_quantization, changes)
    notes += [f"{model.reference.short}: {notice}" for notice in adapter.notices]
    ordered = {name: changes[name] for name in tensors if name in changes}
    made = dataclasses.replace(model, config=config, tensors=tensors, changes=ordered, four_bit=four_bit)
    return made, warnings, notes


def _names(model: Model, adapter: Adapter) -> dict[str, str]:
    """The model's names for the tensors that the adapter changes; every one of them has to be found."""
    spelled = align(adapter.patches, model.tensors)
    names, lost = {}, []
    for name in adapter.patches:
        target = spelled.get(name, name)
        if target not in model.tensors and not (is_head(name) and is_tied(model.config) and model.embedding):
            lost.append(name)
        names[name] = target
    if lost:
        more = f" (and {len(lost) - 1} more such tensors)" if len(lost) > 1 else ""
        raise IncompatibleError(
            f"{model.reference}: the adapter changes '{lost[0]}', which the model does not have{more}; "
            f"every tensor of an adapter has to be used, so take the model that it was trained on"
            + (f", {adapter.config.base!r:.80}" if adapter.config.base else "")
        )
    return names


def _change(model: Model, adapter: Adapter, name: str, patch: Patch) -> Change:
    """What a patch means for tensor ``name``, whose shape has to allow it."""
    below = name if name in model.tensors else model.embedding
    assert below is not None
    info = model.tensors[below]
    if info.dtype.kind not in ("float", "fp8"):
        raise IncompatibleError(
            f"{model.reference}: the adapter changes '{name}', which is {info}, no matrix of numbers"
        )
    shape = info.shape
    if patch.saved is not None:
        has_rows = name == model.embedding or is_embedding(name) or is_head(name)
        shape = patch.saved.shape
        if shape != info.shape and not (has_rows and len(shape) == 2 and shape[1:] == info.shape[1:] and shape[0]):
            raise _misfit(model, name, info, f"replaces it by {list(shape)}")
    product = patch.product
    if product is None:
        return Change(below, patch.saved)
    sizes = (product.b.shape[0], product.a.shape[1])
    plain, turned = shape == sizes and not product.is_embedding, shape == sizes[::-1]
    if not plain and not turned:
        raise _misfit(model, name, info, f"adds a product of {list(product.b.shape)} and {list(product.a.shape)}")
    # A square matrix does not show how it is stored; PEFT notes it where the module is not a plain linear layer.
    is_turned = turned and (not plain or adapter.config.is_transposed)
    return Change(below, patch.saved, product, is_turned)


def _misfit(model: Model, name: str, info: TensorInfo, what: str) -> IncompatibleError:
    return IncompatibleError(
        f"{model.reference}: '{name}' is {info}, but the adapter {what}; take the model that it was trained on"
    )


def _info(model: Model, name: str, change: Change | None) -> TensorInfo:
    """A tensor as the adapted model has it: in the type of the model below, with the shape of what replaces it."""
    if change is None:
        return model.tensors[name]
    below = model.tensors[change.of]
    shape = below.shape if change.saved is None else change.saved.shape
    return dataclasses.replace(below, name=name, shape=shape)


def _settle_tying(model: Model, adapter: Adapter, config: dict[str, Any], changes: dict[str, Change]) -> list[str]:
    """Give the head a tensor of its own where the adapter makes it differ from the embeddings that it was tied to.

    PEFT trains a copy: an adapter on the embeddings leaves the head as it was, and one on the head the embeddings.
    """
    embedding = model.embedding
    if not is_tied(model.config) or embedding is None:
        return []
    heads = [name for name in changes if is_head(name)]
    change = changes.get(embedding)
    if not heads and (change is None or adapter.config.ties_embeddings or has_no_head(model.config)):
        return []
    if not heads:
        assert change is not None
        if change.saved is not None and change.saved.shape[0] != model.tensors[embedding].shape[0]:
            return []  # resized with the head tied to them: the old embeddings would not fit as a head
        heads = [name for name in model.tensors if is_head(name)] or ["lm_head.weight"]
        changes[heads[0]] = Change(embedding)
    set_tied(config, False)
    return [f"{model.reference.short}: the adapter sets embeddings and head apart, so they are no longer tied"]


def _settle_vocabulary(model: Model, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Record a new number of embedding rows; IncompatibleError if the head's is another one."""
    embedding = model.embedding
    if embedding is None:
        return
    rows, before = tensors[embedding].shape[0], model.tensors[embedding].shape[0]
    for name, info in tensors.items():
        was = model.tensors.get(name)
        if is_head(name) and info.shape[0] != rows and (was is None or was.shape[0] == before) and not is_tied(config):
            raise IncompatibleError(
                f"{model.reference}: with the adapter the embeddings have {rows} rows and '{name}' {info.shape[0]}; "
                f"save both with the adapter (modules_to_save)"
            )
    if rows != before:
        set_vocabulary(config, rows)


def _quantisation(
    model: Model, adapter: Adapter, asked: str, changes: Mapping[str, Change]
) -> tuple[FourBit | None, list[str]]:
    """How the base was quantised when the adapter was trained, as far as is known, and notes on that."""
    short, trained_on = model.reference.short, adapter.config.base
    says_so = is_four_bit_name(trained_on)
    if model.checkpoint.packed:
        if asked not in ("none", "auto"):
            return None, [f"{short}: the base is stored in 4 bits; its own tables are used, not '{asked}'"]
        return None, []
    if asked == "none" or (asked == "auto" and not says_so):
        if not says_so:
            return None, []
        return None, [
            f"{short}: the adapter was trained on {trained_on!r:.80}, which is quantised; "
            f"'base_quantization: nf4-double' bakes it onto the base as it was then"
        ]
    scheme = "nf4-double" if asked == "auto" else asked
    notes = []
    if asked == "auto":
        notes.append(
            f"{short}: the base is quantised as {scheme}, because the adapter was trained on {trained_on!r:.80}"
        )
    kind = model.config.get("model_type")
    if kind in _TRANSPOSED_FAMILIES or any(_EXPERTS.search(name) for name in model.tensors):
        what = "experts" if kind not in _TRANSPOSED_FAMILIES else f"the transposed layers of '{kind}'"
        raise IncompatibleError(
            f"{model.reference}: quantising {what} to 4 bits is not built; leave 'base_quantization' out, or take a "
            f"base that is stored in 4 bits"
        )
    names = [name for name, info in model.tensors.items() if _is_quantised(name, info)]
    names = [name for name in names if name not in changes or changes[name].saved is None]
    return FourBit(scheme, {name: _load_dtype(model, model.tensors[name]) for name in names}), notes


def _is_quantised(name: str, info: TensorInfo) -> bool:
    """Whether bitsandbytes quantises a tensor: the weights of linear layers, but for the head's."""
    is_matrix = len(info.shape) == 2 and name.endswith(".weight") and info.dtype.kind in ("float", "fp8")
    return is_matrix and not is_head(name) and not is_embedding(name) and not _NOT_LINEAR.search(name)


def _load_dtype(model: Model, info: TensorInfo) -> DType:
    """The type that a model is loaded in: its config's, else its tensors'. float64 is too wide for bitsandbytes."""
    section = language_section(model.config)
    text = next((s[k] for s in (model.config, section) for k in ("dtype", "torch_dtype") if s.get(k)), None)
    dtype = recipe_dtype(text) if isinstance(text, str) else None
    dtype = dtype or info.dtype
    return dtype if dtype.is_float and dtype.size <= 4 else F32
