"""Route tokens to the experts of a mixture by online K-Means: no router weights, no auxiliary loss."""

__version__ = "0.1.0"

from kmeans_route.conversion.compare import Agreement, Comparison
from kmeans_route.conversion.from_learned import calibrate
from kmeans_route.conversion.to_learned import Export, VanillaGate, export_gates, to_linear
from kmeans_route.functional import centroid_sums, combine, directions, dispatch, route
from kmeans_route.parallel.api import expert_parallel, expert_parameters
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.routing.learned import LearnedRouter
from kmeans_route.routing.moe import MoE
from kmeans_route.routing.replay import record, replay
from kmeans_route.training.attach import Attachment, attach
from kmeans_route.types import Dispatch, MoEDetails, RouterOutput, Routing

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
    "record",
    "replay",
    "route",
    "to_linear",
]
