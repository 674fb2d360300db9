"""K-Means routing in the models of transformers (5.16 and newer): swap the routers, save, load, go back.

The centroids are in the state dict; `save_pretrained` writes the options into config.json, and `load_kmeans_pretrained`
reads both. A plain `from_pretrained` of such a checkpoint makes a learned router of the centroids and only reports what
belongs to them as unexpected keys. docs/transformers.md says more; an example stands in
docs/integrations.md.
"""

from kmeans_route.integrations import require

SUPPORTED = ">=5.16,<6"
TRIED = ("5.16.0", "5.19.0", "5.23.0", "5.24.0")
require("transformers", SUPPORTED)

from kmeans_route.integrations.transformers.export import export_vanilla  # noqa: E402 - only where the right version is
from kmeans_route.integrations.transformers.swap import (  # noqa: E402
    Summary,
    Swap,
    apply_kmeans_routing,
    load_kmeans_pretrained,
    revert,
)
from kmeans_route.integrations.transformers.trainer import KMeansRouterCallback  # noqa: E402

__all__ = [
    "KMeansRouterCallback",
    "Summary",
    "Swap",
    "apply_kmeans_routing",
    "export_vanilla",
    "load_kmeans_pretrained",
    "revert",
]
