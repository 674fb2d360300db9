"""Checks in seconds that routing on this machine agrees with its fp64 definition, and that bad input stays out.

Under TRITON_INTERPRET=1 the Triton kernels too are checked, at tiny shapes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kmeans_route
from kmeans_route import Routing
from kmeans_route.backends import INTERPRETED
from kmeans_route.bench.problem import Problem
from kmeans_route.cli.output import Output
from kmeans_route.testing import BenchShape, make_hidden_states

NEAR_TIE = 1e-5
"""Two scores closer than this, in fp64, may be ranked either way by a narrower dtype."""


class Case(NamedTuple):
    """One routing problem: its shape, and the options of `route`; `masked` leaves out every third token."""

    shape: BenchShape
    dtype: torch.dtype
    options: dict[str, Any]
    masked: bool = False

    @property
    def name(self) -> str:
        """E.g. "T255 D64 E60 K4 bfloat16 gate=sigmoid, masked"."""
        sizes = " ".join(f"{letter}{size}" for letter, size in zip("TDEK", self.shape, strict=True))
        words = [f"{key}={value}" for key, value in self.options.items()] + ["masked"] * self.masked
        return f"{sizes} {str(self.dtype).removeprefix('torch.')} {', '.join(words)}".rstrip()

    @property
    def mask(self) -> Tensor | None:
        """(T,) bool, or None."""
        return torch.arange(self.shape.num_tokens) % 3 > 0 if self.masked else None

    def problem(self) -> Problem:
        """The inputs, equal at each call: a bias too, and a gradient of the gates."""
        bias = 0.05 * make_hidden_states(1, self.shape.num_experts, seed=3)[0]
        return Problem(self.shape, self.dtype, bias=bias)


CASES = (
    Case(BenchShape(1, 7, 3, 1), torch.float32, {}),
    Case(BenchShape(63, 48, 16, 2), torch.float32, {"gate": "sigmoid"}, masked=True),
    Case(BenchShape(255, 64, 60, 4), torch.float32, {"gate": "cosine", "scaling": 2.5}),
    Case(BenchShape(255, 64, 64, 6), torch.float32, {"n_group": 8, "topk_group": 4}),
    Case(BenchShape(1000, 128, 64, 8), torch.bfloat16, {}),
    Case(BenchShape(1000, 128, 64, 8), torch.float16, {"normalize": False}, masked=True),
    Case(BenchShape(63, 33, 5, 5), torch.float64, {"gate": "uniform"}),
)


KERNEL_CASES = (
    Case(BenchShape(1, 7, 3, 1), torch.float32, {}),
    Case(BenchShape(15, 48, 16, 2), torch.float32, {"gate": "sigmoid"}, masked=True),
    Case(BenchShape(17, 32, 12, 4), torch.float16, {"n_group": 4, "topk_group": 2}),
)
"""So small that Triton's interpreter takes seconds. It has no bf16 of its own, and the kernels take no fp64."""


def route_with(case: Case, problem: Problem, backend: str, *, wide: bool = False) -> tuple[Routing, Tensor]:
    """The routing with all scores, and the gradient (T, D) in x; `wide` in fp64, from the same rounded inputs."""
    dtype = torch.float64 if wide else case.dtype
    x, directions = problem.x.detach().to(dtype, copy=True).requires_grad_(), problem.directions.to(dtype)
    options: dict[str, Any] = {"mask": case.mask, "directions": directions, "return_scores": True, **case.options}
    routing = kmeans_route.route(x, directions, case.shape.top_k, problem.bias, backend=backend, **options)
    if not routing.weights.requires_grad:
        return routing, torch.zeros_like(x)
    return routing, torch.autograd.grad(routing.weights, x, problem.d_weights.to(routing.weights.dtype))[0]


def check_route(case: Case, backend: str = "torch") -> str:
    """Ids equal those of the fp64 reference outside near-ties; gates and gradients are no further from it than the
    reference in the same dtype, plus a rounding allowance."""
    problem = case.problem()
    truth, true_gradient = route_with(case, problem, "reference", wide=True)
    twin, twin_gradient = route_with(case, problem, "reference")
    fast, fast_gradient = route_with(case, problem, backend)
    _expect(torch.equal(fast.valid, truth.valid), "the valid tokens differ")
    assert truth.scores is not None
    ranking = truth.scores + problem.bias.double()
    away = (ranking.gather(1, fast.indices) - ranking.gather(1, truth.indices)).abs() > NEAR_TIE
    _expect(not bool(away.any()), f"{int(away.any(1).sum())} rows chose other experts")
    total = int(fast.tokens_per_expert.sum())
    _expect(total == case.shape.top_k * int(truth.valid.sum()), f"the counts sum to {total}")
    same = (fast.indices == truth.indices).all(1) & (twin.indices == truth.indices).all(1)
    gap = _no_worse("gates", fast.weights[same], twin.weights[same], truth.weights[same], torch.float32)
    _no_worse("gradients", fast_gradient[same], twin_gradient[same], true_gradient[same], case.dtype)
    return f"{int((~same).sum())} near-ties, gates within {gap:.1e}"


def check_ties(backend: str = "torch") -> str:
    """Equal scores go to the lower expert ids, whatever the rows hold."""
    x = torch.ones(5, 8)
    weight = torch.ones(64, 8)
    indices = kmeans_route.route(x, weight, 4, backend=backend).indices
    _expect(indices.eq(torch.arange(4)).all().item() is True, f"64 equal experts gave {indices[0].tolist()}")
    return "64 equal experts give ids 0 to 3"


def check_dispatch(case: Case = CASES[1], backend: str = "torch") -> str:
    """Rows come out grouped by expert and combine to the weighted sum; what lies past the end is never read."""
    problem = case.problem()
    routing, x = route_with(case, problem, backend)[0], problem.x.detach()
    routing = routing._replace(weights=routing.weights.detach())
    dispatch = kmeans_route.dispatch(x, routing, backend=backend)
    end = int(dispatch.offsets[-1])
    _expect(torch.equal(dispatch.offsets.diff().long(), routing.tokens_per_expert), "offsets disagree with the counts")
    _expect(torch.equal(dispatch.x_sorted[:end], x[dispatch.token_of_row[:end]]), "a row holds another token")
    y_sorted = dispatch.x_sorted.clone()
    y_sorted[end:] = math.nan
    y = kmeans_route.combine(y_sorted, routing, dispatch, backend=backend)
    expected = x * routing.weights.sum(1, keepdim=True)
    error = float((y - expected).abs().max())
    _expect(error < 1e-5, f"identity experts gave an error of {error:.1e}")
    return f"identity experts within {error:.1e}"


def check_commit(backend: str = "torch", num_tokens: int = 512) -> str:
    """The second commit sets each centroid to the mean direction of the tokens that chose it."""
    router = kmeans_route.KMeansRouter(32, 8, 2, seed=3, backend=backend)
    router.commit()  # with nothing pending: it says that this router is committed by hand
    x = make_hidden_states(num_tokens, 32, seed=1)
    router.initialize(x)
    routing = router.route(x, gather=True)
    counts = routing.tokens_per_expert
    units = (x.double() / x.double().norm(dim=1, keepdim=True)).repeat_interleave(2, 0)
    sums = torch.zeros(8, 32, dtype=torch.float64).index_add_(0, routing.indices.flatten(), units)
    router.commit()
    used = counts > 0
    error = float((router.centroids.double() - sums / counts[:, None].clamp(min=1))[used].abs().max())
    _expect(error < 1e-5, f"centroids are off by {error:.1e}")
    heavier = counts > counts.double().mean()
    falls = router.expert_bias[heavier].max() < router.expert_bias[~heavier].min()
    _expect(bool(falls), "the bias of a busy expert did not fall below an idle one's")
    return f"centroids within {error:.1e} of the mean"


def check_not_a_number() -> str:
    """A NaN token leaves the same state, bit for bit, as the same token masked out."""
    x = make_hidden_states(256, 32, seed=2)
    x[17] = math.nan
    mask = torch.arange(256) != 17
    states = []
    for given in (None, mask):
        router = kmeans_route.KMeansRouter(32, 8, 2)
        router.commit()
        for _ in range(3):
            router(x, mask=given)
            router.commit()
        states.append(router)
    first, second = states
    _expect(bool(first.weight.isfinite().all() & first.centroids.isfinite().all()), "NaN reached the centroids")
    for name in ("weight", "centroids", "expert_bias", "score_std"):
        _expect(torch.equal(first.get_buffer(name), second.get_buffer(name)), f"{name} was changed by the NaN token")
    _expect(int(first.dropped_total) == 3, f"dropped_total is {int(first.dropped_total)}, expected 3")
    return "3 NaN tokens dropped and counted, state unchanged"


def check_layer() -> str:
    """Every router's layer trains: its output and gradients are finite and its loss falls."""
    falls = []
    for kind in ("kmeans", "softmax", "sigmoid"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = kmeans_route.MoE(16, 32, 8, 2, kind)
            x, target = torch.randn(2, 128, 16)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        kmeans_route.attach(layer, optimizer)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(layer(x), target)
            torch.autograd.backward(loss + layer.aux_loss)
            optimizer.step()
            losses.append(loss.item())
        _expect(losses[-1] < 0.9 * losses[0], f"{kind}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
        falls.append(f"{kind} {losses[0]:.2f} to {losses[-1]:.2f}")
    return ", ".join(falls)


def _expect(condition: bool, problem: str) -> None:
    """Unlike assert, this also runs under python -O."""
    if not condition:
        raise AssertionError(problem)


def _no_worse(what: str, value: Tensor, twin: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The largest error of `value`, which must not exceed that of `twin` by more than rounding in `dtype`."""
    truth = truth.detach()
    if not truth.numel():
        return 0.0
    scale = max(1.0, float(truth.abs().max()))
    error, allowed = (float((tensor.detach().double() - truth).abs().max()) for tensor in (value, twin))
    allowed += 16 * torch.finfo(dtype).eps * scale
    _expect(error <= allowed, f"{what} are off by {error:.1e}, allowed {allowed:.1e}")
    return error


def all_checks() -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check); a check returns what it found and raises when it does not hold."""
    for case in CASES:
        yield f"route {case.name}", partial(check_route, case)
    yield "ties go to the lower id", check_ties
    yield "dispatch and combine", check_dispatch
    yield "commit", check_commit
    yield "NaN stays out of the state", check_not_a_number
    yield "layers train", check_layer
    if INTERPRETED:
        for case in KERNEL_CASES:
            yield f"kernels: route {case.name}", partial(check_route, case, "triton")
        yield "kernels: ties", partial(check_ties, "triton")
        yield "kernels: dispatch and combine", partial(check_dispatch, KERNEL_CASES[1], "triton")
        yield "kernels: commit", partial(check_commit, "triton", num_tokens=64)


def selftest(output: Output) -> int:
    """Run every check and print the table. Returns: the exit code, 1 when a check failed."""
    results = []
    for name, check in all_checks():
        start = time.perf_counter()
        try:
            passed, detail = True, check()
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
        time_ms = (time.perf_counter() - start) * 1e3
        results.append({"name": name, "passed": passed, "detail": detail, "time_ms": time_ms})
    failed = [result for result in results if not result["passed"]]
    rows = [[str(r["name"]), "pass" if r["passed"] else "FAIL"] for r in results]
    kernels = ", kernels in Triton's interpreter" if INTERPRETED else ""
    output.table(f"selftest of backend 'torch' on the CPU{kernels}", ["check", "result"], rows, numbers=False)
    for result in failed:
        output.note(f"{result['name']}: {result['detail']}")
    output.note(f"{len(results) - len(failed)} of {len(results)} checks passed")
    output.document({"command": "selftest", "passed": not failed, "checks": results})
    return 1 if failed else 0
