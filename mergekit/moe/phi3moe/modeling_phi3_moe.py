"""Phi-3 with a mixture of experts in place of each MLP; for transformers 4.48 and newer, 4 and 5.

Only the mixture is written here. Attention, rotary scaling, windows, caches and generation are those of the installed
Phi-3, so the model does what the dense model does in that version. Tensors have the names of Phi-3, but for those in
``model.layers.{i}.mlp``: ``gate.weight``, ``experts.{e}.gate_up_proj.weight`` and ``experts.{e}.down_proj.weight``.

Sizes: N tokens, E experts, K experts per token, H hidden.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import (
    Phi3DecoderLayer,
    Phi3ForCausalLM,
    Phi3MLP,
    Phi3Model,
    Phi3PreTrainedModel,
)

from .configuration_phi3_moe import Phi3MoEConfig

__all__ = ["Phi3MoEForCausalLM", "Phi3MoEModel", "Phi3MoEPreTrainedModel", "load_balancing_loss"]

# A context variable and not an attribute of the modules: parallel threads share modules, and an attribute would keep
# the graph of the last forward pass alive.
_recorded: ContextVar[list[torch.Tensor] | None] = ContextVar("recorded router logits", default=None)


@contextmanager
def _recording(wanted: bool) -> Iterator[list[torch.Tensor]]:
    """The list to which routers add their logits, layer by layer; empty unless ``wanted``."""
    logits: list[torch.Tensor] = []
    token = _recorded.set(logits if wanted else None)
    try:
        yield logits
    finally:
        _recorded.reset(token)


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The softmax of router logits, in float32 or wider."""
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], num_chosen: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """How unevenly tokens spread over the experts: K when even, up to E when not.

    E times the sum over experts of (assignments per token) x (mean probability), all layers' tokens together, as in
    Mixtral. ``router_logits``: [N, E] of each layer; ``attention_mask``: N ones and zeros, where zeros don't count.
    Fedus et al. 2021, Switch Transformers, equations 4 to 6.
    """
    probabilities = torch.cat([_probabilities(logits).to(router_logits[0].device) for logits in router_logits])
    assigned = torch.zeros_like(probabilities).scatter(1, probabilities.topk(num_chosen, dim=-1).indices, 1.0)
    if attention_mask is None:
        counted = probabilities.new_ones(len(probabilities), 1)
    else:
        counted = attention_mask.to(probabilities).reshape(-1, 1).repeat(len(router_logits), 1)
    # No matrix products: autocast would round them.
    per_expert = (counted * assigned).sum(dim=0) * (counted * probabilities).sum(dim=0)
    return probabilities.shape[1] * per_expert.sum() / counted.sum() ** 2


class Phi3MoEBlock(nn.Module):
    """A router and the experts it chooses from."""

    def __init__(self, config: Phi3MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Phi3MLP(config) for _ in range(config.num_local_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum of the chosen experts' outputs, by their probabilities; [..., H] to [..., H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.gate(tokens)
        if (record := _recorded.get()) is not None:
            record.append(logits)
        weights, chosen = _probabilities(logits).topk(self.config.num_experts_per_tok, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).flatten()
        # Assignments (token, rank) by expert; one transfer of the counts serves all experts.
        chosen = chosen.flatten()
        picks = chosen.argsort(stable=True).split(chosen.bincount(minlength=len(self.experts)).tolist())
        # In bfloat16 each sum would lose bits: experts that agree must give exactly what one of them gives.
        mixed = torch.zeros_like(tokens, dtype=weights.dtype)
        for expert, picked in zip(self.experts, picks, strict=True):
            # In training idle experts get a gradient of zero: distributed training waits for parameters that get none.
            if len(picked) or self.training:
                rows = picked // self.config.num_experts_per_tok
                mixed.index_add_(0, rows, expert(tokens[rows]).to(mixed.dtype) * weights[picked, None])
        return mixed.to(hidden_states.dtype).view_as(hidden_states)


class Phi3MoEDecoderLayer(Phi3DecoderLayer):
    """A layer of Phi-3 with a mixture for its MLP."""

    def __init__(self, config: Phi3MoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = Phi3MoEBlock(config)


class Phi3MoEPreTrainedModel(Phi3PreTrainedModel):
    """What the two model classes share."""

    config_class = Phi3MoEConfig
    _no_split_modules = ["Phi3MoEDecoderLayer"]  # noqa: RUF012
    # Which tokens an expert gets depends on the data.
    _can_compile_fullgraph = False

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        # Reentrant checkpoints, the default of transformers 4 and of PEFT, drop the gradient of recorded router logits
        # without a word. The public method has two names, of which one goes away; both come through here.
        gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class Phi3MoEModel(Phi3MoEPreTrainedModel, Phi3Model):
    """Embedding, layers and last norm."""

    def __init__(self, config: Phi3MoEConfig) -> None:
        # The parent makes no layers, which would be dense. A changed copy of the config would not do: what
        # transformers notes in a config while it builds a model, such as the attention in use, belongs in this one.
        num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = num_layers
        self.layers = nn.ModuleList(Phi3MoEDecoderLayer(config, index) for index in range(num_layers))
        self.post_init()


def _accepting_router_logits(method: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``method`` with one more keyword."""
    signature = inspect.signature(method)
    extra = inspect.Parameter("output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=sorted([*signature.parameters.values(), extra], key=lambda p: p.kind))


class Phi3MoEForCausalLM(Phi3MoEPreTrainedModel, Phi3ForCausalLM):
    """The model with its unembedding, for training and generation."""

    def __init__(self, config: Phi3MoEConfig) -> None:
        # Past Phi3ForCausalLM, which would make a dense model first.
        super(Phi3ForCausalLM, self).__init__(config)
        self.model = Phi3MoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """As Phi-3; with ``output_router_logits`` also their [N, E] per layer and the load balancing loss.

        That loss times ``router_aux_loss_coef`` is part of ``loss`` where labels are given.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if return_dict is None:
            return_dict = self.config.return_dict
        with _recording(output_router_logits) as recorded:
            outputs = super().forward(input_ids, attention_mask, *args, return_dict=True, **kwargs)
        loss, aux_loss = outputs.loss, None
        if output_router_logits:
            mask = attention_mask if getattr(attention_mask, "ndim", None) == 2 else None
            if mask is not None:
                # While generating, the mask also covers tokens whose keys are cached, and which are not routed again.
                mask = mask[:, -(len(recorded[0]) // len(mask)) :]
            aux_loss = load_balancing_loss(recorded, self.config.num_experts_per_tok, mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss)
        own = {"loss": loss, "aux_loss": aux_loss, "router_logits": tuple(recorded) or None}
        outputs = MoeCausalLMOutputWithPast(**{**outputs, **own})
        return outputs if return_dict else outputs.to_tuple()

    # Transformers and its Trainer read from the signature what they may pass, and argument names differ by version.
    forward.__signature__ = _accepting_router_logits(Phi3ForCausalLM.forward)


# Else transformers 4.48 saves a model without this file.
Phi3MoEConfig.register_for_auto_class()
Phi3MoEModel.register_for_auto_class("AutoModel")
Phi3MoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
