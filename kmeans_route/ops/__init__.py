"""torch.library operators: schema, body, fake and autograd of each, side by side.

Each wrapper takes the backend as the module that `backends.choose` gave, each operator its name. Whoever has to see an
operator (a compiler, a tracer, a profiler, a dispatch mode) sees it; other calls go straight to its body:
`schema.direct`. The bodies are opaque to torch.compile, so they may branch on data. The operators that change pending
state carry no autograd, and they do nothing while a backward pass runs: whatever activation checkpointing recomputes
there has been counted already.

Legend: T tokens, D hidden size, E experts, K top_k, S splits. What is absent is None, and in what an operator returns
an empty tensor.
"""

from kmeans_route.ops.dispatch import combine, dispatch
from kmeans_route.ops.flops import tell_flop_counters
from kmeans_route.ops.route import directions, route, route_dispatch
from kmeans_route.ops.schema import call_after_backward, call_after_node, in_backward, traced
from kmeans_route.ops.statistics import accumulate, centroid_sums, first_moments

__all__ = [
    "accumulate", "call_after_backward", "call_after_node", "centroid_sums", "combine", "directions", "dispatch",
    "first_moments", "in_backward", "route", "route_dispatch", "tell_flop_counters", "traced",
]  # fmt: skip
