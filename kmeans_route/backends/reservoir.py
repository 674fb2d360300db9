"""The token reservoir: a sample of hidden states that depends on the set of tokens alone, for the first centroids.

Until its centroids have data, a router keeps the 16 E valid tokens whose hashes are smallest: the same tokens whatever
the micro-batches, shards or order. Legend: T tokens, D hidden size, E experts, R = 16 E places.
"""

import torch
from torch import Tensor

from kmeans_route.backends import chunks

EMPTY_HASH = torch.iinfo(torch.int64).max  # of a place that holds no token
TOKENS_PER_EXPERT = 16


def hash_rows(x: Tensor, seed: int) -> Tensor:
    """A 63-bit hash of each row's bits and the seed, (T,) int64 in [0, 2^63 - 1), equal on every device.

    A sum of products with odd 64-bit constants, mixed at the end (the finaliser of splitmix64): integer arithmetic
    wraps and is exact, so neither order nor chunks matter.
    """
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randint(-(2**63), 2**63 - 1, (x.shape[1],), generator=generator, dtype=torch.int64, device="cpu")
    factors = (factors | 1).to(x.device)
    h = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for c in chunks.of(x):
        bits = x[c].contiguous().view(width).long()
        # The low half of an fp64 is often all 0, and a product never carries high bits down: fold them in first.
        h[c] = ((bits ^ (bits >> 32)) * factors).sum(1)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        h = (h ^ ((h >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (h & EMPTY_HASH).clamp_max_(EMPTY_HASH - 1)


def smallest(hashes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` smallest of hashes, each once, and where the first of its equals stood; then EMPTY_HASH."""
    values, place = hashes.sort(stable=True)
    values[1:] = torch.where(values[1:] == values[:-1], EMPTY_HASH, values[1:])
    values, again = values.sort(stable=True)
    return values[:size], place[again[:size]]


def keep_smallest_hashes_(x: Tensor, inv_norm: Tensor, valid: Tensor, seed: int, hashes: Tensor, rows: Tensor) -> None:
    """Keep in `hashes` (R,) and `rows` (R, D) the R distinct valid rows of smallest hash seen so far, in that order.

    A sample that depends on the set of tokens alone: not on micro-batches, shards or order. Equal rows count once.
    """
    size = hashes.shape[0]
    new, token = smallest(torch.where(valid, hash_rows(x, seed), EMPTY_HASH), size)
    merged, place = smallest(torch.cat([hashes, new]), size)  # a token kept before stays the first of its equals
    fresh = x.index_select(0, token).to(rows.dtype)
    fresh = torch.where(valid[token, None], fresh * inv_norm[token, None].to(rows.dtype), 0.0)
    hashes.copy_(merged)
    rows.copy_(torch.cat([rows, fresh]).index_select(0, place))


def kmeans_pp(hashes: Tensor, rows: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Places (E,) of E tokens of the reservoir, each drawn with odds 1 - its largest cosine with those before.

    This is k-means++ (Arthur and Vassilvitskii 2007) on the unit sphere. It runs on the host in fp64, so that every
    device and rank draws the same. With fewer than E tokens, empty places follow.
    """
    num_found = int((hashes != EMPTY_HASH).sum())
    unit = torch.nn.functional.normalize(rows[:num_found].cpu().double(), dim=1)
    places = [int(torch.randint(num_found, (), generator=generator, device="cpu"))]
    far = 1 - unit @ unit[places[0]]
    while len(places) < min(num_experts, num_found):
        odds = far.clamp_min(0)
        odds[places] = 0
        left = odds if odds.sum() > 0 else torch.ones_like(odds).index_fill_(0, torch.tensor(places, device="cpu"), 0)
        places.append(int(torch.multinomial(left, 1, generator=generator)))
        far = torch.minimum(far, 1 - unit @ unit[places[-1]])
    empty = range(num_found, num_found + num_experts - len(places))
    return torch.tensor([*places, *empty], device=rows.device)
