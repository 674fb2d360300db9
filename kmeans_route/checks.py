"""Argument checks and their messages: argument, expected, got, remedy.

Options are checked at construction, tensors at the call. ValueError for shape and range, TypeError for dtype,
RuntimeError for device and state.
"""

import difflib
import math
import sys
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from kmeans_route.types import RouteOptions

GATES = ("softmax", "sigmoid", "cosine", "uniform")
GROUP_SCORES = ("top2", "max")
ACCUMULATES = ("unit", "raw")
DEFAULT_TAU = 0.2
"""Temperature of the gates with the centroids' own directions: the best of those tried (docs/quality-appendix.md)."""
WHITENED_TAU = 0.1  # about one standard deviation of the scores of whitened directions
FOREIGN = {
    "Proxy": "torch.fx.symbolic_trace sees no values; give torch.fx.Tracer an is_leaf_module that is true for this "
    "module, or use torch.export, in eval mode"
}
"""What to do about what is no tensor, by the name of its type."""
MIN_TAU = 1e-6
"""A cosine in fp32 is not known to less; and from 1e-39 on 1 / tau is infinite, and gates are NaN."""
MAX_FACTOR = 1e30
"""Of gates and bias steps: products with fp32 values stay finite, also divided by the smallest tau."""


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}: choose one of these")


def default_directions(top_k: int) -> str:
    """The rule that a router's directions follow where nobody names one."""
    return "whitened" if isinstance(top_k, int) and top_k > 1 else "centroids"  # another type is refused later


def default_tau(directions: str) -> float:
    """The temperature of the gates that suits a rule of directions."""
    return WHITENED_TAU if directions == "whitened" else DEFAULT_TAU


def check_module(name: str, value: object, remedy: str = "pass the model") -> None:
    """Raise TypeError unless `value` is a module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}: {remedy}")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The remedy of a name that is not known."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else "leave it out"


def check_option_names(owner: str, given: Iterable[str], taken: Collection[str]) -> None:
    """Raise TypeError unless all names `given` to `owner` are among those that it has `taken` from its signature."""
    for name in given:
        if name not in taken:
            raise TypeError(
                f"{owner} must get options among {', '.join(sorted(taken))}, got {name!r}: {did_you_mean(name, taken)}"
            )


def check_positive_int(name: str, value: int) -> None:
    """Raise unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: pass a whole number")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: pass a positive number")


def check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise ValueError unless low <= value < high (low < value with `low_open`); NaN never passes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: pass a float")
    inside = (low < value if low_open else low <= value) and value < high
    if not inside:
        interval = f"{'(' if low_open else '['}{low:g}, {high:g})"
        raise ValueError(f"{name} must be in {interval}, got {value}: choose a value in that range")


def check_route_options(
    num_experts: int,
    top_k: int,
    *,
    gate: str = "softmax",
    tau: float = DEFAULT_TAU,
    normalize: bool = True,
    scaling: float = 1.0,
    n_group: int | None = None,
    topk_group: int | None = None,
    group_score: str = "top2",
) -> RouteOptions:
    """Check the options of a routing over `num_experts` experts and fill in the absent groups."""
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}: pass a whole number")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in [1, {num_experts}], got {top_k}: lower top_k or raise num_experts")
    check_choice("gate", gate, GATES)
    check_choice("group_score", group_score, GROUP_SCORES)
    check_range("tau", tau, MIN_TAU, math.inf)
    check_range("scaling", scaling, 1 / MAX_FACTOR, MAX_FACTOR)
    if (n_group is None) != (topk_group is None):
        raise ValueError(
            f"n_group and topk_group must be given together, got n_group={n_group}, topk_group={topk_group}: "
            "pass both, or neither for a selection over all experts"
        )
    groups, kept = (1, 1) if n_group is None or topk_group is None else (n_group, topk_group)
    if groups < 1 or num_experts % groups:
        raise ValueError(f"n_group must divide num_experts={num_experts}, got {groups}: choose a divisor")
    if not 1 <= kept <= groups:
        raise ValueError(f"topk_group must be in [1, {groups}], got {kept}: lower topk_group or raise n_group")
    if kept * (num_experts // groups) < top_k:
        raise ValueError(
            f"topk_group * num_experts / n_group must be at least top_k={top_k}, got "
            f"{kept * (num_experts // groups)}: raise topk_group or lower top_k"
        )
    return RouteOptions(top_k, gate, float(tau), bool(normalize), float(scaling), groups, kept, group_score)


def check_centroids(weight: Tensor) -> None:
    """Raise unless `weight` is a floating point matrix of at least one row and column."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a torch.Tensor, got {type(weight).__name__}: "
            f"{FOREIGN.get(type(weight).__name__, 'pass one centroid a row')}"
        )
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"weight must be a floating point (E, D) matrix of at least one row and column, got {weight.dtype} "
            f"{tuple(weight.shape)}: pass one centroid a row"
        )


def flatten_hidden_states(x: Tensor, hidden_size: int) -> Tensor:
    """Check hidden states (..., D) and return them as (T, D)."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x must be a torch.Tensor, got {type(x).__name__}: {FOREIGN.get(type(x).__name__, 'convert it first')}"
        )
    check_plain("x", x)
    if x.is_nested:
        raise TypeError("x must be a dense tensor, got a nested one: pass x.values(), or pad it and pass a mask")
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise ValueError(
            f"x must have shape (..., {hidden_size}), got {tuple(x.shape)}: "
            f"its last dimension must equal the {hidden_size} columns of the centroids"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}: convert it with x.float()")
    if x.element_size() < 2:  # fp8 and less: scales stand elsewhere, and sums of such rows mean nothing
        raise TypeError(
            f"x must have at least 16 bits an element, got {x.dtype}: route before quantising, or x.bfloat16()"
        )
    return x if x.dim() == 2 else x.reshape(-1, hidden_size)


def check_plain(name: str, tensor: Tensor, *, state: bool = False) -> None:
    """Raise TypeError for a DTensor: whether ranks hold other tokens, and gradients add up, only its owner knows.

    Args:
        state: it belongs to a module, and does not come with the tokens.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none, and importing it takes time
    if module is None or not isinstance(tensor, module.DTensor):
        return
    remedy = f"pass what this rank holds, {name}.to_local(), and make a DTensor of the result"
    if state:
        remedy = (
            "keep routers and experts out of distribute_module and parallelize_module; fully_shard and "
            "kmeans_route.expert_parallel know them"
        )
    raise TypeError(f"{name} must be a plain tensor, got a DTensor with {tensor.placements}: {remedy}")


def check_device(name: str, tensor: Tensor, device: torch.device, owner: str) -> None:
    """Raise RuntimeError unless `tensor` is on `device`, where `owner` lives."""
    if tensor.device != device:
        raise RuntimeError(
            f"{name} is on {tensor.device} but {owner} is on {device}: move one of them with .to({str(device)!r})"
        )


def check_bias(bias: Tensor, num_experts: int, device: torch.device, owner: str) -> None:
    """Raise unless a selection bias is (E,), on the device where `owner` lives."""
    if tuple(bias.shape) != (num_experts,):
        raise ValueError(f"expert_bias must have shape {(num_experts,)}, got {tuple(bias.shape)}: one value an expert")
    check_device("expert_bias", bias, device, owner)


def flatten_mask(mask: Tensor, x: Tensor, name: str = "mask") -> Tensor:
    """Check a mask of shape x.shape[:-1] (or (T,)) and return it as (T,) bool."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}: convert it with {name}.bool(), true for real tokens")
    check_plain(name, mask)
    num_tokens = math.prod(x.shape[:-1])
    if tuple(mask.shape) not in (tuple(x.shape[:-1]), (num_tokens,)):
        raise ValueError(
            f"{name} must have shape {tuple(x.shape[:-1])}, the shape of x without its last dimension, "
            f"got {tuple(mask.shape)}: reshape the mask"
        )
    check_device(name, mask, x.device, "x")
    return mask.reshape(-1)


def check_indices(indices: Tensor, x: Tensor, top_k: int) -> Tensor:
    """Check the shape and dtype of given expert ids and return them as (T, K); values are checked in the op."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, got {got}: convert it with indices.long()")
    check_plain("indices", indices)
    num_tokens = math.prod(x.shape[:-1])
    if tuple(indices.shape) not in ((num_tokens, top_k), (*x.shape[:-1], top_k)):
        raise ValueError(
            f"indices must have shape {(num_tokens, top_k)}, got {tuple(indices.shape)}: one row of top_k ids a token"
        )
    check_device("indices", indices, x.device, "x")
    return indices.reshape(num_tokens, top_k)


def check_index_values(indices: Tensor, num_experts: int) -> None:
    """Raise ValueError unless ids (T, K) are in range and distinct in each row, or all -1: that row is to be routed.

    Only on a CPU: elsewhere the answer would stall the device, and such a row is routed as if it had not been given.
    """
    if indices.device.type != "cpu":
        return
    given = (indices != -1).any(1)
    outside = given & ((indices < 0) | (indices >= num_experts)).any(1)
    ordered = indices.sort(dim=1).values
    repeated = given & (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if outside.any():
        low, high = int(indices[outside].min()), int(indices[outside].max())
        raise ValueError(
            f"indices must be in [0, {num_experts - 1}], got values from {low} to {high}: "
            "replay ids that were recorded with this number of experts"
        )
    if repeated.any():
        row = int(repeated.nonzero()[0])
        raise ValueError(
            f"indices must be distinct in each row, got {indices[row].tolist()} in row {row}: "
            "a token goes to an expert once"
        )
