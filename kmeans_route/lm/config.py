"""The options of one training run, checked at construction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kmeans_route.checks import DEFAULT_TAU

BALANCES: dict[str, tuple[str, ...]] = {
    "kmeans": ("proportional", "sign", "quantile", "none"),
    "softmax": ("aux", "sign", "quantile", "none"),
    "sigmoid": ("sign", "quantile", "aux", "none"),
    "random": ("none",),
    "hash": ("none",),
}
"""Router kind -> its balance rules; the first is the default. The last two learn nothing: floors for comparisons."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the bits of a training run, beside the text itself. What is out of range is a ValueError.

    Args:
        router: "kmeans", "softmax" or "sigmoid"; "random" for fixed random directions, "hash" for a fixed table of
            experts by byte, with equal gates (Hash Layers, arXiv 2106.04426).
        balance: a rule of `BALANCES[router]`; "" takes the router's default.
        steps: optimizer steps, which the schedule of the learning rate spans.
        seed: of the initial weights and of the order of the text.
        layers, hidden, heads: of the decoder; hidden is a multiple of 2 * heads (rotary pairs).
        experts, expert_hidden, top_k: of each MoE layer.
        seq_len, batch: bytes a sequence, sequences an optimizer step.
        accumulate: micro-batches that a step is cut into; divides batch. The tokens of a step do not depend on it.
        lr, warmup: peak learning rate, and the part of the steps before it; then a cosine down to a tenth.
        tau, decay: of the K-Means router; tau None takes the router's default. router_options: anything else that the
            router's class takes, by name.
        commit_every: optimizer steps from one commit to the next.
        bias_rate: of the bias rules; None takes the router's default. aux_loss_coef: of balance="aux".
        eval_every: steps between validation passes; 0 evaluates at the end only.
        eval_bytes: validation bytes scored in one pass, spread evenly over the held-out files.
        threads: CPU threads; the order of sums, so the last bits, depends on it. The tensors are so small that one is
            faster than two.
        device: a torch device string.
    """

    router: str = "kmeans"
    balance: str = ""
    steps: int = 2400
    seed: int = 0
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    experts: int = 16
    expert_hidden: int = 128
    top_k: int = 2
    seq_len: int = 128
    batch: int = 16
    accumulate: int = 1
    lr: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    tau: float | None = None
    decay: float = 0.999
    router_options: dict[str, Any] = field(default_factory=dict)
    commit_every: int = 1
    bias_rate: float | None = None
    aux_loss_coef: float = 0.01
    eval_every: int = 0
    eval_bytes: int = 65536
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.router not in BALANCES:
            raise ValueError(f"router must be one of {', '.join(BALANCES)}, got {self.router!r}")
        if not self.balance:
            object.__setattr__(self, "balance", BALANCES[self.router][0])
        if self.balance not in BALANCES[self.router]:
            allowed = ", ".join(BALANCES[self.router])
            raise ValueError(f"balance must be one of {allowed} for router={self.router!r}, got {self.balance!r}")
        least = dict.fromkeys(("steps", "layers", "hidden", "heads", "experts", "expert_hidden", "top_k", "seq_len"), 1)
        least |= dict.fromkeys(("batch", "accumulate", "eval_bytes", "threads", "commit_every"), 1)
        for name, value in {**least, "seed": 0, "eval_every": 0}.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k must be in [1, {self.experts}], got {self.top_k}: lower --top-k or raise --experts"
            )
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden must be a multiple of 2 * heads = {2 * self.heads}, got {self.hidden}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch = {self.batch}, got {self.accumulate}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr must be in (0, 1), got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a fraction in [0, 1), got {self.warmup}")

    @property
    def label(self) -> str:
        """A short name for tables and legends, e.g. "K-Means, proportional"."""
        if self.router in ("random", "hash"):
            return {"random": "random, fixed", "hash": "hash of the byte"}[self.router]
        rules = {"none": "no balancing", "aux": f"aux loss {self.aux_loss_coef:g}"}
        if self.router != "kmeans":
            rules["sign"] = "loss-free sign"
            return f"{self.router}, {rules.get(self.balance, self.balance)}"
        tau = "" if self.tau is None or self.tau == DEFAULT_TAU else f", tau {self.tau:g}"
        more = "".join(f", {name} {value}" for name, value in self.router_options.items())
        return f"K-Means, {rules.get(self.balance, self.balance)}{tau}{more}"

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: names that this version does not know, or lacks.
        """
        known = {known.name for known in fields(cls)}
        if set(values) != known:
            raise ValueError(f"options differ from this version's: {', '.join(sorted(set(values) ^ known))}")
        return cls(**values)
