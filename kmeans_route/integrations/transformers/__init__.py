"""K-Means routing in the models of transformers (5.16 and newer): swap the routers, save, load, go back.

The centroids are in the state dict; `save_pretrained` writes the options into config.json, and a model type that the
Auto classes know once this has been imported: `AutoModelForCausalLM.from_pretrained` reads both. docs/transformers.md
says more; an example stands in docs/integrations.md.
"""

from kmeans_route.integrations import require

SUPPORTED = ">=5.16,<6"
TRIED = ("5.16.0", "5.19.0", "5.23.0", "5.24.0")
require("transformers", SUPPORTED)

from kmeans_route.integrations.transformers.config import register_types  # noqa: E402 - only where the version is right
from kmeans_route.integrations.transformers.export import export_vanilla  # noqa: E402
from kmeans_route.integrations.transformers.load import load_kmeans_pretrained  # noqa: E402
from kmeans_route.integrations.transformers.swap import Summary, Swap, apply_kmeans_routing, revert  # noqa: E402
from kmeans_route.integrations.transformers.trainer import KMeansRouterCallback  # noqa: E402

register_types()

__all__ = [
    "KMeansRouterCallback",
    "Summary",
    "Swap",
    "apply_kmeans_routing",
    "export_vanilla",
    "load_kmeans_pretrained",
    "revert",
]
