"""The stateless forward, for Hugging Face's `kernels`: it may replace the forward of any module that has its centroids.

Copied by `hub/build.py` beside the functions of kmeans_route; no part of the package.
"""

from torch import Tensor, nn

from kmeans_route.functional import route


class KMeansRoute(nn.Module):
    """Route by the centroids of the module whose forward this becomes.

    That module has `weight` (E, D), `expert_bias` (E,) or None, `top_k`, and may have `route_options`, a dict of the
    options of `route`.

    Shape:
        x (..., D), mask x.shape[:-1] bool -> weights (T, K), indices (T, K).
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = getattr(self, "route_options", {})
        routing = route(x, self.weight, self.top_k, self.expert_bias, mask=mask, **options)
        return routing.weights, routing.indices
