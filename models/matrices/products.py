"""The products of a decode step. Every choice between two ways to compute the same product is in this package.

A step reads each active weight once, so memory bandwidth limits a product. PyTorch's own product of a single row
(F.linear) reaches a third to two thirds of the bandwidth on a CPU. Other products replace it, each with its own layout:
one written out for torch.compile to fuse (weights stored by rows), and in eager code a sum over columns (stored by
columns) or torch.mv (by rows), whichever this machine computes faster (models/matrices/candidates.py).
docs/measurements/products.md has the figures.

B batch, T rows, in and out the sides of a weight [out, in], N query heads, K key/value heads, S cache slots, D head
size, C candidates.
"""

import math
import time
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a weight that a fused product of one row reads at once, unless another number was measured to be faster
# (models/matrices/candidates.py), and the least rows for which it does: a smaller weight gains nothing, and each stream
# takes time to compile (docs/measurements/products.md).
STREAMS, STREAMED_ROWS = 8, 512
# Most scores for which comparing every pair is faster than a selection.
MOST_COMPARED = 256
# Most columns that one thread adds up at a time. A sum goes through its columns several times, a stretch of rows each
# time, and the addresses of the memory pages of more columns do not stay cached (docs/measurements/products.md).
COLUMNS_AT_ONCE = 384


def is_fused(x: Tensor) -> bool:
    """Return True if a compiler fuses a written-out product into one loop on a CPU; eager code stores every step."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def row_count(x: Tensor) -> int:
    """Return the number of rows of x, over all leading dimensions."""
    return x.shape[:-1].numel()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which many rows x are multiplied fastest by values that are unpacked for them."""
    half = x.dtype != torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return fast_dtype(x.dtype) if half else x.dtype


@lru_cache(maxsize=2)
def fast_dtype(half: torch.dtype) -> torch.dtype:
    """Return float32 if this processor takes more than twice as long for products in half precision, else `half`.

    Without instructions for it, PyTorch takes 3 to 200 times as long (docs/measurements/packed.md).
    """
    seconds = {}
    for dtype in (half, torch.float32):
        rows, weight = torch.ones(64, 256, dtype=dtype), torch.ones(256, 128, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(rows, weight)
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return half if seconds[half] <= 2 * seconds[torch.float32] else torch.float32


def fused_gemv(x: Tensor, weight: Tensor, streams: int = STREAMS) -> Tensor:
    """Multiply a few rows by a weight as multiply and sum, for a compiler to fuse. x [..., in], weight [out, in]"""
    if row_count(x) == 1:
        return sum_in_streams(x, [weight[part] for part in row_streams(weight.shape[0], streams)])
    rows = x.reshape(-1, x.shape[-1]).float()                                       # [T, in]
    wide = weight.float()
    # as_strided makes Inductor store a row instead of recomputing it (a norm, say) for every row of the weight.
    # Sums over the same weight become one loop, which reads it once for all rows.
    sums = [(wide * row.as_strided(row.shape, (1,))).sum(dim=-1) for row in rows.unbind()]      # T times [out]
    y = torch.stack(sums)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def fused_gemv_rows(x: Tensor, weight: Tensor, which: Tensor, streams: int = STREAMS) -> Tensor:
    """Multiply one row by chosen rows of a weight, fused. x [..., in], weight [out, in], which int64 [k] -> [..., k]"""
    # Split the indices before they gather: splitting afterwards would store the gathered rows first.
    return sum_in_streams(x, [weight[which[part]] for part in row_streams(len(which), streams)])


def sum_in_streams(x: Tensor, parts: list[Tensor]) -> Tensor:
    """Multiply one row by parts of a weight. x [..., in], parts [n, in], all but a short last one of equal length

    A loop over one row of a weight at a time does not use the full bandwidth. Sums over parts of equal length become
    one loop, which reads a row of each part at once and converts x once. Returns [..., sum of n].
    """
    row = x.flatten().float()                                                       # [in]
    # as_strided makes Inductor store a row instead of recomputing it (a norm, say) for every row of the weight.
    row = row.as_strided(row.shape, (1,))
    y = torch.cat([(part.float() * row).sum(dim=-1) for part in parts])             # [out]
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def row_streams(rows: int, streams: int = STREAMS) -> list[slice]:
    """Split rows into `streams` parts of equal length, and a rest of fewer rows than parts if they do not divide."""
    count = streams if rows >= STREAMED_ROWS else 1
    each = rows // count
    parts = [slice(number * each, (number + 1) * each) for number in range(count)]
    return parts if rows == count * each else [*parts, slice(count * each, rows)]


@lru_cache(maxsize=1024)
def stretches(count: int, parts: int) -> tuple[Tensor, Tensor]:
    """Return the indices below `count`, and the begin of each of `parts` stretches of them: int64, on the CPU."""
    with torch.inference_mode(False):       # cached: the next use may be outside inference mode
        return torch.arange(count), torch.arange(parts) * count // parts


def kept(make: Any, *sizes: int) -> tuple[Tensor, Tensor]:
    """Call a cached function; a compiler calls it without the cache, as a constant of its code."""
    made: tuple[Tensor, Tensor] = (make.__wrapped__ if torch.compiler.is_compiling() else make)(*sizes)
    return made


def add_up_columns(columns: Tensor, which: Tensor, factors: Tensor, threads: int) -> Tensor:
    """Compute the sum over k of factors[k] * columns[which[k]]: one row's product that reads the given columns alone.

    embedding_bag computes this from a table of the columns. Each thread adds up its stretches of them, which takes half
    the time of F.linear for one row (figures in docs/measurements/products.md).

    columns [in, out], on the CPU; which int64 [k]; factors [k] -> [out]
    """
    parts = threads * max(1, math.ceil(len(which) / (threads * COLUMNS_AT_ONCE)))
    _, begins = kept(stretches, len(which), parts)
    sums = F.embedding_bag(which, columns, offsets=begins, per_sample_weights=factors, mode="sum")
    return sums.sum(dim=0)


def add_up_for_each(columns: Tensor, factors: Tensor) -> Tensor:
    """Add up all columns for several rows, one bag per row. columns [in, out]; factors [T, in] -> [T, out]"""
    rows, count = factors.shape
    which, begins = kept(every_column, rows, count)
    return F.embedding_bag(which, columns, offsets=begins, per_sample_weights=factors.flatten(), mode="sum")


@lru_cache(maxsize=64)
def every_column(rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices below `count`, repeated for every row, and the begin of each row's: int64, on the CPU."""
    with torch.inference_mode(False):
        return torch.arange(count).repeat(rows), torch.arange(rows) * count


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute attention of a prompt to itself. q [B, N, T, D]; k, v [B, K, T, D] -> [B, T, N, D]; no mask: causal."""
    grouped = q.shape[1] != k.shape[1]
    a = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return a.transpose(1, 2)                                                        # [B, T, N, D]


def attend_cache(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute attention of tokens to the cache. Unfilled slots have weight 0.

    For one token, the query heads that share a key/value head become queries of that head, so keys and values are not
    repeated.

    q [B, N, T, D], N a multiple of K; keys, values [B, K, S, D]; mask float [B, 1, T, S] -> [B, T, N, D]
    """
    batch, heads, rows, head_dim = q.shape
    if rows > 1:
        grouped = heads != keys.shape[1]
        a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return a.transpose(1, 2)
    q = q.reshape(batch, keys.shape[1], -1, head_dim)                               # [B, K, N/K, D]
    if batch == 1 and is_fused(q):
        products = q.unsqueeze(3).float() * keys.unsqueeze(2).float()               # [B, K, N/K, S, D]
        weights = (products.sum(dim=-1) * scale + mask).softmax(dim=-1)    # [B, K, N/K, S]
        a = (weights.unsqueeze(-1) * values.unsqueeze(2).float()).sum(dim=-2)       # [B, K, N/K, D]
        return a.to(q.dtype).reshape(batch, 1, heads, head_dim)
    a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)            # [B, K, N/K, D]
    return a.reshape(batch, 1, heads, head_dim)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Return True at the `count` highest scores along the last dimension (ties: the earlier score).

    scores  [..., C] -> bool [..., C]. Static in shape and free of data-dependent branches, so that a compiled decode
    step can contain it.
    """
    channels = scores.shape[-1]
    if count in (0, channels):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if torch.compiler.is_compiling() and channels <= MOST_COMPARED:
        # Rank by comparing every pair: C * C comparisons fuse into one loop; a selection would be a separate call.
        place = torch.arange(channels, device=scores.device)
        mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)                    # [..., C, 1], [..., 1, C]
        better = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))     # [..., C, C]
        return better.sum(dim=-1) < count
    # kthvalue instead of sort: a twentieth of the time for 8,192 scores.
    lowest = scores.kthvalue(channels - count + 1, dim=-1, keepdim=True).values    # [..., 1]
    above, ties = scores > lowest, scores == lowest                                 # [..., C]
    return above | (ties & (ties.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))


def places(keep: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` True entries, ascending for fast memory access. bool [C] -> int64 [count]"""
    return torch.nonzero_static(keep, size=count).squeeze(-1)


def best_places(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores, in no order (ties: the earlier). float32 >= 0 [C] -> int64

    The bits of such numbers, as integers, have the order of the numbers. With the place below them all keys differ.
    """
    last = scores.shape[-1] - 1
    places_backwards = torch.arange(last, -1, -1, device=scores.device)
    keys = (scores.view(torch.int32).long() << 32) | places_backwards
    return last - (keys.topk(count, sorted=False).values & 0xFFFFFFFF)
