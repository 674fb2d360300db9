"""K-Means routing in the models of transformers (5.21 and newer): swap the routers, save, load, go back.

Example:
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from kmeans_route import attach
    >>> from kmeans_route.integrations.transformers import apply_kmeans_routing
    >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    >>> model = MixtralForCausalLM(config).train()
    >>> print(apply_kmeans_routing(model))
    2 routers swapped
    model.layers.0.mlp.gate  MixtralTopKRouter  E=4 D=32 K=2 gate=softmax tau=0.2
    model.layers.1.mlp.gate  MixtralTopKRouter  E=4 D=32 K=2 gate=softmax tau=0.2
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> attachment = attach(model, optimizer)  # or KMeansRouterCallback().add_to(trainer)
    >>> tokens = torch.randint(64, (4, 16))
    >>> model(tokens, labels=tokens).loss.backward()
    >>> optimizer.step()
    >>> attachment.metrics()["model.layers.1.mlp.gate/dead_experts"] >= 0
    True

The centroids are in the state dict; `save_pretrained` writes the options into config.json, and `load_kmeans_pretrained`
reads both. A plain `from_pretrained` of such a checkpoint makes a learned router of the centroids and only reports what
belongs to them as unexpected keys. docs/transformers.md says more.
"""

from kmeans_route.integrations import require

SUPPORTED = ">=5.21,<6"
TRIED = ("5.23.0",)
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
