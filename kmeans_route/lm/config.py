"""The options of one training run, checked at construction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from kmeans_route.checks import default_directions

BALANCES: dict[str, tuple[str, ...]] = {
    "kmeans": ("proportional", "sign", "quantile", "none"),
    "softmax": ("aux", "sign", "quantile", "none"),
    "sigmoid": ("sign", "quantile", "aux", "none"),
    "random": ("none",),
    "hash": ("none",),
}
"""Router kind -> its balance rules; the first is the default.

The last two learn nothing, floors for comparisons: fixed random directions, and a fixed table of experts by byte with
equal gates (Hash Layers, arXiv 2106.04426).
"""

THREADS = "CPU threads. On a busy machine set OMP_WAIT_POLICY=passive: waiting threads then sleep."


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the bits of a training run, beside the text itself. What is out of range is a ValueError.

    What stands beside a field is also the help of its option on the command line.
    """

    router: Annotated[str, f"One of {', '.join(BALANCES)}."] = "kmeans"
    balance: Annotated[str, "Balance rule: proportional, sign, quantile, aux or none [default: the router's]."] = ""
    steps: Annotated[int, "Optimizer steps, which the schedule of the learning rate spans."] = 2400
    seed: Annotated[int, "Of the weights and of the order of the text."] = 0
    layers: Annotated[int, "Decoder layers."] = 4
    hidden: Annotated[int, "Hidden size, a multiple of 2 * heads (rotary pairs)."] = 128
    heads: Annotated[int, "Attention heads."] = 4
    experts: Annotated[int, "Experts a layer."] = 16
    expert_hidden: Annotated[int, "Inner size of an expert."] = 128
    top_k: Annotated[int, "Experts a byte."] = 2
    seq_len: Annotated[int, "Bytes a sequence."] = 128
    batch: Annotated[int, "Sequences a step."] = 16
    accumulate: Annotated[int, "Micro-batches of a step; they divide batch, and leave the tokens of a step alone."] = 1
    lr: Annotated[float, "Peak learning rate; a cosine brings it down to a tenth."] = 3e-3
    warmup: Annotated[float, "Part of the steps spent warming up."] = 0.05
    weight_decay: Annotated[float, "AdamW's, on matrices."] = 0.1
    tau: Annotated[float | None, "Gate temperature of K-Means [default: the router's]."] = None
    decay: Annotated[float, "Of K-Means' running average."] = 0.999
    router_options: Annotated[dict[str, Any], "Anything else that the router's class takes, by name."] = field(
        default_factory=dict
    )
    commit_every: Annotated[int, "Optimizer steps a commit."] = 1
    bias_rate: Annotated[float | None, "Step of the bias rule [default: the router's]."] = None
    aux_loss_coef: Annotated[float, "Of the auxiliary loss."] = 0.01
    eval_every: Annotated[int, "Steps between validations, 0: at the end."] = 0
    eval_bytes: Annotated[int, "Bytes scored in a validation, spread evenly over the held-out files."] = 65536
    # The order of sums, so the last bits, depends on it. The tensors are so small that one is faster than two.
    threads: Annotated[int, THREADS] = 1
    device: Annotated[str, "A torch device."] = "cpu"

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

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse, by a ValueError, options that somebody has named and this router does not have."""
        used = {
            "tau": self.router in ("kmeans", "random"),
            "decay": self.router == "kmeans",
            "bias_rate": self.balance in ("proportional", "sign", "quantile"),
            "aux_loss_coef": self.balance == "aux",
        }
        for name in names:
            if not used.get(name, True):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{option} must be left out with --router {self.router} and --balance {self.balance}, which have "
                    f"none, got {getattr(self, name)}"
                )

    @property
    def label(self) -> str:
        """A short name for tables and legends, e.g. "K-Means, proportional"."""
        if self.router in ("random", "hash"):
            return {"random": "random, fixed", "hash": "hash of the byte"}[self.router]
        rules = {"none": "no balancing", "aux": f"aux loss {self.aux_loss_coef:g}"}
        if self.router != "kmeans":
            rules["sign"] = "loss-free sign"
            return f"{self.router}, {rules.get(self.balance, self.balance)}"
        tau = "" if self.tau is None else f", tau {self.tau:g}"
        named = {
            name: value for name, value in self.router_options.items() if (name, value) not in self.own_options.items()
        }
        more = "".join(f", {name} {value}" for name, value in named.items())
        return f"K-Means, {rules.get(self.balance, self.balance)}{tau}{more}"

    @property
    def own_options(self) -> dict[str, Any]:
        """The router's options that follow from others, where nobody names them."""
        return {"directions": default_directions(self.top_k)} if self.router == "kmeans" else {}

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values, with the directions of K-Means: a run keeps the rule that it began with."""
        return asdict(self) | {"router_options": self.own_options | self.router_options}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; names that this version does not know, or lacks, are a ValueError.

        K-Means without directions is of a time when they were those of the centroids.
        """
        known = {known.name for known in fields(cls)}
        if set(values) != known:
            raise ValueError(f"options differ from this version's: {', '.join(sorted(set(values) ^ known))}")
        if values["router"] == "kmeans":
            values = values | {"router_options": {"directions": "centroids"} | values["router_options"]}
        return cls(**values)
