"""The commit of a K-Means router and what stands in its place for a learned one: steps and their checks.

Legend: D hidden size, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.harness.truth import assert_close_to_truth
from kmeans_route import KMeansRouter
from kmeans_route.bench.contest import Contestant
from kmeans_route.bench.problem import Problem
from kmeans_route.reference import State, commit_reference, whitened_reference
from kmeans_route.routing.pending import Pending

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


class Gathered(NamedTuple):
    """A router that has gathered, and copies of the state and of the pending statistics that its commit starts from."""

    router: KMeansRouter
    state: State
    pending: dict[str, torch.Tensor]

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """Of `commit_reference`, floating point in `dtype`."""
        floating = (None if each is None or not each.is_floating_point() else each.to(dtype) for each in self.state)
        state = State(*(old if new is None else new for old, new in zip(self.state, floating, strict=True)))
        sums, std_sum = (self.pending[field].to(dtype) for field in ("sums", "std_sum"))
        counts, num_tokens = self.pending["counts"], self.pending["num_tokens"]
        return state, sums, counts, std_sum, num_tokens, None, self.router.commit_options

    def restore(self) -> None:
        """Put the pending statistics back; the state goes on from where it is."""
        for field, value in self.pending.items():
            getattr(self.router.pending, field).copy_(value)


def gathered(router: KMeansRouter) -> Gathered:
    """A router as it is now."""
    return Gathered(router, state_of(router), {f: getattr(router.pending, f).clone() for f in Pending.FIELDS})


def state_of(router: KMeansRouter) -> State:
    """A copy of what a commit writes."""
    held = (getattr(router, name) for name in State._fields)
    return State(*(None if each is None else each.clone() for each in held))


def commit_step(name: str, given: Gathered) -> Contestant:
    """The router's commit of the same statistics each time."""
    return Contestant(name, given.router.commit, given.restore)


def make_adamw(problem: Problem, *, fused: bool) -> torch.optim.AdamW:
    """PyTorch's optimizer for the (E, D) weight of a learned router, with a gradient of the weight's size."""
    weight = problem.weight.clone().requires_grad_()
    weight.grad = problem.weight.roll(1, 0).clone()
    return torch.optim.AdamW([weight], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)


def check_commit(name: str, commit: Callable[[], State], given: Gathered) -> None:
    """The state that `commit` leaves, against the definition in fp64."""
    got = commit()
    truth, plain = (commit_reference(*given.arguments(dtype)) for dtype in (torch.float64, torch.float32))
    for field, value, exact, yardstick in zip(State._fields, got, truth, plain, strict=True):
        if value is None or exact is None or yardstick is None:
            assert value is exact, f"{name}: {field} must be {exact}"
        elif value.is_floating_point():
            assert_close_to_truth(value, exact, yardstick, name=f"{name}: {field}")
        else:
            assert torch.equal(value, exact), f"{name}: {field} is {value}, expected {exact}"


def package_commit(given: Gathered) -> State:
    """The state after the router's own commit."""
    given.restore()
    given.router.commit()
    return state_of(given.router)


def check_whitened(name: str, given: Gathered) -> None:
    """The directions after a commit, against the definition in fp64."""
    new = package_commit(given)
    error = float((new.weight - whitened_reference(new.centroids.double(), new.weight.double())).abs().max())
    assert error <= 1e-4, f"{name}: a direction is off by {error:.3e}"


def check_adamw(name: str, optimizer: torch.optim.AdamW) -> None:
    """A first step: w (1 - lr decay) - lr g / (|g| + eps), in fp64."""
    (group,) = optimizer.param_groups
    (weight,) = group["params"]
    w, g = weight.detach().double(), weight.grad.double()
    optimizer.step()
    truth = w * (1 - LEARNING_RATE * WEIGHT_DECAY) - LEARNING_RATE * g / (g.abs() + group["eps"])
    error = float((weight.detach().double() - truth).abs().max())
    assert error <= 1e-6, f"{name}: the weight is off by {error:.3e}"
