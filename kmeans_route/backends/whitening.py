"""Directions that stay apart: the centroids' differences from their mean, decorrelated. Matrix products alone.

    Delta_e = c_e - mu;  A = Delta Delta^T + eps tr(Delta Delta^T) / E I;  W = A^(-1/2) Delta
    weight_e = unit(mu + n unit(W_e)),  n the mean norm of Delta_e

This is symmetric decorrelation (Hyvarinen and Oja 2000, FastICA). A^(-1/2) by the coupled Newton-Schulz iteration
(Higham 1997; Functions of Matrices, 6.3), each step scaled for the eigenvalues that are left (Chen and Chow 2014), a
fixed number of steps, so that nothing is read back and a graph may hold it. `reference.whitened_reference` is the
definition. Legend: L layers, E experts, D hidden size.
"""

import math

import torch
from torch import Tensor

from kmeans_route.reference import MIN_CENTROID_NORM, WHITENING_EPS, rounds_fp32, unit_rows

LARGEST_SCALE = 1.6  # sqrt(3) would grow small eigenvalues quickest, and take the largest to nearly 0


def newton_schulz_scales(num_experts: int) -> tuple[float, ...]:
    """The scale of each step, until the square root of the smallest eigenvalue that A can have has come to 1.

    A step takes x in (0, 1] to f(x) = a x (3 - a^2 x^2) / 2. With a^2 = 3 / (1 + l + l^2) the least x, l, and the
    largest, 1, have one image, than which no other is less.
    """
    least, scales = math.sqrt(WHITENING_EPS / (1 + WHITENING_EPS) / num_experts), list[float]()
    while least < 1 - 1e-7:
        scales.append(min(LARGEST_SCALE, math.sqrt(3 / (1 + least + least**2))))
        least = min(scales[-1] * x * (3 - (scales[-1] * x) ** 2) / 2 for x in (least, 1.0))
    return tuple(scales)


SCALES = tuple(newton_schulz_scales(1 << bits) for bits in range(21))
"""Of 1, 2, 4, ... experts: made once, since a compiler to which E is a symbol would do the loop above with symbols."""


def scales_for(num_experts: int) -> tuple[float, ...]:
    """`newton_schulz_scales` of the next power of two: it is enough for fewer experts."""
    bits = 0
    while 1 << bits < num_experts:
        bits += 1
    return SCALES[bits]


def inverse_root(a: Tensor) -> Tensor:
    """a^(-1/2) of symmetric (L, E, E) with eigenvalues from WHITENING_EPS / (1 + WHITENING_EPS) / E to 1."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    y, z = a, eye.expand_as(a)
    for scale in scales_for(a.shape[-1]):
        t = torch.baddbmm(eye, z, y, beta=1.5 * scale, alpha=-0.5 * scale**3)
        y, z = torch.bmm(y, t), torch.bmm(t, z)
    return z


def whitened(centroids: Tensor, weight: Tensor) -> Tensor:
    """Directions (L, E, D) of centroids (L, E, D); where an expert has no centroid yet, its row of weight."""
    if centroids.dtype == torch.float32 and rounds_fp32(centroids.device.type):
        centroids = centroids.double()
    length = torch.linalg.vector_norm(centroids, dim=-1, keepdim=True)
    usable = (length >= MIN_CENTROID_NORM) & (length < math.inf)
    here = usable.to(centroids.dtype)
    number = here.sum(1, keepdim=True).clamp_min(1)
    largest = torch.where(usable, length, MIN_CENTROID_NORM).amax(1, keepdim=True)
    c = centroids.nan_to_num(0.0, 0.0, 0.0) * (here / largest)
    mu = c.sum(1, keepdim=True) / number
    delta = (c - mu).mul_(here)
    n = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
    trace = n.square().sum(1, keepdim=True)
    eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    a = torch.baddbmm(WHITENING_EPS * trace / number * eye, delta, delta.mT)
    a = a / torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    w = torch.bmm(inverse_root(a), delta)
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    n = torch.where(length >= MIN_CENTROID_NORM, n.sum(1, keepdim=True) / number / length, 0.0)
    return unit_rows(torch.addcmul(mu, n, w).mul_(here).to(weight.dtype), weight)
