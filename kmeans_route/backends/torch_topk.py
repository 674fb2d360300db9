"""Top-k of the torch backend: ids by decreasing value, ties to the lower id, as `reference.stable_topk` defines it.

`torch.topk` prefers no id among equals, and on CPU it sorts pairs row by row. Few of many are found faster by rounds of
`amax`, which is vectorised, over keys that hold value and id in one int32:

    key_e = 2^b floor(2^(29-b) r_e) + (E - 1 - e)          b bits for an id
    best_0 = max over e of key_e
    best_i = max over e of wrap(key_e - best_(i-1) - 2^31) + best_(i-1) + 2^31

In arithmetic modulo 2^32 the difference to the last best is negative for what comes after it, and subtracting 2^31
makes that, and only that, positive: no mask is needed. Keys of |r| < 2, as cosines with a bias are, differ by less than
2^31. Where two values that follow each other share all bits above the id, their order is not known, and the row is done
again exactly.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kmeans_route.reference import stable_topk

MIN_ROUNDS_SIZE = 1 << 16  # of T x E, for each of up to four threads; below it the calls cost more than they save
MAX_ROUNDS = 16
BOUND = 2.0
FEW_VALUES = 64  # up to here Python compares them quicker than four calls


def exact_topk(ranking: Tensor, k: int) -> Tensor:
    """Ids (T, k) of the k largest of each row of (T, E), by decreasing value, ties to the lower id."""
    num_tokens, num_experts = ranking.shape
    if not ranking.is_cpu or k == num_experts:
        return stable_topk(ranking, k)
    many = num_tokens * num_experts >= MIN_ROUNDS_SIZE * min(4, torch.get_num_threads())
    if many and ranking.dtype == torch.float32 and k <= MAX_ROUNDS:
        low, high = torch.aminmax(ranking)
        if low > -BOUND and high < BOUND:  # false for NaN
            return _by_rounds(ranking, k)
    return _by_topk(ranking, k)


def _by_topk(ranking: Tensor, k: int) -> Tensor:
    """Right wherever the k + 1 largest values of a row differ; only the other rows are sorted."""
    values, ids = ranking.topk(k + 1, dim=1)
    ids = ids[:, :k].contiguous()
    if _neighbours_meet(values):
        rows = (values[:, 1:] == values[:, :-1]).any(1).nonzero().squeeze(1)
        ids[rows] = stable_topk(ranking[rows], k)
    return ids


def _neighbours_meet(values: Tensor) -> bool:
    """Whether two values that follow each other in a row are equal; of many it may say so where rows meet."""
    if values.numel() <= FEW_VALUES:
        return any(one == other for row in values.tolist() for one, other in pairwise(row))
    return not bool(values.flatten().diff().all())  # half the time of asking row by row


def _by_rounds(ranking: Tensor, k: int) -> Tensor:
    num_tokens, num_experts = ranking.shape
    bits, last = (num_experts - 1).bit_length(), num_experts - 1
    key = (ranking * 2.0 ** (29 - bits)).to(torch.int32).mul_(1 << bits)
    key += torch.arange(last, -1, -1, dtype=torch.int32, device=key.device)
    best = torch.empty(k + 1, num_tokens, dtype=torch.int32, device=key.device)
    torch.amax(key, 1, out=best[0])
    step = best[0]
    for i in range(k):
        key -= (step + -(2**31))[:, None]  # + 2^31, which int32 cannot hold
        step = key.amax(1)
        torch.add(best[i], step + -(2**31), out=best[i + 1])
    ids = last - (best[:k] & ((1 << bits) - 1))
    ids = ids.T.to(torch.int64, memory_format=torch.contiguous_format)
    values = best >> bits
    unsure = values[1:] == values[:-1]
    if unsure.any():
        rows = unsure.any(0).nonzero().squeeze(1)
        ids[rows] = _by_topk(ranking[rows], k)
    return ids
