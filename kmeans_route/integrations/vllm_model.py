"""The model of `kmeans_route.integrations.vllm`: vLLM's own for MoE blocks of transformers, with K-Means routers.

vLLM keeps the forward of a block whose router has other state than a learned one, and takes ids and weights from it
(`MoEMixin.recursive_replace`); the experts are vLLM's.
"""

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models import transformers as backend
from vllm.model_executor.models.transformers.moe import TransformersMoERunner

from kmeans_route.integrations.transformers.config import ARCHITECTURE_PREFIX, KMeansConfig, to_architecture
from kmeans_route.integrations.transformers.load import check_version
from kmeans_route.integrations.transformers.router import TransformersRouter
from kmeans_route.integrations.transformers.swap import saved_routers


class TransformersMoEForCausalLM(backend.TransformersMoEForCausalLM):
    """As its base, with the K-Means routers of the checkpoint, which are frozen.

    It has the name of its base because vLLM knows by that which models are of transformers, and what follows from it
    (`ModelConfig.using_transformers_backend`).
    """

    def _patch_config(self) -> None:
        """The first thing that the base does: from here on the config is one of which it makes an ordinary model."""
        super()._patch_config()
        if isinstance(self.config, KMeansConfig):
            to_architecture(self.config)

    def _create_hf_to_vllm_mapper(self) -> None:
        """The first thing that the base does with the fresh model: before it leaves layers to other ranks."""
        section = getattr(self.config, "kmeans_route", None)
        if not section:
            raise ValueError(
                f"config.json of {self.model_config.model} must have a kmeans_route section with architectures "
                f"{self.config.architectures}, got none: save the model with K-Means routers"
            )
        check_version(section, self.model_config.model)
        for path, router in saved_routers(self.model, section).items():
            if router.contract.answer == ("gates", "logits"):
                raise ValueError(
                    f"{path} must answer with ids and weights, got the gates of {router.original_class.__name__}: "
                    "serve what export_vanilla writes"
                )
            router.to_empty(device=self.device_config.device).reset_parameters()  # the base leaves buffers as they are
            self.model.set_submodule(path, router.eval().freeze())
        names = self.config.architectures
        self.config.architectures = [name.removeprefix(ARCHITECTURE_PREFIX) for name in names]  # they name conversions
        try:
            super()._create_hf_to_vllm_mapper()
        finally:
            self.config.architectures = names

    def recursive_replace(self) -> None:
        """Refuse whatever would bypass a router."""
        super().recursive_replace()
        self._awaited = set()
        for path, router in self._routers().items():
            experts = self.get_submodule(path.rpartition(".")[0]).experts
            if not isinstance(experts, TransformersMoERunner):
                raise RuntimeError(
                    f"{path} must hand its choice to vLLM's experts, got {type(experts).__name__} in their place: "
                    "serve what export_vanilla writes"
                )
            self._awaited |= {f"{path}.{name}" for name in router.state_dict()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights, all of them at first, later any; directions are pinned anew."""
        loaded: set[str] = super().load_weights(weights)
        self._awaited -= loaded
        if self._awaited:
            raise ValueError(
                f"{self.model_config.model} must hold the state of all its K-Means routers, got none of "
                f"{min(self._awaited)} and {len(self._awaited) - 1} more: serve what save_pretrained has written"
            )
        for path, router in self._routers().items():
            if any(name.startswith(f"{path}.") for name in loaded):
                for buffer in router.buffers():
                    buffer._is_hf_initialized = True  # type: ignore[attr-defined]  # what `take_loaded` goes by
                router.take_loaded()
                router.freeze()
        return loaded

    def _routers(self) -> dict[str, TransformersRouter]:
        return {path: module for path, module in self.named_modules() if isinstance(module, TransformersRouter)}
