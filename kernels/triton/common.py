"""Small helpers shared by the kernels.

Legend: BT tokens a block, BE experts and KP top_k padded to a power of two. Program ids become int64 before they meet
a stride: T*K*D passes 2^31 at T=65536, K=8, D=7168. An absent tensor is passed as None, which compiles its code away.
"""

import triton
import triton.language as tl
from torch import Tensor

# As in `reference`; a test compares them. NOT_A_CANDIDATE: below every s + b, above the -inf of experts that are taken.
NOT_A_CANDIDATE: tl.constexpr = tl.constexpr(-1.0e30)
MIN_SQUARED_NORM: tl.constexpr = tl.constexpr(1.0e-30)
MAX_SQUARED_NORM: tl.constexpr = tl.constexpr(3.4028234663852886e38)
MIN_CENTROID_NORM: tl.constexpr = tl.constexpr(1.0e-12)
MIN_COSINE_GATE: tl.constexpr = tl.constexpr(1.0e-3)
MAX_BIAS: tl.constexpr = tl.constexpr(1024.0)
TAKEN: tl.constexpr = tl.constexpr(-0x7F800001)  # `ordered` of -inf
NUM_MARGIN_BINS: tl.constexpr = tl.constexpr(1024)  # over [-MARGIN_RANGE, MARGIN_RANGE]
MARGIN_RANGE: tl.constexpr = tl.constexpr(2.0)


def rows_of(x: Tensor) -> Tensor:
    """x itself when its rows are contiguous, else a contiguous copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@triton.jit
def as_mask(condition):
    """A comparison of scalars, to stand in the mask of a tile: itself, once compiled. Triton's interpreter gives it the
    type of what was compared, makes integers of it as it spreads it, and from 3.9.0 on takes none as a mask."""
    return tl.where(condition, True, False)


@triton.jit
def ordered(values):
    """fp32 values other than NaN as int32 in the same order, both zeros as one. Integers are reduced over a warp by one
    instruction."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(keys):
    """The fp32 values of `ordered`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def take_best(keys, ids, LAST: tl.constexpr):
    """The largest of each row and the lowest id that holds it: (BT,), (BT,) from keys (BT, N) and ids (BT or 1, N), all
    below LAST."""
    best = tl.max(keys, axis=1)
    return best, tl.min(tl.where(keys == best[:, None], ids, LAST), axis=1)


@triton.jit
def finite_bias(bias):
    """Within MAX_BIAS of 0, NaN at the low end, so that s + b always has an order: `reference.finite_bias`."""
    return tl.where(bias == bias, tl.minimum(tl.maximum(bias, -MAX_BIAS), MAX_BIAS), -MAX_BIAS)


@triton.jit
def at_expert(values, experts, ids):
    """values (BT, BE) at one expert a row: (BT,)."""
    return tl.sum(tl.where(experts[None, :] == ids[:, None], values, 0), axis=1)


@triton.jit
def log_sigmoid(z):
    """log(1 / (1 + exp(-z))) without overflow."""
    return tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def softmax_rows(z, inside):
    """Softmax over the columns where `inside` is true, 0 elsewhere: (BT, KP)."""
    z = tl.where(inside, z, float("-inf"))
    p = tl.exp(z - tl.max(z, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def popcount(bits):
    """Ones among the 32 bits of each int32."""
    bits = bits.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def at_slot(values, slots, k):
    """Column k of values (BT, KP): (BT,)."""
    return tl.sum(tl.where((slots == k)[None, :], values, 0), axis=1)


@triton.jit
def count_and_rank(
    ids, valid, dropped, in_batch, tokens, block,
    rank_ptr, block_counts_ptr, totals_ptr,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KP: tl.constexpr, DISTINCT: tl.constexpr,
):
    """Count the tokens of a block at each expert, from ids (BT, KP) in [0, E), and rank each copy among those.

    Adds to the running totals (E+2,): tokens at each expert, K times the tokens that are not valid, and the dropped
    tokens. They are integers, so the order of the adds does not matter. Where asked for, row `block` of block_counts
    (NB, E+2) gets the same, and rank (T, K) how many earlier tokens of the block chose that expert. Tokens that are not
    valid queue as if at an expert E, K rows each. DISTINCT: no row has an id twice; else its copies rank in order of k.

    Experts are taken 64 at a time: a whole (BT, BE) tile here, beside that of the scores, would spill.
    """
    EC: tl.constexpr = BE if BE < 64 else 64
    slots = tl.arange(0, KP)
    row = block_counts_ptr
    if rank_ptr is not None:
        row = block_counts_ptr + block * (E + 2)
        ranks = tl.zeros([BT, KP], dtype=tl.int32)
    for first in range(0, BE, EC):
        experts = first + tl.arange(0, EC)
        taken = tl.zeros([BT, EC], dtype=tl.int32)
        for k in range(K):
            taken += (experts[None, :] == at_slot(ids, slots, k)[:, None]).to(tl.int32)
        taken = tl.where(valid[:, None], taken, 0)
        counts = tl.sum(taken, axis=0)
        tl.atomic_add(totals_ptr + experts, counts, mask=(experts < E) & (counts > 0), sem="relaxed")
        if rank_ptr is not None:
            tl.store(row + experts, counts, mask=experts < E)
            before = tl.cumsum(taken, axis=0) - taken
            for k in range(K):
                rank = at_expert(before, experts, at_slot(ids, slots, k))
                ranks += tl.where((slots == k)[None, :], rank[:, None], 0)
    outside = (in_batch & (valid == 0)).to(tl.int32) * K
    num_outside = tl.sum(outside, axis=0)
    num_dropped = tl.sum(dropped.to(tl.int32), axis=0)
    tl.atomic_add(totals_ptr + E, num_outside, mask=num_outside > 0, sem="relaxed")
    tl.atomic_add(totals_ptr + E + 1, num_dropped, mask=num_dropped > 0, sem="relaxed")
    if rank_ptr is not None:
        tl.store(row + E, num_outside)
        tl.store(row + E + 1, num_dropped)
        if not DISTINCT:
            for k in range(K):
                again = (ids == at_slot(ids, slots, k)[:, None]) & (slots > k)[None, :]
                ranks += again.to(tl.int32)
        queue = (tl.cumsum(outside, axis=0) - outside)[:, None] + slots[None, :]
        place = tl.where(valid[:, None], ranks, queue)
        tl.store(rank_ptr + tokens[:, None] * K + slots[None, :], place, mask=in_batch[:, None] & (slots < K)[None, :])


@triton.jit
def publish_totals(
    totals_ptr, ticket_ptr, num_arrivals,
    counts_ptr, offsets_ptr, dropped_ptr,
    E: tl.constexpr, BE: tl.constexpr,
):
    """The last program to arrive writes counts (E,) int64, offsets (E+1,) int32 and the dropped tokens () int64, and
    leaves totals and ticket at zero for the next launch."""
    tl.debug_barrier()  # every thread's adds come before this program's arrival
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == num_arrivals - 1:
        experts = tl.arange(0, BE)
        rest = tl.arange(0, 2)
        own = tl.atomic_and(totals_ptr + experts, 0, mask=experts < E, sem="relaxed")  # read and set to 0
        dropped = tl.atomic_and(totals_ptr + E + rest, 0, sem="relaxed")  # behind the tokens that are not valid
        own = tl.where(experts < E, own, 0)
        tl.store(counts_ptr + experts, own.to(tl.int64), mask=experts < E)
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + experts, tl.cumsum(own, axis=0), mask=experts < E)
        tl.store(dropped_ptr + 0 * rest, dropped.to(tl.int64), mask=rest == 1)
        tl.atomic_and(ticket_ptr, 0, sem="relaxed")
