"""Directions that stay apart: the centroids' differences from their mean, decorrelated. Matrix products alone.

    Delta_e = c_e - mu;  A = Delta Delta^T + eps tr(Delta Delta^T) / E I;  W = A^(-1/2) Delta
    weight_e = unit(mu + n unit(W_e)),  n the mean norm of Delta_e

This is symmetric decorrelation (Hyvarinen and Oja 2000, FastICA). A^(-1/2) by the coupled Newton-Schulz iteration
(Higham 1997; Functions of Matrices, 6.3), a fixed number of steps, so that nothing is read back and a graph may hold
it. `reference.whitened_reference` is the definition. Legend: L layers, E experts, D hidden size.
"""

import math

import torch
from torch import Tensor

from kmeans_route.reference import MIN_CENTROID_NORM, WHITENING_EPS, product, unit_rows


def newton_schulz_steps(num_experts: int) -> int:
    """Steps until the smallest eigenvalue that A can have, eps / E of the largest, has come to 1.

    A small eigenvalue grows by 9 / 4 a step; the last six double its digits.
    """
    return math.ceil(math.log(num_experts / WHITENING_EPS) / math.log(9 / 4)) + 6


def inverse_root(a: Tensor) -> Tensor:
    """a^(-1/2) of symmetric positive definite (L, E, E) with eigenvalues in (0, 1]."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    y, z = a, eye
    for _ in range(newton_schulz_steps(a.shape[-1])):
        t = 1.5 * eye - 0.5 * product(z, y)
        y, z = product(y, t), product(t, z)
    return z


def whitened(centroids: Tensor, weight: Tensor) -> Tensor:
    """Directions (L, E, D) of centroids (L, E, D); where an expert has no centroid yet, its row of weight."""
    length = torch.linalg.vector_norm(centroids, dim=-1, keepdim=True)
    here = (length >= MIN_CENTROID_NORM) & length.isfinite()
    number = here.sum(1, keepdim=True).clamp_min(1)
    length = torch.where(here, length, 0.0)
    c = torch.where(here, centroids / length.amax(1, keepdim=True).clamp_min(MIN_CENTROID_NORM), 0.0)
    mu = c.sum(1, keepdim=True) / number
    delta = torch.where(here, c - mu, 0.0)
    gram = product(delta, delta.mT)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    a = gram + WHITENING_EPS * trace / number * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    size = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)
    w = product(inverse_root(a / torch.where(size > 0, size, 1.0)), delta)
    n = torch.linalg.vector_norm(delta, dim=-1, keepdim=True).sum(1, keepdim=True) / number
    return torch.where(here, unit_rows(mu + n * unit_rows(w), weight), weight)
