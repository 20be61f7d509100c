"""The Llama family: Llama 1-3, SmolLM2, Mistral, Qwen2/2.5 and Qwen3, distinguished by their config alone.

B batch, T tokens (of the prompt, or after it), H hidden size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Attention, CachedAttention
from models.blocks import AttentionBlock, PrunedBlock, Sublayer
from models.cache import KVCache
from models.clock import Clock
from models.config import LlamaConfig
from models.feed_forward import FeedForward
from models.key_names import TEXT_SPELLINGS, keys_by_our_names
from models.layers import DerivedConstants, Embedding, RMSNorm, RotaryEmbedding
from models.matrices.plain import Matrix
from models.passes import DecodePass, PictureRows, PrefillPass, decode_pass, following_pass, prefill_pass
from models.pruning.active_weights import AnyMatrix
from models.pruning.heads import PartitionedAttention
from models.pruning.pop import POP
from models.pruning.pruning import Pruning
from models.pruning.settings import ATTENTION, MLP
from models.slots import AttentionPattern
from models.state import DecodeState, LayerState
from models.walks import decode_layers, prefill_layers
from weights.errors import InputError


class LlamaDecoderLayer(nn.Module):
    """Weights and dense forward of a decoder layer: attention and feed-forward network, each after its norm."""

    # Any: a family may put another network in its place (a mixture of experts).
    mlp: Any

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.windows[index])
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)

    def forward(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.forward_mlp(self.forward_attention(x, rows), rows)

    def forward_attention(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return x + self.after_attention(self.self_attn(self.before_attention(x), rows))

    def forward_mlp(self, x: Tensor, _: PrefillPass) -> Tensor:
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))

    # Positions of the norms. A family with norms elsewhere overrides these four. [B, T, H] -> [B, T, H]
    def before_attention(self, x: Tensor) -> Tensor:
        return self.input_layernorm(x)

    def after_attention(self, a: Tensor) -> Tensor:
        return a

    def before_mlp(self, x: Tensor) -> Tensor:
        return self.post_attention_layernorm(x)

    def after_mlp(self, y: Tensor) -> Tensor:
        return y

    def new_ffn(self, pruning: Pruning) -> PrunedBlock:
        """Build what runs in place of the feed-forward network under a pruning."""
        return pruning.rule.new_ffn(self.mlp)

    def new_attention(self, pruning: Pruning) -> CachedAttention:
        """Build what runs in place of the attention under a pruning."""
        heads = pruning.rule.head_sizes(self.self_attn.heads // self.self_attn.head_groups)
        if heads.prunes:
            return PartitionedAttention(self.self_attn, pruning.rule)
        return pruning.rule.new_attention(self.self_attn)


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm: everything below the output projection."""

    layers: Sequence[LlamaDecoderLayer]

    def __init__(self, config: LlamaConfig, layer_class: type[LlamaDecoderLayer]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.embedding_rows, config.hidden_size)
        layers = (layer_class(config, index) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]  # iterates as what it holds
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)


class LlamaForCausalLM(DerivedConstants):
    """A language model: weights, dense forward, and runs over a state: `prefill`, `decode`, `dense_step`.

    ignored_keys  patterns of checkpoint keys that the model does not use
    can_compile   whether decode steps can run through torch.compile
    """

    layer_class = LlamaDecoderLayer
    ignored_keys: tuple[str, ...] = ()
    can_compile = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, self.layer_class)
        self.lm_head = Matrix(config.hidden_size, config.embedding_rows, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def locate(
        self, parameter_names: list[str], checkpoint_names: list[str]
    ) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Map parameters that a checkpoint keeps under another name to its key and an index into that tensor.

        The Llama family's modules are named as in its checkpoints, except for the prefix.
        """
        stored_as = keys_by_our_names(checkpoint_names, TEXT_SPELLINGS)
        return {name: (stored_as[name], ()) for name in parameter_names if name in stored_as}

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; matrices may be packed."""
        return self.model.norm.weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the embeddings of tokens. tokens int64 [B, T] -> [B, T, H]"""
        return self.model.embed_tokens(tokens)

    def head(self, x: Tensor, lm_head: AnyMatrix | None = None) -> Tensor:
        """Apply the final norm and the output projection. x [B, T, H] -> logits [B, T, V]

        lm_head  what multiplies in place of the model's own matrix (the `lm_head` of a state)
        """
        product = self.lm_head if lm_head is None else lm_head
        return product(self.model.norm(x))

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Run the dense network without a cache.

        tokens int64 [B, T]; real bool [B, T], False where a token is padding -> logits [B, T, V]
        """
        return self.forward_embedded(self.embed(tokens), real)

    def forward_embedded(self, x: Tensor, real: Tensor | None = None, pictures: PictureRows | None = None) -> Tensor:
        """Run `forward` from embedded tokens, which may be features of pictures. x [B, T, H] -> logits [B, T, V]"""
        given = pictures or PictureRows()
        rows = prefill_pass(self.model.rotary, map(AttentionPattern, self.config.windows), x, real, given)
        for index, layer in enumerate(self.model.layers):
            x = given.add_features(index, layer(x, rows))
        return self.head(x)

    def new_state(self, batch: int, capacity: int, pruning: Pruning, dropped: int = 0) -> DecodeState:
        """Allocate cache and buffers for `batch` sequences of up to `capacity` tokens, prompt and new tokens together.

        dropped  tokens that layers which drop tokens need no slots for (see SlotMap)
        """
        config = self.config
        running = [pruning.sublayers(index) for index in range(config.num_hidden_layers)]
        cache = KVCache(
            [pruning.pattern(index, window) for index, window in enumerate(config.windows)],
            [ATTENTION in one for one in running],
            batch, config.num_key_value_heads, capacity, dropped, config.head_dim, self.dtype, self.device,
        )
        whole, layers = replace(pruning, rule=POP(0.0, 0.0)), []        # a block that does not run needs no copies
        for index, (layer, sublayers) in enumerate(zip(self.model.layers, running, strict=True)):
            own = cache.layers[index]
            attention = layer.new_attention(pruning if ATTENTION in sublayers else whole)
            ffn = layer.new_ffn(pruning if MLP in sublayers else whole)
            blocks: dict[str, Sublayer] = {
                ATTENTION: AttentionBlock(layer, attention, own), MLP: pruning.rule.new_block(layer, ffn)
            }
            layers.append(LayerState(index, own, attention, ffn, [blocks[name] for name in sublayers]))
        live = torch.ones(batch, 1, dtype=torch.bool, device=self.device)
        lm_head = pruning.rule.new_head(self.lm_head, self.once)
        return DecodeState(cache, layers, lm_head, pruning, live, Clock(self.device), pruning.new_schedule(batch))

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise InputError for a token without an embedding: some checkpoints add tokens but no embeddings for them."""
        if (highest := max(ids, default=0)) >= self.config.vocab_size:
            raise InputError(
                f"the text has the token {highest}, and the model's embedding only {self.config.vocab_size} rows: "
                "the tokenizer has more tokens than the model was made for; leave that token out of the text"
            )

    def prefill(
        self, x: Tensor, state: DecodeState, real: Tensor | None = None, counted: Tensor | None = None,
        kept: int = 0, pictures: PictureRows | None = None,
    ) -> Tensor:
        """Run the prompts: fill the cache; given enough evidence, partition every layer and copy its active weights.

        Continuing a prompt, as a conversation's next turn does, adds to the evidence and partitions again.

        x        [B, T, H]  embedded prompts, padded on the left
        real     [B, T]     bool, False where a slot is padding; None: no padding
        counted  [B, T]     bool, tokens that count in the scores; None: all real tokens
        kept     slots of the cache to keep; these tokens follow them (without padding). 0: start a new prompt
        pictures positions, blocks and features of pictures in the prompt
        returns  [B, V]     logits after the last token
        """
        rows = self.begin_prompt(x, state, real, kept, pictures or PictureRows())
        rows.count(len(x), real if counted is None else counted)
        walk = state.pruning.walk
        rows.partitions = state.schedule.prompt(walk.evidence_tokens(rows, state))
        rows.finish_dense = state.pruning.settings.prefill == "dense" or not rows.partitions
        x = walk(state.layers, x, rows, state)                                      # [B, T, H]
        return self.head(x[:, -1:])[:, 0]                                           # [B, V]

    def begin_prompt(
        self, x: Tensor, state: DecodeState, real: Tensor | None, kept: int, pictures: PictureRows
    ) -> PrefillPass:
        """Build the pass of a new prompt, or of tokens that continue one after its first `kept` slots."""
        if not kept:
            state.start(x.shape[1], real, pictures.rope_delta)
            rows = prefill_pass(self.model.rotary, state.cache.maps, x, real, pictures)
        else:
            state.go_on(kept, pictures.rope_delta)
            rows = following_pass(self.model.rotary, x, state.cache, pictures)
            state.cache.make_room(x.shape[1])
            state.cache.advance(x.shape[1])
        rows.clock = state.clock
        return rows

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Run one step on the active weights, one token per sequence. tokens int64 [B] -> logits [B, V]"""
        state.cache.make_room()
        x, step = self.begin(tokens, state)                                         # [B, 1, H]
        x = decode_layers(state.layers, x, step)
        state.cache.advance()
        return self.head(x, state.lm_head)[:, 0]                                    # [B, V]

    def dense_step(self, tokens: Tensor, state: DecodeState, partitions: bool) -> Tensor:
        """Run one step on all channels and add to the evidence; if `partitions`, partition the channels again.

        tokens int64 [B] -> logits [B, V]
        """
        state.cache.make_room()
        x, rows = self.begin_dense(tokens, state, partitions, state.schedule.live)  # [B, 1, H]
        x = prefill_layers(state.layers, x, rows)
        state.cache.advance()
        return self.head(x)[:, 0]                                                   # [B, V]

    def begin(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodePass]:
        """Embed the tokens of a step and build their pass; the sequences share one choice of channels.

        tokens int64 [B] -> x [B, 1, H]
        """
        x = self.embed(tokens.unsqueeze(1))
        return x, decode_pass(self.model.rotary, x, state.cache, state.live, together=True)

    def begin_dense(
        self, tokens: Tensor, state: DecodeState, partitions: bool, live: int
    ) -> tuple[Tensor, PrefillPass]:
        """Embed the tokens of a dense step, of which `live` count as evidence, and build their pass.

        tokens int64 [B] -> x [B, 1, H]
        """
        x = self.embed(tokens.unsqueeze(1))
        rows = following_pass(self.model.rotary, x, state.cache, PictureRows())
        rows.counted, rows.tokens, rows.partitions, rows.of_prompt = state.live, live, partitions, False
        return x, rows
