"""Other packages' ways to do the same, as contestants: their own code, called as they document it.

Every package is optional and imported when its peer is looked for. A peer that cannot run on this machine stays in the
list with the reason, taken from its own import or from one call on a small input, so that a contest can say so. Whether
a peer that runs is right, `checks.py` and `clusters.py` decide.

    pip install --no-deps flash-kmeans liger-kernel vector-quantize-pytorch einops einx frozendict loguru \\
        torch-einops-utils

(--no-deps, so that none of them replaces torch.)

Legend: T tokens, D hidden size, E experts, K top_k, I intermediate size.
"""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmeans_route.bench.baselines import LearnedResult, softmax_plain
from kmeans_route.bench.clock import reason
from kmeans_route.testing import BenchShape, make_centroids, make_hidden_states

TRANSFORMERS = {"Mixtral": "mixtral", "Qwen3-MoE": "qwen3_moe", "OLMoE": "olmoe", "GPT-OSS": "gpt_oss"}
"""Models whose router computes softmax, top-k, renormalise -> their module."""


class Peer(NamedTuple):
    """function: what to call, or a module of such; None where it cannot run here, with the reason. version: the
    package and its version.

    kind: how a router's gates are defined, "softmax" or "sigmoid"; groups: (n_group, topk_group) of a router.
    """

    function: Any
    version: str
    reason: str = ""
    kind: str = "softmax"
    groups: tuple[int, int] = (1, 1)


def version_of(package: str) -> str:
    """The distribution's name and version, or that it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, not installed"


def find(package: str, make: Callable[[], Any], *small_input: Any, **fields: Any) -> Peer:
    """The peer that `make` returns, a module too, once it has taken `small_input`; or the reason why it does not.

    Args:
        package: distribution that it comes from.
        make: imports it and returns the function.
        small_input: arguments of one call, whose result is not looked at; none for no call.
        fields: kind and groups of the peer.
    """
    version = version_of(package)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages' imports
            function = make()
            if small_input:
                function(*small_input)
    except Exception as error:
        return Peer(None, version, reason(error), **fields)
    return Peer(function, version, **fields)


def cuda_only(package: str, module: str) -> Peer:
    """A peer all of whose kernels are CUDA's: not run by suites of the CPU, even where its module imports."""
    why = "its kernels are for CUDA devices alone"
    try:
        importlib.import_module(module)
    except Exception as error:
        why = reason(error)
    return Peer(None, version_of(package), why)


def split(peers: dict[str, Peer]) -> tuple[dict[str, Peer], dict[str, str], dict[str, str]]:
    """Those that run; name -> reason of those that do not; name -> version of all."""
    return (
        {name: peer for name, peer in peers.items() if peer.function is not None},
        {name: peer.reason for name, peer in peers.items() if peer.function is None},
        {name: peer.version for name, peer in peers.items()},
    )


def routers(shape: BenchShape) -> dict[str, Peer]:
    """Learned routers that take hidden states, as `LearnedFunction`s: x (T, D), weight (E, D), K -> gates and ids."""
    weight = make_centroids(shape.num_experts, shape.hidden_size)
    small = (make_hidden_states(4, shape.hidden_size), weight, shape.top_k)
    found = {
        f"transformers {name}": find("transformers", partial(transformers_router, module, shape), *small)
        for name, module in TRANSFORMERS.items()
    }
    # Its own groups at its own size; a smaller number of experts is one group.
    groups = (8, 4) if shape.num_experts == 256 and shape.top_k <= 128 else (1, 1)
    found["transformers DeepSeek-V3"] = find(
        "transformers",
        partial(transformers_router, "deepseek_v3", shape, n_group=groups[0], topk_group=groups[1]),
        *small,
        kind="sigmoid",
        groups=groups,
    )
    found["TransformerEngine fused router"] = cuda_only("transformer_engine", "transformer_engine.pytorch.router")
    found["triton_kernels topk"] = cuda_only("triton_kernels", "triton_kernels.topk")
    return found


def _transformers_config(module: str, shape: BenchShape, **options: Any) -> Any:
    """The model's config with this shape, gates renormalised and not scaled."""
    from transformers import AutoConfig

    sizes = {"hidden_size": shape.hidden_size, "num_experts_per_tok": shape.top_k, "routed_scaling_factor": 1.0}
    config = AutoConfig.for_model(module, **sizes, norm_topk_prob=True, **options)
    for name in ("num_experts", "num_local_experts"):
        setattr(config, name, shape.num_experts)
    return config


def transformers_router(
    module: str, shape: BenchShape, device: torch.device | str = "cpu", **options: Any
) -> Callable[..., Any]:
    """A model's router as a `LearnedFunction`. options: of the model's config."""
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    (name,) = (n for n in vars(code) if n.lower().endswith("topkrouter"))
    router: nn.Module = getattr(code, name)(_transformers_config(module, shape, **options))
    router._parameters.pop("weight")
    if router._parameters.pop("bias", None) is not None:
        router.bias = torch.zeros(shape.num_experts)
    router.to(device)

    def route(x: Tensor, weight: Tensor, top_k: int) -> LearnedResult:
        assert top_k == shape.top_k
        router.weight = weight  # a plain attribute, so that the gradient goes to the contest's own leaf
        if "bias" in vars(router):
            router.bias = router.bias.to(x)
        _, gates, indices = router(x)
        return LearnedResult(gates, indices, None)

    return route


def layers(shape: BenchShape, gate_up: Tensor, down: Tensor) -> dict[str, Peer]:
    """Softmax mixtures with given experts, as functions of x (T, D) and the router's weight (E, D) -> y (T, D).

    gate_up (E, 2 I, D) and down (E, D, I) are leaves; the gradient goes to them.
    """
    small = (make_hidden_states(4, shape.hidden_size), make_centroids(shape.num_experts, shape.hidden_size))
    found = {
        f"transformers OLMoE block, {way}": find(
            "transformers", partial(_transformers_layer, shape, gate_up, down, way), *small
        )
        for way in ("eager", "grouped_mm")
    }
    found["Liger fused MoE"] = find("liger_kernel", partial(_liger_layer, shape, gate_up, down), *small)
    found["triton_kernels routed matmul"] = cuda_only("triton_kernels", "triton_kernels.matmul_ogs")
    return found


def _transformers_layer(shape: BenchShape, gate_up: Tensor, down: Tensor, way: str) -> Callable[..., Any]:
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = _transformers_config("olmoe", shape, intermediate_size=down.shape[2])
    config._experts_implementation = way
    with torch.device("meta"):
        block = OlmoeSparseMoeBlock(config)
    block.gate._parameters.pop("weight")
    for name, value in (("gate_up_proj", gate_up), ("down_proj", down)):
        block.experts._parameters.pop(name)
        setattr(block.experts, name, value)

    def layer(x: Tensor, weight: Tensor) -> Any:
        block.gate.weight = weight
        return block(x[None])[0]

    return layer


def _liger_layer(shape: BenchShape, gate_up: Tensor, down: Tensor) -> Callable[..., Any]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def layer(x: Tensor, weight: Tensor) -> Any:
        gates, indices, _ = softmax_plain(x, weight, shape.top_k)
        return LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), gates)

    return layer


def permutations() -> dict[str, Peer]:
    """Dispatch and combine of packages whose kernels are CUDA's: none of them runs on a CPU."""
    return {
        "TransformerEngine permute": cuda_only("transformer_engine", "transformer_engine.pytorch.permutation"),
        "triton_kernels routing": cuda_only("triton_kernels", "triton_kernels.routing"),
    }


class Codebook:
    """The codebook of vector-quantize-pytorch, cosine and EMA, no code replaced, from given unit rows (E, D).

    It averages sums where a K-Means router averages means. The two agree where every code gets `tokens_per_code` tokens
    in every batch, from codes that stand for as many.
    """

    def __init__(self, centroids: Tensor, decay: float, tokens_per_code: float) -> None:
        from vector_quantize_pytorch.vector_quantize_pytorch import Codebook as Theirs

        num_codes, dim = centroids.shape
        self.module = Theirs(
            dim=dim, codebook_size=num_codes, decay=decay, threshold_ema_dead_code=0, use_cosine_sim=True
        ).to(centroids.device)
        self.module.embed.copy_(centroids)
        self.module.embed_avg.copy_(centroids * tokens_per_code)
        self.module.cluster_size.fill_(tokens_per_code)

    @torch.no_grad()
    def __call__(self, x: Tensor, *, update: bool) -> Tensor:
        """Ids (T,) of x (T, D); with `update` the codes move."""
        self.module.train(update)
        ids: Tensor = self.module(F.normalize(x, dim=1)[None])[1][0]
        return ids


def assignments(centroids: Tensor) -> dict[str, Peer]:
    """K = 1: functions of x (T, D) -> ids (T,), the unit row of `centroids` (E, D) with the largest cosine."""
    small = make_hidden_states(4, centroids.shape[1])

    def codebook() -> Callable[..., Any]:
        codes = Codebook(centroids, 0.9, 1.0)
        return lambda x: codes(x, update=False)

    def flash_torch() -> Callable[..., Any]:
        from flash_kmeans.torch_fallback import euclid_assign_torch_native_chunked

        # Among unit rows the nearest is the one of the largest product.
        return lambda x: euclid_assign_torch_native_chunked(x[None], centroids[None], x.square().sum(1)[None])[0].long()

    def flash_triton() -> Callable[..., Any]:
        from flash_kmeans.assign_euclid_triton import cosine_assign_triton

        return lambda x: cosine_assign_triton(x[None], centroids[None])[0].long()

    return {
        "vector-quantize-pytorch codebook": find("vector-quantize-pytorch", codebook, small),
        "flash-kmeans, its PyTorch path": find("flash-kmeans", flash_torch, small),
        "flash-kmeans, its kernels": find("flash-kmeans", flash_triton, small),
    }


def updates(centroids: Tensor, decay: float, tokens_per_code: float) -> dict[str, Peer]:
    """K = 1: functions of x (T, D) -> (ids (T,), directions (E, D) after the update).

    flash-kmeans takes the step of Lloyd's algorithm, to the mean's direction, from `centroids` each time; the codebook
    moves by `decay` from call to call.
    """
    small = make_hidden_states(4, centroids.shape[1])

    def codebook() -> Callable[..., Any]:
        codes = Codebook(centroids, decay, tokens_per_code)

        def update(x: Tensor) -> tuple[Tensor, Tensor]:
            return codes(x, update=True), codes.module.embed[0]

        return update

    def flash_torch() -> Callable[..., Any]:
        from flash_kmeans.torch_fallback import _centroid_update_torch_native, euclid_assign_torch_native_chunked

        def update(x: Tensor) -> tuple[Tensor, Tensor]:
            unit = F.normalize(x, dim=1)[None]
            ids = euclid_assign_torch_native_chunked(unit, centroids[None], unit.square().sum(2)).long()
            return ids[0], _centroid_update_torch_native(unit, ids, centroids[None], "cosine")[0]

        return update

    def flash_triton() -> Callable[..., Any]:
        from flash_kmeans.assign_euclid_triton import cosine_assign_triton
        from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_cosine

        def update(x: Tensor) -> tuple[Tensor, Tensor]:
            unit = F.normalize(x, dim=1)[None]
            ids = cosine_assign_triton(unit, centroids[None])
            return ids[0].long(), triton_centroid_update_sorted_cosine(unit, ids, centroids[None])[0]

        return update

    return {
        "vector-quantize-pytorch codebook": find("vector-quantize-pytorch", codebook),
        "flash-kmeans, its PyTorch path": find("flash-kmeans", flash_torch, small),
        "flash-kmeans, its kernels": find("flash-kmeans", flash_triton, small),
    }
