"""Route tokens to the experts of a mixture by online K-Means: no router weights, no auxiliary loss."""

__version__ = "0.1.0"

from kmeans_route.agreement import Agreement, Comparison
from kmeans_route.attach import Attachment, attach
from kmeans_route.expert_parallel import expert_parallel, expert_parameters
from kmeans_route.functional import centroid_sums, combine, directions, dispatch, route
from kmeans_route.learned import LearnedRouter
from kmeans_route.moe import MoE
from kmeans_route.router import KMeansRouter
from kmeans_route.types import Dispatch, MoEDetails, RouterOutput, Routing
from kmeans_route.warm_start import calibrate
from kmeans_route.way_back import Export, VanillaGate, export_gates, to_linear

__all__ = [
    "Agreement",
    "Attachment",
    "Comparison",
    "Dispatch",
    "Export",
    "KMeansRouter",
    "LearnedRouter",
    "MoE",
    "MoEDetails",
    "RouterOutput",
    "Routing",
    "VanillaGate",
    "__version__",
    "attach",
    "calibrate",
    "centroid_sums",
    "combine",
    "directions",
    "dispatch",
    "expert_parallel",
    "expert_parameters",
    "export_gates",
    "route",
    "to_linear",
]
