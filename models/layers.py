"""The parts every language model here is made of: RMSNorm, rotary embedding, attention, gated feed-forward network.

Attention and FeedForward each show three ways through: `forward` is the dense network that golden tests hold to
Hugging Face, `prefill` runs the prompt and decides which channels stay (POP, arXiv 2602.06822, section 3), `decode`
runs one token on the channels that stayed. Modules carry Hugging Face's names.

B batch, T prompt tokens, S cache slots, H hidden size, I FFN channels, N query heads, K key/value heads, D head size,
A resident channels (retained, then candidate), G groups of query heads that are cut alike, U heads per group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import LlamaConfig, RopeConfig
from popengine.clock import Clock
from popengine.errors import InputError
from popengine.partition import (
    ChannelPartition,
    PartitionSizes,
    StaticChannels,
    best,
    channel_scores,
    head_scores,
    keep_everything,
    partition_channels,
)
from popengine.pruning import Pruning

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"config.json: hidden_act {name!r} is not implemented; implemented are {known}")
    return ACTIVATIONS[name]


@dataclass
class PrefillStep:
    """What every layer needs to run the prompt.

    cos, sin  [B, T, D]  rotary embedding of the positions
    masks     by attention window: bool [B, 1, T, T], True where a query may look; None means causal and nothing else
    counted   bool [B, T], tokens that count in the scores; None: all
    finish_dense  down_proj and o_proj run on all channels (prefill "dense"), not only on the resident ones
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None]
    counted: Tensor | None
    finish_dense: bool
    clock: Clock


@dataclass
class DecodeStep:
    """What every layer needs to run one more token.

    cos, sin  [B, 1, D]; masks by attention window: float [B, 1, 1, S], 0 where the token may look and -inf elsewhere
    slot      [1]     int64, the cache slot this token fills
    live      [B, 1]  bool, False for sequences that have ended: they do not count when candidates are picked
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor]
    slot: Tensor
    live: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each of the D/2 pairs of coordinates, float32 [D/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents                                       # [D/2]
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "factors":
        return frequencies / torch.tensor(rope.factors)
    if rope.rope_type == "llama3":
        # Wavelengths beyond the original context are stretched by `factor`, short ones are left, with a ramp between.
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies
    if rope.rope_type == "yarn":
        return yarn_frequencies(rope, head_dim, frequencies)
    return frequencies


def yarn_frequencies(rope: RopeConfig, head_dim: int, frequencies: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate slow pairs, keep fast ones, with a ramp between."""

    def pair_with(turns: float) -> float:
        """Index of the pair of coordinates that makes `turns` full turns over the original context."""
        wavelengths = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)


class RotaryEmbedding(nn.Module):
    """cos and sin for given positions. Its frequencies follow from the config and are no part of a checkpoint."""

    frequencies: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.scale = rope.attention_factor
        # On the CPU even while the model is being laid out on the meta device: these are values, not a shape.
        with torch.device("cpu"):
            self.register_buffer("frequencies", rotary_frequencies(rope, head_dim), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B, T] -> cos, sin [B, T, D], computed in float32."""
        angles = positions[..., None].float() * self.frequencies                    # [B, T, D/2]
        angles = torch.cat([angles, angles], dim=-1)                                # [B, T, D]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of coordinates (j, j + D/2) by its angle. x [B, heads, T, D]; cos, sin [B, T, D]."""
    first, second = x.chunk(2, dim=-1)                                              # [B, heads, T, D/2] each
    first_cos, second_cos = cos.unsqueeze(1).chunk(2, dim=-1)                       # [B, 1, T, D/2] each
    first_sin, second_sin = sin.unsqueeze(1).chunk(2, dim=-1)
    return torch.cat([first * first_cos - second * first_sin, second * second_cos + first * second_sin], dim=-1)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the prompt to itself. q [B, N, T, D]; k, v [B, K, T, D] -> [B, T, N, D]."""
    grouped = q.shape[1] != k.shape[1]
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return a.transpose(1, 2)                                                        # [B, T, N, D]


def written_out(x: Tensor) -> bool:
    """Whether products are written out as multiply and sum: one token, on a CPU, inside torch.compile.

    A library's matrix product of a single row reads weights at a third of the memory's speed, and so it does inside
    compiled code. The same product written out becomes one loop that Inductor fuses with its neighbours and that reads
    as fast as memory gives (figures in docs/speed.md). In eager code it would write every product to memory instead.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[:-1].numel() == 1


def stored_by_columns(weight: Tensor) -> bool:
    """Whether a matrix [out, in] lies in memory column by column, as lay_columns_together leaves it."""
    return weight.stride(0) == 1 < weight.stride(1)


def adds_up_columns(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is computed column by column: one token, on a CPU, eagerly, weights stored that way."""
    return x.device.type == "cpu" and x.shape[:-1].numel() == 1 and stored_by_columns(weight)


@lru_cache(maxsize=64)
def stretches(count: int, parts: int) -> tuple[Tensor, Tensor]:
    """The indices below `count`, and where each of `parts` stretches of them begins: int64, on the CPU."""
    with torch.inference_mode(False):       # they outlive this call, and may next be needed outside inference
        return torch.arange(count), torch.arange(parts) * count // parts


def add_up_columns(weight: Tensor, columns: Tensor, factors: Tensor) -> Tensor:
    """sum over k of factors[k] * weight[:, columns[k]]: one token's product that reads the columns named and no others.

    That is what embedding_bag computes from a table of the columns. Each thread adds up a stretch of them, and so one
    token's product takes half the time of F.linear's (figures in docs/speed.md).

    weight [out, in], stored by columns, on the CPU; columns int64 [K]; factors [K] -> [out]
    """
    _, begins = stretches(len(columns), torch.get_num_threads())
    sums = F.embedding_bag(columns, weight.t(), offsets=begins, per_sample_weights=factors, mode="sum")
    return sums.sum(dim=0)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear for decode steps, whichever way is fastest. x [B, 1, in], weight [out, in], bias [out] -> [B, 1, out]"""
    if written_out(x):
        y = (weight.float() * x.flatten().float()).sum(dim=-1).to(x.dtype)          # [out]
    elif adds_up_columns(x, weight):
        columns, _ = stretches(weight.shape[1], 1)
        y = add_up_columns(weight, columns, x.flatten())                            # [out]
    else:
        return F.linear(x, weight, bias)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def attend_cache(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token to the cache. Slots not filled yet have weight 0.

    The query heads that share a key/value head stand as if they were its queries, so that nothing is repeated.

    q [B, N, 1, D], N a multiple of K; keys, values [B, K, S, D]; mask float [B, 1, 1, S] -> [B, 1, N, D]
    """
    batch, heads, _, head_dim = q.shape
    alone = written_out(q[:, 0])
    q = q.reshape(batch, keys.shape[1], -1, head_dim)                               # [B, K, N/K, D]
    if alone:
        products = q.unsqueeze(3).float() * keys.unsqueeze(2).float()               # [B, K, N/K, S, D]
        weights = (products.sum(dim=-1) * head_dim**-0.5 + mask).softmax(dim=-1)    # [B, K, N/K, S]
        a = (weights.unsqueeze(-1) * values.unsqueeze(2).float()).sum(dim=-2)       # [B, K, N/K, D]
        return a.to(q.dtype).reshape(batch, 1, heads, head_dim)
    a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)              # [B, K, N/K, D]
    return a.reshape(batch, 1, heads, head_dim)


class Linear(nn.Linear):
    """nn.Linear, without initial values while the model is laid out on the meta device.

    There is nothing to fill there, and PyTorch would import its compiler to find that out: two seconds of loading.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, without initial values on the meta device, as Linear."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def lay_columns_together(linear: nn.Linear) -> None:
    """Store a weight [out, in] column by column instead of row by row, for add_up_columns; its values stay the same."""
    linear.weight.data = linear.weight.data.t().contiguous().t()


def empty_like_layout(weight: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised [rows, columns] matrix, stored by columns if `weight` is."""
    return weight.new_empty(rows, columns) if weight.is_contiguous() else weight.new_empty(columns, rows).t()


def share_storage(parameters: Sequence[Tensor]) -> Tensor:
    """Make matrices [rows, width] (or vectors) parts of one tensor, one below the other, and return it.

    They stay parameters of their own, with the values and the layout they had.
    """
    sizes = [len(parameter) for parameter in parameters]
    first = parameters[0]
    # An inference tensor only if the parameters are (a model loaded during inference): training must be able to go on
    # with those that are not, and the two kinds do not mix.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        if first.dim() == 1:
            together = first.new_empty(sum(sizes))
        else:
            together = empty_like_layout(first, sum(sizes), first.shape[1])
        for parameter, part in zip(parameters, together.split(sizes), strict=True):
            part.copy_(parameter)
            parameter.data = part
    return together


def bits(x: Tensor) -> Tensor:
    """Half-precision numbers as the integers with the same bits: on a CPU they are gathered 1.6 times as fast."""
    return x.view(torch.int16) if x.element_size() == 2 else x


def select_rows(weight: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[i] = weight[rows[i]], whichever way the two (alike) are stored."""
    weight, out = bits(weight), bits(out)
    if stored_by_columns(weight):
        torch.gather(weight.t(), 1, rows.expand(weight.shape[1], -1), out=out.t())
    else:
        torch.index_select(weight, 0, rows, out=out)


def take_channels(h: Tensor, channels: Tensor) -> Tensor:
    """h [..., I] -> [..., A], the channels named. gather is index_select, but faster along the last dimension."""
    return bits(h).gather(-1, channels.expand(*h.shape[:-1], -1)).view(h.dtype)


def column_norms(weight: Tensor) -> Tensor:
    """l2 norm of each column, float32. weight [rows, columns] -> [columns]"""
    return torch.linalg.vector_norm(weight.float(), dim=0)


def tensor_bytes(holder: object) -> int:
    """Memory of the tensors that an object has for attributes, in bytes."""
    return sum(t.numel() * t.element_size() for t in vars(holder).values() if isinstance(t, Tensor))


class ActiveFeedForward:
    """The weights of one FFN that a decode step reads, in buffers that are filled once per prompt.

    Rows stand in the order retained, candidate. With nothing to prune they are the module's own weights, uncopied.
    With `static` channels they are filled here and now, and prompts change nothing. With `in_place` they are the first
    rows of the module's own weights, which every prompt puts into a new order.
    """

    def __init__(
        self, ffn: "FeedForward", sizes: PartitionSizes, static: StaticChannels | None = None, in_place: bool = False
    ) -> None:
        self.sizes, self.static, self.in_place = sizes, static, in_place
        self.prunes = sizes.retained < sizes.channels
        self.down_bias: Tensor | None = ffn.down_proj.bias
        self.partition = keep_everything(sizes.channels, (), ffn.down_proj.weight.device)
        if self.prunes and in_place:
            self.look_at_first_rows(ffn)
        elif self.prunes:
            rows, weight = sizes.resident, ffn.gate_proj.weight
            self.gate = empty_like_layout(weight, rows, weight.shape[1])            # [A, H]
            self.up = empty_like_layout(weight, rows, weight.shape[1])              # [A, H]
            self.down = empty_like_layout(ffn.down_proj.weight, weight.shape[1], rows)          # [H, A]
            self.gate_bias = None if ffn.gate_proj.bias is None else weight.new_empty(rows)     # [A]
            self.up_bias = None if ffn.up_proj.bias is None else weight.new_empty(rows)         # [A]
            self.candidate_norms = weight.new_empty(sizes.candidate, dtype=torch.float32)       # [C]
        else:
            self.gate, self.gate_bias = ffn.gate_proj.weight, ffn.gate_proj.bias
            self.up, self.up_bias = ffn.up_proj.weight, ffn.up_proj.bias
            self.down = ffn.down_proj.weight
        if static is not None and self.prunes:
            self.hold(ffn, static.partition)
            if static.bias is not None:
                self.down_bias = static.bias if self.down_bias is None else self.down_bias + static.bias

    def hold(self, ffn: "FeedForward", partition: ChannelPartition) -> None:
        """From now on be the weights of the resident channels that `partition` names."""
        if self.in_place:
            ffn.reorder(partition.order)
            self.partition = ChannelPartition(torch.arange(self.sizes.channels, device=self.gate.device), self.sizes)
            self.look_at_first_rows(ffn)
        else:
            self.copy_from(ffn, partition)

    def look_at_first_rows(self, ffn: "FeedForward") -> None:
        rows = self.sizes.resident
        self.gate, self.up = ffn.gate_proj.weight[:rows], ffn.up_proj.weight[:rows]             # [A, H]
        self.down = ffn.down_proj.weight[:, :rows]                                              # [H, A]
        self.gate_bias = None if ffn.gate_proj.bias is None else ffn.gate_proj.bias[:rows]      # [A]
        self.up_bias = None if ffn.up_proj.bias is None else ffn.up_proj.bias[:rows]            # [A]
        self.candidate_norms = ffn.down_norms()[self.sizes.retained : rows]                     # [C]

    def copy_from(self, ffn: "FeedForward", partition: ChannelPartition) -> None:
        """Fill the buffers with the resident rows (columns of down_proj) that `partition` names."""
        self.partition = partition
        resident = partition.resident                                               # [A]
        select_rows(ffn.gate_proj.weight, resident, out=self.gate)
        select_rows(ffn.up_proj.weight, resident, out=self.up)
        select_rows(ffn.down_proj.weight.t(), resident, out=self.down.t())
        torch.index_select(ffn.down_norms(), 0, partition.candidate, out=self.candidate_norms)
        if self.gate_bias is not None:
            torch.index_select(ffn.gate_proj.bias, 0, resident, out=self.gate_bias)
        if self.up_bias is not None:
            torch.index_select(ffn.up_proj.bias, 0, resident, out=self.up_bias)

    def copied_bytes(self) -> int:
        """Memory that the copies take, in bytes."""
        return tensor_bytes(self) if self.prunes and not self.in_place else 0


class FeedForward(nn.Module):
    """down_proj(act(gate_proj x) * up_proj x); channel i is row i of gate and up and column i of down."""

    def __init__(self, hidden_size: int, channels: int, act: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, channels, bias=bias)
        self.up_proj = Linear(hidden_size, channels, bias=bias)
        self.down_proj = Linear(channels, hidden_size, bias=bias)
        self.act = activation_function(act)
        self.norms: Tensor | None = None

    def down_norms(self) -> Tensor:
        """l2 norm of each column of down_proj, float32 [I]: constants of the weights, computed at first use."""
        if self.norms is None:
            self.norms = column_norms(self.down_proj.weight)
        return self.norms

    def activation(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> h [B, T, I], what down_proj reads."""
        return self.act(self.gate_proj(x)) * self.up_proj(x)

    def new_active(self, pruning: Pruning) -> ActiveFeedForward:
        """Buffers for the weights that decode steps read under this pruning."""
        static = None if pruning.static is None else pruning.static.of[self]
        return ActiveFeedForward(self, self.sizes(pruning), static, pruning.in_place)

    def sizes(self, pruning: Pruning) -> PartitionSizes:
        """Regions of this network: alike in all of a model, unless static partitions say otherwise."""
        if pruning.static is not None:
            return pruning.static.of[self].partition.sizes
        return pruning.sizes(self.gate_proj.out_features)

    def weight_count(self) -> int:
        """Weights that the prune ratio is a share of."""
        return 3 * self.gate_proj.weight.numel()

    def resident_weight_count(self, pruning: Pruning) -> int:
        """Weights that one token's decode step reads: retained and candidate channels of every matrix.

        Where products add up columns, down_proj's of the candidates that lose are left out.
        """
        sizes = self.sizes(pruning)
        finishing = sizes.active if stored_by_columns(self.down_proj.weight) else sizes.resident
        return self.gate_proj.in_features * (2 * sizes.resident + finishing)

    def copy_bytes(self, pruning: Pruning) -> int:
        """Memory that the active copies will take, in bytes; with nothing to prune there are none."""
        sizes = self.sizes(pruning)
        copied = sizes.retained < sizes.channels and not pruning.in_place
        copies = 3 * self.gate_proj.in_features * sizes.resident if copied else 0
        return copies * self.gate_proj.weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(x))

    def prefill(self, x: Tensor, active: ActiveFeedForward, step: PrefillStep) -> Tensor:
        """Run the prompt, decide from it which channels stay, and copy their weights. x [B, T, H] -> [B, T, H]"""
        h = self.activation(x)                                                      # [B, T, I]
        if not active.prunes:
            return self.down_proj(h)
        partition = active.partition if active.static is not None else self.partition_by(h, active.sizes, step)
        # Finished before `hold`, which may put the weights into another order than that of h.
        dense = self.down_proj(h) if step.finish_dense else None                    # [B, T, H]
        if active.static is None:
            with step.clock.phase("copy"):
                active.hold(self, partition)
        if dense is not None:
            return dense
        return F.linear(take_channels(h, partition.resident), active.down, active.down_bias)

    def partition_by(self, h: Tensor, sizes: PartitionSizes, step: PrefillStep) -> ChannelPartition:
        """Score the prompt's activation and cut the channels. h [B, T, I]"""
        with step.clock.phase("scores"):
            scores = channel_scores(h, self.down_norms(), step.counted)             # [I]
        with step.clock.phase("sort"):
            return partition_channels(scores, sizes)

    def reorder(self, order: Tensor) -> None:
        """Put the channels into another order, int64 [I], in place: what the network computes stays the same."""
        for rows in (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight.t()):
            reordered = torch.empty_like(rows)
            select_rows(rows, order, out=reordered)
            rows.copy_(reordered)
        for linear in (self.gate_proj, self.up_proj):
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[order])
        self.norms = self.down_norms()[order]

    def decode(self, x: Tensor, active: ActiveFeedForward, step: DecodeStep) -> Tensor:
        """Run one token on the resident channels, less the candidates that lose at this step. x [B, 1, H]"""
        gate = project(x, active.gate, active.gate_bias)                            # [B, 1, A]
        up = project(x, active.up, active.up_bias)                                  # [B, 1, A]
        h = self.act(gate) * up                                                     # [B, 1, A]
        if active.sizes.pick < active.sizes.candidate:
            retained, candidate = h.split([active.sizes.retained, active.sizes.candidate], dim=-1)
            scores = channel_scores(candidate, active.candidate_norms, step.live)   # [C]
            if adds_up_columns(h, active.down):
                return self.finish_gathered(h, scores, active)
            keep = active.partition.pick(scores)                                    # [C]
            h = torch.cat([retained, candidate.masked_fill(~keep, 0)], dim=-1)      # [B, 1, A]
        return project(h, active.down, active.down_bias)

    def finish_gathered(self, h: Tensor, scores: Tensor, active: ActiveFeedForward) -> Tensor:
        """down_proj on the retained and the picked channels alone: columns of the losing ones are not even read.

        h [1, 1, A]; scores of the candidates, [C] -> [1, 1, H]
        """
        retained, _ = stretches(active.sizes.retained, 1)                           # [R]
        picked = active.sizes.retained + best(scores, active.sizes.pick)            # [K]
        channels = torch.cat([retained, picked])                                    # [R + K]
        y = add_up_columns(active.down, channels, h.flatten()[channels])            # [H]
        return (y if active.down_bias is None else y + active.down_bias).view(1, 1, -1)

    def decode_masked(self, x: Tensor, partition: ChannelPartition, live: Tensor) -> Tensor:
        """The same step on the full weights, for reading and for tests: channels that are off are set to 0.

        x [B, 1, H]; live [B, 1] bool -> [B, 1, H]
        """
        h = self.activation(x)                                                      # [B, 1, I]
        scores = channel_scores(h, self.down_norms(), live)                         # [I]
        picked = partition.candidate[partition.pick(scores[partition.candidate])]
        on = torch.zeros_like(scores, dtype=torch.bool)                             # [I]
        on[partition.retained] = True
        on[picked] = True
        return self.down_proj(h * on)


class ActiveHeads:
    """The rows of q_proj and columns of o_proj that a decode step reads; keys and values are never pruned.

    Heads stand group by group, in each group retained before candidate. With grouped-query attention a group is the
    query heads of one key/value head; without it all heads form one group, and the cache keeps its heads in the
    partition's order so that those in use are a contiguous slice. The rows of k_proj and v_proj follow those of q_proj,
    so that one product gives all three.
    """

    def __init__(self, attention: "Attention", sizes: PartitionSizes) -> None:
        self.sizes = sizes
        self.prunes = sizes.retained < sizes.channels
        self.o_bias = attention.o_proj.bias
        groups, weight, head_dim = attention.head_groups, attention.q_proj.weight, attention.head_dim
        self.heads = groups * sizes.resident                                        # A
        self.partition = keep_everything(sizes.channels, (groups,), weight.device)
        self.cache_order: Tensor | None = None                                      # [K] int64
        if self.prunes:
            rows, kv_rows = self.heads * head_dim, attention.kv_heads * head_dim
            self.qkv = empty_like_layout(weight, rows + 2 * kv_rows, weight.shape[1])           # [(A + 2K) D, H]
            self.qkv[rows:].copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
            self.qkv_bias: Tensor | None = None                                     # [(A + 2K) D]
            if attention.q_proj.bias is not None:
                self.qkv_bias = weight.new_empty(rows + 2 * kv_rows)
                self.qkv_bias[rows:].copy_(torch.cat([attention.k_proj.bias, attention.v_proj.bias]))
            self.o = empty_like_layout(attention.o_proj.weight, weight.shape[1], rows)          # [H, A D]
            self.candidate_norms = weight.new_empty(groups, sizes.candidate, head_dim, dtype=torch.float32)  # [G, C, D]
            if groups == 1:
                self.cache_order = torch.arange(sizes.channels, device=weight.device)
        else:
            self.qkv, self.qkv_bias = attention.together()
            self.o = attention.o_proj.weight

    def copy_from(self, attention: "Attention", partition: ChannelPartition) -> None:
        """Fill the buffers with the rows and columns of the resident heads that `partition` names."""
        self.partition = partition
        q, o, head_dim = attention.q_proj, attention.o_proj, attention.head_dim
        rows = self.heads * head_dim
        resident = attention.flat_heads(partition.resident)                         # [A]
        coordinates = (resident[:, None] * head_dim + torch.arange(head_dim, device=resident.device)).flatten()
        select_rows(q.weight, coordinates, out=self.qkv[:rows])
        select_rows(o.weight.t(), coordinates, out=self.o.t())
        if self.qkv_bias is not None:
            torch.index_select(q.bias, 0, coordinates, out=self.qkv_bias[:rows])
        candidate = attention.flat_heads(partition.candidate)                       # [G C]
        torch.index_select(attention.output_norms(), 0, candidate, out=self.candidate_norms.flatten(0, 1))
        if self.cache_order is not None:
            self.cache_order.copy_(partition.order[0])

    def copied_bytes(self) -> int:
        """Memory that the copies take, in bytes."""
        return tensor_bytes(self) if self.prunes else 0


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional biases, q/k norms (Qwen3) and a sliding window."""

    def __init__(self, config: LlamaConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = config.head_dim, window
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(self.heads * self.head_dim, hidden, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None
        # Heads are cut inside the group that shares a key/value head; without sharing, over all heads.
        self.head_groups = self.kv_heads if self.kv_heads < self.heads else 1
        self.norms: Tensor | None = None
        self.qkv: Tensor | None = None

    def together(self) -> tuple[Tensor, Tensor | None]:
        """Weight [(N + 2K) D, H] and bias of q_proj, k_proj and v_proj as one, which they become parts of."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.qkv is None or self.qkv.data_ptr() != self.q_proj.weight.data_ptr():    # new, or converted since
            self.qkv = share_storage([projection.weight for projection in projections])
            self.qkv_bias = None
            if self.q_proj.bias is not None:
                self.qkv_bias = share_storage([projection.bias for projection in projections])
        return self.qkv, self.qkv_bias

    def output_norms(self) -> Tensor:
        """l2 norm of each column of o_proj, float32 [N, D]: constants of the weights, computed at first use."""
        if self.norms is None:
            self.norms = column_norms(self.o_proj.weight).view(self.heads, self.head_dim)
        return self.norms

    def flat_heads(self, in_groups: Tensor) -> Tensor:
        """Head indices inside each group, [G, n], as indices into all heads, [G n]."""
        first = torch.arange(self.head_groups, device=in_groups.device) * (self.heads // self.head_groups)
        return (in_groups + first[:, None]).flatten()

    def rotated(self, projected: Tensor, norm: RMSNorm | None, step: PrefillStep | DecodeStep) -> Tensor:
        """[B, T, heads * D] -> [B, heads, T, D], normed if the model does so, turned by its position."""
        x = projected.unflatten(-1, (-1, self.head_dim))                            # [B, T, heads, D]
        if norm is not None:
            x = norm(x)
        return rotate(x.transpose(1, 2), step.cos, step.sin)

    def keys_and_values(self, x: Tensor, step: PrefillStep | DecodeStep) -> tuple[Tensor, Tensor]:
        """x [B, T, H] -> [B, K, T, D] each."""
        k = self.rotated(self.k_proj(x), self.k_norm, step)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return k, v

    def forward(self, x: Tensor, step: PrefillStep) -> Tensor:
        q = self.rotated(self.q_proj(x), self.q_norm, step)                         # [B, N, T, D]
        k, v = self.keys_and_values(x, step)                                        # [B, K, T, D]
        a = attend_prompt(q, k, v, step.masks[self.window])                         # [B, T, N, D]
        return self.o_proj(a.flatten(2))

    def prefill(self, x: Tensor, keys: Tensor, values: Tensor, active: ActiveHeads, step: PrefillStep) -> Tensor:
        """Run the prompt and write its keys and values to the cache, [B, K, S, D]. x [B, T, H] -> [B, T, H]"""
        q, k, v = self.queries_keys_values(x, *self.together(), step)               # [B, N, T, D], [B, K, T, D]
        a = attend_prompt(q, k, v, step.masks[self.window])                         # [B, T, N, D]
        if active.prunes:
            with step.clock.phase("scores"):
                scores = head_scores(a, self.output_norms(), step.counted)          # [N]
            with step.clock.phase("sort"):
                partition = partition_channels(scores.view(self.head_groups, -1), active.sizes)
            with step.clock.phase("copy"):
                active.copy_from(self, partition)
            if active.cache_order is not None:
                k, v = k[:, active.cache_order], v[:, active.cache_order]
        prompt = x.shape[1]
        keys[:, :, :prompt].copy_(k)
        values[:, :, :prompt].copy_(v)
        if not active.prunes or step.finish_dense:
            return self.o_proj(a.flatten(2))
        resident = a.index_select(2, self.flat_heads(active.partition.resident))    # [B, T, A, D]
        return F.linear(resident.flatten(2), active.o, active.o_bias)

    def queries_keys_values(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, step: PrefillStep | DecodeStep
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all three, one rotation for the first two.

        x [B, T, H]; weight [(A + 2K) D, H], bias [(A + 2K) D] -> q [B, A, T, D], k and v [B, K, T, D]
        """
        qkv = project(x, weight, bias).unflatten(-1, (-1, self.head_dim))           # [B, T, A + 2K, D]
        q, k, v = qkv.tensor_split([-2 * self.kv_heads, -self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)                 # [B, T, A + K, D]
        else:
            qk = qkv[:, :, : -self.kv_heads]
        turned = rotate(qk.transpose(1, 2), step.cos, step.sin)                     # [B, A + K, T, D]
        q, k = turned.tensor_split([-self.kv_heads], dim=1)
        return q, k, v.transpose(1, 2)

    def decode(self, x: Tensor, keys: Tensor, values: Tensor, active: ActiveHeads, step: DecodeStep) -> Tensor:
        """Run one token: add its key and value to the cache, attend with the resident heads. x [B, 1, H]"""
        q, k, v = self.queries_keys_values(x, active.qkv, active.qkv_bias, step)
        if active.cache_order is not None:
            k, v = k[:, active.cache_order], v[:, active.cache_order]
        keys.index_copy_(2, step.slot, k)
        values.index_copy_(2, step.slot, v)
        if active.cache_order is not None:
            keys, values = keys[:, : active.sizes.resident], values[:, : active.sizes.resident]
        a = attend_cache(q, keys, values, step.masks[self.window])                  # [B, 1, A, D]
        if active.sizes.pick < active.sizes.candidate:
            a = self.drop_losing_heads(a, active, step.live)
        return project(a.flatten(2), active.o, active.o_bias)

    def drop_losing_heads(self, a: Tensor, active: ActiveHeads, live: Tensor) -> Tensor:
        """Zero the candidate heads that are not picked at this step. a [B, 1, A, D] -> the same"""
        grid = a.unflatten(2, (self.head_groups, -1))                               # [B, 1, G, R + C, D]
        candidate = grid[..., active.sizes.retained :, :].flatten(2, 3)             # [B, 1, G C, D]
        scores = head_scores(candidate, active.candidate_norms.flatten(0, 1), live)             # [G C]
        keep = active.partition.pick(scores.view(self.head_groups, -1))             # [G, C]
        on = F.pad(keep, (active.sizes.retained, 0), value=True)                    # [G, R + C]
        return a * on.flatten()[:, None]

    def decode_masked(
        self, x: Tensor, keys: Tensor, values: Tensor, partition: ChannelPartition, step: DecodeStep
    ) -> Tensor:
        """The same step on the full weights, for reading and for tests: heads that are off are set to 0.

        The cache is in the model's own head order here.
        """
        q = self.rotated(self.q_proj(x), self.q_norm, step)                         # [B, N, 1, D]
        k, v = self.keys_and_values(x, step)
        keys.index_copy_(2, step.slot, k)
        values.index_copy_(2, step.slot, v)
        a = attend_cache(q, keys, values, step.masks[self.window])                  # [B, 1, N, D]
        scores = head_scores(a, self.output_norms(), step.live).view(self.head_groups, -1)      # [G, U]
        keep = partition.pick(scores.gather(-1, partition.candidate))               # [G, C]
        on = torch.zeros_like(scores, dtype=torch.bool)                             # [G, U]
        on.scatter_(-1, partition.retained, True)
        on.scatter_(-1, partition.candidate, keep)
        return self.o_proj((a * on.flatten()[:, None]).flatten(2))
