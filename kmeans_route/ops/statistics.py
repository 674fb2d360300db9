"""What a training forward leaves for the commit: centroid sums, loads, spread, margins, moments for the first."""

from typing import Any

import torch
from torch import Tensor

from kmeans_route import backends
from kmeans_route.backends.first import add_moments_
from kmeans_route.ops.schema import arguments, direct, in_backward, no_autocast, take
from kmeans_route.reference import compute_dtype
from kmeans_route.types import PendingStatistics, Statistics


def centroid_sums(
    x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int, backend: Any
) -> Tensor:
    """(E, D): sums of factor_t x_t over valid tokens, or of x_t without a factor."""
    call = _centroid_sums_body if backend.PLAIN else _centroid_sums_call
    sums: Tensor = call(x, indices, factor, valid, num_experts, backend.NAME)
    return sums


def _centroid_sums_body(
    x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int, backend: str
) -> Tensor:
    with no_autocast(x):
        sums: Tensor = backends.get(backend).centroid_sums(x, indices, factor, valid, num_experts).sum(0)
        return sums


_centroid_sums = torch.library.custom_op("kmeans_route::centroid_sums", _centroid_sums_body, mutates_args=())
_centroid_sums_call = direct(_centroid_sums, _centroid_sums_body)


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
    pairs: Tensor | None,
    backend: Any,
) -> None:
    """Add a batch to what is pending, in place; nothing while a backward pass runs.

    factor: (T,) of each token in the centroid sums; None for 1. counted: (T,) bool, the tokens that count. partials:
    the sums in parts (S, E, D); None: taken from x here. pairs: (E, E) fp32, where to count who was chosen with whom.
    """
    _accumulate_call(x, indices, factor, counted, partials, batch, pending, pairs, backend)


def _accumulate_body(x: Tensor, *rest: Any) -> None:
    if not in_backward():
        with no_autocast(x):
            rest[-1].accumulate(x, *rest[:-1])


def _accumulate_by_name(*flat: Any) -> None:
    values = iter(flat[5:])
    batch, pending = take(Statistics, values), take(PendingStatistics, values)
    pairs, name = values
    _accumulate_body(*flat[:5], batch, pending, pairs, backends.get(name))


_PENDING = ", ".join(f"Tensor(a{i}!) {name}" for i, name in enumerate(PendingStatistics._fields))
_accumulate = torch.library.custom_op(
    "kmeans_route::accumulate",
    _accumulate_by_name,
    mutates_args=(*PendingStatistics._fields, "pairs"),
    schema=f"(Tensor x, Tensor indices, Tensor? factor, Tensor counted, Tensor? partials, "
    f"{arguments(Statistics, 'batch_')}, {_PENDING}, Tensor(p!)? pairs, str backend) -> ()",
)


def _accumulate_operator(*given: Any) -> None:
    """Its inputs may require a gradient, for which the operator has no derivative."""
    *tensors, batch, pending, pairs, backend = given
    detached = (each if each is None else each.detach() for each in (*tensors, *batch))
    _accumulate(*detached, *pending, pairs, backend.NAME)


_accumulate_call = direct(_accumulate_operator, _accumulate_body)


@_accumulate.register_fake
def _(*_args: Any, **_kwargs: Any) -> None:
    return None


def _moments_body(x: Tensor, factor: Tensor, counted: Tensor, directions: Tensor, moments: Tensor) -> None:
    """Add what the first centroids are drawn from; nothing while a backward pass runs."""
    if not in_backward():
        with no_autocast(x):
            add_moments_(x, factor, counted, directions, moments)


_moments = torch.library.custom_op("kmeans_route::first_moments", _moments_body, mutates_args=("moments",))
first_moments = direct(_moments, _moments_body)


@_moments.register_fake
def _(*_args: Any, **_kwargs: Any) -> None:
    return None
