"""Route tokens to the experts of a mixture by online K-Means: no router weights, no auxiliary loss."""

__version__ = "0.1.0"

from kmeans_route.attach import Attachment, attach
from kmeans_route.expert_parallel import expert_parallel, expert_parameters
from kmeans_route.functional import centroid_sums, combine, directions, dispatch, route
from kmeans_route.learned import LearnedRouter
from kmeans_route.moe import MoE
from kmeans_route.router import KMeansRouter
from kmeans_route.types import Dispatch, MoEDetails, RouterOutput, Routing

__all__ = [
    "Attachment",
    "Dispatch",
    "KMeansRouter",
    "LearnedRouter",
    "MoE",
    "MoEDetails",
    "RouterOutput",
    "Routing",
    "__version__",
    "attach",
    "centroid_sums",
    "combine",
    "directions",
    "dispatch",
    "expert_parallel",
    "expert_parameters",
    "route",
]
