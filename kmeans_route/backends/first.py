"""The first centroids: what forward adds up of tokens until a commit, and the centroids drawn from it.

    u_t = x_t / ||x_t||,  g_e the seeded directions, and for both ends d of each, g_e and -g_e:
    y_d = unit(sum over t of exp(16 sqrt(D) d . u_t) u_t)

The few tokens that lie farthest along d outweigh all others, so y_d lies about where one token does. Expert after
expert takes y of the end g_e, unless its cosine with an earlier expert's is 0.5 or more and that of the other end 0.1
less. So first centroids part as tokens do, also where all of these share a mean or a dominant axis.

Sums alone travel: order, micro-batches, shards and ranks do not matter. And rounding moves y_d about as little as it
moves tokens, which it would not if one token were chosen: a compiled, an autocast and an eager run start alike. What
comes out as copies is parted. Raw sums, u_t = x_t, have centroids of the tokens' root mean square.

fp64, for the range of exp. Legend: T tokens, D hidden size, E experts.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kmeans_route.backends import chunks
from kmeans_route.reference import directions_reference

SHARPNESS = 16.0  # times sqrt(D): a seeded direction has a cosine of about 1 / sqrt(D) with a token
ALIKE, LESS = 0.5, 0.1  # cosines: two of one kind of token lie above, of two kinds below; by how much an end is better
COPIES = 1 - 1e-6  # the cosine of two rows from which they are one direction


def no_moments(num_experts: int, hidden_size: int, device: torch.device) -> Tensor:
    """Those of no tokens, (2 E + 1, D): sums of exp(16 sqrt(D) d . u_t) u_t for each end d, and of u_t * u_t."""
    return torch.zeros(2 * num_experts + 1, hidden_size, dtype=moments_dtype(device), device=device)


def moments_dtype(device: torch.device) -> torch.dtype:
    """fp64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def add_moments_(x: Tensor, factor: Tensor, counted: Tensor, directions: Tensor, moments: Tensor) -> None:
    """Add to moments those of the tokens of x (T, D) that count, u_t = factor_t x_t.

    directions: g (E, D), rows of any length.
    """
    g = directions_reference(directions, moments.dtype)  # 0 for a row that is not finite
    most = 0.8 * math.log(torch.finfo(moments.dtype).max)  # beyond it, all that lies so far along d weighs alike
    for c in chunks.of(x, 2 * len(g)):
        u = torch.where(counted[c, None], x[c].to(moments.dtype) * factor[c, None].to(moments.dtype), 0.0)
        along = SHARPNESS * math.sqrt(x.shape[1]) * (g @ _unit(u).T)
        moments[:-1] += torch.cat([along, -along]).clamp_(-most, most).exp_() @ u
        moments[-1] += u.square().sum(0)


def first_centroids(moments: Tensor, num_tokens: Tensor, directions: Tensor) -> Tensor:
    """(E, D) from the moments of num_tokens () > 0; directions: g (E, D), which parts what would be copies."""
    ends = _unit(moments[:-1])
    centroids = _unit(_parted(ends[_apart(ends)], directions.to(moments.dtype)))
    return (moments[-1].sum() / num_tokens).sqrt() * centroids


def _apart(ends: Tensor) -> Tensor:
    """Places (E,) in unit rows ends (2 E, D), of each expert one of its two. The device alone: nothing is read back."""
    number = len(ends) // 2
    cosine = ends @ ends.T
    nearest = cosine[0]  # of each end, the largest cosine with those before
    places = [torch.zeros_like(nearest[0], dtype=torch.int64)]
    for e in range(1, number):
        one, other = nearest[e], nearest[number + e]
        places.append(torch.where((one >= ALIKE) & (other < one - LESS), number + e, e))
        nearest = torch.maximum(nearest, cosine.index_select(0, places[-1][None])[0])
    return torch.stack(places)


def _parted(rows: Tensor, directions: Tensor) -> Tensor:
    """Unit rows (E, D), with a tenth of its direction added to each that is a copy of an earlier one's.

    Equal centroids would have equal scores for ever, and whitening keeps copies.
    """
    copies = torch.tril(rows @ rows.T, diagonal=-1).amax(1) > COPIES
    return torch.where(copies[:, None], rows + 0.1 * _unit(directions), rows)


def _unit(rows: Tensor) -> Tensor:
    """Unit rows, whatever their length: rows may be far shorter or longer than `normalize` takes."""
    return normalize(rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny), dim=1)
