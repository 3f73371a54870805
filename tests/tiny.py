"""Tiny random checkpoints of many model families, made and saved by transformers itself.

Sizes are small and differ from one another wherever a family permits, so that a transposed or swapped tensor can't
fit by chance. Every tensor is random (norms and biases too), and a seed fixes all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergekit
from mergekit.methods import get_method
from mergekit.methods.spec import REQUIRED
from mergekit.planning.expression import leaves
from mergekit.planning.plan import Plan

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # waking a second thread takes longer than these sums

VOCAB, HIDDEN, FFN, LAYERS, POSITIONS = 61, 22, 37, 3, 47
LLAMA = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 10, "max_position_embeddings": POSITIONS,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
SPLIT = {"hidden_size": 32, "head_dim": 16}  # families that rotate a part of each head
BERT = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "max_position_embeddings": POSITIONS}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS, "n_head": 2, "n_positions": POSITIONS,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {"hidden_size": 24, "intermediate_size": 36, "num_experts_per_tok": 2}  # rows of 16 bytes, for torch's kernel
VISION = {"hidden_size": 14, "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 6, "patch_size": 3, "projection_dim": 13}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: its class, the auto class that loads it, and its sizes. ``reads``: what a forward pass takes."""

    model_type: str
    model_class: str
    sizes: Mapping[str, Any] = field(default_factory=lambda: LLAMA)
    auto_class: str = "AutoModelForCausalLM"
    reads: str = "text"


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM"),
    "llama_biased": Family("llama", "LlamaForCausalLM", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": Family("mistral", "MistralForCausalLM"),
    "gpt_neox": Family("gpt_neox", "GPTNeoXForCausalLM", {**LLAMA, "hidden_size": 28}),
    "stablelm": Family("stablelm", "StableLmForCausalLM", {**LLAMA, **SPLIT, "use_qkv_bias": True}),
    "phi": Family("phi", "PhiForCausalLM", {**LLAMA, **SPLIT}),
    "phi3": Family("phi3", "Phi3ForCausalLM"),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", {**LLAMA, "sliding_window": 7}),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", GPT2),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM"),
    "mixtral": Family("mixtral", "MixtralForCausalLM", {**LLAMA, **GROUPED, "num_local_experts": 5}),
    "bert": Family("bert", "BertModel", BERT, "AutoModel"),
    "bert_masked": Family("bert", "BertForMaskedLM", BERT, "AutoModelForMaskedLM"),
    "roberta_classifier": Family(
        "roberta", "RobertaForSequenceClassification", {**BERT, "num_labels": 5}, "AutoModelForSequenceClassification"
    ),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**LLAMA, "sliding_window": 7}),
    "granite": Family("granite", "GraniteForCausalLM"),
    "starcoder2": Family("starcoder2", "Starcoder2ForCausalLM"),
    "falcon": Family(
        "falcon",
        "FalconForCausalLM",
        {**BERT, "hidden_size": 44, "num_kv_heads": 1, "ffn_hidden_size": FFN, "new_decoder_architecture": True},
    ),
    "falcon_7b": Family("falcon", "FalconForCausalLM", {**BERT, "hidden_size": 44, "ffn_hidden_size": FFN}),
    "modernbert": Family(
        "modernbert", "ModernBertForMaskedLM", {**BERT, "hidden_size": 24, "pad_token_id": 0}, "AutoModelForMaskedLM"
    ),
    "mamba": Family("mamba", "MambaForCausalLM", {**LLAMA, "state_size": 5, "hidden_size": 23}),
    "t5": Family(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 23,
            "d_kv": 7,
            "d_ff": FFN,
            "num_layers": LAYERS,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
        "source and target",
    ),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", {**LLAMA, **GROUPED, "num_experts": 5, "moe_intermediate_size": 20}
    ),
    "cohere": Family("cohere", "CohereForCausalLM", {**LLAMA, "use_qk_norm": True}),
    "lfm2": Family(
        "lfm2",
        "Lfm2ForCausalLM",
        {**LLAMA, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **LLAMA,
            **GROUPED,
            "num_key_value_heads": 2,
            "n_routed_experts": 6,
            "moe_intermediate_size": 20,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 11,
            "kv_lora_rank": 7,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "head_dim": 4,
        },
    ),
    "gpt_oss": Family("gpt_oss", "GptOssForCausalLM", {**LLAMA, **GROUPED, "num_local_experts": 4}),
    "granite_hybrid": Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **LLAMA,
            **SPLIT,
            "shared_intermediate_size": 29,
            "num_local_experts": 0,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 5,
            "mamba_n_groups": 1,
            "layer_types": ["mamba", "attention", "mamba"],
        },
    ),
    "distilbert_classifier": Family(
        "distilbert",
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "hidden_dim": FFN,
            "n_layers": LAYERS,
            "n_heads": 2,
            "num_labels": 5,
            "max_position_embeddings": POSITIONS,
        },
        "AutoModelForSequenceClassification",
    ),
    "whisper": Family(
        "whisper",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": LAYERS,
            "encoder_ffn_dim": FFN,
            "decoder_ffn_dim": 31,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "num_mel_bins": 5,
            "max_source_positions": 8,
            "max_target_positions": POSITIONS,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "AutoModelForSpeechSeq2Seq",
        "sound",
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **LLAMA,
                **SPLIT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 17,
                "out_hidden_size": 32,
                "patch_size": 2,
            },
        },
        "AutoModelForImageTextToText",
    ),
    "llava": Family(
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "image_token_index": VOCAB - 1,
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
        "AutoModelForImageTextToText",
        "text and image",
    ),
}


def save_tiny(name: str, folder: Path, *, seed: int = 0, model_class: str | None = None, **changes: Any) -> Path:
    """Save a random model of family ``name`` in ``folder``; ``changes`` go into its config.

    ``max_shard_size`` and ``dtype`` (a torch dtype) are arguments of the saving, not of the config.
    """
    family = FAMILIES[name]
    dtype, shard = changes.pop("dtype", torch.float32), changes.pop("max_shard_size", "5GB")
    config = transformers.AutoConfig.for_model(family.model_type, **{**family.sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class or family.model_class)(config).eval()
        with torch.no_grad():
            stored = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}
            for tensor in stored.values():
                tensor.add_(0.05 * torch.randn_like(tensor))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load_checked(folder: Path, auto_class: str = "AutoModelForCausalLM") -> Any:
    """The model in ``folder``, loaded as anyone would; AssertionError unless every key is found and fits."""
    auto = getattr(transformers, auto_class)
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    faults = {key: value for key, value in info.items() if value}
    assert not faults, f"{folder} does not load cleanly: {faults}"
    for parameter in model.parameters():
        parameter.data = (
            parameter.data.clone()
        )  # aligned anew: torch's sums depend on a file's offsets in their last bit
    return model.eval()


def is_shared(model: Any) -> bool:
    """Whether a loaded model computes its logits with its embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def outputs_of(model: Any, reads: str = "text") -> torch.Tensor:
    """The logits (of a bare model: the hidden states) for a fixed input of ten tokens."""
    tokens = torch.arange(3, 13).reshape(1, 10)
    inputs: dict[str, torch.Tensor] = {"input_ids": tokens}
    if reads == "source and target":
        inputs["decoder_input_ids"] = tokens.flip(1)[:, :7]
    if reads == "text and image":
        size = model.config.vision_config.image_size
        patches = (size // model.config.vision_config.patch_size) ** 2
        inputs["input_ids"] = torch.cat([tokens, torch.full((1, patches), model.config.image_token_id)], 1)
        inputs["pixel_values"] = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    if reads == "sound":
        frames = 2 * model.config.max_source_positions
        inputs = {
            "input_features": torch.linspace(-1, 1, 5 * frames).reshape(1, 5, frames),
            "decoder_input_ids": tokens,
        }
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a folder stores."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def names_of(folder: Path) -> set[str]:
    """The name of every tensor that a folder stores."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    return names


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return json.loads((folder / "config.json").read_text())


def edited(
    folder: Path,
    into: Path,
    *,
    add: Mapping[str, torch.Tensor] | None = None,
    drop: Iterable[str] = (),
    rename: Callable[[str], str] | None = None,
    config: Mapping[str, Any] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """A copy of a checkpoint with tensors added, dropped or renamed, and config entries changed or taken out."""
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if name not in set(drop)}
    if rename is not None:
        tensors = {rename(name): tensor for name, tensor in tensors.items()}
    save_file({**tensors, **(add or {})}, into / "model.safetensors", {"format": "pt"})
    entries = {key: value for key, value in config_of(into).items() if key not in set(without)}
    (into / "config.json").write_text(json.dumps({**entries, **(config or {})}))
    return into


def recipe_for(method: str, models: Sequence[Path]) -> dict[str, Any]:
    """A recipe that merges whole ``models`` by ``method``, as many of them as it takes.

    The first is the base where the method needs one; what the method declares as required gets a value.
    """
    declared = get_method(method)
    paths = [str(path) for path in models][: declared.most]
    values = {p.name: 0.6 for p in declared.params if p.default is REQUIRED}
    if declared.parameter("density"):
        values["density"] = 0.5
    record: dict[str, Any] = {"merge_method": method, "parameters": values}
    if declared.base == "required":
        record["base_model"] = paths.pop(0)
    return {**record, "models": [{"model": path} for path in paths]}


def average(*models: Path) -> dict[str, Any]:
    """A recipe for the plain average of whole models."""
    entries = [{"model": str(model)} for model in models]
    return {"merge_method": "linear", "models": entries, "parameters": {"weight": 1}}


def merge(recipe: Mapping[str, Any], out: Path, **options: Any) -> Plan:
    """Run ``recipe`` into the folder ``out``; returns the plan that it followed."""
    plans: list[Plan] = []
    mergekit.run_merge(recipe, out, on_plan=plans.append, **options)
    return plans[0]


def unaccounted(plan: Plan) -> dict[str, set[str]]:
    """Input tensors that the plan neither reads nor lists as left out, by folder."""
    seen = {(read.source, read.info.name) for output in plan.outputs for read in leaves(output.expression)}
    seen |= {(source, name) for source, name, _ in plan.left_out}
    found = {s.folder: names_of(Path(s.folder)) - {n for k, n in seen if k == i} for i, s in enumerate(plan.sources)}
    return {folder: names for folder, names in found.items() if names}
