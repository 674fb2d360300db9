"""What a training forward leaves for the commit: centroid sums, loads, spread, margins, and the token reservoir."""

from typing import Any

import torch
from torch import Tensor

from kmeans_route import backends
from kmeans_route.backends.reservoir import keep_smallest_hashes_
from kmeans_route.ops.schema import arguments, in_backward, no_autocast, recorded, take
from kmeans_route.reference import compute_dtype
from kmeans_route.types import PendingStatistics, Statistics

PAIRS_FROM = 1024  # tokens of a batch of which one looks who was chosen with whom


def centroid_sums(
    x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int, backend: Any
) -> Tensor:
    """(E, D): sums of factor_t x_t over valid tokens, or of x_t without a factor."""
    if backend.PLAIN or not recorded(x):
        return _sums(x, indices, factor, valid, num_experts, backend)
    sums: Tensor = _centroid_sums(x, indices, factor, valid, num_experts, backend.NAME)
    return sums


def _sums(x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int, backend: Any) -> Tensor:
    with no_autocast(x):
        sums: Tensor = backend.centroid_sums(x, indices, factor, valid, num_experts).sum(0)
        return sums


@torch.library.custom_op("kmeans_route::centroid_sums", mutates_args=())
def _centroid_sums(
    x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int, backend: str
) -> Tensor:
    return _sums(x, indices, factor, valid, num_experts, backends.get(backend))


@_centroid_sums.register_fake
def _(x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int, backend: str) -> Tensor:
    return x.new_empty(num_experts, x.shape[1], dtype=compute_dtype(x.dtype))


def accumulate(
    x: Tensor,
    indices: Tensor,
    factor: Tensor | None,
    counted: Tensor,
    partials: Tensor | None,
    batch: Statistics,
    pending: PendingStatistics,
    backend: Any,
) -> None:
    """Add a batch to what is pending, in place; nothing while a backward pass runs.

    factor: (T,) of each token in the centroid sums; None for 1. counted: (T,) bool, the tokens that count. partials:
    the sums in parts (S, E, D); None: taken from x here.
    """
    _accumulate(x, indices, factor, counted, partials, *batch, *pending, backend.NAME)


def _accumulate_by_name(
    x: Tensor, indices: Tensor, factor: Tensor | None, counted: Tensor, partials: Tensor | None, *flat: Any
) -> None:
    if in_backward():
        return
    values = iter(flat)
    batch, pending = take(Statistics, values), take(PendingStatistics, values)
    with no_autocast(x):
        backends.get(next(values)).accumulate(x, indices, factor, counted, partials, batch, pending)


_PENDING = ", ".join(f"Tensor(a{i}!) {name}" for i, name in enumerate(PendingStatistics._fields))
_accumulate = torch.library.custom_op(
    "kmeans_route::accumulate",
    _accumulate_by_name,
    mutates_args=PendingStatistics._fields,
    schema=f"(Tensor x, Tensor indices, Tensor? factor, Tensor counted, Tensor? partials, "
    f"{arguments(Statistics, 'batch_')}, {_PENDING}, str backend) -> ()",
)


@_accumulate.register_fake
def _(*_args: Any, **_kwargs: Any) -> None:
    return None


@torch.library.custom_op("kmeans_route::reservoir", mutates_args=("hashes", "rows"))
def reservoir(x: Tensor, inv_norm: Tensor, valid: Tensor, seed: int, hashes: Tensor, rows: Tensor) -> None:
    """Keep the tokens of smallest hash; nothing while a backward pass runs."""
    if not in_backward():
        with no_autocast(x):
            keep_smallest_hashes_(x, inv_norm, valid, seed, hashes, rows)


@torch.library.custom_op("kmeans_route::count_pairs", mutates_args=("pairs",))
def count_pairs(indices: Tensor, counted: Tensor, pairs: Tensor) -> None:
    """Add to pairs (E, E) fp32 how many of the first tokens chose both of two experts; nothing in a backward pass.

    An (E, E) product over at most `PAIRS_FROM` tokens: sums of ones, so exact in any order.
    """
    if in_backward():
        return
    some = slice(0, PAIRS_FROM)
    experts = torch.arange(pairs.shape[0], device=pairs.device)
    chosen = ((indices[some, :, None] == experts).any(1) & counted[some, None]).to(pairs.dtype)
    with no_autocast(pairs):
        pairs.addmm_(chosen.T, chosen)


@count_pairs.register_fake
def _(*_args: Any, **_kwargs: Any) -> None:
    return None


@reservoir.register_fake
def _(*_args: Any, **_kwargs: Any) -> None:
    return None
