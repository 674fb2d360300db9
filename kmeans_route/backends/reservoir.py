"""The token reservoir: a sample of hidden states that depends on the set of tokens alone, for the first centroids.

Until its centroids have data, a router keeps R valid tokens: the same whatever the micro-batches, shards or order, and
nearly the same when rounding changes the hidden states (bf16 in place of fp32, tensor parallelism, a compiled model).

A token lies in the cell of the one of M seeded directions that is nearest to it, and its depth there is its cosine with
that direction, measured in a projection onto `PROJECTED` seeded directions of +1 and -1. Cells are dealt out to the R
places. A place takes the deepest token of its cells: to take another's place a token must be as deep, and the deepest
lie far apart, so that small changes of all tokens change few places. They must change some: of all sets of a given
measure a half-space has the least boundary (Sudakov and Tsirelson 1974, Borell 1975), and what crosses it changes
sides. Random projections as hashes: Charikar 2002; the nearest of random directions: Terasawa and Tanaka 2007.

Legend: T tokens, D hidden size, E experts, R places: E for init="tokens", 16 E for "kmeans++"; M cells.
"""

import torch
from torch import Tensor

from kmeans_route.backends import chunks
from kmeans_route.reference import compute_dtype, product

EMPTY_HASH = torch.iinfo(torch.int64).max  # of a place that holds no token
TOKENS_PER_EXPERT = 16
PROJECTED = 32  # hidden states are looked at along so many directions
MIN_CELLS = 512  # more cells than places: then each has a token even where all tokens share an offset
DEPTH_BITS = 31  # of a hash: those of a non-negative fp32, turned round, below the number of the cell
SAME_DEPTH = 64  # steps of fp32 between depths that are one token's: batches of other sizes add up in other order
GOLDEN = -0x61C8864680B583EB  # the step of splitmix64
MAX_RANK = 2**15  # within a cell; those behind it are forgotten


def mixed(h: Tensor) -> Tensor:
    """Integers (int64) whose bits all depend on all bits of h: the finaliser of splitmix64, equal on every device."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        h = (h ^ ((h >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return h


def random_signs(num_rows: int, seed: int, device: torch.device) -> Tensor:
    """(num_rows, `PROJECTED`) fp32 of +1 and -1, equal on every device."""
    bits = mixed((torch.arange(num_rows, device=device) + 1) * GOLDEN + seed)[:, None]
    return (((bits >> torch.arange(PROJECTED, device=device)) & 1) * 2 - 1).float()


def hash_rows(x: Tensor, seed: int, num_places: int) -> Tensor:
    """(T,) int64 of each row's direction and the seed: the number of its cell, then its depth, the deepest first.

    Rows that are not valid have any hash.
    """
    dtype = compute_dtype(x.dtype)
    base = random_signs(x.shape[1], seed, x.device).to(dtype)
    # Rows of signs are of one length, so none of them is favoured.
    cells = random_signs(max(num_places, MIN_CELLS), ~seed, x.device).T.contiguous()
    hashes = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for c in chunks.of(x):
        rows = x[c].to(dtype)
        seen = (product(rows, base) / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).float()
        depth, cell = product(seen, cells).max(1)
        hashes[c] = (cell << DEPTH_BITS) + (2**DEPTH_BITS - 1 - depth.clamp_min(0).view(torch.int32).long())
    return hashes


def select(hashes: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
    """The num_places (R,) hashes to keep, and where each stood; then EMPTY_HASH.

    The order is: the deepest token of each cell, then the second of each cell, and so on; among these the deepest of
    each place, then its second deepest, and so on; by place. What is kept of a set is kept of any part of it that it
    lies in, for a token never moves forward as others join. Tokens of one cell and `SAME_DEPTH` count once.
    """
    hashes, at = hashes.sort(stable=True)
    held, cell, depth = hashes != EMPTY_HASH, hashes >> DEPTH_BITS, hashes & (2**DEPTH_BITS - 1)
    new_cell = _differs(cell)
    copy = ~new_cell & (_step(depth) <= SAME_DEPTH)
    rank = _count_within(new_cell, ~copy)
    held &= ~copy & (rank < MAX_RANK)
    place = cell % num_places
    group = rank * num_places + place  # below 2^15 R
    by_depth, again = torch.where(held, (group << DEPTH_BITS) + depth, EMPTY_HASH).sort(stable=True)
    hashes, at, held, group = hashes[again], at[again], held[again], group[again]
    position = _count_within(_differs(by_depth >> DEPTH_BITS), torch.ones_like(held))
    rank, place = group // num_places, group % num_places
    order = (rank * hashes.shape[0] + position) * num_places + place
    last = torch.where(held, order, EMPTY_HASH).argsort(stable=True)[:num_places]
    return torch.where(held, hashes, EMPTY_HASH)[last], at[last]


def _step(values: Tensor) -> Tensor:
    """Of each value from the one before; 0 for the first."""
    return torch.diff(values, prepend=values[:1])


def _differs(values: Tensor) -> Tensor:
    """Whether each value begins a run of equals."""
    return (_step(values) != 0).index_fill(0, torch.zeros_like(values[:1]), True)


def _count_within(begins: Tensor, counted: Tensor) -> Tensor:
    """How many of `counted` stand before each place, within the run that begins where `begins` is true."""
    before = counted.long().cumsum(0) - counted.long()
    return before - torch.where(begins, before, 0).cummax(0).values


def keep_deepest_(x: Tensor, inv_norm: Tensor, valid: Tensor, seed: int, hashes: Tensor, rows: Tensor) -> None:
    """Keep in `hashes` (R,) and `rows` (R, D) what `select` keeps of the valid rows seen so far."""
    num_places = hashes.shape[0]
    if not x.shape[0]:
        return
    new = torch.where(valid, hash_rows(x, seed, num_places), EMPTY_HASH)
    kept, place = select(torch.cat([hashes, new]), num_places)
    token = (place - num_places).clamp_min(0)
    fresh = x.index_select(0, token).to(rows.dtype) * inv_norm[token, None].to(rows.dtype)
    old = rows.index_select(0, place.clamp_max(num_places - 1))
    taken = torch.where((place < num_places)[:, None], old, fresh)
    hashes.copy_(kept)
    rows.copy_(torch.where((kept != EMPTY_HASH)[:, None], taken, 0.0))


def in_places(hashes: Tensor) -> Tensor:
    """(R,) which of the kept tokens goes to each place: the first of its cells, or where there is none a token over.

    So a token that changes leaves the places of the others as they are.
    """
    num_places = hashes.shape[0]
    place = torch.where(hashes != EMPTY_HASH, (hashes >> DEPTH_BITS) % num_places, num_places)
    place, at = place.sort(stable=True)
    first = _differs(place) & (place < num_places)
    # Sorting puts the free places, and the tokens over, one beside the other in their order.
    taken = torch.zeros(num_places + 1, dtype=torch.bool, device=hashes.device)
    taken = taken.scatter(0, torch.where(first, place, num_places), True)[:num_places]
    over = torch.ones_like(first).scatter(0, at, ~first)
    chosen = torch.empty_like(at)
    chosen[torch.cat([place[first], torch.nonzero(~taken)[:, 0]])] = torch.cat([at[first], torch.nonzero(over)[:, 0]])
    return chosen


def kmeans_pp(hashes: Tensor, rows: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Places (E,) of E tokens of the reservoir, each drawn with odds 1 - its largest cosine with those before.

    This is k-means++ (Arthur and Vassilvitskii 2007) on the unit sphere. It runs on the host in fp64, so that every
    device and rank draws the same. With fewer than E tokens, empty places follow.

    A draw is a race in which the token of odds w arrives after -log(u) / w, u uniform in (0, 1): the first is a token
    with probability in proportion to w. u is a hash of the token's cell, and of its rank there: it goes with the token
    wherever that stands.
    """
    num_found = int((hashes != EMPTY_HASH).sum())
    unit = torch.nn.functional.normalize(rows[:num_found].cpu().double(), dim=1)
    cell, at = (hashes[:num_found].cpu() >> DEPTH_BITS).sort(stable=True)
    token = torch.empty_like(cell)
    token[at] = (cell << DEPTH_BITS) + _count_within(_differs(cell), torch.ones_like(cell, dtype=torch.bool))
    token = token + torch.randint(2**62, (), generator=generator, device="cpu")
    far = torch.full_like(unit[:, 0], 2.0)
    places: list[int] = []
    while len(places) < min(num_experts, num_found):
        free = torch.ones_like(far).index_fill_(0, torch.tensor(places, dtype=torch.int64, device="cpu"), 0)
        odds = far.clamp_min(0) * free
        odds = odds if odds.sum() > 0 else free
        token = mixed(token + GOLDEN)
        uniform = ((token & (2**52 - 1)).double() + 0.5) / 2**52
        places.append(int((-uniform.log() / odds).argmin()))
        far = torch.minimum(far, 1 - unit @ unit[places[-1]])
    empty = range(num_found, num_found + num_experts - len(places))
    return torch.tensor([*places, *empty], device=rows.device)
