"""The first centroids: what forward adds up of tokens until a commit, and the centroids drawn from it.

    u_t = x_t / ||x_t||,  g_e the seeded directions,  mean = sum over t of u_t / n
    v_e = sum over t of (g_e . (u_t - mean)) (u_t - mean)
    c_e = unit(mean + spread unit(v_e)),  spread^2 = mean over t of ||u_t - mean||^2

Each c_e lies about as far from the mean as tokens do, in a seeded direction that their covariance has turned: one step
of the power method (Golub and Van Loan, Matrix Computations, 8.2) on E random vectors. Sums alone travel, so order,
micro-batches, shards and ranks do not matter, and rounded tokens move c_e by no more than they are moved themselves: a
compiled, an autocast and an eager run start alike, as they would not from E tokens chosen by hash or by distance. Raw
sums, u_t = x_t, have centroids of the tokens' length.

fp64, since a mean that all tokens share is taken off the products afterwards. Legend: T tokens, D hidden size, E
experts.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kmeans_route.backends import chunks

EXTRA_ROWS = 2  # of the moments, after the E of products: the sum of u_t, and of u_t * u_t
COPIES = 1 - 1e-6  # the cosine of two rows from which they are one direction


def no_moments(num_experts: int, hidden_size: int, device: torch.device) -> Tensor:
    """(E + 2, D) of no tokens, fp64 where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(num_experts + EXTRA_ROWS, hidden_size, dtype=dtype, device=device)


def add_moments_(x: Tensor, factor: Tensor, counted: Tensor, directions: Tensor, moments: Tensor) -> None:
    """moments (E + 2, D) += sums of (g_e . u_t) u_t, of u_t and of u_t * u_t over the tokens of x (T, D) that count.

    u_t = factor_t x_t. directions: g (E, D), rows of any one length.
    """
    g = directions.to(moments.dtype)
    for c in chunks.of(x):
        u = x[c].to(moments.dtype) * factor[c, None].to(moments.dtype)
        u = torch.where(counted[c, None], u, 0.0)
        moments[: g.shape[0]] += (g @ u.T) @ u
        moments[-2] += u.sum(0)
        moments[-1] += u.square().sum(0)


def first_centroids(moments: Tensor, num_tokens: Tensor, directions: Tensor) -> Tensor:
    """(E, D) from the moments of num_tokens tokens, at least one, and the directions that they were taken with."""
    g = directions.to(moments.dtype)
    mean = moments[-2] / num_tokens
    off_mean = moments[:-2] - torch.outer(g @ mean, moments[-2])
    squares = moments[-1].sum() / num_tokens
    spread = (squares - mean.square().sum()).clamp_min(0).sqrt()
    apart = _parted(mean + spread * normalize(off_mean, dim=1), g)
    return squares.sqrt() * normalize(apart, dim=1)


def _parted(rows: Tensor, directions: Tensor) -> Tensor:
    """Rows (E, D), with a tenth of its direction added to each that is a copy of an earlier one's.

    Equal centroids would have equal scores for ever, and whitening keeps copies.
    """
    unit, other = (normalize(each, dim=1) for each in (rows, directions))
    copies = torch.tril(unit @ unit.T, diagonal=-1).amax(1) > COPIES
    aside = rows + 0.1 * torch.linalg.vector_norm(rows, dim=1, keepdim=True) * other
    return torch.where(copies[:, None], aside, rows)
