"""The peers that kmeans_route is measured against, in plain PyTorch.

The learned softmax router is fixed here: linear, softmax, top-k, renormalise by the sum; its auxiliary loss is that of
the Switch Transformer (arXiv 2101.03961, eq. 4) with bincount for f and the mean for P. It is written for speed:
top-k need not sort, nothing is computed twice, no temporary is kept beyond what autograd saves. Selecting among the
logits and taking the softmax over the K selected is the same function, and quicker where no loss needs all
probabilities; with the loss the two orders are level within the noise, so both run and the quicker one counts.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route.checks import DEFAULT_TAU

AUX_LOSS_COEF = 0.01


class LearnedResult(NamedTuple):
    """weights (T, K), indices (T, K), aux_loss () or None."""

    weights: Tensor
    indices: Tensor
    aux_loss: Tensor | None


LearnedFunction = Callable[[Tensor, Tensor, int], LearnedResult]
Compilable = TypeVar("Compilable", bound=Callable[..., object])
NOT_COMPILED = "left out by --no-compile"


def switch_loss(probabilities: Tensor, indices: Tensor) -> Tensor:
    """coef * E * sum over e of f_e P_e; f_e the share of the choices, P_e the mean probability of expert e."""
    num_experts = probabilities.shape[1]
    counts = torch.bincount(indices.flatten(), minlength=num_experts)
    scale = AUX_LOSS_COEF * num_experts / indices.numel()
    return torch.dot(counts.to(probabilities.dtype), probabilities.mean(0)) * scale


def softmax_aux(x: Tensor, weight: Tensor, top_k: int) -> LearnedResult:
    """Learned router with auxiliary loss, in the order of its definition."""
    probabilities = F.linear(x, weight).softmax(1)
    selected, indices = probabilities.topk(top_k, dim=1, sorted=False)
    weights = selected / selected.sum(1, keepdim=True)
    return LearnedResult(weights, indices, switch_loss(probabilities, indices))


def softmax_aux_topk_first(x: Tensor, weight: Tensor, top_k: int) -> LearnedResult:
    """The same function: the softmax over the selected logits is the renormalised softmax over all."""
    logits = F.linear(x, weight)
    selected, indices = logits.topk(top_k, dim=1)
    return LearnedResult(selected.softmax(1), indices, switch_loss(logits.softmax(1), indices))


def softmax_plain(x: Tensor, weight: Tensor, top_k: int) -> LearnedResult:
    """Learned router without auxiliary loss, in the quicker order."""
    selected, indices = F.linear(x, weight).topk(top_k, dim=1)
    return LearnedResult(selected.softmax(1), indices, None)


LEARNED: dict[str, LearnedFunction] = {
    "softmax + aux": softmax_aux,
    "softmax + aux, topk first": softmax_aux_topk_first,
    "softmax, no aux": softmax_plain,
}


def learned_backward(result: LearnedResult, gradient: Tensor) -> None:
    """Backward of a training step: `gradient` (T, K) reaches the gate weights, and the loss, if any, adds its own."""
    if result.aux_loss is None:
        torch.autograd.backward(result.weights, gradient)
    else:
        torch.autograd.backward([result.weights, result.aux_loss], [gradient, None])


def compile_learned(function: LearnedFunction, x: Tensor, weight: Tensor, top_k: int) -> LearnedFunction | str:
    """`function` under torch.compile, compiled for these shapes forward and backward, or the reason why it is not."""
    try:
        compiled: LearnedFunction = torch.compile(function, dynamic=False, fullgraph=True)
        result = compiled(x, weight, top_k)
        learned_backward(result, torch.zeros_like(result.weights))
    except Exception as error:
        reason = str(error).strip().splitlines()
        return f"{type(error).__name__}: {reason[0] if reason else 'no message'}"
    x.grad = weight.grad = None
    return compiled


def compile_or_reason(
    function: Compilable, try_out: Callable[[Compilable], object], *, compiles: bool
) -> Compilable | str:
    """`function` under torch.compile for fixed shapes, compiled by `try_out`, or the reason why it is not.

    compiles: false for NOT_COMPILED as the reason.
    """
    if not compiles:
        return NOT_COMPILED
    try:
        compiled: Compilable = torch.compile(function, dynamic=False, fullgraph=True)  # type: ignore[assignment]
        try_out(compiled)
    except Exception as error:
        reason = str(error).strip().splitlines()
        return f"{type(error).__name__}: {reason[0] if reason else 'no message'}"
    return compiled


def enter(name: str, made: Compilable | str, functions: dict[str, Compilable], not_run: dict[str, str]) -> None:
    """Put what was made among the functions, or, where it is a reason, among those not run."""
    if isinstance(made, str):
        not_run[name] = made
    else:
        functions[name] = made


class TextbookKMeansRouter:
    """A K-Means router as a first reading of arXiv 2605.12476 gives it, for context.

    Normalise, multiply, select, softmax; then one running average an expert in a Python loop, inside the forward.

    Args:
        centroids: (E, D) fp32, moved in place.
        top_k: K.
        tau: temperature of the gates, in units of cosine.
        decay: of the running average.
    """

    def __init__(self, centroids: Tensor, top_k: int, *, tau: float = DEFAULT_TAU, decay: float = 0.999) -> None:
        self.centroids, self.top_k, self.tau, self.decay = centroids, top_k, tau, decay

    def __call__(self, x: Tensor, *, update: bool = True) -> tuple[Tensor, Tensor]:
        """weights (T, K) and indices (T, K) of x (T, D); `update` moves the centroids."""
        x_unit = F.normalize(x, dim=1)
        selected, indices = (x_unit @ F.normalize(self.centroids, dim=1).T).topk(self.top_k, dim=1)
        if update:
            with torch.no_grad():
                for expert in range(self.centroids.shape[0]):
                    members = x_unit[(indices == expert).any(1)]
                    if len(members):
                        self.centroids[expert].lerp_(members.mean(0), 1 - self.decay)
        return (selected / self.tau).softmax(1), indices


CombineFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def index_dispatch(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch dispatch: x_sorted (T*K, D) and the sorting permutation (T*K,), by a stable sort and an index."""
    order = indices.flatten().argsort(stable=True)
    return x[order // indices.shape[1]], order


def scatter_combine(y_sorted: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Combine by index_add_: the weighted rows are added into (T, D), one copy of y_sorted for the products."""
    num_tokens, top_k = weights.shape
    weighted = y_sorted * weights.flatten()[order].unsqueeze(1)
    return y_sorted.new_zeros(num_tokens, y_sorted.shape[1]).index_add_(0, order // top_k, weighted)


def gather_combine(y_sorted: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Combine by the inverse permutation: rows back in token order, then one product a token."""
    num_tokens, top_k = weights.shape
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    rows = y_sorted.index_select(0, inverse).view(num_tokens, top_k, -1)
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
