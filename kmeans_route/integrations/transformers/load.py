"""Load what `save_pretrained` of a swapped model has written."""

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from kmeans_route.integrations.transformers.config import (
    ARCHITECTURE_PREFIX,
    TYPE_PREFIX,
    KMeansConfig,
    kmeans_config_class,
    to_architecture,
    to_kmeans,
)
from kmeans_route.integrations.transformers.swap import SECTION_VERSION, saved_routers, swap, swapped_routers


def load_kmeans_pretrained(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
    """`cls.from_pretrained(path, **kwargs)` for a checkpoint of a swapped model.

    An Auto class does the same by its own `from_pretrained`. This function is for the class of an architecture, and for
    checkpoints whose section has version 1: their model type is that of an ordinary model.

    Args:
        cls: a model class of transformers or an Auto class.
        path: a folder, or whatever `from_pretrained` takes.
        args, kwargs: of `from_pretrained`.

    Raises:
        ValueError: config.json has no `kmeans_route` section, or one that does not fit the model or the weights.
        TypeError: cls is no model class, or one of another architecture.
    """
    if not (isinstance(cls, type) and hasattr(cls, "from_pretrained")):
        raise TypeError(
            f"cls must be a model class of transformers, got {cls!r}: call load_kmeans_pretrained(cls, path)"
        )
    config = kwargs.pop("config", None)
    if config is None:
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        config = _read_config(path, {k: kwargs[k] for k in names if k in kwargs})
    config, real, section = _checked(cls, config, path)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = _swapping_class(real, section).from_pretrained(
        path, *args, config=config, output_loading_info=True, **kwargs
    )
    model.__class__ = real
    swapped = tuple(f"{path}." for path in swapped_routers(model))
    missing = [key for key in info["missing_keys"] if key.startswith(swapped)]
    if missing:
        raise ValueError(
            f"{path} must hold the state of all its K-Means routers, got none of {sorted(missing)[0]} and "
            f"{len(missing) - 1} more: load a checkpoint that save_pretrained of the swapped model has written"
        )
    return (model, info) if wants_info else model


def kmeans_from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
    """`cls.from_config(config, **kwargs)` for the config of a swapped model: the routers have no data yet."""
    config, real, section = _checked(cls, copy.deepcopy(config), "config")
    model = _swapping_class(real, section)._from_config(config, **kwargs)
    model.__class__ = real
    return model


def check_version(section: dict[str, Any], path: Any) -> None:
    """Raise ValueError unless this version can read the `kmeans_route` section of a checkpoint."""
    if section.get("version") not in range(1, SECTION_VERSION + 1):
        raise ValueError(
            f"the kmeans_route section of {path} must have a version of 1 to {SECTION_VERSION}, got "
            f"{section.get('version')!r}: install the version of kmeans_route that wrote it"
        )


def _read_config(path: Any, options: dict[str, Any]) -> Any:
    written, _ = PreTrainedConfig.get_config_dict(path, **options)
    model_type = str(written.get("model_type"))
    if model_type.startswith(TYPE_PREFIX):
        kmeans_config_class(model_type.removeprefix(TYPE_PREFIX))  # known from here on, whatever holds the routers
    return AutoConfig.from_pretrained(path, **options)


def _checked(cls: Any, config: Any, path: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(config of K-Means, model class of the architecture, section)."""
    section = getattr(config, "kmeans_route", None)
    if not section:
        raise ValueError(
            f"{path} must hold a K-Means checkpoint, got a config without kmeans_route section: use from_pretrained, "
            "then apply_kmeans_routing"
        )
    check_version(section, path)
    if not isinstance(config, KMeansConfig):
        config = copy.deepcopy(config)  # it may be the caller's
        to_kmeans(config)
    return config, _model_class(cls, config), section


def _model_class(cls: Any, config: Any) -> Any:
    mapping, wanted = getattr(cls, "_model_mapping", None), config.architecture
    own = getattr(cls, "config_class", None) or wanted  # an Auto class has none
    if own.model_type != wanted.model_type or (mapping is not None and wanted not in mapping):
        raise TypeError(
            f"cls must be a model class of {wanted.model_type}, got {cls.__name__}: "
            "AutoModelForCausalLM finds the one of a language model"
        )
    if mapping is None:
        return cls
    found = mapping[wanted]
    if isinstance(found, list | tuple):
        saved = {name.removeprefix(ARCHITECTURE_PREFIX) for name in config.architectures or ()}
        named = [c for c in found if c.__name__ in saved]
        return named[0] if named else found[0]
    return found


def _swapping_class(real: Any, section: dict[str, Any]) -> Any:
    """A subclass that swaps its routers as it is made, so that `from_pretrained` fills the swapped ones."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        to_architecture(config)  # for a model that makes another one inside by AutoModel.from_config
        real.__init__(self, config, *args, **kwargs)
        to_kmeans(config)
        swap(self, saved_routers(self, section))

    names = {"__init__": __init__, "__module__": real.__module__, "__qualname__": real.__qualname__}
    return type(real)(real.__name__, (real,), names)
