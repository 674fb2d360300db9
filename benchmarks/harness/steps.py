"""The steps that are timed. Every maker returns a contestant; `checks.py` decides whether it may run.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import rivals
from kmeans_route import Dispatch, KMeansRouter, MoE, Routing, combine, dispatch, route
from kmeans_route.bench.baselines import LearnedFunction, TextbookKMeansRouter
from kmeans_route.bench.contest import Contestant
from kmeans_route.bench.problem import Problem
from kmeans_route.testing import make_hidden_states


def first_tokens(problem: Problem, num_tokens: int) -> Problem:
    """The same problem with at most that many tokens; x is a leaf again."""
    x, d_weights = problem.x.detach()[:num_tokens], problem.d_weights[:num_tokens]
    return Problem(problem.shape._replace(num_tokens=len(x)), x.dtype, x=x, d_weights=d_weights)


def make_kmeans_router(problem: Problem, **options: Any) -> KMeansRouter:
    """A router in training, backend "torch", whose centroids come from the data; the paper's unless told otherwise."""
    shape = problem.shape
    options = {"directions": "centroids", "backend": "torch", **options}
    router = KMeansRouter(shape.hidden_size, shape.num_experts, shape.top_k, **options)
    router.initialize(problem.x.detach())
    router.commit()  # nothing is pending: it tells the router that commits come by hand, so it does not warn
    assert bool(router.initialized)
    return router.train()


def make_reference_router(router: KMeansRouter) -> KMeansRouter:
    """A copy of `router` on the backend "reference", the definition in plain PyTorch, with nothing pending."""
    reference = copy.deepcopy(router)
    reference.backend = "reference"
    reference.pending.clear_()
    reference.commit()
    return reference


def reference_route(x: Tensor, router: KMeansRouter, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and ids (T, K) by the definition, with the router's directions (E, D) given, as its own cache has them."""
    top_k, tau = router.options.top_k, router.options.tau
    routing = route(x, router.weight, top_k, router.expert_bias, tau=tau, directions=unit, backend="reference")
    return routing.weights, routing.indices


def kmeans_step(problem: Problem, router: KMeansRouter, name: str = "kmeans_route") -> Contestant:
    """Forward, backward, and statistics added to pending; no commit."""

    def step() -> None:
        torch.autograd.backward(router(problem.x).weights, problem.d_weights)

    return Contestant(name, step, lambda: clear(problem.x))


def commit_step(problem: Problem, name: str = "kmeans_route commit alone") -> Contestant:
    """What comes once per optimizer step beside the step above: fold pending into centroids and bias."""
    router = make_kmeans_router(problem)
    return Contestant(name, router.commit, lambda: router(problem.x))


def learned_step(name: str, function: LearnedFunction, problem: Problem) -> Contestant:
    """Forward and backward of a learned router; x and the weight get gradients."""
    weight = problem.weight.clone().requires_grad_()

    def step() -> None:
        rivals.learned_backward(function(problem.x, weight, problem.shape.top_k), problem.d_gates)

    return Contestant(name, step, lambda: clear(problem.x, weight))


def textbook_step(problem: Problem, router: KMeansRouter, name: str = "textbook K-Means") -> Contestant:
    """The textbook K-Means router from the same centroids, forward with its update, and backward."""
    textbook = TextbookKMeansRouter(router.weight.clone(), problem.shape.top_k)

    def step() -> None:
        torch.autograd.backward(textbook(problem.x)[0], problem.d_gates)

    return Contestant(name, step, lambda: clear(problem.x))


class Exchange(NamedTuple):
    """One routing for dispatch and combine: `routing` with leaf weights (T, K), and dy (T, D)."""

    x: Tensor
    routing: Routing
    dy: Tensor


ExchangeFunction = Callable[[Exchange], Tensor]


def package_exchange(exchange: Exchange) -> Tensor:
    """y of dispatch and combine of the package, identity experts between them."""
    sent = dispatch(exchange.x, exchange.routing)
    return combine(sent.x_sorted, exchange.routing, sent)


def plain_exchange(combine_function: rivals.CombineFunction) -> Callable[[Exchange], Tensor]:
    """The same in plain PyTorch, with one of the combines of `rivals.py`."""

    def exchanged(exchange: Exchange) -> Tensor:
        x_sorted, order = rivals.index_dispatch(exchange.x, exchange.routing.indices)
        return combine_function(x_sorted, exchange.routing.weights, order)

    return exchanged


def exchange_step(name: str, function: Callable[[Exchange], Tensor], exchange: Exchange) -> Contestant:
    """Forward and backward of dispatch and combine; x and the gate weights get gradients."""
    return Contestant(
        name,
        lambda: torch.autograd.backward(function(exchange), exchange.dy),
        lambda: clear(exchange.x, exchange.routing.weights),
    )


def package_dispatch(exchange: Exchange) -> Tensor:
    """x_sorted (T*K, D) of the package."""
    return dispatch(exchange.x, exchange.routing).x_sorted


def plain_dispatch(exchange: Exchange) -> Tensor:
    """The same in plain PyTorch."""
    return rivals.index_dispatch(exchange.x, exchange.routing.indices)[0]


def dispatch_step(
    name: str, function: Callable[[Exchange], Tensor], exchange: Exchange, d_sorted: Tensor
) -> Contestant:
    """Forward and backward of dispatch alone; x gets a gradient from d_sorted (T*K, D)."""
    return Contestant(name, lambda: torch.autograd.backward(function(exchange), d_sorted), lambda: clear(exchange.x))


class Sorted(NamedTuple):
    """Expert outputs for combine: y_sorted (T*K, D) and the routing's weights (T, K), both leaves, and dy (T, D).

    sent: the package's dispatch, its copies left out. order (T*K,): the sorting permutation of plain PyTorch.
    """

    y_sorted: Tensor
    routing: Routing
    sent: Dispatch
    order: Tensor
    dy: Tensor


def make_sorted(exchange: Exchange, seed: int = 4) -> Sorted:
    """Random expert outputs for the routing of `exchange`."""
    sent = dispatch(exchange.x.detach(), exchange.routing)
    order = rivals.index_dispatch(exchange.x.detach(), exchange.routing.indices)[1]
    y_sorted = make_hidden_states(sent.x_sorted.shape[0], exchange.x.shape[1], seed=seed, dtype=exchange.x.dtype)
    y_sorted.requires_grad_()
    return Sorted(y_sorted, exchange.routing, sent._replace(x_sorted=y_sorted.new_empty(0)), order, exchange.dy)


SortedFunction = Callable[[Sorted], Tensor]


def package_combine(given: Sorted) -> Tensor:
    """y (T, D) of the package."""
    return combine(given.y_sorted, given.routing, given.sent)


def plain_combine(combine_function: rivals.CombineFunction) -> SortedFunction:
    """The same in plain PyTorch; gates in the dtype of the expert outputs, as models have it."""

    def combined(given: Sorted) -> Tensor:
        return combine_function(given.y_sorted, given.routing.weights.to(given.y_sorted.dtype), given.order)

    return combined


def combine_step(name: str, function: SortedFunction, given: Sorted) -> Contestant:
    """Forward and backward of combine alone; expert outputs and gate weights get gradients."""
    return Contestant(
        name,
        lambda: torch.autograd.backward(function(given), given.dy),
        lambda: clear(given.y_sorted, given.routing.weights),
    )


def moe_step(name: str, layer: MoE, x: Tensor, dy: Tensor) -> Contestant:
    """Forward and backward of a whole layer, with its auxiliary loss where it has one."""
    parameters = list(layer.parameters())

    def step() -> None:
        y = layer(x)
        losses = [layer.aux_loss] if layer.aux_loss.requires_grad else []
        torch.autograd.backward([y, *losses], [dy, *[None] * len(losses)])

    return Contestant(name, step, lambda: clear(x, *parameters))


def layer_step(
    name: str, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, dy: Tensor, leaves: list[Tensor]
) -> Contestant:
    """Forward and backward of another package's layer, a function of x and the router's weight, the first leaf."""
    return Contestant(name, lambda: torch.autograd.backward(function(x, leaves[0]), dy), lambda: clear(x, *leaves))


def clear(*leaves: Tensor) -> None:
    """Drop the gradients, as an optimizer's zero_grad does."""
    for leaf in leaves:
        leaf.grad = None
