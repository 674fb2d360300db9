"""Other packages' kernels as contestants on a GPU, each held against fp64 before it is timed: the table PEERS.

None of them is needed. What is installed is found; a GPU's machine without a network gets the rest as wheels from a
folder (`--wheels DIR`, which `make gpu-wheels` fills from peers.txt). They are run, never shipped: no code of theirs
is here.

Parts: eval (hidden states to ids and gates), assignment (the nearest of the unit rows, K = 1), dispatch (copies sorted
by expert, from given ids), combine (from given expert outputs and gates), experts (from given routing to the sum over
experts, forward).

Legend: T tokens, D hidden size, E experts, K top_k, I intermediate size.
"""

import importlib
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from benchmarks.gpu.checks import Problem, routing_alone
from benchmarks.gpu.timing import Maker, Parts, Run, contestants, num_checked, product
from benchmarks.harness.checks import one_expert_after_another
from benchmarks.harness.peers import TRANSFORMERS, Codebook, find, split, transformers_router
from benchmarks.harness.rivals import index_dispatch
from benchmarks.harness.truth import assert_close_to_truth
from kmeans_route import combine, dispatch, route
from kmeans_route.bench import truth
from kmeans_route.bench.truth import CHUNK, assert_near, chunks
from kmeans_route.checks import DEFAULT_TAU as TAU
from kmeans_route.routing.experts import apply_experts
from kmeans_route.testing import assert_same_selection
from kmeans_route.types import Dispatch, Routing

INTERMEDIATE = {"OLMoE": 1024, "tiny": 16}
"""Shape -> I of those whose experts are timed."""
EXPERT_ROWS = 256
"""Tokens whose experts are computed in fp64."""


class Peer(NamedTuple):
    """A row of the table. name: of the contestant. package: its distribution. module: what is imported of it.

    make: of a problem and the module, the run with its check. slow: it tries so many launch configurations at each
    shape that ten minutes would hold little else.
    """

    name: str
    package: str
    module: str
    part: str
    make: Callable[[Problem, Any], Run]
    slow: bool = False


def unpack(wheels: Path, folder: Path) -> None:
    """Wheels of pure Python, from now on importable from `folder`; whatever is installed already comes first."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path.append(str(folder))
    importlib.invalidate_caches()


def hidden_states(p: Problem) -> Tensor:
    """x without its gradient, which no peer here is asked for."""
    return p.x.detach()


def learned_run(p: Problem, run: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype, note: str = "") -> Run:
    """Gates and ids of a softmax router whose weight has the directions for rows. dtype: of its logits."""

    def check() -> None:
        gates, ids = run()
        truth.check_learned(hidden_states(p).to(dtype), p.directions, gates, ids.long(), num_checked(p))

    return Run(run, check=check, note=note)


def select_run(p: Problem, select: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Run:
    """The library's product, then `select` of logits and K."""
    logits, note = product(hidden_states(p), p.directions)
    return learned_run(p, lambda: select(logits(), p.cell.top_k), logits().dtype, note)


def moe_ops_top_k(p: Problem, module: Any) -> Run:
    """Their top-k, and softmax of what it selects."""
    return select_run(p, module.fused_topk_softmax)


def triton_kernels_top_k(p: Problem, module: Any) -> Run:
    """Triton's own top-k and softmax, which also packs the choice into bits. K must be a power of two."""
    return select_run(p, lambda logits, top_k: module.topk_forward(logits, top_k)[:2])


def softmax_router(name: str, p: Problem, _module: Any) -> Run:
    """A router of transformers, with the directions for its weight."""
    router, x = transformers_router(TRANSFORMERS[name], p.shape, p.device), hidden_states(p)
    return learned_run(p, lambda: router(x, p.directions, p.cell.top_k)[:2], x.dtype)


def sigmoid_router(p: Problem, _module: Any) -> Run:
    """DeepSeek-V3's router of transformers, in one group."""
    router = transformers_router("deepseek_v3", p.shape, p.device, n_group=1, topk_group=1)
    x = hidden_states(p)

    def run() -> tuple[Tensor, Tensor]:
        gates, ids, _ = router(x, p.directions, p.cell.top_k)
        return gates, ids

    return Run(run, check=lambda: check_sigmoid(p, *run()))


def check_sigmoid(p: Problem, gates: Tensor, ids: Tensor) -> None:
    """Ids of the largest logits, in any order, and their sigmoids over their sum; logits in fp32."""
    rows = slice(0, num_checked(p))
    logits = hidden_states(p)[rows].double() @ p.directions.double().T
    # The logits' own rounding; a sigmoid's slope is 1/4 at the most, so it is off by no more.
    tolerance = 2 * -(-p.cell.hidden_size // 16) * 2**-23 * float(logits.abs().max())
    scores = logits.sigmoid()
    by_value = scores.gather(1, ids[rows]).argsort(dim=1, descending=True, stable=True)
    sorted_ids, sorted_gates = (part[rows].gather(1, by_value) for part in (ids, gates))
    assert_same_selection(sorted_ids, scores, tolerance=tolerance, cap=truth.NEAR_TIE_CAP)
    chosen = scores.gather(1, sorted_ids)
    assert_near("gates", sorted_gates, chosen / chosen.sum(1, keepdim=True))


def nearest_run(p: Problem, run: Callable[[], Tensor]) -> Run:
    """Ids (T,) of the nearest of the unit rows."""

    def check() -> None:
        rows = slice(0, num_checked(p))
        scores = truth.cosines(p.x.detach()[rows], p.directions)
        tolerance = truth.score_tolerance(p.cell.hidden_size, scores)
        assert_same_selection(run()[rows, None].long(), scores, tolerance=tolerance, cap=truth.NEAR_TIE_CAP)

    return Run(run, check=check)


def flashlib_nearest(p: Problem, module: Any) -> Run:
    """Their Euclidean kernel, with their table's configuration: unit rows, whose squares are 1, decide by product."""
    x, directions = hidden_states(p)[None], p.directions[None]
    squares = torch.ones(1, p.cell.num_experts, device=p.device)
    return nearest_run(p, lambda: module.euclid_assign_triton(x, directions, c_sq=squares)[0])


def flash_kmeans_nearest(p: Problem, module: Any) -> Run:
    """Their cosine kernel."""
    x, directions = hidden_states(p)[None], p.directions[None]
    return nearest_run(p, lambda: module.cosine_assign_triton(x, directions)[0])


def codebook_nearest(p: Problem, _module: Any) -> Run:
    """Their cosine codebook, which computes in fp32."""
    codes, x = Codebook(p.directions.float(), 0.9, 1.0), hidden_states(p)
    return nearest_run(p, lambda: codes(x.float(), update=False))


def check_permuted(p: Problem, ids: Tensor, x_sorted: Tensor, rows: Tensor, offsets: Tensor) -> None:
    """Copies by expert, in any order within one: token t's k-th lies in rows[t, k], among those of expert ids[t, k].

    ids, rows: (T, K). x_sorted: (T*K, D). offsets: (E+1,), where each expert's rows begin.
    """
    counts = torch.bincount(ids.flatten(), minlength=p.cell.num_experts)
    assert torch.equal(offsets[1:].long(), counts.cumsum(0)), "offsets are not the counts' sum"
    every_row = torch.arange(rows.numel(), device=p.device)
    assert torch.equal(rows.flatten().sort().values, every_row), "rows are not a permutation"
    expert_of_row = torch.arange(len(counts), device=p.device).repeat_interleave(counts)
    assert torch.equal(expert_of_row[rows], ids), "a row lies among those of another expert"
    for tokens in chunks(len(ids)):
        copies = hidden_states(p)[tokens, None].expand(-1, ids.shape[1], -1)
        assert torch.equal(x_sorted[rows[tokens]], copies), f"x_sorted differs in {tokens}"


def moe_ops_dispatch(p: Problem, module: Any) -> Run:
    """Their counting sort with copies. Atomics deal out the rows of an expert, so their order differs from run to
    run."""
    ids, x = routing_alone(p).indices, hidden_states(p)
    ids_32 = ids.int()

    def run() -> Any:
        return module.permute(x, ids_32, E=p.cell.num_experts)

    def check() -> None:
        x_sorted, row_of, offsets = run()
        check_permuted(p, ids, x_sorted, row_of.view(ids.shape[1], -1).T.long(), offsets)

    return Run(run, check=check)


def triton_kernels_dispatch(p: Problem, module: Any) -> Run:
    """Their sort of the packed choice that their top-k made, then an index. K must be a power of two."""
    x, top_k = hidden_states(p), p.cell.top_k
    logits, note = product(x, p.directions)
    gates, ids, bits = module.topk_forward(logits(), top_k)

    def run() -> tuple[Any, Tensor]:
        made = module.SparseMatrix(ids, gates, bits).mask_metadata
        return made, x.index_select(0, made.col_sorted_indx // top_k)

    def check() -> None:
        made, x_sorted = run()
        offsets = torch.nn.functional.pad(made.col_sum.cumsum(0), (1, 0))
        check_permuted(p, ids.long(), x_sorted, made.row_sorted_indx.view_as(ids).long(), offsets)

    return Run(run, check=check, note=note)


def check_combined(p: Problem, gates: Tensor, positions: Tensor, y: Tensor) -> None:
    """Each token's weighted sum of its rows of the expert outputs p.rows."""
    for rows in chunks(p.cell.num_tokens, CHUNK // 4):
        assert_near("combine", y[rows], (gates[rows, :, None].double() * p.rows[positions[rows]].double()).sum(1))


def moe_ops_combine(p: Problem, module: Any) -> Run:
    """Their gathered sum, of the rows that kmeans_route's dispatch has chosen."""
    routing, sent = p.forward(p.ours)
    row_of, gates = sent.positions.T.int().flatten(), routing.weights.detach()

    def run() -> Tensor:
        y: Tensor = module.unpermute(p.rows, row_of, gates, *gates.shape)
        return y

    return Run(run, check=lambda: check_combined(p, gates, sent.positions, run()))


class SomeExperts:
    """Weights of experts, gate_up (E, 2I, D) and down (E, D, I), drawn on the device in the dtype of x."""

    def __init__(self, p: Problem) -> None:
        width, inner, generator = p.cell.hidden_size, INTERMEDIATE[p.cell.shape], torch.Generator(p.device)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(p.cell.num_experts, *shape, device=p.device, generator=generator, dtype=p.x.dtype)
            return drawn.mul_(shape[1] ** -0.5)

        generator.manual_seed(2)
        self.gate_up, self.down = normal(2 * inner, width), normal(width, inner)


def experts_run(p: Problem, make: Callable[[SomeExperts, Routing], Callable[[], Tensor]]) -> Run:
    """From routing to the weighted sum over experts, (T, D)."""
    experts, routing = SomeExperts(p), routing_alone(p)
    run = make(experts, routing)

    def check() -> None:
        rows = slice(0, min(EXPERT_ROWS, p.cell.num_tokens))
        given = experts, routing.indices[rows], routing.weights[rows]
        exact, plain = (one_expert_after_another(*given, p.x.detach()[rows].to(dtype))
                        for dtype in (torch.float64, p.x.dtype))  # fmt: skip
        assert_close_to_truth(run()[rows], exact, plain, name="y")

    return Run(run, check=check)


def liger_experts(p: Problem, module: Any) -> Run:
    """Their fused mixture layer, given the same ids and gates."""
    x = hidden_states(p)

    def make(experts: SomeExperts, routing: Routing) -> Callable[[], Tensor]:
        ids, apply = routing.indices.int(), module.LigerFusedMoEFunction.apply
        return lambda: apply(x, experts.gate_up, experts.down, ids, routing.weights)

    return experts_run(p, make)


MOE_OPS, TRITON_KERNELS = ("moe-ops", "moe_ops"), ("tokenspeed-triton-kernels", "triton_kernels.topk")
PEERS = (
    Peer("product, moe-ops top-k", *MOE_OPS, "eval", moe_ops_top_k),
    Peer("product, triton_kernels top-k", *TRITON_KERNELS, "eval", triton_kernels_top_k),
    *(Peer(f"transformers {name}", "transformers", f"transformers.models.{module}.modeling_{module}", "eval",
           partial(softmax_router, name)) for name, module in TRANSFORMERS.items()),
    Peer("transformers DeepSeek-V3", "transformers", "transformers.models.deepseek_v3.modeling_deepseek_v3", "eval",
         sigmoid_router),
    Peer("flashlib", "flashlib", "flashlib.primitives.kmeans.triton.assign", "assignment", flashlib_nearest),
    Peer("flash-kmeans", "flash-kmeans", "flash_kmeans.assign_euclid_triton", "assignment", flash_kmeans_nearest,
         slow=True),
    Peer("vector-quantize-pytorch", "vector-quantize-pytorch", "vector_quantize_pytorch", "assignment",
         codebook_nearest),
    Peer("moe-ops permute", *MOE_OPS, "dispatch", moe_ops_dispatch),
    Peer("triton_kernels sort, index", *TRITON_KERNELS, "dispatch", triton_kernels_dispatch),
    Peer("moe-ops unpermute", *MOE_OPS, "combine", moe_ops_combine),
    Peer("Liger", "liger-kernel", "liger_kernel.ops.fused_moe", "experts", liger_experts, slow=True),
)  # fmt: skip


def one_configuration(packages: set[str]) -> None:
    """Leave the first launch configuration of each kernel of these packages that has several."""
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in packages]:
        for value in list(getattr(module, "__dict__", {}).values()):
            if isinstance(value, Autotuner):
                value.configs = value.configs[:1]


def look_up(*, slow: bool, dry: bool) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Name -> module of the peers that can be imported; a record of them and of those that cannot; and its text.

    slow: those too that try many launch configurations. dry: for the interpreter, in which nothing can be tried.
    """
    wanted = {row.name: row for row in PEERS if slow or not row.slow}
    found, absent, versions = split(
        {name: find(row.package, partial(importlib.import_module, row.module)) for name, row in wanted.items()}
    )
    record = {"kind": "peers", "absent": absent, "versions": versions}
    if dry:
        one_configuration({row.module.partition(".")[0] for row in wanted.values()})
    there = ", ".join(dict.fromkeys(versions[name] for name in found)) or "none"
    missing = dict.fromkeys(f"{wanted[name].package} ({why})" for name, why in absent.items())
    text = there + (f"; absent: {', '.join(missing)}" if missing else "")
    return {name: peer.function for name, peer in found.items()}, record, text


def ours(p: Problem) -> dict[str, dict[str, Maker]]:
    """Part -> this package and plain PyTorch, the contestants beside which the peers stand."""
    x, no_bias = hidden_states(p), torch.zeros_like(p.bias)

    def nearest() -> Run:
        def run() -> Routing:
            return route(x, p.centroids, 1, no_bias, tau=TAU, directions=p.directions, backend="triton")

        check = partial(truth.check_routing, x, p.directions, no_bias, TAU)
        return Run(run, check=lambda: check(run(), num_checked(p)))

    def copies() -> Run:
        routing = routing_alone(p)

        def run() -> Dispatch:
            return dispatch(x, routing, backend="triton")

        def check() -> None:
            sent = run()
            check_permuted(p, routing.indices, sent.x_sorted, sent.positions, sent.offsets)

        return Run(run, check=check)

    def index() -> Run:
        ids = routing_alone(p).indices
        return Run(lambda: index_dispatch(x, ids))

    def experts(some: SomeExperts, routing: Routing) -> Callable[[], Tensor]:
        def run() -> Tensor:
            sent = dispatch(x, routing, backend="triton")
            rows = apply_experts(sent.x_sorted, some.gate_up, some.down, sent.offsets)
            return combine(rows, routing, sent, backend="triton")

        return run

    timed = contestants(p)
    return {
        "eval": {name: timed["eval"][name] for name in ("kmeans_route", "product, top-k")},
        "assignment": {"kmeans_route": nearest},
        "dispatch": {"kmeans_route": copies, "index": index},
        "combine": {"kmeans_route": timed["combine"]["kmeans_route"]},
        "experts": {"kmeans_route": lambda: experts_run(p, experts)},
    }


def peer_contestants(modules: dict[str, Any], p: Problem) -> Parts:
    """Part -> contestants, of the parts in which a peer takes part."""
    parts: Parts = {}
    for row in PEERS:
        if row.name in modules and (row.part != "experts" or p.cell.shape in INTERMEDIATE):
            parts.setdefault(row.part, ours(p)[row.part])[row.name] = partial(row.make, p, modules[row.name])
    return parts
