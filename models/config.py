"""Configurations of the Llama family, with every default filled in (read from config.json by models/read_config.py)."""

from dataclasses import dataclass

from models.ranks import ALONE, Ranks

# Largest number of tokens of a context: indices fit into 32 bits everywhere.
LONGEST_CONTEXT = 2**31


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and scaling for long contexts."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0        # llama3
    high_freq_factor: float = 4.0       # llama3
    beta_fast: float = 32.0             # yarn
    beta_slow: float = 1.0              # yarn
    attention_factor: float = 1.0       # yarn, factors: scale of cos and sin
    truncate: bool = True               # yarn
    factors: tuple[float, ...] = ()     # factors: one divisor per frequency, as .gguf files store them
    streams: tuple[int, ...] = ()       # of pictures: per frequency, the index of one of three positions


@dataclass(frozen=True)
class LlamaConfig:
    """Configuration of a Llama-family forward pass. Field names are Hugging Face's if it has the field."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool
    windows: tuple[int | None, ...]     # per layer: tokens a query sees, itself included; None: all before it
    unknown_fields: tuple[str, ...] = ()
    ranks: Ranks = ALONE                # with several ranks, heads and channels are those of one rank

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding and of the output projection that this rank holds."""
        own = self.ranks.stretch(self.vocab_size)
        return own.stop - own.start

    @property
    def context(self) -> int:
        """Maximum tokens of a sequence: the positions of training, stretched by linear scaling or YaRN."""
        if self.rope.rope_type not in ("linear", "yarn"):
            return self.max_position_embeddings
        stretched = min(self.rope.original_max_position_embeddings * self.rope.factor, LONGEST_CONTEXT)
        return max(self.max_position_embeddings, int(stretched))

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return self.head_dim**-0.5

    @property
    def sides(self) -> tuple[int, ...]:
        """Sizes of the dimensions that its tensors have."""
        queries = self.num_attention_heads * self.head_dim
        return self.vocab_size, self.hidden_size, self.intermediate_size, queries

    @property
    def blocks(self) -> int:
        """Number of blocks with matrices of their own: layers, and in each its experts."""
        return self.num_hidden_layers
