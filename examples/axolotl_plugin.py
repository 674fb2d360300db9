"""A plugin for axolotl: K-Means routers in the model that its configuration names.

With this file on the Python path, in axolotl's YAML:

    plugins:
      - axolotl_plugin.KMeansPlugin
    kmeans_route:  # options of KMeansRouter; may be left out
      balance: proportional
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from kmeans_route.integrations.transformers import KMeansRouterCallback, apply_kmeans_routing


class KMeansArgs(BaseModel):
    """What the plugin adds to the configuration."""

    kmeans_route: dict[str, Any] | None = None


class KMeansPlugin(BasePlugin):
    """Swaps the routers before adapters are put on, and ties them to the trainer's optimizer."""

    def get_input_args(self) -> str:
        return f"{__name__}.KMeansArgs"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        print(apply_kmeans_routing(model, **(cfg.kmeans_route or {})))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        KMeansRouterCallback(metrics=["maxvio", "dead_experts"], max_keys=10).add_to(trainer)
