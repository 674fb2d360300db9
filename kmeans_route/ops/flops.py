"""FLOPs of the operators, for `torch.utils.flop_counter`, which cannot look into them.

A product and an addition are two, as PyTorch counts. Copies, sums of copies, gates and statistics are none: PyTorch
counts matrix products alone.

    route, route_dispatch   2 T E D
    their backward          2 T K D, or 2 T E D where a gradient comes for the scores of all experts
    directions, backward    2 T E D
    grouped product         2 M N D, backward 4 M N D; M = T K rows, of padding too
    combine                 2 T K D, backward 4 T K D

Legend: T tokens, D hidden size, E experts, K top_k, M rows, N outputs of an expert.
"""

import sys
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kmeans_route.ops.route import split_back
from kmeans_route.types import RouteOptions


def _scores(x: Any, directions: Any, *_: Any, **__: Any) -> int:
    """x (T, D) by directions (E, D)."""
    return 2 * int(prod(x)) * int(directions[0])


def _route_bwd(*flat: Any, **_: Any) -> int:
    x, directions, _saved, grads, (_d_x_sorted, _positions, *options, _name) = split_back(flat)
    through = RouteOptions(*options)
    dense = grads.scores is not None or (through.over_all and grads.weights is not None)
    return 2 * int(prod(x)) * (int(directions[0]) if dense else through.top_k)


def _grouped_linear(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(rows)) * int(weight[1])


def _grouped_linear_bwd(_dy: Any, rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _grouped_linear(rows, weight)


def _combine(y_sorted: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(y_sorted))


def _combine_bwd(_dy: Any, y_sorted: Any, *_: Any, **__: Any) -> int:
    return 2 * _combine(y_sorted)


FORMULAS = {
    "route": _scores,
    "route_dispatch": _scores,
    "route_bwd": _route_bwd,
    "directions_bwd": _scores,
    "grouped_linear": _grouped_linear,
    "grouped_linear_bwd": _grouped_linear_bwd,
    "combine": _combine,
    "combine_bwd": _combine_bwd,
}


NAMESPACE = "kmeans_route::".removesuffix("::")  # `hub/build.py` writes another one, and leaves out grouped products


def tell_flop_counters() -> None:
    """Register the formulas, once, as soon as somebody has imported PyTorch's counter.

    Importing it here would take 0.2 s and bring Triton along. A counter copies the registry when it is made, so one
    that is counting already is told by itself.
    """
    counter = None if torch.compiler.is_compiling() else sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    operators = getattr(torch.ops, NAMESPACE)
    if operators.route in counter.flop_registry:
        return
    packets = {getattr(operators, name): formula for name, formula in FORMULAS.items() if hasattr(operators, name)}
    for packet, formula in packets.items():
        counter.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counting = getattr(mode, "counter", None)
        if isinstance(counting, counter.FlopCounterMode):
            counting.flop_registry.update({packet: counter.flop_registry[packet] for packet in packets})
