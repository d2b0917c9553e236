"""The device code of how much each token counts in an alignment loss, for Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens_of(Padding, b, n_batch, length, MASKED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many tokens of each sequence are no padding."""
    if not MASKED:
        return tl.where(b < n_batch, length, 0)
    count = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (b < n_batch)[:, None] & (t < length)[None, :]
        pointers = Padding + b.to(tl.int64)[:, None] * length + t[None, :]
        count += tl.sum((tl.load(pointers, mask=inside, other=1) == 0).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["n_batch", "n_heads", "n_queries", "n_keys"])
def token_shares(
    QueryPadding, KeyPadding, Shares, n_batch, n_heads, n_queries, n_keys,
    MASKED: tl.constexpr, MEAN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Shares [2, B]: 1 / n of n queries and of n keys, 0 where one of the two has none. One program.

    MEAN: divided by the number of other sequences and by that of heads.
    """
    counted = 0
    for start in range(0, n_batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        queries = _tokens_of(QueryPadding, b, n_batch, n_queries, MASKED, BLOCK_B, BLOCK_T)
        keys = _tokens_of(KeyPadding, b, n_batch, n_keys, MASKED, BLOCK_B, BLOCK_T)
        both = (queries > 0) & (keys > 0)
        counted += tl.sum(both.to(tl.int32), 0)
        tl.store(Shares + b, tl.where(both, 1.0 / tl.maximum(queries, 1), 0.0), mask=b < n_batch)
        tl.store(Shares + n_batch + b, tl.where(both, 1.0 / tl.maximum(keys, 1), 0.0), mask=b < n_batch)
    if MEAN:
        factor = 1.0 / (tl.maximum(counted, 1) * n_heads).to(tl.float32)
        tl.debug_barrier()
        for start in range(0, 2 * n_batch, BLOCK_B):
            index = start + tl.arange(0, BLOCK_B)
            share = tl.load(Shares + index, mask=index < 2 * n_batch, other=0.0)
            tl.store(Shares + index, share * factor, mask=index < 2 * n_batch)
