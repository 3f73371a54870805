"""Configuration of a Phi-3 mixture of experts: all of Phi-3's keys, and the four that describe the mixture."""

from typing import Any

import transformers
from transformers.models.phi3.configuration_phi3 import Phi3Config

__all__ = ["Phi3MoEConfig"]


class Phi3MoEConfig(Phi3Config):
    """``num_experts_per_tok`` of ``num_local_experts`` serve each token; the last two keys are for training."""

    # Called "phi3", the dense class of transformers would load the folder, with random MLPs.
    model_type = "phi3moe"
    # Phi-3's plan names dense MLPs.
    base_model_tp_plan = None

    def __init__(
        self,
        num_local_experts: int = 8,
        num_experts_per_tok: int = 2,
        router_aux_loss_coef: float = 0.001,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 1 <= num_experts_per_tok <= num_local_experts:
            raise ValueError(f"num_experts_per_tok = {num_experts_per_tok} of num_local_experts = {num_local_experts}")
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        if transformers.__version__.startswith("4.") and "rope_parameters" in kwargs:
            # A model trained with transformers 5 is saved so; version 4 would take the defaults without a word.
            rope = kwargs.pop("rope_parameters")
            kwargs |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
            if rope["rope_type"] == "longrope":
                factors = {key: rope[key] for key in ("short_factor", "long_factor")}
                kwargs["rope_scaling"] = {"type": "longrope", **factors}
        super().__init__(**kwargs)
