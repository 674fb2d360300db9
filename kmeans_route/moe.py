"""A sparse mixture-of-experts layer whose router is a flag: "kmeans", "softmax" or "sigmoid"."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmeans_route.checks import check_choice, check_positive_int, flatten_hidden_states, flatten_mask
from kmeans_route.functional import combine, dispatch
from kmeans_route.learned import LearnedRouter
from kmeans_route.router import KMeansRouter
from kmeans_route.types import Dispatch, MoEDetails, Routing

ROUTERS = ("kmeans", "softmax", "sigmoid")


class Experts(nn.Module):
    """E SwiGLU feed-forward networks over rows sorted by expert: y = (silu(x G_e) * x U_e) O_e.

    Args:
        num_experts, hidden_size, intermediate_size: E, D, I.

    Shape:
        x_sorted (M, D), offsets (E+1,) int32 -> (M, D). Rows at offsets[E] and after may hold anything.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian, of standard deviation 1 / sqrt(inputs)."""
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)

    def extra_repr(self) -> str:
        """E, D and I."""
        num_experts, hidden_size, intermediate_size = self.down.shape
        return f"num_experts={num_experts}, hidden_size={hidden_size}, intermediate_size={intermediate_size}"

    def forward(self, x_sorted: Tensor, offsets: Tensor) -> Tensor:
        """Apply expert e to rows offsets[e] to offsets[e+1] - 1."""
        if x_sorted.shape[0] == 0:
            return x_sorted
        device = x_sorted.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_sorted.dtype
        x_sorted = x_sorted.to(dtype)
        gate, up = grouped_linear(x_sorted, self.gate_up.to(dtype), offsets).chunk(2, dim=1)
        return grouped_linear(F.silu(gate) * up, self.down.to(dtype), offsets)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e] : offsets[e+1]] @ weight[e].T for every e: (M, N) from (M, D), (E, N, D), (E+1,).

    One grouped_mm where PyTorch has it for these shapes (rows a multiple of 16 bytes, a dtype it takes); a loop over
    the experts otherwise, which reads the offsets back to the host.
    """
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if hasattr(F, "grouped_mm") and aligned and rows.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:])
    ends = offsets.tolist()
    parts = [rows[ends[e] : ends[e + 1]] @ weight[e].T for e in range(weight.shape[0])]
    tail = rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[1])
    return torch.cat([*parts, tail])


class MoE(nn.Module):
    """A mixture of SwiGLU experts behind one of three routers.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: D, I, E, K.
        router: "kmeans" (`KMeansRouter`), "softmax" or "sigmoid" (`LearnedRouter`).
        balance: the router's balance rule; None for its default: "proportional", "aux" and "sign".
        num_shared_experts: experts that see every token, as one SwiGLU network of that many times I; 0 for none.
        seed, name: of the router's private generator; give each layer its own name.
        router_options: anything else that the router class takes.

    Shape:
        x (..., D), mask x.shape[:-1] bool -> y like x. Tokens that are not valid get 0.

    After a forward `tokens_per_expert` (E,) holds its loads and `aux_loss` () what to add to the training loss (0 for
    routers without one). The weights of the experts come from torch's global generator and do not depend on the router.

    Example:
        >>> import torch, kmeans_route
        >>> layer = kmeans_route.MoE(16, 32, num_experts=4, top_k=2, router="kmeans").eval()
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        router: str = "kmeans",
        *,
        balance: str | None = None,
        num_shared_experts: int = 0,
        seed: int = 0,
        name: str = "",
        **router_options: Any,
    ) -> None:
        super().__init__()
        check_choice("router", router, ROUTERS)
        check_positive_int("intermediate_size", intermediate_size)
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be at least 0, got {num_shared_experts}: pass 0 for none")
        if balance is not None:
            router_options["balance"] = balance
        self.router: KMeansRouter | LearnedRouter
        if router == "kmeans":
            self.router = KMeansRouter(hidden_size, num_experts, top_k, seed=seed, name=name, **router_options)
        else:
            self.router = LearnedRouter(
                hidden_size, num_experts, top_k, kind=router, seed=seed, name=name, **router_options
            )
        self.hidden_size = hidden_size
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        self.shared = Experts(1, hidden_size, num_shared_experts * intermediate_size) if num_shared_experts else None
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)

    @property
    def aux_loss(self) -> Tensor:
        """() the auxiliary loss of the last training forward, already times its coefficient; 0 without one."""
        if isinstance(self.router, LearnedRouter):
            return self.router.aux_loss
        return self.router.score_std.new_zeros(())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Route, dispatch, apply the experts, combine."""
        x_TD = flatten_hidden_states(x, self.hidden_size)
        routing = cast(Routing, self.router(x_TD, flatten_mask(mask, x), details=True))
        self.tokens_per_expert = routing.tokens_per_expert
        y, _, _ = self._apply_experts(x_TD, routing)
        return y.view(x.shape)

    def _apply_experts(self, x: Tensor, routing: Routing) -> tuple[Tensor, Dispatch, Tensor]:
        sent = dispatch(x, routing)
        y_sorted = self.experts(sent.x_sorted, sent.offsets)
        y = combine(y_sorted, routing, sent).to(x.dtype)
        if self.shared is not None:
            clean = torch.where(routing.valid[:, None], x, 0.0)  # 0 * NaN would reach the shared weights' gradients
            every = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device)
            y = y + self.shared(clean, every).to(x.dtype)
        return y, sent, y_sorted

    @torch.no_grad()
    def details(self, x: Tensor, mask: Tensor | None = None) -> MoEDetails:
        """One forward laid open, for metrics: no gradient, and no statistics gathered."""
        x_TD = flatten_hidden_states(x, self.hidden_size)
        flat_mask = flatten_mask(mask, x)
        routing = self.router.route(x_TD, flat_mask)
        y, sent, y_sorted = self._apply_experts(x_TD, routing)
        past = torch.arange(y_sorted.shape[0], device=y_sorted.device) >= sent.offsets[-1]
        return MoEDetails(routing, sent, y_sorted.masked_fill(past[:, None], 0.0), y.view(x.shape))
