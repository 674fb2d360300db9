"""What must hold before a time is taken: each contestant against fp64, with plain fp32 PyTorch as the yardstick."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import rivals
from benchmarks.harness.steps import Exchange, ExchangeFunction, Sorted, SortedFunction, clear
from benchmarks.harness.truth import assert_close_to_truth
from kmeans_route import KMeansRouter, MoE, centroid_sums, directions, route
from kmeans_route.bench import baselines
from kmeans_route.bench.problem import Problem
from kmeans_route.checks import check_route_options
from kmeans_route.reference import candidates_reference
from kmeans_route.testing import assert_same_selection

# Rows in which two fp32 implementations may choose differently: near-ties grow with E, K and the logits' scale.
NEAR_TIE_CAP = 1e-3


def check_learned(name: str, function: baselines.LearnedFunction, problem: Problem) -> None:
    """Ids, gates, loss and both gradients of a learned router against its definition, term by term in fp64."""
    x, weight = problem.x, problem.weight.clone().requires_grad_()
    got = function(x, weight, problem.shape.top_k)
    rivals.learned_backward(got, problem.d_gates)
    assert x.grad is not None
    assert weight.grad is not None
    ours = {"weights": got.weights.detach(), "dx": x.grad, "d weight": weight.grad}
    if got.aux_loss is not None:
        ours["auxiliary loss"] = got.aux_loss.detach()
    clear(x)

    logits = x.detach().double() @ problem.weight.double().T
    by_value = logits.gather(1, got.indices).argsort(dim=1, descending=True, stable=True)
    tolerance = 2e-7 * float(logits.abs().max())  # logits are no cosines: their rounding grows with them
    assert_same_selection(got.indices.gather(1, by_value), logits, tolerance=tolerance, cap=NEAR_TIE_CAP)
    truth, plain = (naive_learned(problem, got, dtype) for dtype in (torch.float64, torch.float32))
    for what, value in ours.items():
        assert_close_to_truth(value, truth[what], plain[what], name=f"{name}: {what}")


def naive_learned(problem: Problem, got: baselines.LearnedResult, dtype: torch.dtype) -> dict[str, Tensor]:
    """The learned router's definition for given ids, by plain autograd."""
    x = problem.x.detach().to(dtype).requires_grad_()
    weight = problem.weight.detach().to(dtype).requires_grad_()
    probabilities = torch.softmax(x @ weight.T, dim=1)
    selected = probabilities.gather(1, got.indices)
    weights = selected / selected.sum(1, keepdim=True)
    num_experts = problem.shape.num_experts
    f = F.one_hot(got.indices, num_experts).sum((0, 1)).to(dtype) / got.indices.numel()
    loss = baselines.AUX_LOSS_COEF * num_experts * (f * probabilities.mean(0)).sum()
    objective = (weights * problem.d_gates.to(dtype)).sum()
    if got.aux_loss is not None:
        objective = objective + loss
    dx, dw = torch.autograd.grad(objective, [x, weight])
    return {"weights": weights.detach(), "dx": dx, "d weight": dw, "auxiliary loss": loss.detach()}


def check_kmeans(router: KMeansRouter, problem: Problem) -> None:
    """Ids, gates, gradient, sums and counts of one training step against the reference in fp64."""
    x, top_k, bias = problem.x, problem.shape.top_k, router.expert_bias
    pending = router.pending
    pending.clear_()
    got = router(x)  # as it is timed
    torch.autograd.backward(got.weights, problem.d_weights)
    assert x.grad is not None
    dx = x.grad
    clear(x)

    d = directions(router.weight, x.dtype)
    unit = d.double()
    x_64, tau = x.detach().double().requires_grad_(), router.options.tau
    free = route(x_64.detach(), unit, top_k, bias, directions=unit, return_scores=True, backend="reference")
    assert free.scores is not None
    assert_same_selection(got.indices, free.scores + bias, cap=NEAR_TIE_CAP)
    truth = route(x_64, unit, top_k, bias, tau=tau, directions=unit, indices=got.indices, backend="reference")
    (dx_64,) = torch.autograd.grad(truth.weights, x_64, problem.d_weights.double())
    x_32 = x.detach().requires_grad_()
    unit_rows = F.normalize(x_32, dim=1)
    plain = ((unit_rows @ d.T).gather(1, got.indices) / tau).softmax(1)
    (dx_32,) = torch.autograd.grad(plain, x_32, problem.d_weights)
    # One rounding of a score changes a gate by up to 1 / (4 tau) as much, and the gradient by 1 / tau.
    rounding = torch.finfo(x.dtype).eps / tau
    assert_close_to_truth(
        got.weights.detach(), truth.weights.detach(), plain.detach(), tolerance=rounding / 4, name="weights"
    )
    assert_close_to_truth(dx, dx_64, dx_32, tolerance=rounding * float(dx_64.abs().max()), name="dx")

    sums_64, counts = centroid_sums(x_64.detach(), truth, backend="reference")
    member = F.one_hot(got.indices, problem.shape.num_experts).sum(1).float()
    assert_close_to_truth(pending.sums, sums_64, member.T @ unit_rows.detach(), name="centroid sums")
    assert torch.equal(pending.counts, counts)
    assert int(pending.num_tokens) == problem.shape.num_tokens


def check_routed(
    name: str, weights: Tensor, indices: Tensor, ranking: Tensor, temperature: float, plain: Tensor
) -> None:
    """Ids (T, K), in any order, of the largest of `ranking`, near-ties aside; gates by softmax over the chosen.

    Args:
        name: what messages call it.
        weights, indices: (T, K), what is checked.
        ranking: (T, E) fp64, cosines or logits.
        temperature: what the chosen ones are divided by before the softmax.
        plain: (T, E), the same scores by plain PyTorch in the dtype of the contestants, whose error is the measure of
            a near-tie. In 16 bits most rows are one; there, too, no place may lose more.
    """
    eps = torch.finfo(plain.dtype).eps
    tolerance = max(1e-7, eps * float(ranking.abs().max()), float((plain.double() - ranking).abs().max())) * 2
    by_value = ranking.gather(1, indices).argsort(dim=1, descending=True, stable=True)
    ids, gates = indices.gather(1, by_value), weights.gather(1, by_value).double()
    assert_same_selection(ids, ranking, tolerance=tolerance, cap=NEAR_TIE_CAP if eps < 1e-6 else 1.0)
    truth = (ranking.gather(1, ids) / temperature).softmax(1)
    error, allowed = float((gates - truth).abs().max()), 2 * eps + tolerance / temperature
    assert error <= allowed, f"{name}: gates are off by {error:.3e}, allowed {allowed:.3e}"


def check_sigmoid(name: str, function: baselines.LearnedFunction, problem: Problem, groups: tuple[int, int]) -> None:
    """Ids, gates and both gradients of a sigmoid router, limited to (n_group, topk_group), against fp64."""
    x, weight, top_k = problem.x, problem.weight.clone().requires_grad_(), problem.shape.top_k
    got = function(x, weight, top_k)
    rivals.learned_backward(got, problem.d_gates.to(got.weights.dtype))
    assert x.grad is not None
    assert weight.grad is not None
    ours = {"weights": got.weights.detach(), "dx": x.grad, "d weight": weight.grad}
    clear(x)
    options = check_route_options(problem.shape.num_experts, top_k, n_group=groups[0], topk_group=groups[1])

    def definition(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = [t.detach().to(dtype if dtype == torch.float64 else t.dtype).requires_grad_() for t in (x, weight)]
        scores = (leaves[0].to(dtype) @ leaves[1].to(dtype).T).sigmoid()
        selected = scores.gather(1, got.indices)
        gates = selected / selected.sum(1, keepdim=True)
        dx, dw = torch.autograd.grad(gates, leaves, problem.d_gates.to(dtype))
        return scores.detach(), {"weights": gates.detach(), "dx": dx, "d weight": dw}

    scores, truth = definition(torch.float64)
    plain = definition(torch.float32)[1]
    ranking = scores.masked_fill(~candidates_reference(scores, options), -torch.inf)
    by_value = ranking.gather(1, got.indices).argsort(dim=1, descending=True, stable=True)
    assert_same_selection(got.indices.gather(1, by_value), ranking, cap=NEAR_TIE_CAP)
    for what, value in ours.items():
        assert_close_to_truth(value, truth[what], plain[what], name=f"{name}: {what}")


def check_textbook(router: KMeansRouter, problem: Problem) -> None:
    """The textbook router, given the same centroids, has the same ids and gates, near-ties aside."""
    textbook = baselines.TextbookKMeansRouter(router.weight.clone(), problem.shape.top_k)
    weights, indices = textbook(problem.x.detach(), update=False)
    ours = router.route(problem.x.detach())
    same = (indices == ours.indices).all(1)
    assert float((~same).float().mean()) <= NEAR_TIE_CAP
    torch.testing.assert_close(weights[same], ours.weights[same], atol=1e-4, rtol=1e-4)


def check_exchange(name: str, function: Callable[[Exchange], Tensor], exchange: Exchange) -> None:
    """With identity experts, y_t = x_t sum over k of g_tk: value and both gradients, against that in fp64."""
    x, weights = exchange.x, exchange.routing.weights
    y = function(exchange)
    torch.autograd.backward(y, exchange.dy)
    assert x.grad is not None
    assert weights.grad is not None
    ours = [y.detach(), x.grad, weights.grad]
    clear(x, weights)
    truth: list[Tensor] = []
    plain: list[Tensor] = []
    for dtype, results in ((torch.float64, truth), (torch.float32, plain)):
        rows, gates, dy = x.detach().to(dtype), weights.detach().to(dtype), exchange.dy.to(dtype)
        total = gates.sum(1, keepdim=True)
        results += [rows * total, dy * total, torch.bmm(rows[:, None], dy[:, :, None])[:, 0].expand_as(gates)]
    for what, value, exact, yardstick in zip(("y", "dx", "d weights"), ours, truth, plain, strict=True):
        # K products are summed one after the other where the yardstick multiplies by their sum.
        tolerance = gates.shape[1] * torch.finfo(value.dtype).eps * float(exact.abs().max())
        assert_close_to_truth(value, exact, yardstick, tolerance=tolerance, name=f"{name}: {what}")


def check_dispatch(name: str, function: ExchangeFunction, exchange: Exchange, d_sorted: Tensor) -> None:
    """The copies bit for bit, and dx, the sum of its K rows of d_sorted (T*K, D), against fp64."""
    x, indices = exchange.x, exchange.routing.indices
    x_sorted = function(exchange)
    torch.autograd.backward(x_sorted, d_sorted)
    assert x.grad is not None
    dx = x.grad
    clear(x)
    expected, order = rivals.index_dispatch(x.detach(), indices)
    assert torch.equal(x_sorted, expected), f"{name}: the copies are not those of the tokens in expert order"
    rows = torch.empty_like(d_sorted).index_copy_(0, order, d_sorted).view(*indices.shape, -1)
    truth, plain = rows.double().sum(1), rows.sum(1)
    # K rows may be added one after the other, each sum rounded.
    tolerance = indices.shape[1] * torch.finfo(dx.dtype).eps * float(truth.abs().max())
    assert_close_to_truth(dx, truth, plain, tolerance=tolerance, name=f"{name}: dx")


def check_combine(name: str, function: SortedFunction, given: Sorted) -> None:
    """y, d y_sorted and d weights of combine against fp64, from the rows in token order."""
    y_sorted, weights, dy = given.y_sorted, given.routing.weights, given.dy
    y = function(given)
    torch.autograd.backward(y, dy)
    assert y_sorted.grad is not None
    assert weights.grad is not None
    ours = {"y": y.detach(), "d y_sorted": y_sorted.grad, "d weights": weights.grad}
    clear(y_sorted, weights)

    def definition(dtype: torch.dtype) -> dict[str, Tensor]:
        gates = weights.detach().to(dtype)
        rows = torch.empty_like(y_sorted, dtype=dtype).index_copy_(0, given.order, y_sorted.detach().to(dtype))
        rows = rows.view(*gates.shape, -1)
        d_rows = (gates[..., None] * dy.to(dtype)[:, None]).flatten(0, 1)
        return {
            "y": torch.bmm(gates[:, None], rows)[:, 0],
            "d y_sorted": d_rows[given.order],
            "d weights": torch.bmm(rows, dy.to(dtype)[..., None])[..., 0],
        }

    truth, plain = definition(torch.float64), definition(y_sorted.dtype)
    for what, value in ours.items():
        tolerance = weights.shape[1] * torch.finfo(y_sorted.dtype).eps * float(truth[what].abs().max())
        assert_close_to_truth(
            value, truth[what], plain[what].to(value.dtype), tolerance=tolerance, name=f"{name}: {what}"
        )


def check_moe(layer: MoE, x: Tensor) -> None:
    """The layer's output against one expert after another, from the layer's own routing."""
    details = layer.details(x)
    routing = details.routing
    truth, plain = (one_expert_after_another(layer.experts, routing.indices, routing.weights, x.to(dtype).detach())
                    for dtype in (torch.float64, torch.float32))  # fmt: skip
    assert_close_to_truth(details.y, truth, plain, name="y")


@torch.no_grad()
def one_expert_after_another(experts: Any, indices: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """(T, D) in the dtype of x (T, D). experts: has gate_up (E, 2I, D) and down (E, D, I). indices, weights: (T, K)."""
    y = torch.zeros_like(x)
    for gate_up, down, expert in zip(experts.gate_up, experts.down, range(len(experts.down)), strict=True):
        gate, up = (x @ gate_up.to(x.dtype).T).chunk(2, dim=1)
        g = torch.where(indices == expert, weights, 0.0).sum(1, keepdim=True).to(x.dtype)
        y += g * ((F.silu(gate) * up) @ down.to(x.dtype).T)
    return y


def check_layer(name: str, function: Callable[[Tensor, Tensor], Tensor], layer: MoE, x: Tensor, dy: Tensor) -> None:
    """A softmax mixture that shares the experts of `layer`: y against one expert after another, dx against `layer`'s.

    function: of x (T, D) and the router's weight (E, D), which it takes from `layer`. The auxiliary loss is left out.
    """
    router = layer.router
    weight = router.weight.detach()
    y = function(x, weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    routing = router.route(x.detach())
    truth, plain = (one_expert_after_another(layer.experts, routing.indices, routing.weights, x.to(dtype).detach())
                    for dtype in (torch.float64, torch.float32))  # fmt: skip
    assert_close_to_truth(y.detach(), truth, plain, tolerance=1e-5 * float(truth.abs().max()), name=f"{name}: y")
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    error, allowed = float((dx - expected).abs().max()), 1e-4 * float(expected.abs().max())
    assert error <= allowed, f"{name}: dx differs by {error:.3e}, allowed {allowed:.3e}"
