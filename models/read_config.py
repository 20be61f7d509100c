"""config.json of the Llama family, read into a LlamaConfig with every default of the family filled in.

Both spellings that transformers has written are read (`rope_theta` + `rope_scaling`, and `rope_parameters`).
A field that changes the computation and is not implemented here raises an error that names it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import LlamaConfig, RopeConfig
from weights.errors import InputError
from weights.json_files import JsonObject, shown

# Layers are built one by one before any weight is read: a hostile number must not keep the process busy.
MOST_LAYERS = 1024

# Model types with a config field for attention biases.
BIASED_BY_CONFIG = ("llama", "qwen3", "qwen3_moe", "gemma3_text")

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "factors")
# Settings of one type that transformers ignores in another type, and a field of YaRN's first checkpoints.
ROPE_FIELDS = frozenset({
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale",
    "mscale_all_dim", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "finetuned",
})

# Fields that do not affect inference: provenance, training, token ids (read elsewhere) and switches of transformers'
# own implementation.
HARMLESS_FIELDS = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "initializer_range",
    "attention_dropout", "pretraining_tp", "name_or_path", "_name_or_path", "is_llama_config",
    "transformers.js_config", "auto_map", "task_specific_params", "id2label", "label2id", "gradient_checkpointing",
    "output_attentions", "output_hidden_states", "return_dict", "is_decoder", "is_encoder_decoder",
    "_attn_implementation_autoset", "attn_implementation", "torchscript", "problem_type", "finetuning_task",
    "tokenizer_class", "chunk_size_feed_forward", "prefix", "cross_attention_hidden_size", "add_cross_attention",
    "tie_encoder_decoder", "tf_legacy_loss", "use_bfloat16", "pruned_heads", "unsloth_version", "unsloth_fixed",
})

# Fields that affect inference, with the values at which they have no effect.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "use_parallel_residual": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "clip_qkv": (None,),
    "use_mrope": (None, False),
    "attention_chunk_size": (None,),
    "use_bidirectional_attention": (None, False),
}


class ConfigReader(JsonObject):
    """A config.json, or a part of it, that remembers which fields were read, so that none is ignored silently."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        super().__init__(raw, where)

    def finish(self) -> tuple[str, ...]:
        """Return unknown fields, after every field was read. Raises InputError for a field that is not implemented."""
        for name, neutral in NEUTRAL_VALUES.items():
            if name in self.raw and name not in self.read and self.raw[name] not in neutral:
                raise InputError(f"{self.where}: {name} = {shown(self.raw[name])} is not implemented")
        known = self.read | HARMLESS_FIELDS | NEUTRAL_VALUES.keys()
        return tuple(name for name in self.raw if name not in known)


@dataclass(frozen=True)
class FamilyDefaults:
    """Defaults of fields that config.json may leave out, per family (transformers' documented defaults)."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_key_value_heads: int | None = None      # None: equal to the query heads
    head_dim: int | None = None                 # None: hidden_size / num_attention_heads
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


def rope_section(fields: JsonObject, default_theta: float) -> JsonObject:
    """Return the RoPE section of config.json, with rope_theta filled in.

    As in transformers 5, `rope_scaling` (which people add by hand) replaces all of `rope_parameters`. Raises InputError
    if that would also replace a given rope_theta by the family's default.
    """
    parameters, scaling = fields.section("rope_parameters"), fields.section("rope_scaling")
    rope, theta = scaling if scaling.raw else parameters, fields.number("rope_theta", default_theta)
    replaced = parameters.number("rope_theta", theta)
    if rope is scaling and replaced != theta and "rope_theta" not in scaling.raw:
        raise InputError(
            f"{scaling.where} replaces rope_parameters with its rope_theta of {replaced}, and has none: add it there"
        )
    given = {name: value for name, value in rope.raw.items() if value is not None}
    return JsonObject({"rope_theta": theta} | given, rope.where)


def read_rope(fields: ConfigReader, default_theta: float, max_position_embeddings: int) -> RopeConfig:
    """Read RoPE from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    rope = rope_section(fields, default_theta)
    theta = rope.number("rope_theta", default_theta)
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise InputError(
            f"{rope.where}: RoPE type {rope_type!r} is not implemented; implemented are {', '.join(ROPE_TYPES[:-1])}"
        )
    rotated = rope.number("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise InputError(f"{rope.where}: partial_rotary_factor = {rotated} is not implemented")
    values: dict[str, Any] = {"theta": theta, "rope_type": rope_type}
    if rope_type == "linear":
        values["factor"] = rope.number("factor", None)
    if rope_type in ("linear", "llama3", "yarn"):
        original = rope.integer("original_max_position_embeddings", max_position_embeddings)
        values["original_max_position_embeddings"] = fields.integer("original_max_position_embeddings", original)
    if rope_type == "llama3":
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            values[name] = rope.number(name, None)
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise InputError(f"{rope.where}: high_freq_factor must be above low_freq_factor")
    if rope_type == "yarn":
        if theta <= 1:
            raise InputError(f"{rope.where}: rope_theta must be above 1 for RoPE type 'yarn', not {theta}")
        factor = rope.number("factor", max_position_embeddings / values["original_max_position_embeddings"])
        values |= {"factor": factor, "beta_fast": rope.number("beta_fast", 32.0)}
        values |= {"beta_slow": rope.number("beta_slow", 1.0), "truncate": rope.boolean("truncate", True)}
        values["attention_factor"] = yarn_attention_factor(rope, factor)
    if rope_type == "factors":
        values["factors"] = rope.numbers("factors", ())
        values["attention_factor"] = rope.number("attention_factor", 1.0)
    if rope_type == "dynamic":          # differs only beyond max_position_embeddings, which no prompt reaches
        values["rope_type"] = "default"
    unknown = rope.raw.keys() - rope.read - ROPE_FIELDS
    if rope_type != "default" and unknown:
        raise InputError(f"{rope.where}: {', '.join(sorted(unknown))} is not implemented for RoPE type {rope_type!r}")
    return RopeConfig(**values)


def refuse_rope_outside(fields: ConfigReader, text: RopeConfig) -> None:
    """Raise InputError for a rope_scaling beside text_config (where it is not read) of another type than inside."""
    outside = fields.section("rope_scaling")
    kind = outside.text("rope_type", outside.text("type", "default"))
    if kind not in ("default", "mrope", "dynamic", text.rope_type):
        raise InputError(f"{outside.where} ({kind}) stands beside text_config, which is read instead: put it in there")


def yarn_attention_factor(rope: JsonObject, factor: float) -> float:
    """Compute the scale of cos and sin (YaRN, arXiv 2309.00071, Eq. 22; mscale and mscale_all_dim are DeepSeek's)."""

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = (abs(rope.number(name, 0.0, positive=False)) for name in ("mscale", "mscale_all_dim"))
    inferred = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return rope.number("attention_factor", inferred)


def layer_windows(fields: ConfigReader, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Return per layer the number of tokens that a query attends to (itself included), or None for all."""
    if model_type in ("llama",):
        return (None,) * layers
    if model_type in ("mistral", "mixtral"):
        default = 4096 if model_type == "mistral" and "sliding_window" not in fields.raw else None
        window = fields.get("sliding_window", default)
        return (None if window is None else fields.integer("sliding_window", window),) * layers
    # Gemma, and Qwen with a switch: a list of layer types, else each family's own rule.
    use_window = model_type == "gemma3_text" or fields.boolean("use_sliding_window", False)
    fields.read.add("sliding_window")       # even if the switch turns it off
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        use_window = False
    window = fields.integer("sliding_window", 4096) if use_window else None
    max_layers = fields.integer("max_window_layers", 28, least=0)
    if model_type == "qwen3_moe":
        return (window,) * layers
    if model_type == "gemma3_text":
        pattern = fields.integer("sliding_window_pattern", 6)
        windowed = [(i + 1) % pattern > 0 for i in range(layers)]
    elif model_type == "qwen2_moe":
        windowed = [use_window and i % 2 == 0 and i < max_layers for i in range(layers)]
    else:
        windowed = [use_window and i >= max_layers for i in range(layers)]
    by_depth = ["sliding_attention" if with_window else "full_attention" for with_window in windowed]
    layer_types = fields.get("layer_types", by_depth)
    kinds = ("sliding_attention", "full_attention")
    if not isinstance(layer_types, list) or len(layer_types) != layers or any(one not in kinds for one in layer_types):
        raise InputError(
            f"{fields.where}: layer_types must name sliding_attention or full_attention for each of the {layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


FAMILIES = {
    "llama": FamilyDefaults(),
    "mistral": FamilyDefaults(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32),
    "qwen2": FamilyDefaults(
        intermediate_size=22016, num_key_value_heads=32, vocab_size=151936, max_position_embeddings=32768
    ),
    "qwen3": FamilyDefaults(
        intermediate_size=22016, num_key_value_heads=32, head_dim=128, vocab_size=151936, max_position_embeddings=32768
    ),
}


def read_decoder_fields(fields: ConfigReader, model_type: str, defaults: FamilyDefaults) -> dict[str, Any]:
    """Read the fields of LlamaConfig from a config of any family that shares Llama's attention."""
    layers = fields.integer("num_hidden_layers", 32, most=MOST_LAYERS)
    hidden_size = fields.integer("hidden_size", defaults.hidden_size)
    heads = fields.integer("num_attention_heads", 32)
    # null means one per query head, also in families with another default for an absent field.
    kv_default = None if "num_key_value_heads" in fields.raw else defaults.num_key_value_heads
    kv_heads = fields.integer("num_key_value_heads", kv_default or heads)
    if heads % kv_heads:
        raise InputError(
            f"{fields.where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
        )
    if fields.get("head_dim") is None and defaults.head_dim is None and hidden_size % heads:
        raise InputError(
            f"{fields.where}: hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({heads}), "
            "or head_dim must be given"
        )
    head_dim = fields.integer("head_dim", defaults.head_dim or hidden_size // heads)
    if head_dim % 2:
        raise InputError(f"{fields.where}: head_dim must be even for rotary embeddings, not {head_dim}")
    max_positions = fields.integer("max_position_embeddings", defaults.max_position_embeddings)
    rope = read_rope(fields, defaults.rope_theta, max_positions)
    if rope.rope_type == "factors" and len(rope.factors) != head_dim // 2:
        raise InputError(f"{fields.where}: {len(rope.factors)} RoPE factors for {head_dim // 2} frequencies")
    biased = fields.boolean("attention_bias", False) if model_type in BIASED_BY_CONFIG else False
    return {
        "vocab_size": fields.integer("vocab_size", defaults.vocab_size),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size", defaults.intermediate_size),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": fields.text("hidden_act", "silu"),
        "rms_norm_eps": fields.number("rms_norm_eps", defaults.rms_norm_eps),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
        "rope": rope,
        "qkv_bias": biased or model_type in ("qwen2", "qwen2_moe"),
        "output_bias": biased,
        "mlp_bias": fields.boolean("mlp_bias", False) if model_type == "llama" else False,
        "query_key_norm": model_type in ("qwen3", "qwen3_moe", "gemma3_text"),
        "windows": layer_windows(fields, model_type, layers),
    }


def read_llama_config(raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
    """Read a LlamaConfig from a parsed config.json of Llama, Mistral, Qwen2 or Qwen3.

    Raises InputError for a field of the wrong type and for a feature that is not implemented.
    """
    fields = ConfigReader(raw, where)
    model_type = fields.text("model_type", "llama", FAMILIES)
    values = read_decoder_fields(fields, model_type, FAMILIES[model_type])
    return LlamaConfig(**values, unknown_fields=fields.finish())
