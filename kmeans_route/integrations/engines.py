"""For serving engines' own models: the function that their MoE layers ask for ids and weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from kmeans_route.routing.kmeans import KMeansRouter

RoutingFunction = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]


def routing_function(router: KMeansRouter) -> RoutingFunction:
    """What vLLM's FusedMoE and SGLang's TopK take as `custom_routing_function`.

    Args:
        router: with its state loaded. It is frozen, in eval mode: nothing is gathered, directions are pinned. After a
            write into its weight call `freeze` again.

    Returns:
        (hidden_states (T, D), gating_output, topk, renormalize) -> (weights (T, K) fp32, ids (T, K) int32). Logits and
        renormalize are not looked at: the cosines and the options are the router's.
    """
    router.eval().freeze()

    def choose(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        if topk != router.top_k:
            raise ValueError(f"topk must be that of router {router.name!r}, {router.top_k}, got {topk}")
        routing = router.route(hidden_states)
        return routing.weights.float(), routing.indices.to(torch.int32)

    return choose
