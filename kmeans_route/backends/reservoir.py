"""The token reservoir: a sample of hidden states for the first centroids that neither order nor rounding changes.

Until its centroids have data, a router keeps R valid tokens, the same whatever the micro-batches, shards or order. A
token goes by the cell of its direction, which rounding seldom changes, and each place of the reservoir takes its token
from cells of its own, so that a token in another cell changes one place or two. A cell counts once, however many tokens
lie in it: clusters so tight that no line parts them weigh no more than a single token far away. Legend: T tokens,
D hidden size, E experts, R places.
"""

import torch
from torch import Tensor

from kmeans_route.backends import chunks

EMPTY_HASH = torch.iinfo(torch.int64).max  # of a place that holds no token
TOKENS_PER_EXPERT = 16
LINES = 64
"""How many lines bound a cell: with more, cells are finer, and rounding moves more tokens to another."""
CELL_BIT, SLOPE_BIT = 39, 31
"""Where in a hash the bits of a cell begin, and below them those of a slope; then come bits of the row."""


def hash_rows(x: Tensor, seed: int) -> Tensor:
    """A 63-bit hash of each row, (T,) int64 in [0, 2^63 - 1), equal on every device.

    A cell is all directions on the same sides of `LINES` lines through 0, each in the plane of two components that the
    seed draws: random projections (Charikar 2002) of two components each (Li, Hastie and Church 2006). Rows of a cell
    are in the order of a slope in one more plane, which begins at a place of the cell's own. All of it is made of
    single components, so that no order of summation changes it.
    """
    generator = torch.Generator().manual_seed(seed)
    of_cell, of_row = (_odd(n, generator).to(x.device) for n in (LINES, x.shape[1]))
    one = torch.randint(x.shape[1], (LINES + 1,), generator=generator, device="cpu")
    other = (one + torch.randint(1, max(2, x.shape[1]), (LINES + 1,), generator=generator, device="cpu")) % x.shape[1]
    one, other = one.to(x.device), other.to(x.device)
    a, b = torch.randn(2, LINES + 1, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    h = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for c in chunks.of(x):
        left, right = x[c][:, one].double() * a, x[c][:, other].double() * b
        cell = _mixed(((left > right)[:, :LINES] * of_cell).sum(1))
        rise, run = left[:, LINES].abs(), right[:, LINES].abs()
        slope = (rise / (rise + run) * (1 << (CELL_BIT - SLOPE_BIT))).nan_to_num(0.0).long() + cell
        bits = x[c].contiguous().view(width).long()
        # The low half of an fp64 is often all 0, and a product never carries high bits down: fold them in first.
        row = _mixed(((bits ^ (bits >> 32)) * of_row).sum(1))
        h[c] = (cell << CELL_BIT) | ((slope << SLOPE_BIT) & ((1 << CELL_BIT) - 1)) | (row & ((1 << SLOPE_BIT) - 1))
    return (h & EMPTY_HASH).clamp_max_(EMPTY_HASH - 1)


def _odd(size: int, generator: torch.Generator) -> Tensor:
    """Random odd 64-bit factors (size,). Sums of their products wrap and are exact: neither order nor chunks matter."""
    return torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator, dtype=torch.int64, device="cpu") | 1


def _mixed(h: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        h = (h ^ ((h >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return h


def kept(hashes: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """(what R `places` keep of hashes, where each stood), both (R,); EMPTY_HASH where too few differ.

    Every cell belongs to one place. A place takes the smallest of its cells, and of a cell the smallest hash. Where a
    place has no cell, the next cells of others fill it, then the next hashes of cells. What is kept of the kept of
    several parts is what is kept of all.
    """
    values, stood = hashes.sort(stable=True)
    values[1:] = torch.where(values[1:] == values[:-1], EMPTY_HASH, values[1:])
    values, again = values.sort(stable=True)
    cell, size = values >> CELL_BIT, max(1, values.numel())
    place, turn_of_cell = cell % places, _turns(cell)
    group, order = (turn_of_cell * places + place).sort(stable=True)
    turn = (turn_of_cell * size).index_add_(0, order, _turns(group))
    turn.masked_fill_(values == EMPTY_HASH, EMPTY_HASH)
    turn, order = (part[:places] for part in turn.sort(stable=True))
    own, place = turn == 0, place[order]
    taken = torch.zeros(places, dtype=torch.int64, device=hashes.device).index_add_(0, place, own.long())
    free = taken.sort(stable=True).indices
    place = torch.where(own, place, free[((~own).cumsum(0) - 1).clamp_min_(0)])
    return (
        torch.full((places,), EMPTY_HASH, device=hashes.device).index_copy_(0, place, values[order]),
        torch.zeros_like(taken).index_copy_(0, place, stood[again[order]]),
    )


def _turns(sorted_values: Tensor) -> Tensor:
    """How many equals stand before each."""
    index = torch.arange(sorted_values.numel(), device=sorted_values.device)
    starts = sorted_values.diff(prepend=sorted_values[:1] - 1) != 0
    return index - torch.where(starts, index, 0).cummax(0).values


def keep_(x: Tensor, inv_norm: Tensor, valid: Tensor, seed: int, hashes: Tensor, rows: Tensor) -> None:
    """Let `hashes` (R,) and `rows` (R, D) hold what is `kept` of all valid rows seen so far.

    A sample that depends on the set of tokens alone: not on micro-batches, shards or order. Equal rows count once.
    """
    if x.shape[0] == 0:
        return
    places = hashes.shape[0]
    new, token = kept(torch.where(valid, hash_rows(x, seed), EMPTY_HASH), places)
    merged, place = kept(torch.cat([hashes, new]), places)  # a token kept before stays the first of its equals
    fresh = x.index_select(0, token).to(rows.dtype) * inv_norm[token, None].to(rows.dtype)
    fresh = torch.where(new[:, None] != EMPTY_HASH, fresh, 0.0)
    hashes.copy_(merged)
    rows.copy_(torch.cat([rows, fresh]).index_select(0, place))


def kmeans_pp(hashes: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    """Places (E,) of E tokens of the reservoir, each drawn with odds 1 - its largest cosine with those before.

    This is k-means++ (Arthur and Vassilvitskii 2007) on the unit sphere. Each draw is a race: a token arrives after an
    exponential time, which its cell decides, over its odds, so that of a cell the token with the largest comes first. A
    token that rounding moves leaves the others' draws as they are. It runs on the host in fp64, so that every device
    and rank draws the same. With fewer than E tokens, empty places follow.
    """
    found = (hashes != EMPTY_HASH).cpu()
    unit = torch.nn.functional.normalize(rows.cpu().double(), dim=1)
    cells, places = hashes.cpu() >> CELL_BIT, list[int]()
    far = torch.ones_like(cells, dtype=torch.float64)
    while len(places) < min(num_experts, int(found.sum())):
        drawn = (_mixed(cells + (len(places) << (63 - CELL_BIT))) & EMPTY_HASH) >> 11
        time = -torch.log((drawn.double() + 0.5) / 2**52)  # finite and above 0
        odds = far.clamp_min(torch.finfo(torch.float64).eps)  # of equal directions any
        odds[~found] = odds[places] = 0
        places.append(int((time / odds).argmin()))
        far = torch.minimum(far, 1 - unit @ unit[places[-1]])
    empty = (~found).nonzero()[: num_experts - len(places), 0].tolist()
    return torch.tensor([*places, *empty], device=rows.device)
