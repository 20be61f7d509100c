"""The supported architectures of .gguf files: their config and the names of their tensors.

Keys, defaults and formulas follow llama.cpp (src/llama-model.cpp, src/models/, src/llama-context.cpp; names also in
gguf/constants.py of the gguf package). The result equals config.json of the same model.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weights.errors import InputError
from weights.gguf_header import GGUFTensor, Metadata

Tensors = Mapping[str, GGUFTensor]

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
GEMMA3_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERT_NAMES = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
ROPE_FACTORS = "rope_freqs.weight"

# model_type of config.json to its architecture.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

# Keys that can change the computation (without the prefix of the architecture), and the values that change nothing.
# Files with another value are refused.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),       # 1 is the softmax
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "use_parallel_residual": (False,),
}


def read_llama_fields(fields: Metadata, tensors: Tensors, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Llama and of families that differ from it only by their tensors or their window.

    llama.cpp writes Mistral and Mixtral as "llama". A file with biases of queries, keys and values but none of the
    output is treated as Qwen2, whatever its architecture is called.
    """
    window = read_window(fields)
    if "blk.0.ffn_gate_inp.weight" in tensors:
        experts = {"num_local_experts": fields.size("expert_count")}
        experts["num_experts_per_tok"] = fields.size("expert_used_count")
        return {"model_type": "mixtral", "sliding_window": window, **experts}
    biased = "blk.0.attn_q.bias" in tensors
    if biased and "blk.0.attn_output.bias" not in tensors:
        if window is None:
            return {"model_type": "qwen2"}
        layer_types = ["sliding_attention"] * config["num_hidden_layers"]
        return {
            "model_type": "qwen2", "use_sliding_window": True, "sliding_window": window, "layer_types": layer_types,
        }
    if window is not None:
        return {"model_type": "mistral", "sliding_window": window}
    return {"model_type": "llama", "attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def read_qwen2_fields(fields: Metadata, tensors: Tensors, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Qwen2. Raises InputError for a window shorter than the context."""
    refuse_window(fields)
    return read_llama_fields(fields, tensors, config)


def read_qwen3_fields(fields: Metadata, tensors: Tensors, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Qwen3. Raises InputError for a window shorter than the context."""
    refuse_window(fields)
    return {"model_type": "qwen3", "attention_bias": "blk.0.attn_q.bias" in tensors}


def read_qwen2moe_fields(fields: Metadata, tensors: Tensors, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Qwen2-MoE. Raises InputError if the file has no shared expert."""
    shared = tensors.get("blk.0.ffn_up_shexp.weight")
    if shared is None:
        raise InputError(f"{fields.path} is corrupt: it has no blk.0.ffn_up_shexp.weight")
    return {
        **read_expert_fields(fields, tensors, renormalised=False),
        "model_type": "qwen2_moe",
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "shared_expert_intermediate_size": shared.shape[0],
    }


def read_qwen3moe_fields(fields: Metadata, tensors: Tensors, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Qwen3-MoE."""
    return {
        **read_expert_fields(fields, tensors, renormalised=True),
        "model_type": "qwen3_moe",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }


def read_expert_fields(fields: Metadata, tensors: Tensors, renormalised: bool) -> dict[str, Any]:
    """Return the fields of a mixture of experts. renormalised: default of norm_topk_prob if the file has none"""
    refuse_window(fields)
    used = fields.size("expert_used_count")
    default = max(1, fields.size("feed_forward_length") // used)
    return {
        "num_experts": fields.size("expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": fields.size("expert_feed_forward_length", default),
        "norm_topk_prob": fields.flag("expert_weights_norm", renormalised),
    }


def read_gemma3_fields(fields: Metadata, tensors: Tensors, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Gemma 3: every sixth layer has full attention, the others a window; their RoPE differs."""
    window, layers = read_window(fields), config["num_hidden_layers"]
    period = fields.whole("attention.sliding_window_pattern", default=6) if window else 1
    if period < 0:
        raise InputError(f"{fields.path}: {fields.prefix}attention.sliding_window_pattern is {period}")
    windowed = [period == 0 or index % period < period - 1 for index in range(layers)]
    cap = fields.number("final_logit_softcapping", default=0.0)
    # Gemma-3 27B, the only one with 62 layers, uses hidden size / heads, which differs from its head size.
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"]
    local = {"rope_theta": fields.positive("rope.freq_base_swa", default=10000.0)}
    return {
        "model_type": "gemma3_text",
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": cap or None,
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": ["sliding_attention" if one else "full_attention" for one in windowed],
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {})},
            "sliding_attention": local | (divided_rope(config["head_dim"], 1.0, attention_factor(fields)) or {}),
        },
    }


def read_window(fields: Metadata) -> int | None:
    """Return the size of the attention window in tokens, the query included; None: the file has none."""
    window = fields.whole("attention.sliding_window", default=0)
    return None if window in (0, 2**32 - 1) else fields.size("attention.sliding_window")


def refuse_window(fields: Metadata) -> None:
    """Raise InputError for a Qwen window shorter than the context, because files do not say which layers have it."""
    window = read_window(fields)
    if window is not None and window < fields.size("context_length"):
        raise InputError(
            f"{fields.path}: {fields.prefix}attention.sliding_window is {window}; in .gguf files a window shorter than "
            "the context is supported for 'llama' and 'gemma3' only"
        )


@dataclass(frozen=True)
class Family:
    """One value of general.architecture.

    read_fields   returns the fields of config.json that only this family has, with its model_type
    layer_names   names of a layer's tensors that differ from LAYER_NAMES
    pairs         queries and keys are rotated in neighbouring pairs, and their rows are stored in that order
    norm_offset   number added to the weights of norms before they were stored
    """

    read_fields: Callable[[Metadata, Tensors, dict[str, Any]], dict[str, Any]]
    layer_names: dict[str, str] = field(default_factory=dict)
    pairs: bool = False
    norm_offset: int = 0


FAMILIES = {
    "llama": Family(read_llama_fields, pairs=True),
    "qwen2": Family(read_qwen2_fields),
    "qwen3": Family(read_qwen3_fields),
    "qwen2moe": Family(read_qwen2moe_fields),
    "qwen3moe": Family(read_qwen3moe_fields),
    "gemma3": Family(read_gemma3_fields, GEMMA3_NAMES, norm_offset=1),
}


def find_family(metadata: Metadata) -> Family:
    """Return the family of a file. Raises InputError for an unsupported architecture."""
    architecture = metadata.text("general.architecture")
    if architecture not in FAMILIES:
        raise InputError(
            f"{metadata.path} has the architecture {architecture!r}; in .gguf files {', '.join(FAMILIES)} are "
            "supported (Mistral and Mixtral are written as 'llama')"
        )
    return FAMILIES[architecture]


def read_config(
    family: Family, metadata: Metadata, tensors: Tensors, divisors: list[float] | None
) -> dict[str, Any]:
    """Build the contents of config.json. Raises InputError for missing keys and unsupported features.

    divisors  of each rotary frequency, if the file has them (Llama 3.1 and later)
    """
    path, fields = metadata.path, metadata.under(metadata.text("general.architecture"))
    for key, neutral in NEUTRAL_VALUES.items():
        if key in fields and fields.values[key] not in neutral:
            raise InputError(f"{path} has {fields.prefix}{key}, which is not supported in .gguf files")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise InputError(f"{path} has no token_embd.weight of two dimensions: it is not a whole model")

    layers = fields.size("block_count")
    if f"blk.{layers - 1}.attn_norm.weight" not in tensors:  # before a model with that many layers is built
        raise InputError(
            f"{path} is corrupt: {fields.prefix}block_count is {layers}, but it has no tensors of the last layer"
        )

    heads = fields.size("attention.head_count")
    hidden_size = fields.size("embedding_length")
    head_dim = fields.size("attention.key_length", default=max(1, hidden_size // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, default=head_dim) != head_dim:
            raise InputError(
                f"{path}: {fields.prefix}{key} is {fields.size(key)}, but heads of {head_dim}; only equal is supported"
            )
    if head_dim % 2:
        raise InputError(f"{path}: heads of {head_dim} dimensions cannot be rotated in pairs")

    config: dict[str, Any] = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": fields.positive("rope.freq_base", default=10000.0),
        "rope_scaling": read_rope_scaling(fields, head_dim, divisors),
    }
    config |= family.read_fields(fields, tensors, config)
    config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    return {name: value for name, value in config.items() if value is not None}


def read_rope_scaling(fields: Metadata, head_dim: int, divisors: list[float] | None) -> dict[str, Any] | None:
    """Return rope_scaling of config.json; None: frequencies are not scaled.

    A factor without a type is linear; files of 2023 call it rope.scale_linear. attn_factor scales cos and sin for
    every type. Converters store transformers' attention_factor of YaRN as yarn_attn_factor.
    """
    kind = fields.text("rope.scaling.type", default="linear")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(
            f"{fields.path}: {fields.prefix}rope.scaling.type is {kind!r}; in .gguf files 'none', 'linear' and 'yarn' "
            "are supported"
        )
    factor = fields.number("rope.scaling.factor", default=fields.number("rope.scale_linear", default=0.0))
    if factor < 0:
        raise InputError(f"{fields.path}: {fields.prefix}rope.scaling.factor is {factor}, not a number above zero")
    factor = 1.0 if kind == "none" or factor == 0 else factor
    if kind != "yarn":
        return divided_rope(head_dim, factor, attention_factor(fields), divisors)
    if divisors is not None:
        raise InputError(f"{fields.path} has both YaRN and {ROPE_FACTORS}; one of them is supported")

    def magnitude(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0

    # With a logarithmic multiplier of 0 the divisor is 1.
    usual = magnitude(1.0) / magnitude(fields.number("rope.scaling.yarn_log_multiplier", default=0.0))
    own = fields.positive("rope.scaling.yarn_attn_factor", default=usual)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.size(
            "rope.scaling.original_context_length", default=fields.size("context_length")
        ),
        "attention_factor": own * attention_factor(fields),
        "beta_fast": fields.positive("rope.scaling.yarn_beta_fast", default=32.0),
        "beta_slow": fields.positive("rope.scaling.yarn_beta_slow", default=1.0),
    }


def attention_factor(fields: Metadata) -> float:
    """Return the factor of cos and sin in all layers."""
    return fields.positive("rope.scaling.attn_factor", default=1.0)


def divided_rope(
    head_dim: int, factor: float, magnitude: float, divisors: list[float] | None = None
) -> dict[str, Any] | None:
    """Return the rope_scaling that divides every frequency by a common factor and by its own divisor."""
    if divisors is None and magnitude == 1:
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    divisors = [1.0] * (head_dim // 2) if divisors is None else divisors
    return {"rope_type": "factors", "factors": [factor * one for one in divisors], "attention_factor": magnitude}


def hugging_face_names(name: str, shape: tuple[int, ...], family: Family) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of the tensors in one tensor of the file.

    A merged tensor [experts, out, in] holds one per expert. An unknown name is kept; the model then rejects it.
    """
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)(?:\.(\d+))?\.(weight|bias)", name)
    if not match:
        return [(NAMES.get(name, name), shape)]
    layer, part, expert, kind = match.groups()
    merged = part.removesuffix("_exps")
    if part != merged and merged in EXPERT_NAMES and len(shape) == 3:
        return [
            (f"model.layers.{layer}.mlp.experts.{index}.{EXPERT_NAMES[merged]}.{kind}", shape[1:])
            for index in range(shape[0])
        ]
    if expert is not None and part in EXPERT_NAMES:     # files before April 2024: one tensor per expert
        return [(f"model.layers.{layer}.mlp.experts.{expert}.{EXPERT_NAMES[part]}.{kind}", shape)]
    own = (LAYER_NAMES | family.layer_names).get(part)
    if own is None or expert is not None:
        return [(name, shape)]
    # The gate of the shared expert is a vector in the file and a matrix of one row in the model.
    return [(f"model.layers.{layer}.{own}.{kind}", (1, *shape) if part == "ffn_gate_inp_shexp" else shape)]
