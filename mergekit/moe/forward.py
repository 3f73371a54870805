"""Forward passes of a dense model, or of a mixture made from it, with one part of one layer in memory at a time.

transformers computes: one decoder with a single layer is built from the model's config, and its weights are replaced
by those of layer after layer, so masks, windows and rotary embeddings are its own. Every prompt goes through a layer
before the next layer is read. Between layers only the residual stream is kept, without padding.

This needs layers of the form h = h + attention(norm(h)); h = h + mlp(norm(h)): see MODEL_TYPES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mergekit.errors import CheckpointError, IncompatibleError, RunError
from mergekit.families.config import layer_count, vocab_size
from mergekit.families.rope import read_rope
from mergekit.moe.prompts import Tokens

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

__all__ = ["MODEL_TYPES", "Routes", "Weights", "capture", "embeddings_of", "route"]

MODEL_TYPES = ("phi3", "llama", "mistral")
_EMBEDDINGS = "model.embed_tokens.weight"
BATCH_TOKENS = 1024
"""Tokens, padding included, that go through a layer at once: activations stay near 200 MB at Phi-3-mini's sizes."""
_NO_IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
_REMEDY = "gate_mode random and cheap_embed need no forward pass"


class Weights(Protocol):
    """The tensors of a dense model and of the experts made from it, each read when it is asked for."""

    config: Mapping[str, Any]
    """config.json of the dense model."""

    def tensor(self, name: str) -> Tensor:
        """A tensor of the dense model, by its name there (``model.layers.3.self_attn.qkv_proj.weight``)."""

    def expert(self, expert: int, name: str) -> Tensor:
        """A tensor of an expert's MLPs, by its name in a dense model."""

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """Rows of a tensor of the dense model, [ids, columns], without the rest of it in memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Where a mixture sends the tokens that count, prompt after prompt.

    ``chosen`` int64 [layers, tokens, experts per token], the likeliest first; ``probabilities`` float32
    [layers, tokens, experts], before the choice.
    """

    chosen: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def capture(
    weights: Weights,
    prompts: Sequence[Tokens],
    what: Literal["residual", "mlp_input"],
    *,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[NDArray[np.float32]]:
    """For each layer of the dense model, what every token of the prompts looks like there, float32 [tokens, hidden].

    ``residual`` is the stream that enters the layer, ``mlp_input`` the normed stream that enters its MLP (what a
    router sees). Tokens are those of all prompts in a row, special ones included. An array is good until the next one
    is asked for.
    """
    layers = _layers(weights.config)
    stream = _Stream(weights, prompts, device, batch_tokens)
    for layer in range(layers):
        is_last = layer == layers - 1
        if what == "residual":
            yield stream.state.cpu().numpy()
            if is_last:
                return
        inputs = stream.attend(layer)
        if what == "mlp_input":
            yield inputs.cpu().numpy()
        if not is_last:
            stream.load_mlp(layer, weights.tensor)
            stream.feed_forward(inputs)


def route(
    weights: Weights,
    gates: NDArray[np.float32],
    experts_per_token: int,
    prompts: Sequence[Tokens],
    *,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    on_layer: Callable[[int, int], None] = lambda layer, layers: None,
) -> Routes:
    """Run the mixture with router rows ``gates`` [layers, experts, hidden] and say where the prompts' tokens go.

    As Mixtral: a softmax over all experts, the likeliest ``experts_per_token`` of them, weights that add up to 1.
    ``on_layer`` is told each finished layer and their number.
    """
    import torch

    layers, experts = len(gates), gates.shape[1]
    counts = np.concatenate([p.counts for p in prompts])
    stream = _Stream(weights, prompts, device, batch_tokens)
    chosen, probabilities = [], []
    for layer in range(layers):
        inputs = stream.attend(layer)
        with torch.inference_mode():
            likely = torch.softmax(inputs @ torch.from_numpy(gates[layer]).to(inputs).T, dim=-1)
            share, choice = torch.topk(likely, experts_per_token, dim=-1)
            share /= share.sum(-1, keepdim=True)
        chosen.append(choice.cpu().numpy()[counts])
        probabilities.append(likely.cpu().numpy()[counts])
        for expert in range(experts) if layer < layers - 1 else ():
            rows, place = torch.nonzero(choice == expert, as_tuple=True)
            if len(rows):
                stream.load_mlp(layer, partial(weights.expert, expert))
                stream.feed_forward(inputs, rows, share[rows, place])
        on_layer(layer + 1, layers)
    return Routes(np.stack(chosen), np.stack(probabilities))


def embeddings_of(weights: Weights, prompts: Sequence[Tokens]) -> tuple[Tensor, NDArray[np.int64]]:
    """The embeddings of the prompts' distinct tokens, float32 [distinct, hidden], and for each token in a row its own.

    Each embedding is read once. IncompatibleError if the tokenizer makes tokens that the model has no embedding for.
    """
    distinct, place = np.unique(np.concatenate([p.ids for p in prompts]), return_inverse=True)
    vocabulary = vocab_size(weights.config)
    if vocabulary is not None and distinct[-1] >= vocabulary:
        raise IncompatibleError(
            f"the base's tokenizer makes token {distinct[-1]} of a prompt, but the model has {vocabulary} embeddings; "
            f"put the tokenizer that belongs to the model into its folder"
        )
    return weights.rows(_EMBEDDINGS, distinct.tolist()).float(), place.reshape(-1)


class _Stream:
    """The residual stream of all prompts, ``state`` [tokens, hidden], and the one layer that it is moved through."""

    def __init__(self, weights: Weights, prompts: Sequence[Tokens], device: str, batch_tokens: int) -> None:
        import torch

        self._weights, self._device, self._batch_tokens = weights, device, batch_tokens
        self._decoder, self._seen, self._mlp = _build(weights.config, device)
        self._batches = list(_batches([len(p.ids) for p in prompts], batch_tokens, _boundary(weights.config)))
        table, place = embeddings_of(weights, prompts)
        self.state = table[torch.from_numpy(place)].to(device)

    def attend(self, layer: int) -> Tensor:
        """Move the stream through a layer's attention; returns the inputs of its MLP, [tokens, hidden]."""
        import torch

        inner = self._decoder.layers[0]
        for name, parameter in inner.named_parameters():
            if not name.startswith("mlp."):
                full = f"model.layers.{layer}.{name}"
                _fill(parameter, self._weights.tensor(full), full)
        inputs = torch.empty_like(self.state)
        with torch.inference_mode():
            for index, is_real in self._batches:
                index, is_real = index.to(self._device), is_real.to(self._device)
                mask = is_real.long()
                out = self._decoder(inputs_embeds=self.state[index], attention_mask=mask, use_cache=False)
                inputs[index[is_real]] = self._seen.pop()[is_real]
                self.state[index[is_real]] = out.last_hidden_state[is_real]
        return inputs

    def load_mlp(self, layer: int, read: Callable[[str], Tensor]) -> None:
        """Take the weights of a layer's MLP from ``read``, a function of their dense names."""
        for name, parameter in self._mlp.named_parameters():
            full = f"model.layers.{layer}.mlp.{name}"
            _fill(parameter, read(full), full)

    def feed_forward(self, inputs: Tensor, rows: Tensor | None = None, share: Tensor | None = None) -> None:
        """Add the loaded MLP of ``inputs`` to the stream: for all tokens, or for ``rows`` [n] times ``share`` [n]."""
        import torch

        rows = torch.arange(len(inputs), device=inputs.device) if rows is None else rows
        with torch.inference_mode():
            for start in range(0, len(rows), self._batch_tokens):
                part = slice(start, start + self._batch_tokens)
                out = self._mlp(inputs[rows[part]])
                self.state[rows[part]] += out if share is None else out * share[part, None]


def _build(config: Mapping[str, Any], device: str) -> tuple[Any, list[Tensor], Module]:
    """A decoder of one layer whose MLP gives zero, the list that its MLP's inputs are put in, and an MLP of real size.

    With an MLP of zeros, what leaves the layer is the stream between attention and MLP.
    """
    import torch
    import transformers

    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise IncompatibleError(
            f"prompts can be run through {', '.join(MODEL_TYPES)} models only, and this is '{kind}'; {_REMEDY}"
        )
    try:
        # No vocabulary and one neuron: neither embeddings nor the zero MLP take memory.
        small = _config(config, num_hidden_layers=1, vocab_size=1, intermediate_size=1, **_NO_IDS)
        auto: Any = transformers.AutoModel
        decoder = auto.from_config(small, attn_implementation="sdpa").float().eval().to(device)
        decoder.requires_grad_(False)
        decoder.norm = torch.nn.Identity()
        seen: list[Tensor] = []
        zero = decoder.layers[0].mlp
        for parameter in zero.parameters():
            parameter.zero_()
        zero.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.device("meta"):
            mlp = type(zero)(_config(config)).float().eval().requires_grad_(False)
        # A short text shows now whether this version can compute the model at all.
        with torch.inference_mode():
            decoder(inputs_embeds=torch.zeros(1, 2, small.hidden_size, device=device), use_cache=False)
        seen.clear()
        return decoder, seen, mlp.to_empty(device=device)
    except Exception as error:  # each version has faults of its own for configs that it can't read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"transformers {transformers.__version__} can't run this {kind} model ({reason}); "
            f"try a newer transformers; {_REMEDY}"
        ) from error


def _config(entries: Mapping[str, Any], **changes: Any) -> Any:
    """The config object of a dense model with ``changes``; no code of the model's own, no quantisation."""
    import transformers

    found = {**entries, **changes}
    for key in ("model_type", "auto_map", "architectures", "quantization_config", "dtype", "torch_dtype",
                "attn_implementation", "_attn_implementation", "transformers_version"):  # fmt: skip
        found.pop(key, None)
    if "rope_parameters" in found and int(transformers.__version__.split(".")[0]) < 5:
        # Version 4 passes over the keys of version 5 without a word.
        rope = read_rope(entries)
        del found["rope_parameters"]
        found["rope_theta"], found["partial_rotary_factor"], scaling = rope.theta, rope.partial, dict(rope.scaling)
        if rope.original is not None:
            found["original_max_position_embeddings"] = rope.original
        if rope.kind != "default":
            if entries["model_type"] == "phi3":
                scaling = {key: scaling[key] for key in ("short_factor", "long_factor")} | {"type": rope.kind}
            found["rope_scaling"] = scaling if "type" in scaling else {**scaling, "rope_type": rope.kind}
    return transformers.AutoConfig.for_model(entries["model_type"], **found)


def _fill(parameter: Parameter, tensor: Tensor, name: str) -> None:
    if parameter.shape != tensor.shape:
        raise CheckpointError(
            f"tensor {name} is {list(tensor.shape)}, but the sizes in config.json ask for {list(parameter.shape)}"
        )
    parameter.data.copy_(tensor)


def _layers(config: Mapping[str, Any]) -> int:
    found = layer_count(config)
    assert found, "a dense model has layers"
    return found


def _boundary(config: Mapping[str, Any]) -> int:
    """The length from which longrope takes its long factors, for all that is in a batch; 0 if there is none."""
    rope = read_rope(config)
    return (rope.original or 0) if rope.kind == "longrope" else 0


def _batches(lengths: Sequence[int], limit: int, boundary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts of similar length together, padded on the right: their tokens' places in the stream, and which are real.

    int64 and bool [prompts, longest]; padding points at the prompt's first token. Prompts longer than ``boundary``
    and others never share a batch.
    """
    import torch

    starts = np.cumsum([0, *lengths[:-1]])
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        most = max(1, limit // longest)
        batch = [i for i in order[:most] if not boundary or (lengths[i] > boundary) == (longest > boundary)]
        del order[: len(batch)]
        place = np.arange(longest)
        is_real = place < np.array([[lengths[i]] for i in batch])
        index = np.array([[starts[i]] for i in batch]) + place * is_real
        yield torch.from_numpy(index), torch.from_numpy(is_real)
