"""One training run: steps, resume, validation.

Letters: L layers, E experts, T tokens of a step, K experts a token.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kmeans_route import MoE, attach, metrics
from kmeans_route.lm.checkpoint import Checkpoint, CheckpointError
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import BatchSampler, Corpus, validation_windows
from kmeans_route.lm.model import DecoderLM, next_byte_loss
from kmeans_route.routing.pending import Pending

NATS_PER_BIT = math.log(2.0)
SAMPLE_BYTES = 8192
"""Validation bytes over which coupling and effective experts are measured."""


class NotFiniteError(Exception):
    """The loss is NaN or infinite; nothing later can be trusted."""


class Evaluation(NamedTuple):
    """A pass over the validation windows, in eval mode.

    bits_per_byte: mean cross-entropy / ln 2. perplexity: exp of the mean cross-entropy, per byte.
    tokens_per_expert: (L, E) int64, pooled over the whole pass. coupling: (L,) fp64, correlation of a selected score
    with the norm of what that expert returned; NaN where one of them does not vary. effective_experts: (L,) fp64, see
    `metrics.effective_experts`. The last two are NaN when not asked for.
    """

    bits_per_byte: float
    perplexity: float
    tokens_per_expert: Tensor
    coupling: Tensor
    effective_experts: Tensor


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then a cosine down to a tenth of the peak."""
    warmup_steps = math.ceil(config.warmup * config.steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, config.steps - warmup_steps)
    return config.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


class Trainer:
    """A run between two steps: model, optimizer, routers' commits, order of the text, history.

    Args:
        config, corpus: what to train, and on what.
        autocast: dtype that forwards are autocast to, e.g. torch.bfloat16; weights and optimizer stay fp32. None
            computes in fp32. No option of `config`, and in no checkpoint: a run that goes on must be given it again.

    Raises:
        ValueError: options that a router, the text or this machine refuses.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, *, autocast: torch.dtype | None = None) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.corpus, self.autocast = config, corpus, autocast
        self.device = _usable_device(config.device)
        self.model = DecoderLM(config, corpus.vocab_size).to(self.device)
        groups = _parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
        self.attachment = attach(self.model, self.optimizer, every_n_steps=config.commit_every)
        self.sampler = BatchSampler(corpus.train, config.seq_len, config.batch, config.seed)
        self.windows = validation_windows(corpus.validation, config.seq_len, config.eval_bytes)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.tokens_per_expert = torch.zeros(len(self.model.moe_layers), config.experts, dtype=torch.int64)
        """(L, E) int64, of the last step."""

    def train_step(self) -> dict[str, Any]:
        """One optimizer step.

        Returns:
            The record appended to `history`: step (from 1), loss_bits (bits per byte, without auxiliary losses),
            max_vio (one number a layer, of this step's counts), lr, time_ms (the step without validation), and every
            `eval_every` steps before the last validation_bits.

        Raises:
            NotFiniteError: the loss is not finite; the weights are those of the step before.
        """
        start = time.perf_counter()
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, self.tokens_per_expert = self._backward(self.sampler.next().to(self.device))
        loss_nats = loss.item()
        if not math.isfinite(loss_nats):
            raise NotFiniteError(f"the loss of step {self.step + 1} is {loss_nats}: lower --lr")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        record: dict[str, Any] = {
            "step": self.step,
            "loss_bits": loss_nats / NATS_PER_BIT,
            "max_vio": [float(value) for value in metrics.max_vio(self.tokens_per_expert)],
            "lr": rate,
            "time_ms": (time.perf_counter() - start) * 1e3,
        }
        every = self.config.eval_every
        if every and self.step % every == 0 and self.step < self.config.steps:
            record["validation_bits"] = self.evaluate(sample=False).bits_per_byte
        self.history.append(record)
        return record

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def _loss(self, windows: Tensor) -> Tensor:
        with self._precision():
            return next_byte_loss(self.model, windows)

    def _backward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of one step, micro-batch by micro-batch. Returns: (() loss in nats, (L, E) counts)."""
        layers = self.model.moe_layers
        loss_sum = torch.zeros((), device=self.device)
        tokens_per_expert = torch.zeros(len(layers), self.config.experts, dtype=torch.int64, device=self.device)
        for micro in windows.chunk(self.config.accumulate):
            loss = self._loss(micro)
            auxiliary = torch.stack([layer.aux_loss for layer in layers]).sum()
            torch.autograd.backward((loss + auxiliary) / self.config.accumulate)
            loss_sum += loss.detach() / self.config.accumulate
            tokens_per_expert += torch.stack([layer.tokens_per_expert for layer in layers])
        return loss_sum, tokens_per_expert

    @torch.no_grad()
    def evaluate(self, *, sample: bool = True) -> Evaluation:
        """A validation pass, which leaves the routers as they were.

        With `sample` coupling and effective experts too are measured, on the first `SAMPLE_BYTES` bytes.
        """
        self.model.eval()
        layers = self.model.moe_layers
        tokens_per_expert = torch.zeros(len(layers), self.config.experts, dtype=torch.int64, device=self.device)
        nats, num_bytes = 0.0, 0
        for windows in torch.split(self.windows, self.config.batch):
            loss = self._loss(windows.to(self.device).long())
            count = windows[:, 1:].numel()
            nats, num_bytes = nats + loss.item() * count, num_bytes + count
            tokens_per_expert += torch.stack([layer.tokens_per_expert for layer in layers])
        mean_nats = nats / num_bytes
        coupling = torch.full((len(layers),), math.nan, dtype=torch.float64)
        effective = coupling.clone()
        if sample:
            inputs, chosen = self.observe()
            effective = metrics.effective_experts(chosen, self.config.experts).double().cpu()
            if self.config.router != "hash":  # a table, which has no scores
                pairs = zip(layers, inputs, strict=True)
                with self._precision():
                    coupling = torch.tensor([_coupling(layer, x) for layer, x in pairs], dtype=torch.float64)
        self.model.train()
        return Evaluation(mean_nats / NATS_PER_BIT, math.exp(mean_nats), tokens_per_expert.cpu(), coupling, effective)

    @torch.no_grad()
    def observe(self) -> tuple[list[Tensor], Tensor]:
        """(hidden states that each MoE layer sees, ids (L, T, K) that it chooses), in the model's present mode.

        They are of the first `SAMPLE_BYTES` validation bytes.
        """
        inputs: list[Tensor] = []
        choices: list[Tensor] = []
        layers = self.model.moe_layers
        hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
        hooks += [layer.router.observe(lambda _, routing: choices.append(routing.indices)) for layer in layers]
        try:
            count = max(1, SAMPLE_BYTES // self.config.seq_len)
            with self._precision():
                self.model(self.windows[:count, :-1].to(self.device).long())
        finally:
            for hook in hooks:
                hook.remove()
        return inputs, torch.stack(choices)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on, and the history; nothing draws from torch's own generator.

        All of it is copied, tensors to the CPU: later steps leave it as it is.
        """
        with warnings.catch_warnings():  # they are held here, beside the state dict
            warnings.filterwarnings("ignore", message=".* tokens pending, which a state dict does not hold")
            live = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                live[f"optimizer.{key}.{name}"] = value
        for key, value in self.attachment.state_dict().items():
            live[f"attachment.{key}"] = torch.as_tensor(value)
        for name, router in self.attachment.routers.items():
            if int(router.pending.num_tokens):
                live |= {f"pending.{field}.{name}": getattr(router.pending, field) for field in Pending.FIELDS}
        live["random.sampler"] = self.sampler.generator.get_state()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
        corpus = {**self.corpus.summary(), "paths": list(self.corpus.paths)}
        return Checkpoint(self.step, self.config.to_dict(), corpus, [{**record} for record in self.history], tensors)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit.

        Raises:
            CheckpointError: it belongs to other options or another text, or its tensors do not fit.
        """
        if TrainConfig.from_dict(checkpoint.config).to_dict() != self.config.to_dict():
            raise CheckpointError("the checkpoint was made with other options: resume without changing them")
        if checkpoint.corpus.get("sha256") != self.corpus.sha256:
            raise CheckpointError(
                "the text differs from the one that the checkpoint was trained on: "
                "name the same --text, and use the same Python for the standard library"
            )
        tensors = checkpoint.tensors
        try:
            self.model.load_state_dict(checkpoint.model_state())
            self.optimizer.state.clear()  # before the first step there is none, whatever this trainer has done
            for name, parameter in self.model.named_parameters():
                if checkpoint.step > 0:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer.{key}.{name}"].to(self.device, copy=True)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            self._restore_attachment(checkpoint)
            self.sampler.generator.set_state(tensors["random.sampler"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's tensors do not fit its options: {error}") from error
        self.step, self.history = checkpoint.step, [{**record} for record in checkpoint.history]

    def _restore_attachment(self, checkpoint: Checkpoint) -> None:
        """Steps counted and tokens pending; loading the model's state has emptied what was pending."""
        saved = {
            name.removeprefix("attachment."): tensor.to(self.device)
            for name, tensor in checkpoint.tensors.items()
            if name.startswith("attachment.")
        }
        # Checkpoints did not hold the count once: each step of a run is one of the attachment's.
        steps = {"steps": checkpoint.step}
        self.attachment.load_state_dict({**self.attachment.state_dict(), **steps, **saved})
        for name, router in self.attachment.routers.items():
            if f"pending.num_tokens.{name}" in checkpoint.tensors:
                for field in Pending.FIELDS:
                    _fill(getattr(router.pending, field), checkpoint.tensors, f"pending.{field}.{name}")


def _fill(tensor: Tensor, tensors: Mapping[str, Tensor], name: str) -> None:
    given = tensors[name]
    if given.shape != tensor.shape:  # copy_ alone would broadcast
        raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(given.shape)}")
    tensor.copy_(given)


def _usable_device(name: str) -> torch.device:
    """The device of that name; ValueError when torch cannot compute on it here."""
    try:
        device = torch.device(name)
        (torch.ones(1, device=device) + 1).item()
    # A torch built without a device answers with AssertionError or NotImplementedError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that works here, got {name!r} ({reason}): see kmeans-route info"
        ) from None
    return device


def _coupling(layer: MoE, x: Tensor) -> float:
    details = layer.details(x)
    norms_TK = details.y_sorted.norm(dim=-1)[details.dispatch.positions]
    return float(metrics.coupling(details.routing.selected_scores, norms_TK))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, which are vectors, and what is learned beside a centroid do not."""
    matrices: dict[str, Any] = {"params": [], "weight_decay": weight_decay}
    others: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        group = matrices if parameter.ndim > 1 and not name.endswith("router.offset") else others
        group["params"].append(parameter)
    return [matrices, others]


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; `signum` is 0 until then."""

    signum = 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM only sets a flag; a second one interrupts at once.

    Off the main thread, where Python allows no handlers, the flag simply stays unset.
    """
    request = StopRequest()

    def handle(signum: int, frame: FrameType | None) -> None:
        if request.signum:
            raise KeyboardInterrupt
        request.signum = signum

    previous: dict[int, Any] = {}
    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def run_steps(
    trainer: Trainer,
    request: StopRequest,
    *,
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
    save: Callable[[], object] = lambda: None,
    save_every: int = 0,
) -> bool:
    """Train until the last step or a stop request, whichever comes first. Returns: whether all steps are done.

    `on_step` gets each step's record; `save` writes a checkpoint every `save_every` steps (0: never) but the last.
    """
    while trainer.step < trainer.config.steps and not request.signum:
        on_step(trainer.train_step())
        if save_every and trainer.step % save_every == 0 and trainer.step < trainer.config.steps:
            save()
    return trainer.step >= trainer.config.steps
