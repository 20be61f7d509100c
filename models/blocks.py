"""The two residual blocks of a decoder layer, as a prompt and a step run them.

B batch, T tokens, H hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.attention import CachedAttention
from models.cache import LayerCache
from models.passes import DecodePass, PrefillPass


class BlockNorms(Protocol):
    """The norms of a layer, by their positions (LlamaDecoderLayer in models/llama.py). [B, T, H] -> [B, T, H]"""

    def before_attention(self, x: Tensor) -> Tensor: ...

    def after_attention(self, a: Tensor) -> Tensor: ...

    def before_mlp(self, x: Tensor) -> Tensor: ...

    def after_mlp(self, y: Tensor) -> Tensor: ...


class PrunedBlock(Protocol):
    """A pruned feed-forward network or mixture of experts (methods: see PrunedFFN in models/pruning/interface.py)."""

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor: ...

    def decode(self, x: Tensor, step: DecodePass) -> Tensor: ...

    def restart(self) -> None: ...

    def count(self, tokens: int) -> None: ...

    def copied_bytes(self) -> int: ...


class Sublayer(Protocol):
    """A residual block. x [B, T, H] -> [B, T, H]"""

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor: ...

    def decode(self, x: Tensor, step: DecodePass) -> Tensor: ...

    def skip(self, x: Tensor, rows: PrefillPass) -> None:
        """Write keys and values of prompt tokens that skip this block."""


@dataclass
class AttentionBlock:
    """x + Attention(norm(x)) over the layer's cache."""

    layer: BlockNorms
    attention: CachedAttention
    cache: LayerCache

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        a = self.attention.prefill(self.layer.before_attention(x), self.cache, rows)            # [B, T, H]
        return x + self.layer.after_attention(a)

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        a = self.attention.decode(self.layer.before_attention(x), self.cache, step)
        return x + self.layer.after_attention(a)

    def skip(self, x: Tensor, rows: PrefillPass) -> None:
        self.attention.write_keys_and_values(self.layer.before_attention(x), self.cache, rows)


@dataclass
class FeedForwardBlock:
    """x + FFN(norm(x)), with the pruned network."""

    layer: BlockNorms
    ffn: PrunedBlock

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return x + self.layer.after_mlp(self.ffn.prefill(self.layer.before_mlp(x), rows))

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        return x + self.layer.after_mlp(self.ffn.decode(self.layer.before_mlp(x), step))

    def skip(self, x: Tensor, rows: PrefillPass) -> None:
        pass
