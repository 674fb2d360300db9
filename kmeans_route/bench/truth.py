"""Routing, its statistics and its gradient against plain fp64 on the same device, at any size.

Rows are taken in chunks, so that no (T, E) or (T, K, D) in fp64 exists at once.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route.testing import assert_same_selection
from kmeans_route.types import Routing

CHUNK = 4096
NEAR_TIE_CAP = 0.02


def chunks(length: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover 0..length."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def assert_near(name: str, actual: Tensor, truth: Tensor) -> None:
    """|actual - truth| <= 2 eps |truth| + 1e-4 max |truth|: two roundings, and what small scores' errors grow to."""
    truth = truth.double()
    bound = 2 * torch.finfo(actual.dtype).eps * truth.abs() + 1e-4 * truth.abs().max()
    wrong = ~((actual.double() - truth).abs() <= bound)  # NaN is wrong
    assert not bool(wrong.any()), f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ"


def score_tolerance(hidden_size: int, scores: Tensor) -> float:
    """How far a cosine may be off: one unit in the last place for each step of 16 columns, which tensor cores cut off
    instead of rounding, and as much again for the norm and the division."""
    return max(4e-7, 2 * -(-hidden_size // 16) * 2**-23 * float(scores.abs().max()))


def cosines(x: Tensor, directions: Tensor) -> Tensor:
    """(rows, E) fp64 of the rows x (rows, D) with the directions as rounded to the dtype."""
    x = x.double()
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x @ directions.double().T / norm


def check_selection(
    ids: Tensor, gates: Tensor, scores: Tensor, tau: float, tolerance: float, dtype: torch.dtype, bias: Any = 0.0
) -> int:
    """ids (rows, K) are those of the largest scores + bias, in fp64 (rows, E), and gates their softmax at tau.

    tolerance: how far a score may be off. dtype: what scores and gates were rounded to; in 16 bits most rows have
    near-ties. Returns: how many rows differ in near-ties.
    """
    eps = torch.finfo(dtype).eps
    cap = NEAR_TIE_CAP if eps < 1e-6 else 1.0
    near_ties = assert_same_selection(ids, scores + bias, tolerance=tolerance, cap=cap)
    off = float((gates.detach().double() - (scores.gather(1, ids) / tau).softmax(1)).abs().max())
    assert off <= 2 * tolerance / tau + 4 * eps, f"gates: error {off:.2e}"
    return near_ties


def check_routing(
    x: Tensor, directions: Tensor, bias: Tensor, tau: float, routing: Routing, num_rows: int | None = None
) -> dict[str, float]:
    """ids, selected scores and gates of the first num_rows tokens (None: all), and all counts.

    Returns: near_ties, how many rows differ in near-ties, and max_score_error.
    """
    x, worst, near_ties = x.detach(), 0.0, 0
    assert bool(routing.valid.all()), "tokens were dropped"
    for rows in chunks(num_rows or len(x)):
        scores, ids = cosines(x[rows], directions), routing.indices[rows]
        tolerance = score_tolerance(x.shape[1], scores)
        near_ties += check_selection(ids, routing.weights[rows], scores, tau, tolerance, torch.float32, bias.double())
        error = float((routing.selected_scores.detach()[rows].double() - scores.gather(1, ids)).abs().max())
        assert error <= tolerance, f"scores: error {error:.2e}, allowed {tolerance:.2e}"
        worst = max(worst, error)
    counts = torch.bincount(routing.indices.flatten(), minlength=len(directions))
    assert torch.equal(routing.tokens_per_expert, counts), "tokens_per_expert does not count the ids"
    return {"near_ties": near_ties, "max_score_error": worst}


def check_sums(x: Tensor, indices: Tensor, sums: Tensor) -> None:
    """Centroid sums (E, D) of unit rows against a one-hot product in fp64; 16 bits of mantissa a term."""
    truth = torch.zeros(sums.shape, dtype=torch.float64, device=x.device)
    size = torch.zeros_like(truth)
    for rows in chunks(len(x)):
        unit = F.normalize(x.detach()[rows].double(), dim=1)
        member = torch.zeros(len(sums), len(unit), dtype=torch.float64, device=x.device)
        member.scatter_(0, indices[rows].T, 1.0)
        truth += member @ unit
        size += member @ unit.abs()
    wrong = ~((sums.double() - truth).abs() <= 2**-15 * size + 1e-6)
    assert not bool(wrong.any()), f"centroid sums: {int(wrong.sum())} of {wrong.numel()} values differ"


def gate_gradient(x: Tensor, directions: Tensor, tau: float, indices: Tensor, d_weights: Tensor) -> Tensor:
    """dx (rows, D) in fp64 of softmax gates at given ids (rows, K), by autograd."""
    x = x.detach().double().requires_grad_()
    gates = (cosines(x, directions).gather(1, indices) / tau).softmax(1)
    (dx,) = torch.autograd.grad(gates, x, d_weights.double())
    return dx


def check_learned(x: Tensor, weight: Tensor, gates: Tensor, indices: Tensor, num_rows: int | None = None) -> None:
    """ids and gates of a learned softmax router whose logits were rounded to the dtype of x, in the first rows."""
    x = x.detach()
    for rows in chunks(num_rows or len(x)):
        logits = x[rows].double() @ weight.detach().double().T
        # No cosines: their rounding grows with them.
        rounding = 2 * torch.finfo(x.dtype).eps + 2 * -(-x.shape[1] // 16) * 2**-23
        by_value = logits.gather(1, indices[rows]).argsort(dim=1, descending=True, stable=True)
        ids, sorted_gates = (part[rows].gather(1, by_value) for part in (indices, gates))
        check_selection(ids, sorted_gates, logits, 1.0, rounding * float(logits.abs().max()), x.dtype)
