"""What the file config.json of a swapped model says: a model type of its own, "kmeans_mixtral" for "mixtral".

- The Auto classes of transformers load it as soon as `kmeans_route.integrations.transformers` has been imported.
- Without that import they stop at the type, which they do not know; with trust_remote_code=True the small module that
  lies in the folder does the import.
- A class of an architecture (`MixtralForCausalLM.from_pretrained`) stops at `REMEDY`, which stands where a name of a
  file is expected: it would make learned routers of the centroids.

In memory the config keeps the type of its architecture: transformers looks up by it how a checkpoint's experts are
merged, plans of parallelism and more.
"""

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "llama4_text",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)
TYPE_PREFIX = "kmeans_"
# Before the architecture's name: engines that go by it shall not know the checkpoint.
ARCHITECTURE_PREFIX = "KMeans"
REMEDY = (
    "none, for the routers are K-Means: import kmeans_route.integrations.transformers, then call "
    "AutoModelForCausalLM.from_pretrained, or load_kmeans_pretrained with a class of your choice"
)
CODE = '''"""For trust_remote_code=True: importing kmeans_route, which must be installed, is all it takes."""

from kmeans_route.integrations.transformers.config import kmeans_config_class

Config = kmeans_config_class("{model_type}")
'''
CODE_FILE = "kmeans_routing.py"
# What is written anew each time, and means nothing in memory.
ONLY_IN_FILE = ("auto_map", "transformers_weights")


class KMeansConfig:
    """What the config of a swapped model is besides that of its architecture, its other base class."""

    model_type: str
    architecture: Any  # its config class

    def __post_init__(self, **kwargs: Any) -> None:
        """From a file: in memory the type is that of the architecture."""
        own = {name: value for name, value in kwargs.items() if name not in ONLY_IN_FILE}
        super().__post_init__(**own | {"model_type": self.architecture.model_type})  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """As the file says it."""
        said: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # the type is that of the class there
        if said.get("architectures"):
            plain = [name.removeprefix(ARCHITECTURE_PREFIX) for name in said["architectures"]]
            said["architectures"] = [ARCHITECTURE_PREFIX + name for name in plain]
        said["auto_map"] = {"AutoConfig": f"{CODE_FILE.removesuffix('.py')}.Config"}
        said["transformers_weights"] = REMEDY
        return said

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever, and the module that auto_map names."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        code = CODE.format(model_type=self.architecture.model_type)
        (Path(save_directory) / CODE_FILE).write_text(code, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, *_: Any) -> None:
        """transformers would copy this file into the folder of a checkpoint."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """5.16 would rename the layer types of custom configs, to names that LFM2 does not know."""
        return False

    def __reduce__(self) -> Any:
        return _empty, (self.architecture,), self.__dict__


def _empty(architecture: Any) -> Any:
    made = config_class(architecture)
    return made.__new__(made)


class Loader:
    """What an Auto class takes for the model class of a K-Means config; one for each, so that no model is imported."""

    auto: Any

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """A model with the routers of the checkpoint, of the class of its architecture."""
        from kmeans_route.integrations.transformers.load import load_kmeans_pretrained

        return load_kmeans_pretrained(cls.auto, path, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        from kmeans_route.integrations.transformers.load import kmeans_from_config

        return kmeans_from_config(cls.auto, config, **kwargs)


@functools.cache
def config_class(architecture: Any) -> Any:
    """The config class of K-Means for an architecture's, known to the Auto classes from here on."""
    names = {
        "architecture": architecture, "model_type": TYPE_PREFIX + architecture.model_type, "__module__": __name__,
        "__doc__": KMeansConfig.__doc__,
    }  # fmt: skip
    made = type(architecture)(f"KMeans{architecture.__name__}", (KMeansConfig, architecture), names)
    model_type = architecture.model_type
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] is architecture:
        AutoConfig.register(made.model_type, made, exist_ok=True)
        for loader in _loaders():
            if architecture in loader.auto._model_mapping:
                loader.auto.register(made, loader, exist_ok=True)
    return made


@functools.cache
def _loaders() -> list[type[Loader]]:
    autos = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")]
    mapped = [auto for auto in autos if getattr(auto, "_model_mapping", None) is not None]  # their truth is slow
    return [type("Loader", (Loader,), {"auto": auto}) for auto in mapped]


def kmeans_config_class(model_type: str) -> Any:
    """`config_class` by the type of the architecture."""
    return config_class(CONFIG_MAPPING[model_type])


def register_types() -> None:
    """Make the model types known to the Auto classes; others are from where one is swapped, or loaded."""
    for model_type in (*MODEL_TYPES, "llama4"):  # which holds a llama4_text
        kmeans_config_class(model_type)


def to_kmeans(config: Any) -> None:
    """Make it the config of a swapped model, in place."""
    architecture: Any = type(config)
    config.__class__ = config_class(architecture)
    config.__dict__["model_type"] = architecture.model_type


def to_architecture(config: Any) -> None:
    """The way back, in place; the section stays."""
    config.__class__ = config.architecture
    del config.__dict__["model_type"]


def copied_configs(model: Any) -> list[tuple[Any, str, Any]]:
    """Give a model copies of its configs, the same where modules shared one: (module, attribute, what was there)."""
    memo: dict[int, Any] = {}
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    ]
    for module, name, config in held:
        setattr(module, name, copy.deepcopy(config, memo))
    return held


def give_back(held: Iterable[tuple[Any, str, Any]]) -> None:
    """Put the configs back that `copied_configs` has found, unless the copies have been changed since."""
    held = list(held)
    if all(_values(getattr(module, name)) == _values(config) for module, name, config in held):
        for module, name, config in held:
            setattr(module, name, config)


def _values(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name != "model_type"}
