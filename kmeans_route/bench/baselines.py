"""The peers that kmeans_route is measured against, in plain PyTorch.

The learned softmax router is fixed here: linear, softmax, top-k, renormalise by the sum; its auxiliary loss is that of
the Switch Transformer (arXiv 2101.03961, eq. 4) with bincount for f and the mean for P. It is written for speed:
top-k need not sort, nothing is computed twice, no temporary is kept beyond what autograd saves. Selecting among the
logits and taking the softmax over the K selected is the same function, and quicker where no loss needs all
probabilities; with the loss the two orders are level within the noise, so both run and the quicker one counts.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from collections.abc import Callable
from typing import NamedTuple

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


class TextbookKMeansRouter:
    """A K-Means router as a first reading of arXiv 2605.12476 gives it, for context.

    Normalise, multiply, select, softmax; then one running average an expert in a Python loop, inside the forward, which
    moves the centroids (E, D) in place.
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
