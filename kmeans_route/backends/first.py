"""The first centroids: what forward adds up of tokens until a commit, and the centroids drawn from it.

    u_t = x_t / ||x_t||,  mean = sum over t of u_t / n,  spread^2 = sum over t of ||u_t - mean||^2 / n,
    g_e the seeded directions, and for both ends d of each, g_e and -g_e:
    y_d = sum over t of w_t u_t / sum over t of w_t,  w_t = exp(16 sqrt(D) d . u_t)
    c_e = unit(mean + spread unit(y_d - mean))

The few tokens that lie farthest along d outweigh all others, so y_d lies about where one token does. Expert after
expert takes the end g_e, unless its y - mean has a cosine of 0.5 or more with an earlier expert's and that of the other
end 0.1 less. So first centroids part as tokens do, also where all of these share a mean or a dominant axis. All lie as
far from the mean as tokens do: nearer ones would have the larger cosines with every token.

Sums alone travel: order, micro-batches, shards and ranks do not matter. And rounding moves y_d about as little as it
moves tokens, which it would not if one token were chosen: a compiled, an autocast and an eager run start alike. What
comes out as copies is parted. Raw sums, u_t = x_t, have centroids of the tokens' root mean square.

fp64, for the range of exp, and since a mean that all tokens share is taken off. Legend: T tokens, D hidden size,
E experts.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from kmeans_route.backends import chunks
from kmeans_route.reference import directions_reference

SHARPNESS = 16.0  # times sqrt(D): a seeded direction has a cosine of about 1 / sqrt(D) with a token
ALIKE, LESS = 0.5, 0.1  # cosines: two of one kind of token lie above, of two kinds below; by how much an end is better
COPIES = 1 - 1e-6  # the cosine of two rows from which they are one direction
EQUAL = 1e-5  # the spread of tokens of length 1 from which they are one token


def no_moments(num_experts: int, hidden_size: int, device: torch.device) -> Tensor:
    """Those of no tokens, (2 E + 2, D + 1): for each end d sums of w_t u_t, then of u_t and of u_t * u_t, u_t with a 1
    at its end: so the last column holds the sums of w_t, and twice the number of tokens.
    """
    return torch.zeros(2 * num_experts + 2, hidden_size + 1, dtype=moments_dtype(device), device=device)


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
        u = pad(x[c].to(moments.dtype) * factor[c, None].to(moments.dtype), (0, 1), value=1.0)
        u = torch.where(counted[c, None], u, 0.0)
        along = SHARPNESS * math.sqrt(x.shape[1]) * (g @ _unit(u[:, :-1]).T)
        moments[:-2] += torch.cat([along, -along]).clamp_(-most, most).exp_() @ u
        moments[-2] += u.sum(0)
        moments[-1] += u.square().sum(0)


def first_centroids(moments: Tensor, directions: Tensor) -> Tensor:
    """(E, D) from the moments of at least one token; directions: g (E, D), which parts what would be copies."""
    y, number = moments[:-2, :-1] / moments[:-2, -1:], moments[-1, -1]
    mean, squares = moments[-2, :-1] / number, moments[-1, :-1].sum() / number
    spread = (squares - mean.square().sum()).clamp_min(0).sqrt()
    equal = spread <= EQUAL * squares.sqrt()
    off_mean = torch.where(equal, 0.0, _unit(y - mean))
    away = _unit(_parted(off_mean[_apart(off_mean)], directions.to(moments.dtype)))
    return squares.sqrt() * _unit(mean + torch.where(equal, 0.1 * squares.sqrt(), spread) * away)


def _apart(rows: Tensor) -> Tensor:
    """Places (E,) in rows (2 E, D), of each expert one of its two ends. The device alone: nothing is read back."""
    number = len(rows) // 2
    cosine = rows @ rows.T
    nearest = cosine[0]  # of each end, the largest cosine with those before
    places = [torch.zeros_like(nearest[0], dtype=torch.int64)]
    for e in range(1, number):
        one, other = nearest[e], nearest[number + e]
        places.append(torch.where((one >= ALIKE) & (other < one - LESS), number + e, e))
        nearest = torch.maximum(nearest, cosine.index_select(0, places[-1][None])[0])
    return torch.stack(places)


def _parted(rows: Tensor, directions: Tensor) -> Tensor:
    """Unit rows (E, D), with a tenth of its direction added to each that is a copy of an earlier one's, or 0.

    Equal centroids would have equal scores for ever, and whitening keeps copies.
    """
    copies = torch.tril(rows @ rows.T, diagonal=-1).amax(1) > COPIES
    return torch.where((copies | ~rows.any(1))[:, None], rows + 0.1 * _unit(directions), rows)


def _unit(rows: Tensor) -> Tensor:
    """Unit rows, whatever their length: rows may be far shorter or longer than `normalize` takes."""
    return normalize(rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny), dim=1)
