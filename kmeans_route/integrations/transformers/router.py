"""The K-Means router in the place of a router of transformers: what that one promised, and the class that keeps it.

Blocks of transformers call `router(hidden) -> (router_logits (T, E), weights (T, K), indices (T, K))` and then
`experts(hidden, indices, weights)`. GraniteMoe's had the other order before 5.21; Llama4's returns (gates (T, E),
router_logits (T, E)).
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kmeans_route.checks import default_tau, flatten_hidden_states
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.types import RouteOptions

_OWN = "e_score_correction_bias"


class Slot(NamedTuple):
    """What the gate of an architecture is.

    kind: of its probabilities. bias: where a bias goes, as in `export_gates`. key: of that bias, seen from the router;
    "../" is its block.
    """

    kind: str
    bias: str = "rows"
    key: str = ""


# The router classes that are known.
ROUTERS = {
    "DeepseekV2TopkRouter": Slot("softmax"),
    "DeepseekV3TopkRouter": Slot("sigmoid", "score", _OWN),
    "Ernie4_5_MoeTopKRouter": Slot("softmax", "score", f"moe_statics.{_OWN}"),
    "ExaoneMoeTopkRouter": Slot("sigmoid", "score", _OWN),
    "FlexOlmoTopKRouter": Slot("softmax"),
    "Glm4MoeTopkRouter": Slot("sigmoid", "score", _OWN),
    "GptOssTopKRouter": Slot("softmax", "logit", "bias"),
    "GraniteMoeTopKRouter": Slot("softmax"),
    "HunYuanMoEV1Gate": Slot("softmax"),
    "Lfm2MoeTopKRouter": Slot("sigmoid", "score", "../expert_bias"),
    "Llama4Router": Slot("sigmoid"),
    "MiniMaxM2TopKRouter": Slot("sigmoid", "score", f"../{_OWN}"),
    "MixtralTopKRouter": Slot("softmax"),
    "OlmoeTopKRouter": Slot("softmax"),
    "PhimoeTopKRouter": Slot("sparsemixer"),
    "Qwen2MoeTopKRouter": Slot("softmax"),
    "Qwen3MoeTopKRouter": Slot("softmax"),
    "Qwen3NextTopKRouter": Slot("softmax"),
}
# Gates that do not sum to one over the selected experts, though their class has no norm_topk_prob.
NOT_NORMALIZED = ("DeepseekV2TopkRouter", "Llama4Router")
ANSWER = "logits", "weights", "indices"
ANSWERS = {"GraniteMoeTopKRouter": (ANSWER, ANSWER[::-1]), "Llama4Router": (("gates", "logits"),)}
PROBE_TOKENS = 5
_made: dict[Any, type["TransformersRouter"]] = {}


class Contract(NamedTuple):
    """What a router was seen to take and to return.

    gate_key: where its weight (E, D) lies in its state dict. answer: what it returns, `ANSWER` or one of its class's
    `ANSWERS`. follows_dtype: gates come in the dtype of the hidden states, else in fp32.
    """

    num_experts: int
    hidden_size: int
    top_k: int
    gate_key: str
    answer: tuple[str, ...]
    follows_dtype: bool


def is_known(module: nn.Module) -> bool:
    """Whether this is a router of transformers that can be swapped, and has not been."""
    return type(module).__name__ in ROUTERS and not isinstance(module, KMeansRouter)


def probe(path: str, router: nn.Module) -> Contract:
    """The contract that a meta copy of the router keeps with a few tokens; an answer in no known order: ValueError."""
    gate_key = "wg.weight" if hasattr(router, "wg") else "weight"
    num_experts, hidden_size = router.get_parameter(gate_key).shape
    twin = copy.deepcopy(router).to(device="meta", dtype=torch.bfloat16).eval()
    x = torch.zeros(PROBE_TOKENS, hidden_size, dtype=torch.bfloat16, device="meta")
    extra = [torch.zeros(num_experts, device="meta") for _ in list(inspect.signature(twin.forward).parameters)[1:]]
    expected = f"{path} ({type(router).__name__}) must return (logits (T, E), weights (T, K), int64 indices (T, K))"
    try:
        out = twin.forward(x, *extra)
    except Exception as error:  # whatever a foreign forward raises, it does not fit
        raise ValueError(f"{expected}, got {type(error).__name__}: {error}") from error
    shapes = [tuple(t.shape) for t in out] if isinstance(out, tuple) else type(out).__name__
    top_k = int(getattr(router, "top_k", 0))
    rows = {"weights": (PROBE_TOKENS, top_k), "indices": (PROBE_TOKENS, top_k)}
    for answer in ANSWERS.get(type(router).__name__, (ANSWER,)):
        parts = dict(zip(answer, out, strict=False))
        fits = shapes == [rows.get(name, (PROBE_TOKENS, num_experts)) for name in answer]
        if fits and ("indices" not in parts or parts["indices"].dtype == torch.int64):
            dtype = parts["gates" if "gates" in parts else "weights"].dtype
            return Contract(num_experts, hidden_size, top_k, gate_key, answer, dtype == torch.bfloat16)
    raise ValueError(f"{expected}, got {shapes}: use a version of transformers between those tried")


def architecture_options(router: nn.Module, contract: Contract) -> dict[str, Any]:
    """The options of `KMeansRouter` that this architecture decides: normalisation, scaling, groups.

    The form of the gate is K-Means' own everywhere, a softmax of cosine / tau: a sigmoid of cosine / tau saturates. A
    single expert, and architectures that do not normalise, get softmax over all candidates.
    """
    name = type(router).__name__
    normalize = bool(getattr(router, "norm_topk_prob", name not in NOT_NORMALIZED)) and contract.top_k > 1
    options: dict[str, Any] = {"normalize": normalize, "scaling": float(getattr(router, "routed_scaling_factor", 1.0))}
    n_group = getattr(router, "num_group", None)
    if n_group and n_group > 1 and getattr(router, "topk_method", "group_limited_greedy") == "group_limited_greedy":
        score = "max" if name == "DeepseekV2TopkRouter" else "top2"
        options |= {"n_group": n_group, "topk_group": getattr(router, "topk_group", None), "group_score": score}
    return options


class TransformersRouter(KMeansRouter):
    """A `KMeansRouter` that answers as the router did whose place it has taken.

    It is made by `router_class`, as a subclass of that router's class too: hooks of transformers look for the class.
    The bias has the name that checkpoints give it. Routing is that of all tokens; the attention mask, which blocks do
    not hand on, decides only whose statistics count.
    """

    original_class: type[nn.Module]
    e_score_correction_bias: Tensor
    FP32_STATE = ("weight", "centroids", "e_score_correction_bias", "score_std")

    def __init__(self, original: nn.Module, contract: Contract, **options: Any) -> None:
        self.chosen_options: dict[str, Any] = {}  # what config.json is to say
        super().__init__(
            contract.hidden_size,
            contract.num_experts,
            contract.top_k,
            return_scores=True,
            device=original.get_parameter(contract.gate_key).device,
            **options,
        )
        self._named_options = {name for name, value in options.items() if value is not None}
        self._follow(self.commit_options.directions)
        self.contract = contract
        self.masks: Masks | None = None
        self.handles: list[Any] = []
        self._original = [original]  # in a list: no submodule, so it is in no state dict
        # The same dictionaries: hooks that capture outputs, set before a swap or after it, work on both sides of it.
        self._forward_hooks = original._forward_hooks
        self._forward_hooks_with_kwargs = original._forward_hooks_with_kwargs
        self._forward_hooks_always_called = original._forward_hooks_always_called
        self.train(original.training)
        # transformers initialises what does not carry this flag; on the meta device a checkpoint is still to come.
        self._is_hf_initialized = not self.weight.is_meta

    @property
    def options(self) -> RouteOptions:
        """How it selects and weighs. config.json says tau, be it chosen, fitted later or this version's default:
        a model keeps the gates that it was trained with."""
        return self._options

    @options.setter
    def options(self, options: RouteOptions) -> None:
        self.chosen_options["tau"] = options.tau
        self._options = options

    def _follow(self, directions: str) -> None:
        """Go by another rule of directions from here on, with its tau; what was named stays."""
        if "directions" not in self._named_options:
            self.commit_options = self.commit_options._replace(directions=directions)
            if "tau" not in self._named_options:
                self.options = self.options._replace(tau=default_tau(directions))
        self.chosen_options["directions"] = self.commit_options.directions

    def _take_gate(self, gate: Tensor) -> None:
        """A learned router's rows are the centroids, which whitening would turn."""
        self.set_centroids(gate)
        self._follow("centroids")

    @property
    def original(self) -> nn.Module:
        """The router that was here before."""
        return self._original[0]

    @property
    def expert_bias(self) -> Tensor:  # type: ignore[override]
        """The selection bias."""
        return self.e_score_correction_bias

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """`expert_bias` is stored as e_score_correction_bias."""
        super().register_buffer("e_score_correction_bias" if name == "expert_bias" else name, tensor, persistent)

    def forward(self, hidden_states: Tensor, *_bias: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Route as the contract says. A learned router's bias, which some blocks hand over, is not for cosines."""
        x = flatten_hidden_states(hidden_states, self.hidden_size)
        mask = None if self.masks is None else self.masks.of(x)
        routing = self.route(x, count_mask=mask, gather=True)
        assert routing.scores is not None
        logits = routing.scores / self.options.tau
        weights = routing.weights.to(x.dtype) if self.contract.follows_dtype else routing.weights
        parts = {"logits": logits, "weights": weights, "indices": routing.indices}
        if "gates" in self.contract.answer:
            parts["gates"] = weights.new_zeros(logits.shape).scatter(1, routing.indices, weights)
        return tuple(parts[name] for name in self.contract.answer)

    def _apply(self, fn: Any, recurse: bool = True) -> "TransformersRouter":
        super()._apply(fn, recurse)
        if not any(p.is_meta for p in self.original.parameters()):
            self.original._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """K-Means state as ever; from a checkpoint of the unswapped model its gate, as centroids."""
        gate = state_dict.get(prefix + self.contract.gate_key)
        if gate is None or prefix + "centroids" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        metadata, *_, error_msgs = rest
        if self.weight.is_meta and not gate.is_meta and metadata.get("assign_to_params_buffers"):
            self.to_empty(device=gate.device)
        try:
            self._take_gate(gate)
        except ValueError as error:
            error_msgs.append(f"{prefix}{self.contract.gate_key}: {error}")
            return
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not gate.is_meta and not any(p.is_meta for p in self.original.parameters()):
            self.original.load_state_dict(own, strict=False)

    def take_loaded(self) -> None:
        """Make whole what transformers' `from_pretrained` has set tensor by tensor, and fill in what it has not.

        A gate without the rest of the state is that of a learned router, and becomes the centroids. NaN or Inf in what
        was loaded is a RuntimeError.
        """
        brought = {name for name, buffer in self.named_buffers() if getattr(buffer, "_is_hf_initialized", False)}
        for name in brought:
            if not bool(self.get_buffer(name).isfinite().all()):
                raise RuntimeError(
                    f"{name} of router {self.name!r} must be finite, got NaN or Inf: load a checkpoint from before that"
                )
        self._move_plain_tensors()
        if "centroids" in brought:
            for name, buffer in self.named_buffers():
                if name not in brought:
                    buffer.zero_()
            self._after_load(brought)
        elif "weight" in brought and not self._has_first_rows():
            self._take_gate(self.weight)
        else:
            self.reset_parameters()

    def __reduce__(self) -> Any:
        return _empty_router, (self.original_class,), self.__getstate__()


def router_class(original: type[nn.Module]) -> type[TransformersRouter]:
    """The K-Means router that is also an instance of `original`, of which it uses nothing; one class for each."""
    if original not in _made:
        names = {
            "original_class": original, "__module__": __name__, "__doc__": TransformersRouter.__doc__,
            "kernel_condition": staticmethod(lambda _: False),  # `kernels` would replace forward by the original's name
        }  # fmt: skip
        _made[original] = type(f"KMeans{original.__name__}", (TransformersRouter, original), names)
    return _made[original]


def keep_from_kernels(block: nn.Module) -> None:
    """Hugging Face's `kernels` replaces some blocks by ones that call no router: not where it is one of ours."""
    cls: Any = type(block)
    before = getattr(cls, "kernel_condition", None)
    if not hasattr(cls, "kernel_layer_name") or hasattr(before, "of_kmeans_route"):
        return

    def condition(module: nn.Module) -> bool:
        swapped = any(isinstance(child, TransformersRouter) for child in module.children())
        return not swapped and (before is None or before(module))

    condition.of_kmeans_route = True  # type: ignore[attr-defined]
    cls.kernel_condition = staticmethod(condition)


def _empty_router(original: type[nn.Module]) -> TransformersRouter:
    made = router_class(original)
    return made.__new__(made)


class Masks:
    """Keeps the attention mask of the forward of a model that is running for the routers in it."""

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.position = names.index("attention_mask") if "attention_mask" in names else -1
        self.handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    def _enter(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and 0 <= self.position < len(args):
            mask = args[self.position]
        # (B, S), true or 1 for a token; what attention has prepared for itself has more dimensions or is a dictionary
        self.mask = mask.detach().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _leave(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self.mask = None

    def of(self, x: Tensor) -> Tensor | None:
        """The mask of the tokens x (T, D), or None: with a cache it is longer than they are."""
        if self.mask is None or self.mask.numel() != x.shape[0]:
            return None
        return self.mask.reshape(-1).to(x.device)


def zero_bad_rows(_experts: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of experts: hidden states that cannot be routed become zeros, since 0 * NaN is NaN."""
    x: Tensor = args[0]
    squared_norm = x.detach().float().square().sum(-1, keepdim=True)
    return (torch.where(squared_norm.isfinite(), x, 0.0), *args[1:])
