"""What every contestant of a benchmark gets: hidden states, centroids and a gradient of the gates.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

from functools import cached_property

import torch
from torch import Tensor

from kmeans_route import KMeansRouter, directions
from kmeans_route.testing import BenchShape, make_centroids, make_hidden_states

CPU = torch.device("cpu")


class Problem:
    """One input for all: clustered hidden states with a common offset, as in a model, and one (E, D) for every router.

    x (T, D): a leaf in the dtype, which wants a gradient in mode "train". centroids (E, D): fp32 unit rows; weight: the
    same in the dtype, for learned routers. bias (E,): fp32, 0 unless given. d_weights (T, K): fp32, the gradient of the
    gates; d_gates: the same in the dtype. x, bias and d_weights may be given in place of those that are made here.
    """

    def __init__(
        self,
        shape: BenchShape,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        mode: str = "train",
        *,
        x: Tensor | None = None,
        bias: Tensor | None = None,
        d_weights: Tensor | None = None,
    ) -> None:
        self.shape, self.device, self.mode = shape, device, mode
        num_tokens, width, num_experts, top_k = shape
        if x is None:
            x = make_hidden_states(
                num_tokens, width, num_clusters=4 * num_experts, spread=1.0, offset=0.5, dtype=dtype, device=device
            )
        if d_weights is None:
            d_weights = make_hidden_states(num_tokens, top_k, seed=2, device=device)
        self.x = x.requires_grad_(mode == "train")
        self.centroids = make_centroids(num_experts, width, device=device)
        self.weight = self.centroids.to(dtype)
        self.bias = torch.zeros(num_experts, device=device) if bias is None else bias
        self.d_weights, self.d_gates = d_weights, d_weights.to(dtype)

    @cached_property
    def directions(self) -> Tensor:
        """(E, D) in the dtype, what x is scored with: at hand in inference."""
        return directions(self.centroids, self.weight.dtype)

    def router(self, backend: str) -> KMeansRouter:
        """A router of these centroids and this bias, in training; commits are made by hand."""
        router = KMeansRouter(*self.shape[1:], directions="centroids", backend=backend, device=self.device)
        router.set_centroids(self.centroids)
        router.expert_bias.copy_(self.bias)
        router.commit()  # nothing is pending: it tells the router that commits come by hand, so it does not warn
        return router.train()
