"""The Llama family: Llama 1-3, SmolLM2, Mistral, Qwen2/2.5 and Qwen3, told apart by their config alone.

B batch, T prompt tokens, S cache slots, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import ActiveHeads, Attention
from models.cache import KVCache
from models.clock import Clock
from models.config import LlamaConfig, read_llama_config
from models.feed_forward import FeedForward
from models.layers import DecodeStep, Embedding, Linear, PrefillStep, RMSNorm, RotaryEmbedding
from models.products import project
from models.pruning.partition import PartitionSizes
from models.pruning.settings import LayerWeights, Pruning
from models.state import DecodeState, LayerState
from weights.errors import InputError

# Layers that one call of compiled code runs at most.
MOST_LAYERS_PER_CALL = 4


class LlamaDecoderLayer(nn.Module):
    # Any: a family may put another network in its place that has FeedForward's methods (a mixture of experts).
    mlp: Any

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.windows[index])
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)

    def new_state(self, keys: Tensor, values: Tensor, pruning: Pruning) -> LayerState:
        heads = ActiveHeads(self.self_attn, pruning.head_sizes(self.self_attn.heads // self.self_attn.head_groups))
        return LayerState(keys, values, heads, self.mlp.new_active(pruning))

    def forward(self, x: Tensor, step: PrefillStep) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))

    def prefill(self, x: Tensor, state: LayerState, step: PrefillStep) -> Tensor:
        x = x + self.self_attn.prefill(self.input_layernorm(x), state.keys, state.values, state.heads, step)
        return x + self.mlp.prefill(self.post_attention_layernorm(x), state.ffn, step)

    def decode(self, x: Tensor, state: LayerState, step: DecodeStep) -> Tensor:
        x = x + self.self_attn.decode(self.input_layernorm(x), state.keys, state.values, state.heads, step)
        return x + self.mlp.decode(self.post_attention_layernorm(x), state.ffn, step)

    def weights(self) -> LayerWeights:
        """What pruning can take from, in weights of the layer's matrices."""
        attention = self.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return LayerWeights(
            attention=sum(projection.weight.numel() for projection in projections),
            ffn=self.mlp.weight_count(),
            head=2 * attention.head_dim * attention.q_proj.in_features,
            head_groups=attention.head_groups,
            heads_per_group=attention.heads // attention.head_groups,
        )

    def weights_read(self, pruning: Pruning) -> int:
        """Weights (elements, not bytes) that one token's decode step reads."""
        whole = self.weights()
        heads = pruning.head_sizes(whole.heads_per_group)
        unread_heads = heads.pruned * whole.head_groups * whole.head
        return whole.attention - unread_heads + self.mlp.read_weight_count(pruning)


def run_layers(
    layers: Sequence[LlamaDecoderLayer], x: Tensor, states: Sequence[LayerState], step: DecodeStep
) -> Tensor:
    """One token through some layers, one after the other. x [B, 1, H] -> [B, 1, H]"""
    for layer, state in zip(layers, states, strict=True):
        x = layer.decode(x, state, step)
    return x


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm: everything below the output projection."""

    layers: Sequence[LlamaDecoderLayer]

    def __init__(self, config: LlamaConfig, layer_class: type[LlamaDecoderLayer]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = (layer_class(config, index) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]  # iterates as what it holds
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)


class LlamaForCausalLM(nn.Module):
    layer_class = LlamaDecoderLayer
    # Buffers that old checkpoints carry and that follow from the config.
    ignored_keys = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, self.layer_class)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # What compile_decode replaces: how layers are grouped (by the index of the first), and the parts of a step.
        self.decode_groups = {0: tuple(self.model.layers)}
        self.decode_begin: Callable[..., tuple[Tensor, DecodeStep]] = LlamaForCausalLM.begin
        self.decode_layers: Callable[..., Tensor] = run_layers
        self.decode_head: Callable[..., Tensor] = LlamaForCausalLM.head
        self.compiled = False
        # The state whose prompt the weights were last reordered for (pruning in place).
        self.reordered_for: DecodeState | None = None

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> "LlamaForCausalLM":
        """A model of empty weights from a parsed config.json."""
        return cls(read_llama_config(raw))

    def locate(
        self, parameter_names: list[str], checkpoint_names: list[str]
    ) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Parameters that a checkpoint keeps under another name: to its key and an index into that tensor.

        The Llama family's modules are named as its checkpoints name them: there are none.
        """
        return {}

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] -> [B, T, H]"""
        return self.model.embed_tokens(tokens)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """The dense network without a cache.

        tokens int64 [B, T]; real bool [B, T], False where a token is padding -> logits [B, T, V]
        """
        return self.forward_embedded(self.embed(tokens), real)

    def forward_embedded(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """The same, from embedded tokens (which may be features of pictures). x [B, T, H] -> logits [B, T, V]"""
        step = self.prefill_step(x, real, counted=None, finish_dense=True, clock=Clock(x.device))
        for layer in self.model.layers:
            x = layer(x, step)
        return self.lm_head(self.model.norm(x))

    def copy_bytes(self, pruning: Pruning) -> int:
        """Memory that the active copies of the feed-forward networks will take, in bytes."""
        return sum(layer.mlp.copy_bytes(pruning) for layer in self.model.layers)

    def new_state(
        self, batch: int, capacity: int, pruning: Pruning, free_memory: int | None = None
    ) -> DecodeState:
        """Cache and buffers for `batch` sequences of up to `capacity` tokens, prompt and new ones together.

        free_memory  bytes that the copies of active weights may take, InputError when they take more; None: any
        """
        if free_memory is not None and self.copy_bytes(pruning) > free_memory:
            raise InputError(
                f"the weights that stay active take another {self.copy_bytes(pruning) / 1e9:.1f} GB beside the model, "
                f"and {free_memory / 1e9:.1f} GB is free: prune more, use a smaller dtype, or run dense (prune ratio 0)"
            )
        config, weight = self.config, self.model.embed_tokens.weight
        cache = KVCache(
            config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim,
            weight.dtype, weight.device,
        )
        if self.compiled:
            torch._dynamo.mark_dynamic(cache.slots, 0)      # the capacity: one compiled step serves them all
            for buffer in cache.keys + cache.values:
                torch._dynamo.mark_dynamic(buffer, 2)
        layers = [
            layer.new_state(keys, values, pruning)
            for layer, keys, values in zip(self.model.layers, cache.keys, cache.values, strict=True)
        ]
        live = torch.ones(batch, 1, dtype=torch.bool, device=weight.device)
        return DecodeState(cache, layers, pruning, live, Clock(weight.device))

    def prefill(
        self, x: Tensor, state: DecodeState, real: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """Run the prompts: fill the cache, decide every layer's partition, copy what stays active.

        x        [B, T, H]  embedded prompts, padded on the left
        real     [B, T]     bool, False where a slot is padding; None: no padding
        counted  [B, T]     bool, tokens that count in the scores; None: all real ones
        returns  [B, V]     logits after the last token
        """
        state.start(x.shape[1], real)
        if state.pruning.in_place:
            self.reordered_for = state
        finish_dense = state.pruning.prefill == "dense"
        step = self.prefill_step(x, real, real if counted is None else counted, finish_dense, state.clock)
        for layer, layer_state in zip(self.model.layers, state.layers, strict=True):
            x = layer.prefill(x, layer_state, step)
        return self.head(x[:, -1:])                                                 # [B, V]

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """One step: run one token per sequence on the active weights. tokens int64 [B] -> logits [B, V]"""
        state.cache.make_room()
        if state.pruning.in_place and self.reordered_for is not state:
            raise InputError("pruning in place serves one run at a time, and another prompt has reordered the weights")
        x, step = self.decode_begin(self, tokens, state)                            # [B, 1, H]
        if self.compiled:
            for mask in step.masks.values():
                torch._dynamo.mark_dynamic(mask, 3)
        for first, layers in self.decode_groups.items():
            x = self.decode_layers(layers, x, state.layers[first : first + len(layers)], step)
        state.cache.advance()
        return self.decode_head(self, x)                                            # [B, V]

    def begin(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodeStep]:
        """The beginning of a decode step: what every layer needs. tokens int64 [B] -> x [B, 1, H]"""
        x = self.embed(tokens.unsqueeze(1))                                         # [B, 1, H]
        return x, self.decode_step(x, state)

    def head(self, x: Tensor) -> Tensor:
        """The end of a prompt or a decode step: final norm and output projection. x [B, 1, H] -> logits [B, V]"""
        return project(self.model.norm(x), self.lm_head.weight, None)[:, 0]

    def compile_decode(self) -> None:
        """From now on run decode steps through torch.compile: one function for every few layers, two for the ends.

        A call of a compiled function costs some 60 microseconds whatever it computes, and compiling takes time for
        each layer in it. Groups are of one size, so that they share one compiled function.
        It is compiled at its first step and again for every new shape: another batch size, dtype or set of partition
        sizes, but not another prompt or length.
        """
        # Every shape of the one function counts towards this limit, past which PyTorch would silently run eagerly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        layers = tuple(self.model.layers)
        size = max(size for size in range(1, MOST_LAYERS_PER_CALL + 1) if len(layers) % size == 0)
        self.decode_groups = {first: layers[first : first + size] for first in range(0, len(layers), size)}
        # Checking again that inputs have the shapes compiled for takes 4 % of a step: the guards have seen to that.
        compile = partial(torch.compile, dynamic=False, options={"size_asserts": False})
        self.decode_begin = compile(LlamaForCausalLM.begin)
        self.decode_layers = compile(run_layers)
        self.decode_head = compile(LlamaForCausalLM.head)
        self.compiled = True

    def prefill_step(
        self, x: Tensor, real: Tensor | None, counted: Tensor | None, finish_dense: bool, clock: Clock
    ) -> PrefillStep:
        tokens = x.shape[1]
        slots = torch.arange(tokens, device=x.device)                               # [T]
        positions = slots[None]                                                     # [1, T]
        if real is not None:
            positions = (positions - (~real).sum(dim=1, keepdim=True)).clamp(min=0)     # [B, T]
        cos, sin = self.model.rotary(positions, x.dtype)
        windows = set(self.config.windows)
        masks = {window: prompt_mask(slots, real, window) for window in windows}
        return PrefillStep(cos, sin, masks, counted, finish_dense, clock)

    def decode_step(self, x: Tensor, state: DecodeState) -> DecodeStep:
        cos, sin = self.model.rotary(state.cache.positions(), x.dtype)              # [B, 1, D]
        masks = {}
        for window in set(self.config.windows):
            hidden = ~state.cache.visible(window)                                   # [B, 1, 1, S]
            masks[window] = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, -torch.inf)
        return DecodeStep(cos, sin, masks, state.cache.length, state.live)

    def layer_weights(self) -> LayerWeights:
        """Weights per layer, averaged over layers where they differ."""
        each = [layer.weights() for layer in self.model.layers]
        return LayerWeights(
            attention=sum(layer.attention for layer in each) // len(each),
            ffn=sum(layer.ffn for layer in each) // len(each),
            head=each[0].head,
            head_groups=each[0].head_groups,
            heads_per_group=each[0].heads_per_group,
        )

    def ffn_sizes(self, pruning: Pruning) -> PartitionSizes:
        """Regions of the feed-forward networks (of the first layer, where layers differ)."""
        return pruning.sizes(self.config.intermediate_size)

    def weight_bytes_per_token(self, pruning: Pruning) -> int:
        """Bytes of weights that one decode step reads: attention, feed-forward networks and lm_head."""
        weight = self.lm_head.weight
        read = weight.numel() + sum(layer.weights_read(pruning) for layer in self.model.layers)
        return read * weight.element_size()


def prompt_mask(slots: Tensor, real: Tensor | None, window: int | None) -> Tensor | None:
    """Where a prompt's query may look: bool [B or 1, 1, T, T], or None when causality is all there is to say.

    slots int64 [T]; real bool [B, T]. A padding slot sees itself, so that no row of the softmax is empty.
    """
    if real is None and (window is None or window >= len(slots)):
        return None
    query, key = slots[:, None], slots[None, :]
    seen = key <= query                                                             # [T, T]
    if window is not None:
        seen = seen & (key > query - window)
    if real is None:
        return seen[None, None]
    return ((seen & real[:, None, :]) | (query == key))[:, None]                    # [B, 1, T, T]
