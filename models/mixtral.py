"""Mixtures of experts: Mixtral, Qwen2-MoE (with its shared expert) and Qwen3-MoE, distinguished by their config alone.

Everything except the feed-forward network (models/experts.py) is the Llama family's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.blocks import PrunedBlock
from models.config import LlamaConfig
from models.experts import MixtureOfExperts
from models.key_names import TEXT_SPELLINGS, keys_by_our_names
from models.llama import LlamaDecoderLayer, LlamaForCausalLM
from models.pruning.experts import PartitionedExperts
from models.pruning.pruning import Pruning
from models.read_config import ConfigReader, FamilyDefaults, read_decoder_fields
from weights.errors import InputError


@dataclass(frozen=True)
class MixtralConfig(LlamaConfig):
    """LlamaConfig with the fields of the experts. intermediate_size is that of layers without experts.

    sparse_layers                     per layer, True if it is a mixture of experts
    shared_expert_intermediate_size   channels of the shared expert, which runs for every token (Qwen2-MoE); 0: none
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 14336
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int = 0
    sparse_layers: tuple[bool, ...] = ()

    @property
    def sides(self) -> tuple[int, ...]:
        # If every layer has experts, no tensor has intermediate_size as a side.
        queries = self.num_attention_heads * self.head_dim
        channels = self.moe_intermediate_size if all(self.sparse_layers) else self.intermediate_size
        return self.vocab_size, self.hidden_size, queries, channels, self.shared_expert_intermediate_size

    @property
    def blocks(self) -> int:
        return self.num_hidden_layers + sum(self.sparse_layers) * self.num_experts


FAMILIES = {
    "mixtral": FamilyDefaults(
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=4096 * 32,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    ),
    "qwen2_moe": FamilyDefaults(
        hidden_size=2048,
        intermediate_size=5632,
        num_key_value_heads=16,
        vocab_size=151936,
        max_position_embeddings=32768,
    ),
    "qwen3_moe": FamilyDefaults(
        hidden_size=2048,
        intermediate_size=6144,
        num_key_value_heads=4,
        vocab_size=151936,
        max_position_embeddings=32768,
    ),
}
TRAINING_FIELDS = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")


def read_mixtral_config(raw: Mapping[str, Any], where: str = "config.json") -> MixtralConfig:
    """Read a MixtralConfig from a parsed config.json of Mixtral, Qwen2-MoE or Qwen3-MoE.

    Raises InputError for a field of the wrong type, for numbers that contradict each other and for a feature that is
    not implemented.
    """
    fields = ConfigReader(raw, where)
    model_type = fields.text("model_type", "mixtral", FAMILIES)
    fields.read.update(TRAINING_FIELDS)
    values = read_decoder_fields(fields, model_type, FAMILIES[model_type])
    layers = values["num_hidden_layers"]
    if model_type == "mixtral":
        experts = fields.integer("num_local_experts", 8)
        values |= {
            "num_experts_per_tok": fields.integer("num_experts_per_tok", 2),
            "moe_intermediate_size": values["intermediate_size"],
            "norm_topk_prob": True,
            "sparse_layers": (True,) * layers,
        }
    else:
        qwen2 = model_type == "qwen2_moe"
        # transformers 5 writes Qwen3-MoE's number of experts under Mixtral's name.
        experts = fields.integer("num_experts", fields.integer("num_local_experts", 60 if qwen2 else 128))
        step = fields.integer("decoder_sparse_step", 1)
        dense_layers = fields.integers("mlp_only_layers", ())
        values |= {
            "num_experts_per_tok": fields.integer("num_experts_per_tok", 4 if qwen2 else 8),
            "moe_intermediate_size": fields.integer("moe_intermediate_size", 1408 if qwen2 else 768),
            "norm_topk_prob": fields.boolean("norm_topk_prob", False),
            "sparse_layers": tuple((i + 1) % step == 0 and i not in dense_layers for i in range(layers)),
        }
        if qwen2:
            values["shared_expert_intermediate_size"] = fields.integer("shared_expert_intermediate_size", 5632)
            values["qkv_bias"] = fields.boolean("qkv_bias", True)
    if values["num_experts_per_tok"] > experts:
        raise InputError(
            f"{where}: num_experts_per_tok ({values['num_experts_per_tok']}) must not exceed the number of experts "
            f"({experts})"
        )
    return MixtralConfig(**values, num_experts=experts, unknown_fields=fields.finish())


class MixtralDecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose feed-forward network is a mixture of experts (in Qwen's models, if the config says so)."""

    def __init__(self, config: MixtralConfig, index: int) -> None:
        super().__init__(config, index)
        if config.sparse_layers[index]:
            self.mlp = MixtureOfExperts(
                config.hidden_size, config.moe_intermediate_size, config.hidden_act, config.num_experts,
                config.num_experts_per_tok, config.norm_topk_prob, config.shared_expert_intermediate_size,
            )

    def new_ffn(self, pruning: Pruning) -> PrunedBlock:
        if isinstance(self.mlp, MixtureOfExperts):
            return pruning.new_experts(self.mlp, PartitionedExperts)
        return super().new_ffn(pruning)


class MixtralForCausalLM(LlamaForCausalLM):
    """A language model with mixtures of experts, read from any of their three checkpoint layouts."""

    config: MixtralConfig
    layer_class = MixtralDecoderLayer  # type: ignore[assignment]  # takes the wider config
    # Each step chooses its experts, and every choice would be compiled again.
    can_compile = False

    def locate(
        self, parameter_names: list[str], checkpoint_names: list[str]
    ) -> dict[str, tuple[str, tuple[Any, ...]]]:
        channels = self.config.moe_intermediate_size * self.config.ranks.count      # as the checkpoint has them
        stored_as = keys_by_our_names(checkpoint_names, TEXT_SPELLINGS)
        places = {name: (name, ()) for name in parameter_names}
        places |= locate_experts(parameter_names, list(stored_as), channels)
        return {name: (stored_as.get(key, key), index) for name, (key, index) in places.items()}


MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def locate_experts(
    parameter_names: Sequence[str], checkpoint_names: Sequence[str], channels: int
) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Locate the router and the experts in a checkpoint: the key, and an index into that tensor (() for all of it).

    The keys distinguish three layouts: Mixtral's block_sparse_moe.experts.E.{w1,w3,w2}; Qwen's
    mlp.experts.E.{gate,up,down}_proj, which are our own names; and all experts of a layer in two tensors,
    mlp.experts.gate_up_proj [E, 2 I, H] (gate above up) and mlp.experts.down_proj [E, H, I].
    """
    present = set(checkpoint_names)
    mixtral_layout = any(".block_sparse_moe." in name for name in present)
    places: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for name in parameter_names:
        expert = re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if expert is None:
            if mixtral_layout and name.endswith(".mlp.gate.weight"):
                places[name] = (name.replace(".mlp.", ".block_sparse_moe."), ())
            continue
        layer, index, projection = expert[1], int(expert[2]), expert[3]
        if mixtral_layout:
            block = layer.removesuffix("mlp") + "block_sparse_moe"
            places[name] = (f"{block}.experts.{index}.{MIXTRAL_NAMES[projection]}.weight", ())
        elif projection == "down" and f"{layer}.experts.down_proj" in present:
            places[name] = (f"{layer}.experts.down_proj", (index,))
        elif projection != "down" and f"{layer}.experts.gate_up_proj" in present:
            half = slice(None, channels) if projection == "gate" else slice(channels, None)
            places[name] = (f"{layer}.experts.gate_up_proj", (index, half))
    return places
