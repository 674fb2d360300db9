"""The test cases of `transformers_suite.py`, collected beside a checkout of transformers, never on their own."""

import contextlib
import importlib.util
import os
import unittest
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.generation.test_utils import GenerationTesterMixin  # of the checkout
from tests.test_modeling_common import ModelTesterMixin, ids_tensor

from kmeans_route.integrations.transformers import apply_kmeans_routing
from kmeans_route.integrations.transformers.config import KMeansConfig, to_architecture

# By its path: `tests` is the checkout's here.
_spec = importlib.util.spec_from_file_location(
    "tiny_models", Path(__file__).parent.parent / "tests" / "integrations" / "transformers_models.py"
)
assert _spec is not None
assert _spec.loader is not None
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)
VOCAB = tiny_models.VOCAB
SWAPPED = os.environ["KMEANS_ROUTE_SWAPPED"] == "1"


def born_swapped(model_class: Any) -> Any:
    """The class whose models come with K-Means routers, as if each had been swapped after it was made."""
    if not SWAPPED:
        return model_class

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        with contextlib.suppress(AttributeError):
            del self.config.kmeans_route
        apply_kmeans_routing(self)

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        # The class of an architecture takes no K-Means checkpoint for its own; these swap in their constructor.
        if "config" not in kwargs:
            kwargs["config"] = transformers.AutoConfig.from_pretrained(pretrained_model_name_or_path)
            if isinstance(kwargs["config"], KMeansConfig):
                to_architecture(kwargs["config"])
        return model_class.from_pretrained.__func__(cls, pretrained_model_name_or_path, *args, **kwargs)

    names = {
        "__init__": __init__,
        "from_pretrained": classmethod(from_pretrained),
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class)(model_class.__name__, (model_class,), names)


class Sizes:
    """What the mixins ask of a model tester."""

    batch_size, seq_length, is_training, hidden_size, num_hidden_layers = 3, 7, True, 32, 2
    num_attention_heads, vocab_size = 2, VOCAB

    def __init__(self, parent: unittest.TestCase, model_type: str) -> None:
        self.parent, self.model_type = parent, model_type

    def get_config(self) -> Any:
        """A tiny one."""
        return tiny_models.tiny_config(self.model_type)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Ids without the special ones, and a mask of ones."""
        ids = ids_tensor([self.batch_size, self.seq_length], VOCAB).clamp(min=3)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def case(model_type: str, prefix: str) -> type[unittest.TestCase]:
    """The test case of one model type."""
    base = born_swapped(getattr(transformers, f"{prefix}Model"))
    causal = born_swapped(getattr(transformers, f"{prefix}ForCausalLM"))

    class Case(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc]
        all_model_classes = (base, causal)
        all_generative_model_classes = (causal,)

        def setUp(self) -> None:
            self.model_tester = Sizes(self, model_type)

        def _prepare_for_class(self, inputs: Any, _model_class: Any, return_labels: bool = False) -> Any:
            return dict(inputs) | ({"labels": inputs["input_ids"]} if return_labels else {})

    Case.__name__ = Case.__qualname__ = prefix
    return Case


Mixtral = case("mixtral", "Mixtral")
Qwen3Moe = case("qwen3_moe", "Qwen3Moe")
Olmoe = case("olmoe", "Olmoe")
DeepseekV3 = case("deepseek_v3", "DeepseekV3")
GptOss = case("gpt_oss", "GptOss")
