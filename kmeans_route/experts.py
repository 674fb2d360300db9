"""The experts behind a router: SwiGLU networks over rows sorted by expert, and one that sees every token."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _one_call(rows: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes these shapes: rows of a multiple of 16 bytes, in a dtype it knows, and some of them."""
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    known = rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return hasattr(F, "grouped_mm") and aligned and known and rows.shape[0] > 0


def _spans(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


@torch.library.custom_op("kmeans_route::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e] : offsets[e+1]] @ weight[e].T for every e: (M, N) from (M, D), (E, N, D), (E+1,) int32.

    One grouped_mm where it takes the shapes, else a loop over the experts, which reads the offsets back to the host.
    Rows at offsets[E] and after come out undefined. An operator of its own, because torch.compile knows grouped_mm in
    bf16 only, and because its own backward refuses expanded gradients.
    """
    with torch.autocast(rows.device.type, enabled=False):
        if _one_call(rows, weight):
            return F.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=offsets[1:])
        y = rows.new_zeros(rows.shape[0], weight.shape[1])
        for e, span in enumerate(_spans(offsets)):
            torch.mm(rows[span], weight[e].T, out=y[span])
        return y


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, _offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("kmeans_route::grouped_linear_bwd", mutates_args=())
def _grouped_linear_bwd(dy: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        dy = dy.contiguous()
        if _one_call(rows, weight):
            d_rows = F.grouped_mm(dy, weight, offs=offsets[1:])
            return d_rows, F.grouped_mm(dy.T, rows.contiguous(), offs=offsets[1:])
        d_rows, d_weight = torch.zeros_like(rows), torch.zeros_like(weight)
        for e, span in enumerate(_spans(offsets)):
            torch.mm(dy[span], weight[e], out=d_rows[span])
            torch.mm(dy[span].T, rows[span], out=d_weight[e])
        return d_rows, d_weight


@_grouped_linear_bwd.register_fake
def _(dy: Tensor, rows: Tensor, weight: Tensor, _offsets: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_grouped_linear_bwd(dy, *ctx.saved_tensors), None


grouped_linear.register_autograd(_backward, setup_context=_setup)


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the experts compute in: autocast's, or that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def apply_experts(x_sorted: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """y = (silu(x G_e) * x U_e) O_e over rows sorted by expert, (M, D) from (M, D), (E, 2I, D), (E, D, I), (E+1,)."""
    dtype = working_dtype(x_sorted)
    gate, up = grouped_linear(x_sorted.to(dtype), gate_up.to(dtype), offsets).chunk(2, dim=1)
    y: Tensor = grouped_linear(F.silu(gate) * up, down.to(dtype), offsets)
    return y


class Experts(nn.Module):
    """E SwiGLU feed-forward networks over rows sorted by expert: y = (silu(x G_e) * x U_e) O_e.

    Args:
        num_experts, hidden_size, intermediate_size: E, D, I.

    Shape:
        x_sorted (M, D), offsets (E+1,) int32 -> (M, D). Rows at offsets[E] and after come out undefined.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian, of standard deviation 1 / sqrt(inputs), drawn expert by expert.

        So ranks that hold some of the experts each can draw the same ones.
        """
        for weight in (self.gate_up, self.down):
            for expert in weight.detach():
                nn.init.normal_(expert, std=weight.shape[2] ** -0.5)

    def extra_repr(self) -> str:
        """E, D and I."""
        num_experts, hidden_size, intermediate_size = self.down.shape
        return f"num_experts={num_experts}, hidden_size={hidden_size}, intermediate_size={intermediate_size}"

    def forward(self, x_sorted: Tensor, offsets: Tensor) -> Tensor:
        """Apply expert e to rows offsets[e] to offsets[e+1] - 1."""
        return apply_experts(x_sorted, self.gate_up, self.down, offsets)


class SharedExpert(nn.Module):
    """One SwiGLU network that sees every token.

    Args:
        hidden_size, intermediate_size: D, I.

    Shape:
        (T, D) -> (T, D).
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian, of standard deviation 1 / sqrt(inputs)."""
        for linear in (self.gate_up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """y = (silu(x G) * x U) O."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y
