"""The experts behind a router: SwiGLU networks over rows sorted by expert, and one that sees every token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmeans_route.checks import check_plain
from kmeans_route.ops.grouped_linear import grouped_linear


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the experts compute in: autocast's, or that of x."""
    device = x.device.type  # "meta" has no autocast, and does not like to be asked
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


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
        device, dtype: of the weights; None for torch's defaults.

    Shape:
        x_sorted (M, D), offsets (E+1,) int32 -> (M, D). Rows at offsets[E] and after may hold anything and come out 0.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        gate_up, down = (num_experts, 2 * intermediate_size, hidden_size), (num_experts, hidden_size, intermediate_size)
        self.gate_up = nn.Parameter(torch.empty(gate_up, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(down, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian, of standard deviation 1 / sqrt(inputs), drawn expert by expert.

        So ranks that hold some of the experts each can draw the same ones.
        """
        for weight in (self.gate_up, self.down):
            for expert in weight.detach():
                nn.init.normal_(expert, std=weight.shape[2] ** -0.5)

    def check_plain(self) -> None:
        """Raise TypeError where the weights are DTensors."""
        check_plain("experts.gate_up", self.gate_up, state=True)
        check_plain("experts.down", self.down, state=True)

    def extra_repr(self) -> str:
        """E, D and I."""
        num_experts, hidden_size, intermediate_size = self.down.shape
        return f"num_experts={num_experts}, hidden_size={hidden_size}, intermediate_size={intermediate_size}"

    def forward(self, x_sorted: Tensor, offsets: Tensor) -> Tensor:
        """Apply expert e to rows offsets[e] to offsets[e+1] - 1."""
        return apply_experts(x_sorted, self.gate_up, self.down, offsets)


class SharedExpert(nn.Module):
    """One SwiGLU network that sees every token, (T, D) -> (T, D); hidden_size D, intermediate_size I."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)
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
