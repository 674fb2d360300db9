"""The first centroids: what forward adds up of tokens until a commit, and the centroids drawn from it.

    u_t = x_t / ||x_t||,  g_e the seeded directions,  mean = sum over t of u_t / n
    v_e = sum over t of (g_e . (u_t - mean)) (u_t - mean)
    c_e = unit(mean + spread unit(v_e)),  spread^2 = mean over t of ||u_t - mean||^2

Each c_e lies about as far from the mean as tokens do, in a seeded direction that their covariance has turned: one step
of the power method (Golub and Van Loan, Matrix Computations, 8.2) on E random vectors. Sums alone travel, so order,
micro-batches, shards and ranks do not matter, and rounded tokens move c_e about as little as themselves, but for rows
that come out as copies, which are parted: a compiled, an autocast and an eager run start alike, as they would not from
E tokens chosen by hash or by distance. Raw sums, u_t = x_t, have centroids of the tokens' root mean square.

fp64, since a mean that all tokens share is taken off the products afterwards. Legend: T tokens, D hidden size, E
experts.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from kmeans_route.backends import chunks
from kmeans_route.reference import directions_reference

COPIES = 1 - 1e-6  # the cosine of two rows from which they are one direction


def no_moments(num_experts: int, hidden_size: int, device: torch.device) -> Tensor:
    """Those of no tokens, (E + 2, D + 1): sums of (g_e . u_t) u_t, of u_t and of u_t * u_t, u_t with a 1 at its end.

    So the last column holds the sums of g_e . u_t and the number of tokens, and nothing hangs on what g is later. fp64,
    where the device has it.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(num_experts + 2, hidden_size + 1, dtype=dtype, device=device)


def add_moments_(x: Tensor, factor: Tensor, counted: Tensor, directions: Tensor, moments: Tensor) -> None:
    """Add to moments those of the tokens of x (T, D) that count, u_t = factor_t x_t.

    directions: g (E, D), rows of any length.
    """
    g = directions_reference(directions, moments.dtype)  # 0 for a row that is not finite
    for c in chunks.of(x):
        u = pad(x[c].to(moments.dtype) * factor[c, None].to(moments.dtype), (0, 1), value=1.0)
        u = torch.where(counted[c, None], u, 0.0)
        moments[:-2] += (g @ u[:, :-1].T) @ u
        moments[-2] += u.sum(0)
        moments[-1] += u.square().sum(0)


def first_centroids(moments: Tensor, directions: Tensor) -> Tensor:
    """(E, D) from the moments of at least one token; directions: g (E, D), which parts what would be copies."""
    sums, number = moments[-2, :-1], moments[-2, -1]
    mean, squares = sums / number, moments[-1, :-1].sum() / number
    off_mean = moments[:-2, :-1] - torch.outer(moments[:-2, -1], mean)
    spread = (squares - mean.square().sum()).clamp_min(0).sqrt()
    apart = _parted(mean + spread * _unit(off_mean), directions.to(moments.dtype))
    return squares.sqrt() * _unit(apart)


def _parted(rows: Tensor, directions: Tensor) -> Tensor:
    """Rows (E, D), with a tenth of its direction added to each that is a copy of an earlier one's.

    Equal centroids would have equal scores for ever, and whitening keeps copies.
    """
    unit, other = _unit(rows), _unit(directions)
    copies = torch.tril(unit @ unit.T, diagonal=-1).amax(1) > COPIES
    aside = rows + 0.1 * torch.linalg.vector_norm(rows, dim=1, keepdim=True) * other
    return torch.where(copies[:, None], aside, rows)


def _unit(rows: Tensor) -> Tensor:
    """Unit rows, whatever their length: the products of short raw rows are shorter than `normalize` takes for 0."""
    return normalize(rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny), dim=1)
