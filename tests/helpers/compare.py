"""What the tests share: inputs, named options, the same in plain PyTorch, comparisons with the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import kmeans_route
from kmeans_route import backends
from kmeans_route.types import Tokens
from tests.helpers import oracle

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
ROUND = EPS[torch.float32]
LOW = [torch.float32, torch.float16, torch.bfloat16]
# Two fp32 scores this close may change places: dots of unit vectors accumulate a few fp32 roundings.
NEAR_TIE = 1e-6

# Every value of every named option that changes a number. n_group divides 12 and 60.
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax-all-candidates": {"normalize": False},
    "softmax-warm": {"tau": 1.0},
    "softmax-scaled": {"scaling": 2.5},
    "sigmoid": {"gate": "sigmoid", "tau": 0.3},
    "sigmoid-raw": {"gate": "sigmoid", "normalize": False, "scaling": 1.5},
    "cosine": {"gate": "cosine"},
    "cosine-raw": {"gate": "cosine", "normalize": False},
    "uniform": {"gate": "uniform", "scaling": 2.0},
    "uniform-raw": {"gate": "uniform", "normalize": False},
    "groups-top2": {"n_group": 4, "topk_group": 2},
    "groups-max": {"n_group": 4, "topk_group": 2, "group_score": "max"},
    "groups-all-candidates": {"n_group": 4, "topk_group": 2, "normalize": False},
    "groups-one": {"n_group": 1, "topk_group": 1},
    "groups-every": {"n_group": 4, "topk_group": 4, "gate": "sigmoid"},
}


def routers_of(model: torch.nn.Module) -> list[Any]:
    """Its K-Means routers, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, kmeans_route.KMeansRouter)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_inputs(
    num_tokens: int, hidden_size: int, num_experts: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D) of the dtype with rows of different lengths, fp32 weight (E, D) and fp32 expert_bias (E,)."""
    gen = generator(seed)
    weight = torch.randn(num_experts, hidden_size, generator=gen) * 3
    lengths = torch.rand(num_tokens, 1, generator=gen) * 4 + 0.1
    x = (torch.randn(num_tokens, hidden_size, generator=gen) * lengths).to(dtype)
    bias = torch.randn(num_experts, generator=gen) * 0.05
    return x, weight, bias


def numpy(tensor: Tensor) -> Any:
    """A NumPy array, floating dtypes as fp64."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def truth(
    x: Tensor, weight: Tensor, top_k: int, bias: Tensor | None = None, **kwargs: Any
) -> tuple[oracle.OracleRouting, Any]:
    """The oracle's routing of x by the directions rounded to x's dtype, and these directions, both in fp64."""
    mask, indices = kwargs.pop("mask", None), kwargs.pop("indices", None)
    unit_rows = numpy(kmeans_route.directions(weight, x.dtype))
    routing = oracle.route(
        numpy(x.reshape(-1, x.shape[-1])),
        unit_rows,
        top_k,
        None if bias is None else numpy(bias),
        mask=None if mask is None else mask.numpy(),
        indices=None if indices is None else indices.numpy(),
        options=oracle.Options(**kwargs),
    )
    return routing, unit_rows


def assert_ids(ids: Tensor, expected: oracle.OracleRouting, bias: Tensor | None, near: float = NEAR_TIE) -> int:
    """Ids equal the oracle's but in rows where s + b ties within `near`; returns the number of rows that differ."""
    got, want = ids.numpy(), expected.indices
    assert got.shape == want.shape
    assert ids.dtype == torch.int64
    differing = np.flatnonzero((got != want).any(axis=1))
    select = expected.scores + (0 if bias is None else numpy(bias))
    for t in differing:
        assert expected.valid[t], f"token {t} is not valid: ids must be {want[t]}, got {got[t]}"
        assert len(set(got[t])) == got.shape[1], f"token {t}: repeated ids {got[t]}"
        assert expected.candidates[t, got[t]].all(), f"token {t}: {got[t]} leaves the selected groups"
        gap = np.abs(select[t, got[t]] - select[t, want[t]]).max()
        assert gap <= near, f"token {t}: expected {want[t]}, got {got[t]}, s + b apart by {gap:.3e}"
    return len(differing)


def plain_weights(
    x: Tensor, unit_rows: Tensor, ids: Tensor, options: oracle.Options, candidates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, selected, scores) of given ids as one would write them in plain PyTorch, all in the dtype of x."""
    scores = torch.nn.functional.normalize(x, dim=1) @ unit_rows.T
    selected = scores.gather(1, ids)
    if options.gate == "softmax" and options.normalize:
        weights = torch.softmax(selected / options.tau, dim=1)
    elif options.gate == "softmax":
        weights = torch.softmax((scores / options.tau).masked_fill(~candidates, -torch.inf), dim=1).gather(1, ids)
    elif options.gate == "sigmoid":
        weights = torch.sigmoid(selected / options.tau)
    elif options.gate == "cosine":
        weights = selected.clamp(min=1e-3)
    else:
        weights = torch.full_like(selected, 1 / ids.shape[1])
    if options.normalize and options.gate in ("sigmoid", "cosine"):
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights * options.scaling, selected, scores


def largest_error(got: Tensor, want: Any) -> float:
    """max |got - want|; NaN anywhere is an infinite error."""
    if got.numel() == 0:
        return 0.0
    error = np.abs(numpy(got) - want).max()
    return float("inf") if np.isnan(error) else float(error)


def assert_no_worse(got: Tensor, plain: Tensor, want: Any, tolerance: float, what: str) -> None:
    """The error of `got` is at most that of plain PyTorch in the same dtype plus `tolerance`."""
    ours, theirs = largest_error(got, want), largest_error(plain, want)
    assert ours <= theirs + tolerance, f"{what}: error {ours:.3e}, plain PyTorch {theirs:.3e} + {tolerance:.3e}"


def half_step(dtype: torch.dtype, exact: Any) -> Any:
    """What one rounding of `exact` to the dtype may change, subnormal numbers included."""
    return EPS[dtype] / 2 * 1.01 * np.abs(exact) + torch.finfo(dtype).smallest_normal * EPS[dtype] / 2


def assert_same_bits(got: Tensor, want: Tensor, what: str = "") -> None:
    """Equal in dtype, shape and every bit, NaN and the sign of zero included."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.is_floating_point():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
        got, want = got.detach().contiguous().view(integer), want.detach().contiguous().view(integer)
    assert torch.equal(got, want), f"{what} differs in {int((got != want).sum())} of {got.numel()} elements"


def assert_same_routing(got: kmeans_route.Routing, want: kmeans_route.Routing) -> None:
    """Every field equal bit for bit."""
    for name, one, other in zip(got._fields, got, want, strict=True):
        if one is None or other is None:
            assert one is other, name
        else:
            assert_same_bits(one, other, name)


def upstream_of(num_tokens: int, top_k: int, num_experts: int) -> dict[str, Tensor]:
    """Random gradients for weights, selected_scores and scores."""
    gen = generator(9)
    return {
        "d_weights": torch.randn(num_tokens, top_k, generator=gen),
        "d_selected": torch.randn(num_tokens, top_k, generator=gen),
        "d_scores": torch.randn(num_tokens, num_experts, generator=gen),
    }


def assert_left_out(got: kmeans_route.Routing, row: int, top_k: int) -> None:
    """Token `row` is not valid: ids 0..K-1, zeros, and nothing non-finite anywhere."""
    assert not got.valid[row]
    assert got.indices[row].tolist() == list(range(top_k))
    assert (got.weights[row] == 0).all()
    assert (got.selected_scores[row] == 0).all()
    assert got.inv_norm[row] == 0
    for name, field in zip(got._fields, got, strict=True):
        assert field is None or torch.isfinite(field).all(), name


def tokens_of(
    x: Tensor,
    mask: Tensor | None = None,
    count_mask: Tensor | None = None,
    indices: Tensor | None = None,
    backend: str = "torch",
) -> Tokens:
    """What `enter` makes of x (T, D)."""
    return Tokens(x, mask, count_mask, indices, backends.get(backend))
