"""Experts that live on several ranks: rows travel to the ranks of their experts and their results travel back.

A rank holds experts start to start + L - 1 of all E. Its rows are sorted by expert, so what goes to one rank is one
contiguous piece, and no row is copied before it is sent. The pieces arrive by source rank, each sorted by expert; one
gather brings them into expert order, ranks in order within an expert: the order that one process with the tokens of all
ranks would have. The way back is the same in reverse, and so is each way's gradient.

Legend: D hidden size, E experts of all ranks, L experts of this rank, R ranks, M rows that this rank's experts get.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from kmeans_route.routing.experts import Experts, apply_experts, working_dtype

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Pieces:
    """How many rows go where.

    num_rows: of x_sorted, T*K. to_ranks, from_ranks: rows sent to and got from each rank; they sum to offsets[E] and M.
    """

    group: Any
    num_rows: int
    to_ranks: list[int]
    from_ranks: list[int]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows go where, and in what order.

    order: (M,) int64, the received row that is i-th in expert order. place: (M,) int64, its inverse.
    offsets: (L+1,) int32, local expert e owns rows offsets[e] to offsets[e+1] - 1.
    wants_dx: whether any rank needs the gradient of its rows, so that all must join in sending it.
    """

    pieces: Pieces
    order: Tensor
    place: Tensor
    offsets: Tensor
    wants_dx: bool


def make_plan(x_sorted: Tensor, offsets: Tensor, num_local: int, group: Any, *, trains: bool) -> Plan:
    """Tell all ranks how many rows each expert gets from here.

    One all-to-all of E / R + 1 int64 a rank and one read-back to the host: the lengths of what is sent and received
    must be known there. With the counts go the dtype and whether this rank will run a backward pass, so that ranks
    which disagree fail together instead of waiting for each other.

    trains: whether a parameter of the experts requires a gradient.

    Raises:
        RuntimeError: dtype or gradients differ between the ranks.
    """
    num_ranks, device = dist.get_world_size(group), offsets.device
    counts = offsets.diff().long()
    most = -(-counts.numel() // num_ranks)  # experts a rank, as torch.chunk and DTensor cut them
    dx = torch.is_grad_enabled() and x_sorted.requires_grad
    backward = dx or (torch.is_grad_enabled() and trains)
    note = 4 * DTYPES.index(x_sorted.dtype) + 2 * backward + dx
    message = torch.full((num_ranks, most + 1), note, dtype=torch.int64, device=device)
    message[:, :most] = nn.functional.pad(counts, (0, num_ranks * most - counts.numel())).view(num_ranks, most)
    answer = torch.empty_like(message)
    dist.all_to_all_single(answer, message, group=group)
    sums = torch.stack([message[:, :most].sum(1), answer[:, :most].sum(1), answer[:, most]])
    to_ranks, from_ranks, notes = sums.tolist()
    _check_notes(notes)
    received = answer[:, :num_local]  # (R, L)
    order, place = _expert_order(received, sum(from_ranks))
    local_offsets = nn.functional.pad(received.sum(0).cumsum(0), (1, 0)).int()
    wants_dx = any(other & 1 for other in notes)
    return Plan(Pieces(group, x_sorted.shape[0], to_ranks, from_ranks), order, place, local_offsets, wants_dx)


def _check_notes(notes: list[int]) -> None:
    if len({note >> 2 for note in notes}) > 1:
        dtypes = [str(DTYPES[note >> 2]) for note in notes]
        raise RuntimeError(
            f"hidden states must have one dtype on all ranks of the mesh, got {', '.join(dtypes)}: cast them, or use "
            "autocast on all ranks alike"
        )
    if len({note & 2 for note in notes}) > 1:
        without = [rank for rank, note in enumerate(notes) if not note & 2]
        raise RuntimeError(
            f"a forward must need gradients on all ranks of the mesh or on none, got none on ranks {without}: use "
            "no_grad, frozen experts and x.requires_grad on all ranks alike"
        )


def _expert_order(received: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """order and place (M,) of a `Plan`, from the counts (R, L) of each source rank."""
    flat = received.flatten()
    start_by_rank = (flat.cumsum(0) - flat).view_as(received).T.flatten()
    by_expert = received.T.flatten()
    shift = start_by_rank - (by_expert.cumsum(0) - by_expert)
    rows = torch.arange(num_rows, device=received.device)
    order = rows + shift.repeat_interleave(by_expert, output_size=num_rows)
    return order, torch.empty_like(order).scatter_(0, order, rows)


def _to_experts(rows: Tensor, order: Tensor, pieces: Pieces) -> Tensor:
    """(M, D) in expert order, from (T*K, D)."""
    received = rows.new_empty(order.numel(), rows.shape[1])
    sent = rows[: sum(pieces.to_ranks)].contiguous()
    dist.all_to_all_single(received, sent, pieces.from_ranks, pieces.to_ranks, group=pieces.group)
    return received.index_select(0, order)


def _to_tokens(rows: Tensor, place: Tensor, pieces: Pieces) -> Tensor:
    """(T*K, D), 0 after the rows that were sent, from (M, D) in expert order."""
    y, num_sent = rows.new_empty(pieces.num_rows, rows.shape[1]), sum(pieces.to_ranks)
    y[num_sent:] = 0.0
    returned, sent = y[:num_sent], rows.index_select(0, place)
    dist.all_to_all_single(returned, sent, pieces.to_ranks, pieces.from_ranks, group=pieces.group)
    return y


class _ToExperts(torch.autograd.Function):
    """Rows to their experts, gradients back.

    The weights are arguments so that the node is there, and its backward joins the exchange, on a rank whose own rows
    need no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_sorted: Tensor, plan: Plan, *_weights: Tensor) -> Tensor:
        ctx.save_for_backward(plan.place)
        ctx.pieces = plan.pieces
        return _to_experts(x_sorted, plan.order, plan.pieces)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _to_tokens(d_rows, place, ctx.pieces), None, None, None


class _ToTokens(torch.autograd.Function):
    """Results back to the ranks of their tokens, gradients to the experts."""

    @staticmethod
    def forward(ctx: Any, y_rows: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(plan.order)
        ctx.pieces = plan.pieces
        return _to_tokens(y_rows, plan.place, plan.pieces)

    @staticmethod
    def backward(ctx: Any, dy_sorted: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return _to_experts(dy_sorted, order, ctx.pieces), None


def send_rows(x_sorted: Tensor, plan: Plan, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows of all ranks for this rank's experts, (M, D) in expert order, from x_sorted (T*K, D)."""
    if plan.wants_dx:
        rows: Tensor = _ToExperts.apply(x_sorted, plan, gate_up, down)  # type: ignore[no-untyped-call]
        return rows
    return _to_experts(x_sorted, plan.order, plan.pieces)


# The lengths come from the host, and a compiler must neither drop nor move a collective: a break in the graph.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def return_rows(y_rows: Tensor, plan: Plan) -> Tensor:
    """y_sorted (T*K, D), row by row what the experts made of x_sorted, from (M, D) on their ranks."""
    y_sorted: Tensor = _ToTokens.apply(y_rows, plan)  # type: ignore[no-untyped-call]
    return y_sorted


class ParallelExperts(nn.Module):
    """`Experts` with each rank of a mesh holding some of them; takes the place of the module that it is made from.

    Args:
        experts: all E experts, with equal values on all ranks, or on the meta device.
        mesh: 1-D; rank r holds experts r * ceil(E / R) and following, ceil(E / R) of them as far as there are.
        average_gradients: divide the gradients of the weights by R.

    Shape:
        x_sorted (M, D), offsets (E+1,) int32 -> (M, D), of this rank's tokens. Rows at offsets[E] and after come out 0.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh, *, average_gradients: bool) -> None:
        super().__init__()
        self.mesh, self.average_gradients = mesh, average_gradients
        for name, weight in experts.named_parameters():
            shards = distribute_tensor(weight.detach(), mesh, [Shard(0)])
            self.register_parameter(name, nn.Parameter(shards, requires_grad=weight.requires_grad))

    gate_up: DTensor
    down: DTensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The numbers that `Experts.reset_parameters` draws from the same state of the global generator."""
        for weight in (self.gate_up, self.down):
            local = weight.to_local()
            start = self.mesh.get_local_rank() * -(-weight.shape[0] // self.mesh.size())
            elsewhere = local.new_empty(local.shape[1:])
            for e in range(weight.shape[0]):
                expert = local[e - start] if start <= e < start + local.shape[0] else elsewhere
                nn.init.normal_(expert, std=weight.shape[2] ** -0.5)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes whole plain tensors too, as one process saves them: each rank keeps its own experts of them."""
        for name, own in self.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(own, DTensor) and given is not None and not isinstance(given, DTensor):
                whole = distribute_tensor(given, own.device_mesh, own.placements, src_data_rank=None)
                state_dict[prefix + name] = whole
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """E, D, I and R."""
        num_experts, hidden_size, intermediate_size = self.down.shape
        return (
            f"num_experts={num_experts}, hidden_size={hidden_size}, intermediate_size={intermediate_size}, "
            f"num_ranks={self.mesh.size()}"
        )

    def forward(self, x_sorted: Tensor, offsets: Tensor) -> Tensor:
        """Apply expert e, wherever it is, to rows offsets[e] to offsets[e+1] - 1. All ranks must call it."""
        rows, gate_up, down, plan = self._send(x_sorted, offsets)
        y: Tensor = return_rows(apply_experts(rows, gate_up, down, plan.offsets), plan)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _send(self, x_sorted: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Plan]:
        gate_up, down = self._local(self.gate_up), self._local(self.down)
        x_sorted = x_sorted.to(working_dtype(x_sorted))  # as the experts would: half the bytes under autocast
        trains = gate_up.requires_grad or down.requires_grad
        plan = make_plan(x_sorted, offsets, down.shape[0], self.mesh.get_group(), trains=trains)
        return send_rows(x_sorted, plan, gate_up, down), gate_up, down, plan

    def _local(self, weight: DTensor) -> Tensor:
        local = weight.to_local()
        if self.average_gradients and self.mesh.size() > 1 and local.requires_grad:
            factor = 1 / self.mesh.size()
            local.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
        return local
