"""The Llama family: Llama 1-3, SmolLM2, Mistral, Qwen2/2.5 and Qwen3, told apart by their config alone.

B batch, T rows (prompt tokens, or what follows them), S cache slots, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.active_heads import ActiveHeads
from models.attention import Attention
from models.cache import KVCache
from models.clock import Clock
from models.config import LlamaConfig, read_llama_config
from models.feed_forward import ActiveFeedForward, FeedForward
from models.gathering import Drift, Gathering
from models.key_names import TEXT_SPELLINGS, keys_by_our_names
from models.layers import Embedding, RMSNorm, RotaryEmbedding
from models.matrix import Matrix
from models.passes import (
    DecodePass,
    Observer,
    PictureRows,
    PrefillPass,
    View,
    decode_pass,
    following_pass,
    prefill_pass,
    prompt_plan,
)
from models.pruning.left_out import ATTENTION, MLP
from models.pruning.partition import PartitionSizes
from models.pruning.resolve import Pruning
from models.pruning.rules import POP
from models.reading import all_copy_bytes
from models.state import DecodeState, LayerState
from models.visual_tokens import attended_by_last, leave_out
from weights.errors import InputError
from weights.memory import gigabytes


class LlamaDecoderLayer(nn.Module):
    # Any: a family may put another network in its place that has FeedForward's methods (a mixture of experts).
    mlp: Any

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.ranks = config.ranks
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.windows[index])
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)

    def new_active(self, pruning: Pruning) -> Any:
        """What decode steps are to read of the feed-forward network."""
        return ActiveFeedForward(self.mlp, pruning.rule, self.mlp.copying_saves(pruning.rule))

    # What a layer is but for its norms is written here; a family that norms elsewhere says where in these three.
    def attended(self, a: Tensor) -> Tensor:
        """What attention adds, from what it puts out. [B, T, H]"""
        return a

    def before_mlp(self, x: Tensor) -> Tensor:
        """What the feed-forward network reads. [B, T, H]"""
        return self.post_attention_layernorm(x)

    def after_mlp(self, y: Tensor) -> Tensor:
        """What the feed-forward network adds, from what it puts out. [B, T, H]"""
        return y

    def forward(self, x: Tensor, step: PrefillPass) -> Tensor:
        return self.forward_mlp(self.forward_attention(x, step), step)

    def forward_attention(self, x: Tensor, step: PrefillPass) -> Tensor:
        return x + self.attended(self.ranks.add_up(self.self_attn(self.input_layernorm(x), step)))

    def forward_mlp(self, x: Tensor, _: PrefillPass) -> Tensor:
        return x + self.after_mlp(self.ranks.add_up(self.mlp(self.before_mlp(x))))

    def prefill(self, x: Tensor, state: LayerState, step: PrefillPass) -> Tensor:
        if ATTENTION in state.halves:
            x = self.prefill_attention(x, state, step)
        if MLP in state.halves:
            x = self.prefill_probed_mlp(x, state, step) if state.probed else self.prefill_mlp(x, state, step)
        return x

    def prefill_attention(self, x: Tensor, state: LayerState, step: PrefillPass) -> Tensor:
        a = self.self_attn.prefill(self.input_layernorm(x), state.keys, state.values, state.heads, step)    # [B, T, H]
        a = self.ranks.add_up(a)
        if state.drift is not None:
            state.drift.see(a, step.counted, step.of_prompt)
        return x + self.attended(a)

    def prefill_mlp(self, x: Tensor, state: LayerState, step: PrefillPass) -> Tensor:
        return x + self.after_mlp(self.ranks.add_up(self.mlp.prefill(self.before_mlp(x), state.ffn, step)))

    def prefill_probed_mlp(self, x: Tensor, state: LayerState, step: PrefillPass) -> Tensor:
        """As prefill_mlp, where a rule probes: rows of the stream decide first, then all run on what stays."""
        probe = state.ffn.rule.probe(x, step.counted)                               # int64 [n]
        y = self.mlp.prefill_probed(self.before_mlp(x), state.ffn, step, probe)
        return x + self.after_mlp(self.ranks.add_up(y))

    def pass_by(self, x: Tensor, state: LayerState, waiting: PrefillPass, running: PrefillPass) -> Tensor:
        """A prompt that skips this layer, all but its last rows (Prefill-Only pruning, arXiv 2602.03295, Eq. 14, 15).

        The waiting rows leave keys and values of what has reached this layer, and are what they were; the running ones
        are on their way to the first new token, and attend to the cache as a step does. x [B, T, H] -> [B, T, H]

        What is left of a layer is a norm and two products, each layer by itself: one stacked product for all skipped
        layers takes a second copy of their weights, and saves less than 1 % of a prompt (docs/prefill_only.md).
        """
        rest, last = x.tensor_split([len(waiting.slots[state.heads.view])], dim=1)  # [B, T - K, H], [B, K, H]
        if ATTENTION in state.halves:
            normed = self.input_layernorm(rest)
            self.self_attn.leave_keys_and_values(normed, state.keys, state.values, state.heads, waiting)
        if last.shape[1] == 0:          # no boundary: a control that nothing but a comparison asks for
            return rest
        return torch.cat([rest, self.prefill(last, state, running)], dim=1)

    def decode(self, x: Tensor, state: LayerState, step: DecodePass) -> Tensor:
        if ATTENTION in state.halves:
            x = self.decode_attention(x, state, step)
        if MLP in state.halves:
            x = self.decode_mlp(x, state, step)
        return x

    def decode_attention(self, x: Tensor, state: LayerState, step: DecodePass) -> Tensor:
        a = self.self_attn.decode(self.input_layernorm(x), state.keys, state.values, state.heads, step)     # [B, T, H]
        a = self.ranks.add_up(a)
        if state.drift is not None:
            state.drift.see(a, step.live, of_prompt=False)
        return x + self.attended(a)

    def decode_mlp(self, x: Tensor, state: LayerState, step: DecodePass) -> Tensor:
        return x + self.after_mlp(self.ranks.add_up(self.mlp.decode(self.before_mlp(x), state.ffn, step)))


def prefill_layers(
    layers: Sequence[LlamaDecoderLayer], x: Tensor, states: Sequence[LayerState], step: PrefillPass
) -> Tensor:
    """Rows that add to the evidence through some layers, one after the other. x [B, T, H]"""
    for layer, state in zip(layers, states, strict=True):
        x = layer.prefill(x, state, step)
    return x


def decode_layers(
    layers: Sequence[LlamaDecoderLayer], x: Tensor, states: Sequence[LayerState], step: DecodePass
) -> Tensor:
    """Rows through some layers, one after the other. x [B, T, H] -> [B, T, H]"""
    for layer, state in zip(layers, states, strict=True):
        x = layer.decode(x, state, step)
    return x


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm: everything below the output projection."""

    layers: Sequence[LlamaDecoderLayer]

    def __init__(self, config: LlamaConfig, layer_class: type[LlamaDecoderLayer]) -> None:
        super().__init__()
        own = config.ranks.stretch(config.vocab_size)
        self.embed_tokens = Embedding(own.stop - own.start, config.hidden_size)
        layers = (layer_class(config, index) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]  # iterates as what it holds
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)


class LlamaForCausalLM(nn.Module):
    layer_class = LlamaDecoderLayer
    ignored_keys: tuple[str, ...] = ()
    can_compile = True
    read_config: Callable[..., LlamaConfig] = staticmethod(read_llama_config)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, self.layer_class)
        self.lm_head = Matrix(config.hidden_size, self.model.embed_tokens.num_embeddings, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> "LlamaForCausalLM":
        """A model of empty weights from a parsed config.json."""
        return cls(cls.read_config(raw))

    def locate(
        self, parameter_names: list[str], checkpoint_names: list[str]
    ) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Parameters that a checkpoint keeps under another name: to its key and an index into that tensor.

        The Llama family's modules are named as its checkpoints name them, but for what stands in front.
        """
        stored_as = keys_by_our_names(checkpoint_names, TEXT_SPELLINGS)
        return {name: (stored_as[name], ()) for name in parameter_names if name in stored_as}

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; matrices may be packed."""
        return self.model.norm.weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] -> [B, T, H]"""
        ranks = self.config.ranks
        if ranks.count == 1:
            return self.model.embed_tokens(tokens)
        own = ranks.stretch(self.config.vocab_size)
        elsewhere = (tokens < own.start) | (tokens >= own.stop)                     # [B, T]
        x = self.model.embed_tokens((tokens - own.start).masked_fill(elsewhere, 0))
        return ranks.add_up(x.masked_fill(elsewhere.unsqueeze(-1), 0))

    def head(self, x: Tensor) -> Tensor:
        """Final norm and output projection. x [B, T, H] -> logits [B, T, V]"""
        return self.config.ranks.join_rows(self.lm_head(self.model.norm(x)), self.config.vocab_size)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """The dense network without a cache.

        tokens int64 [B, T]; real bool [B, T], False where a token is padding -> logits [B, T, V]
        """
        return self.forward_embedded(self.embed(tokens), real)

    def forward_embedded(self, x: Tensor, real: Tensor | None = None, pictures: PictureRows | None = None) -> Tensor:
        """The same, from embedded tokens (which may be features of pictures). x [B, T, H] -> logits [B, T, V]"""
        given = pictures or PictureRows()
        step = prefill_pass(
            self.model.rotary, map(View, self.config.windows), x, real, positions=given.positions, blocks=given.blocks
        )
        for index, layer in enumerate(self.model.layers):
            x = layer(x, step)
            if index < len(given.added):
                x = x + given.added[index]
        return self.head(x)

    def new_state(
        self, batch: int, capacity: int, pruning: Pruning, free_memory: int | None = None,
        thin_capacity: int | None = None,
    ) -> DecodeState:
        """Cache and buffers for `batch` sequences of up to `capacity` tokens, prompt and new ones together.

        free_memory    bytes that cache and copies of active weights may take, InputError for more; None: any
        thin_capacity  tokens in the layers where rows of pictures have been left out; None: as many
        """
        config = self.config
        cached, copies = self.cache_bytes(batch, capacity, pruning), self.least_copies(pruning)
        if free_memory is not None and cached + copies > free_memory:
            raise InputError(
                f"the cache of {batch} x {capacity} tokens takes {gigabytes(cached)} and the weights that stay active "
                f"another {gigabytes(copies)} beside the model, and {gigabytes(free_memory)} is free: ask for fewer "
                "tokens, prune more, use a smaller dtype, or run dense (prune ratio 0)"
            )
        thin_capacity = capacity if thin_capacity is None else thin_capacity
        running = [pruning.halves(index) for index in range(config.num_hidden_layers)]
        attends = [ATTENTION in halves for halves in running]
        thin = [pruning.is_thin(index) for index in range(config.num_hidden_layers)]
        sizes = [own * (thin_capacity if few else capacity) for own, few in zip(attends, thin, strict=True)]
        cache = KVCache(
            sizes, batch, config.num_key_value_heads, capacity, thin_capacity, config.head_dim, self.dtype, self.device
        )
        whole, layers = replace(pruning, rule=POP(0.0, 0.0)), []        # of what is left out there are no copies
        for index, (layer, halves) in enumerate(zip(self.model.layers, running, strict=True)):
            blind = pruning.blind and index in pruning.skipped
            heads = ActiveHeads(layer.self_attn, (pruning if attends[index] else whole).rule, blind, thin[index])
            active = layer.new_active(pruning if MLP in halves else whole)
            own = LayerState(cache.keys[index], cache.values[index], heads, active, halves=halves)
            own.probed = pruning.rule.probed > 0
            layers.append(own)
        most, drift = pruning.settings.redraw_on_drift, None
        if most is not None and pruning.rule.follows_prompt and pruning.cuts and any(attends):
            last = max(index for index, one in enumerate(attends) if one)
            drift = layers[last].drift = Drift(most, config.hidden_size, self.device)
        live = torch.ones(batch, 1, dtype=torch.bool, device=self.device)
        clocks = Clock(self.device), Clock(self.device)
        return DecodeState(cache, layers, pruning, live, *clocks, Gathering(pruning, batch, drift))

    def cache_bytes(self, batch: int, capacity: int, pruning: Pruning | None = None) -> int:
        """Of all layers, or of those that attend under a pruning."""
        one = self.config.num_key_value_heads * self.config.head_dim * self.dtype.itemsize
        gone = 0 if pruning is None else sum(half.part == ATTENTION for half in pruning.left_out)
        return 2 * (self.config.num_hidden_layers - gone) * batch * capacity * one

    def least_copies(self, pruning: Pruning) -> int:
        """Bytes of the copies that a state cannot do without."""
        return all_copy_bytes(self, pruning)

    def check_ids(self, ids: Iterable[int]) -> None:
        """InputError for a token without a row in the embedding: some checkpoints add tokens and leave it as it is."""
        if (highest := max(ids, default=0)) >= self.config.vocab_size:
            raise InputError(
                f"the text has the token {highest}, and the model's embedding only {self.config.vocab_size} rows: "
                "the tokenizer has more tokens than the model was made for; leave that token out of the text"
            )

    def prefill(
        self, x: Tensor, state: DecodeState, real: Tensor | None = None, counted: Tensor | None = None,
        observe: Observer | None = None, kept: int = 0, pictures: PictureRows | None = None,
    ) -> Tensor:
        """Run the prompts: fill the cache; given enough evidence, decide every layer's partition and copy what stays.

        Layers that the pruning skips see no more of a prompt than its last tokens: those are their evidence.
        More of a prompt, as a conversation's next turn is, adds to the evidence, and the partitions are drawn anew.

        x        [B, T, H]  embedded prompts, padded on the left
        real     [B, T]     bool, False where a slot is padding; None: no padding
        counted  [B, T]     bool, tokens that count in the scores; None: all real ones
        observe  is told what every feed-forward network and every attention computes
        kept     slots of the cache that stay, and that these rows come after (without padding); 0: begin anew
        pictures what the rows have because of pictures in the prompt
        returns  [B, V]     logits after the last token
        """
        rotary, views, pruning = self.model.rotary, state.views, state.pruning
        given = pictures or PictureRows()
        if kept:
            state.go_on(kept, given.rope_delta)
            tokens = x.shape[:-1].numel() if counted is None else int(counted.sum())
            whole = following_pass(
                rotary, views, x, state.cache, counted, tokens, True, state.clock, observe, True, given.positions,
                given.blocks,
            )
            state.cache.make_room(x.shape[1])
            state.cache.advance(x.shape[1])
        else:
            state.start(x.shape[1], real, given.rope_delta)
            whole = prefill_pass(rotary, views, x, real, counted, state.clock, observe, given.positions, given.blocks)
        plan = prompt_plan(whole, pruning, len(self.model.layers), state.cache, x.dtype, given.blocks)
        least = whole.tokens - pruning.uncounted(given.stretches)
        draws = state.gathering.prompt(min(least, *(rows.running.tokens for rows in plan)))
        for rows in plan:
            rows.running.draws, rows.running.finish_dense = draws, pruning.settings.prefill == "dense" or not draws
        attended = None
        for index, (layer, own) in enumerate(zip(self.model.layers, state.layers, strict=True)):
            if index == pruning.thin_from and given.stretches:
                x, whole, given = leave_out(pruning, x, whole, given, state.cache, attended)
                plan = prompt_plan(whole, pruning, len(self.model.layers), state.cache, x.dtype, given.blocks)
            entered, (running, waiting) = x, plan[index]
            x = layer.prefill(x, own, running) if waiting is None else layer.pass_by(x, own, waiting, running)
            if index + 1 == pruning.thin_from and given.stretches:
                attended = attended_by_last(layer, entered, own, whole, state.cache)
            if index < len(given.added):
                x = x + given.added[index]
        return self.head(x[:, -1:])[:, 0]                                           # [B, V]

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """One step: run one token per sequence on the active weights. tokens int64 [B] -> logits [B, V]

        Where evidence is still gathered (see Gathering), some steps are the dense model's instead.
        """
        state.cache.make_room()
        dense, draws = state.gathering.next_step()
        if dense:
            return self.dense_step(tokens, state, draws)
        x, step = self.begin(tokens, state)                                         # [B, 1, H]
        x = decode_layers(self.model.layers, x, state.layers, step)
        state.cache.advance()
        return self.head(x)[:, 0]                                                   # [B, V]

    def dense_step(self, tokens: Tensor, state: DecodeState, draws: bool) -> Tensor:
        """A step on all channels, which adds to the evidence and perhaps draws the partitions from all there is."""
        x, step = self.begin_dense(tokens, state, draws, state.gathering.live)      # [B, 1, H]
        x = prefill_layers(self.model.layers, x, state.layers, step)
        state.cache.advance()
        return self.head(x)[:, 0]                                                   # [B, V]

    def begin_dense(self, tokens: Tensor, state: DecodeState, draws: bool, live: int) -> tuple[Tensor, PrefillPass]:
        """The beginning of a step on all channels, whose rows are evidence. tokens int64 [B] -> x [B, 1, H]"""
        x = self.embed(tokens.unsqueeze(1))
        return x, following_pass(
            self.model.rotary, state.views, x, state.cache, state.live, live, draws, state.step_clock
        )

    def begin(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodePass]:
        """The beginning of a decode step. tokens int64 [B] -> x [B, 1, H], and a pass whose rows decide together"""
        x = self.embed(tokens.unsqueeze(1))
        return x, decode_pass(self.model.rotary, state.views, x, state.cache, state.live, together=True)

    def ffn_sizes(self, pruning: Pruning) -> PartitionSizes:
        """Regions of the feed-forward networks (of the first that runs, where layers differ; of none: of the first)."""
        running = [layer.mlp for index, layer in enumerate(self.model.layers) if MLP in pruning.halves(index)]
        return pruning.rule.sizes(running[0]) if running else POP(0.0, 0.0).sizes(self.model.layers[0].mlp)
