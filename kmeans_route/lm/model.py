"""A small byte-level decoder whose feed-forward layers are mixtures of experts.

Shapes: B sequences, S bytes a sequence, D hidden size, H heads, V ids: the 256 bytes, or those of another alphabet.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmeans_route import KMeansRouter, LearnedRouter, MoE
from kmeans_route.checks import did_you_mean
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import NUM_BYTE_VALUES

FIXED = ("random", "hash")
GIVEN = ("hidden_size", "num_experts", "top_k", "kind", "balance", "seed", "name", "device")
OWN = (*GIVEN, "bias_rate", "aux_loss_coef", "tau", "decay")
"""Options of a router that have a name of their own in `TrainConfig`, or follow from it."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, seq_len: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        half = hidden_size // num_heads // 2
        inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), inv_freq)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def _rotate(self, x_BHSd: Tensor) -> Tensor:
        first, second = x_BHSd.chunk(2, dim=-1)
        seq_len = x_BHSd.shape[-2]
        cos, sin = self.get_buffer("cos")[:seq_len], self.get_buffer("sin")[:seq_len]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Args: x (B, S, D). Returns: (B, S, D)."""
        batch, seq_len, hidden_size = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, seq_len, 3, self.num_heads, hidden_size // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self._rotate(query), self._rotate(key), value, is_causal=True)
        y_BSD: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, seq_len, hidden_size))
        return y_BSD


class Block(nn.Module):
    """Pre-norm attention, then pre-norm mixture of experts."""

    def __init__(self, config: TrainConfig, layer: int, vocab_size: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config.hidden, config.heads, config.seq_len)
        self.moe_norm = nn.RMSNorm(config.hidden)
        sizes = (config.hidden, config.expert_hidden, config.experts, config.top_k)
        self.moe = MoE(*sizes, name=f"layer_{layer:02d}", **router_options(config))
        self.table_VK: Tensor | None
        table = None
        if config.router in FIXED:
            self.moe.router.freeze()
        if config.router == "hash":
            generator = torch.Generator().manual_seed(config.seed * 1000 + layer)
            order = torch.rand(vocab_size, config.experts, generator=generator).argsort(1)
            table = order[:, : config.top_k].contiguous()
        self.register_buffer("table_VK", table, persistent=False)

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Tensor:
        """Args: x (B, S, D), tokens (B, S) for the hash. Returns: (B, S, D)."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        indices = None if self.table_VK is None else self.table_VK[tokens_BS.flatten()]
        y_BSD: Tensor = x_BSD + self.moe(self.moe_norm(x_BSD), indices=indices)
        return y_BSD


class DecoderLM(nn.Module):
    """Next-byte prediction: embedding, blocks, norm, linear head.

    Two models of equal options and seed start from equal weights whatever their routers.

    Args:
        config: sizes, router and seed.
        vocab_size: ids that a token can have.
    """

    def __init__(self, config: TrainConfig, vocab_size: int = NUM_BYTE_VALUES) -> None:
        super().__init__()
        self.config = config
        # The caller's own random stream is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(vocab_size, config.hidden)
            self.blocks = nn.ModuleList(Block(config, layer, vocab_size) for layer in range(config.layers))
            self.norm = nn.RMSNorm(config.hidden)
            self.head = nn.Linear(config.hidden, vocab_size, bias=False)
            self._initialize(config.layers)

    def _initialize(self, num_layers: int) -> None:
        # As in GPT-2: 0.02, and less where a branch meets the residual stream, which grows by two branches a layer.
        branch_std = 0.02 / math.sqrt(2 * num_layers)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention.qkv.weight, std=0.02)
            nn.init.normal_(block.attention.out.weight, std=branch_std)
            nn.init.normal_(block.moe.experts.gate_up, std=0.02)
            nn.init.normal_(block.moe.experts.down, std=branch_std)

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts layers, first layer first."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Args: tokens (B, S) int64 in [0, V). Returns: logits (B, S, V)."""
        x_BSD = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD, tokens_BS)
        logits_BSV: Tensor = self.head(self.norm(x_BSD))
        return logits_BSV


def router_options(config: TrainConfig) -> dict[str, Any]:
    """The router of `config`, and the options that its class takes, as keyword arguments of `MoE`."""
    options: dict[str, Any] = {"router": config.router, "balance": config.balance, "seed": config.seed}
    if config.router in FIXED:
        gate = "uniform" if config.router == "hash" else "softmax"
        return options | {
            "router": "kmeans",
            "init": "normal",
            "directions": "centroids",
            "gate": gate,
            "tau": config.tau,
        }
    if config.bias_rate is not None:
        options["bias_rate"] = config.bias_rate
    if config.router == "kmeans":
        options |= {"tau": config.tau, "decay": config.decay}
    if config.balance == "aux":
        options["aux_loss_coef"] = config.aux_loss_coef
    taken = inspect.signature(KMeansRouter if config.router == "kmeans" else LearnedRouter).parameters
    known = [name for name in taken if name not in OWN]
    unknown = sorted(set(config.router_options) - set(known))
    if unknown:
        own = config.to_dict()
        got, remedy = ", ".join(unknown), did_you_mean(unknown[0], [*known, *own])
        if unknown[0] in own:
            remedy = f"name it as --{unknown[0].replace('_', '-')}"
        raise ValueError(f"router_options must be among {', '.join(known)}, got {got}: {remedy}")
    return options | config.router_options


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte in windows (B, S + 1) int64: () nats a byte, without auxiliary losses."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
