"""Mixture of experts: Mixtral, Qwen2-MoE (with its shared expert) and Qwen3-MoE, told apart by their config alone.

Everything but the feed-forward network is the Llama family's. A router sends each token to a few experts, each of them
an ordinary FeedForward; online pruning (POP, arXiv 2602.06822) keeps one ChannelPartition per layer and expert, made
from the prompt tokens that were routed to that expert. The router itself is never touched.

B batch, T prompt tokens, M tokens of the batch in a row (B T), E experts, X experts per token, H hidden size,
I channels of one expert, n tokens routed to one expert.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ConfigReader, FamilyDefaults, LlamaConfig, read_decoder_fields
from models.feed_forward import ActiveFeedForward, FeedForward
from models.layers import DecodeStep, Linear, PrefillStep
from models.llama import LlamaDecoderLayer, LlamaForCausalLM
from models.products import take_channels
from models.pruning.partition import ChannelPartition, PartitionSizes, channel_scores, partition_channels
from models.pruning.settings import Pruning
from models.state import DecodeState
from weights.errors import InputError


@dataclass(frozen=True)
class MixtralConfig(LlamaConfig):
    """LlamaConfig and what the experts add. intermediate_size is that of layers without experts.

    sparse_layers                     per layer, whether it is a mixture of experts
    shared_expert_intermediate_size   channels of the expert every token passes (Qwen2-MoE); 0: there is none
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 14336
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int = 0
    sparse_layers: tuple[bool, ...] = ()


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
    """MixtralConfig from a parsed config.json of Mixtral, Qwen2-MoE or Qwen3-MoE.

    Raises InputError for a field of the wrong type, for numbers that contradict each other and for a feature that is
    not implemented.
    """
    fields = ConfigReader(raw, where)
    model_type = fields.get("model_type", "mixtral")
    if model_type not in FAMILIES:
        raise InputError(f"{where}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
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
        dense_layers = fields.get("mlp_only_layers", [])
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


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and the tokens in the order of their experts.

    probabilities  float32 [M, E], the router's softmax over all experts
    experts        int64 [M, X]
    weights        float32 [M, X], what each expert's output counts
    order          int64 [M X], the (token, expert) pairs sorted by expert: an expert's tokens are one segment
    counts         per expert, the length of its segment
    """

    probabilities: Tensor
    experts: Tensor
    weights: Tensor
    order: Tensor
    counts: list[int]

    def segments(self, per_token: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each expert's tokens: [M, ...] -> E tensors [n, ...], n = 0 for an expert without tokens."""
        return per_token[self.order // self.experts.shape[1]].split(self.counts)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The experts' outputs, [n, H] each, back in the order of the tokens and weighted -> [M, H]"""
        by_expert = torch.cat(list(outputs))                                        # [M X, H]
        by_token = torch.empty_like(by_expert).index_copy(0, self.order, by_expert)
        by_token = by_token.unflatten(0, self.weights.shape)                        # [M, X, H]
        return (by_token * self.weights.unsqueeze(-1)).sum(dim=1).to(by_expert.dtype)


class ActiveExperts:
    """What decode steps read of one mixture of experts, and what was seen of each expert.

    An expert gets a copy of its active weights when it is first needed, in buffers that are kept for every later
    prompt: an expert that no token reaches costs neither memory nor time. With too little memory for all,
    `copy_limit` experts get one, those with most prompt tokens; a step on any other expert masks its full weights
    instead, with the same result and nothing saved.
    """

    def __init__(self, mixture: "MixtureOfExperts", pruning: Pruning) -> None:
        experts = len(mixture.experts)
        self.pruning = pruning
        self.sizes = pruning.sizes(mixture.channels)
        self.prunes = self.sizes.retained < self.sizes.channels
        self.copy_limit = experts
        self.spare: list[ActiveFeedForward] = []                                    # buffers of earlier prompts
        self.shared: ActiveFeedForward | None = None
        if mixture.shared_expert is not None:
            self.shared = mixture.shared_expert.new_active(pruning)
        self.copies: list[ActiveFeedForward | None] = [None] * experts
        self.start([0] * experts)

    def start(self, prompt_tokens: list[int]) -> None:
        """Forget the last prompt. prompt_tokens: per expert, how many of the new one count in its scores."""
        experts = range(len(prompt_tokens))
        if self.pruning.static is None:
            self.spare += [copy for copy in self.copies if copy is not None]
            self.copies = [None] * len(prompt_tokens)
        self.partitions: list[ChannelPartition | None] = [None] * len(prompt_tokens)    # None: not decided yet
        self.prompt_tokens = prompt_tokens
        self.picks = [0] * len(prompt_tokens)               # decoded tokens, those of ended sequences included
        self.may_copy = sorted(experts, key=lambda expert: -prompt_tokens[expert])[: self.copy_limit]

    def left_dense(self, expert: int) -> bool:
        """Whether this expert runs on all its channels: nothing is pruned, or it was not seen and is to be spared."""
        unseen = self.prompt_tokens[expert] < self.pruning.min_tokens and self.pruning.static is None
        return not self.prunes or (unseen and self.pruning.unseen_experts == "dense")

    def partition(self, expert: int, ffn: FeedForward) -> ChannelPartition:
        """The expert's partition; of one that was not seen, from its weights alone, decided now."""
        if self.pruning.static is not None:
            return self.pruning.static.of[ffn].partition
        partition = self.partitions[expert]
        if partition is None:
            partition = self.partitions[expert] = partition_channels(weight_scores(ffn), self.sizes)
        return partition

    def weights(self, expert: int, ffn: FeedForward) -> ActiveFeedForward | None:
        """The expert's active weights, copied now if this is their first use; None for one beyond the limit."""
        copy = self.copies[expert]
        if copy is None and expert in self.may_copy:
            copy = self.copies[expert] = self.spare.pop() if self.spare else ffn.new_active(self.pruning)
            if copy.static is None:
                copy.copy_from(ffn, self.partition(expert, ffn))
        return copy

    def copied_bytes(self) -> int:
        """Memory that copies of weights take so far."""
        held = [*self.copies, *self.spare, self.shared]
        return sum(active.copied_bytes() for active in held if active is not None)


def weight_scores(ffn: FeedForward) -> Tensor:
    """Importance of each channel from the weights alone, for an expert that saw no token to judge by: float32 [I]."""
    gate_norms = torch.linalg.vector_norm(ffn.gate_proj.weight, dim=1, dtype=torch.float32)         # [I]
    up_norms = torch.linalg.vector_norm(ffn.up_proj.weight, dim=1, dtype=torch.float32)             # [I]
    return ffn.down_norms() * gate_norms * up_norms


class MixtureOfExperts(nn.Module):
    """The feed-forward network of a sparse layer: a router, its experts, in Qwen2-MoE also one for all tokens."""

    experts: Sequence[FeedForward]

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        hidden, act = config.hidden_size, config.hidden_act
        self.experts_per_token, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.channels = config.moe_intermediate_size
        self.gate = Linear(hidden, config.num_experts, bias=False)
        experts = (FeedForward(hidden, self.channels, act, bias=False) for _ in range(config.num_experts))
        self.experts = nn.ModuleList(experts)  # type: ignore[assignment]  # iterates as what it holds
        self.shared_expert: FeedForward | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = FeedForward(hidden, config.shared_expert_intermediate_size, act, bias=False)
            self.shared_expert_gate = Linear(hidden, 1, bias=False)

    def route(self, x: Tensor) -> Routing:
        """Choose each token's experts: softmax over all of them, the best X, renormalised if the model does so.

        x [M, H]
        """
        probabilities = self.gate(x).softmax(dim=-1, dtype=torch.float32)           # [M, E]
        weights, experts = probabilities.topk(self.experts_per_token, dim=-1)       # [M, X]
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)                              # [M X]
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        return Routing(probabilities, experts, weights, order, counts)

    def gated(self, x: Tensor, shared: Tensor) -> Tensor:
        """What the shared expert contributes: its output times a gate of its own."""
        return self.shared_expert_gate(x).sigmoid() * shared

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]"""
        return self.run(x, self.route(x.flatten(0, 1)))

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """Every token through the experts it was sent to. x [B, T, H] -> [B, T, H]"""
        outputs = [
            expert(tokens) if len(tokens) else tokens                               # [n, H]
            for expert, tokens in zip(self.experts, routing.segments(x.flatten(0, 1)), strict=True)
        ]
        y = routing.combine(outputs).view_as(x)
        return y if self.shared_expert is None else y + self.gated(x, self.shared_expert(x))

    def prefill(self, x: Tensor, active: ActiveExperts, step: PrefillStep) -> Tensor:
        """Run the prompt, deciding for each expert which channels stay from the tokens routed to it.

        x [B, T, H] -> [B, T, H]
        """
        routing = self.route(x.flatten(0, 1))
        if step.counted is None:
            counted: Sequence[Tensor | None] = [None] * len(self.experts)
            active.start(routing.counts)
        else:
            counted = routing.segments(step.counted.flatten())                      # E times [n]
            active.start(torch.stack([mask.sum() for mask in counted]).tolist())
        outputs = [
            self.prefill_expert(expert, tokens, active, replace(step, counted=mask)) if len(tokens) else tokens
            for expert, (tokens, mask) in enumerate(zip(routing.segments(x.flatten(0, 1)), counted, strict=True))
        ]
        y = routing.combine(outputs).view_as(x)
        if self.shared_expert is None or active.shared is None:
            return y
        return y + self.gated(x, self.shared_expert.prefill(x, active.shared, step))

    def prefill_expert(self, index: int, x: Tensor, active: ActiveExperts, step: PrefillStep) -> Tensor:
        """One expert's part of the prompt. x [n, H], step.counted [n] -> [n, H]"""
        expert = self.experts[index]
        h = expert.activation(x)                                                    # [n, I]
        if active.left_dense(index):
            return expert.down_proj(h)
        if active.pruning.static is None and active.prompt_tokens[index] >= active.pruning.min_tokens:
            with step.clock.phase("scores"):
                counted = None if step.counted is None else step.counted[None]
                scores = channel_scores(h[None], expert.down_norms(), counted)      # [I]
            with step.clock.phase("sort"):
                active.partitions[index] = partition_channels(scores, active.sizes)
        with step.clock.phase("copy"):
            partition, weights = active.partition(index, expert), active.weights(index, expert)
        if step.finish_dense:
            return expert.down_proj(h)
        if weights is None:
            return expert.down_proj(h.index_fill(-1, partition.pruned, 0))
        return F.linear(take_channels(h, partition.resident), weights.down, weights.down_bias)      # [n, H]

    def decode(self, x: Tensor, active: ActiveExperts, step: DecodeStep) -> Tensor:
        """Run one token per sequence on the active rows of its experts, and of no others. x [B, 1, H]"""
        routing = self.route(x[:, 0])
        live = routing.segments(step.live)                                          # E times [n, 1]
        outputs = [
            self.decode_expert(expert, tokens, active, replace(step, live=mask)) if len(tokens) else tokens[:, 0]
            for expert, (tokens, mask) in enumerate(zip(routing.segments(x), live, strict=True))
        ]
        y = routing.combine(outputs).unsqueeze(1)                                   # [B, 1, H]
        if self.shared_expert is None or active.shared is None:
            return y
        return y + self.gated(x, self.shared_expert.decode(x, active.shared, step))

    def decode_expert(self, index: int, x: Tensor, active: ActiveExperts, step: DecodeStep) -> Tensor:
        """One expert's part of a decode step. x [n, 1, H], step.live [n, 1] -> [n, H]"""
        expert = self.experts[index]
        active.picks[index] += len(x)
        if active.left_dense(index):
            return expert(x)[:, 0]
        weights = active.weights(index, expert)
        if weights is None:
            return expert.decode_masked(x, active.partition(index, expert), step.live)[:, 0]
        return expert.decode(x, weights, step)[:, 0]

    def new_active(self, pruning: Pruning) -> ActiveExperts:
        if pruning.in_place:
            raise InputError("pruning in place is not implemented for mixtures of experts; leave it off")
        return ActiveExperts(self, pruning)

    def weight_count(self) -> int:
        """Weights that the prune ratio is a share of: those of the experts one token is routed to (POP, Table 8).

        The paper leaves out the shared expert, which is pruned at the same rate as the others all the same.
        """
        return self.experts_per_token * self.experts[0].weight_count()

    def read_weight_count(self, pruning: Pruning) -> int:
        """Weights that one decode step of one token reads: of the experts it is routed to, and of the shared one."""
        shared = 0 if self.shared_expert is None else self.shared_expert.read_weight_count(pruning)
        routed = sum(expert.read_weight_count(pruning) for expert in self.experts)
        return self.experts_per_token * routed // len(self.experts) + shared

    def copy_bytes(self, pruning: Pruning) -> int:
        """Memory that active copies of all experts take, in bytes."""
        shared = 0 if self.shared_expert is None else self.shared_expert.copy_bytes(pruning)
        return sum(expert.copy_bytes(pruning) for expert in self.experts) + shared


class MixtralDecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose feed-forward network is a mixture of experts (in Qwen's models, where the config says so)."""

    def __init__(self, config: MixtralConfig, index: int) -> None:
        super().__init__(config, index)
        if config.sparse_layers[index]:
            self.mlp = MixtureOfExperts(config)


class MixtralForCausalLM(LlamaForCausalLM):
    config: MixtralConfig
    layer_class = MixtralDecoderLayer  # type: ignore[assignment]  # takes the wider config

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> "MixtralForCausalLM":
        """A model of empty weights from a parsed config.json."""
        return cls(read_mixtral_config(raw))

    def compile_decode(self) -> None:
        """Not for mixtures: which experts run is known only at the step, and each choice would be compiled anew."""
        raise InputError("compiling the decode step is not implemented for mixtures of experts; leave --compile off")

    def locate(
        self, parameter_names: list[str], checkpoint_names: list[str]
    ) -> dict[str, tuple[str, tuple[Any, ...]]]:
        return locate_experts(parameter_names, checkpoint_names, self.config.moe_intermediate_size)

    def new_state(
        self, batch: int, capacity: int, pruning: Pruning, free_memory: int | None = None
    ) -> DecodeState:
        """As Llama's; with too little memory for all experts' copies, as many experts per layer get one as fit."""
        if pruning.static is not None:
            return super().new_state(batch, capacity, pruning, free_memory)
        state = super().new_state(batch, capacity, pruning)
        mixtures = [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]
        one_per_layer = sum(mixture.experts[0].copy_bytes(pruning) for mixture in mixtures)
        if free_memory is not None and one_per_layer:
            others = self.copy_bytes(pruning) - self.config.num_experts * one_per_layer
            for layer in state.layers:
                if isinstance(layer.ffn, ActiveExperts):
                    layer.ffn.copy_limit = max(0, free_memory - others) // one_per_layer
        return state

    def ffn_sizes(self, pruning: Pruning) -> PartitionSizes:
        """Regions of one expert."""
        return pruning.sizes(self.config.moe_intermediate_size)


MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def locate_experts(
    parameter_names: Sequence[str], checkpoint_names: Sequence[str], channels: int
) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Where the router and the experts stand in a checkpoint: the key, and what to index it with (() for all of it).

    Three layouts are told apart by the keys themselves: Mixtral's block_sparse_moe.experts.E.{w1,w3,w2}; Qwen's
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
