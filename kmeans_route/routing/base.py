"""What all routers have in common: the contract, when a forward counts, and fp32 buffers that stay fp32.

Forward only gathers into `Pending`; `commit` folds it into the buffers once per optimizer step. So the state that
decides routing never changes between a forward and its recomputation.
"""

import functools
import hashlib
import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmeans_route import ops
from kmeans_route.checks import check_option_names, check_positive_int
from kmeans_route.functional import enter
from kmeans_route.routing.pending import CountingScope, Pending
from kmeans_route.types import CommitOptions, Dispatch, RouterOutput, Routing, Tokens

P = ParamSpec("P")


def seed_for(seed: int, name: str) -> int:
    """A seed in [0, 2^63) from (seed, name), equal on every rank and Python version."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def called(router: "StatefulRouter") -> str:
    """The router in words: by its name, else by that which it has in the model that it is attached in."""
    attached = getattr(router.attachment, "routers", {})
    name = router.name or next((name for name, each in attached.items() if each is router), "")
    size = f"{router.num_experts} experts, hidden size {router.hidden_size}"
    return f"router {name!r}" if name else f"a {type(router).__name__} without a name ({size})"


COMMIT_REMEDY = (
    "call kmeans_route.attach(model, optimizer) once, or router.commit() after each optimizer step, and once before "
    "the first forward"
)


def _when_to(act: str, router: "StatefulRouter") -> str:
    """When to save or freeze it, so that nothing is pending."""
    if router.attachment is None and not router._commits_by_hand:
        return COMMIT_REMEDY
    every = getattr(router.attachment, "every_n_steps", 1)
    after = "an optimizer step" if every == 1 else f"a commit, every {every} optimizer steps"
    state = ", with attachment.state_dict()" if every > 1 and act == "save" else ""
    # A step that a gradient scaler has skipped commits nothing.
    own = "router" if router.attachment is None else "attachment"
    return f"{act} right after {after}{state}, or call {own}.commit() before"


def _num_pending(router: "StatefulRouter") -> int:
    """Tokens from which a commit would learn, read back to the host."""
    num_tokens = router.pending.num_tokens
    return int(num_tokens) if router.learns and not num_tokens.is_meta else 0


def _drop_pending(router: "StatefulRouter", why: str) -> None:
    if num_tokens := _num_pending(router):
        warnings.warn(f"{called(router)} drops {num_tokens} pending tokens: {why}", stacklevel=3)
    router.pending.clear_()


def option_names(router: "type[StatefulRouter]") -> set[str]:
    """What the constructor takes by name alone."""
    parameters = inspect.signature(router).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def checks_option_names(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor that refuses an option it does not have by the class that was called, with those that it takes."""
    taken = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if not kwargs.keys() <= taken.keys():
            check_option_names(type(args[0]).__name__, kwargs, taken.keys() - {"self"})
        init(*args, **kwargs)

    return checked


OF_TOKENS = ("maxvio", "load_", "dead_experts", "effective_experts", "score_std", "centroid_drift")
"""Beginnings of the names of metrics that say something of the tokens of a commit."""


def scalars(values: Mapping[str, Any], tokens_per_expert: Tensor) -> dict[str, float]:
    """Metrics as numbers; where no token has been committed, NaN for those that would tell of tokens."""
    if bool(tokens_per_expert.any()):
        return {name: float(value) for name, value in values.items()}
    return {name: math.nan if name.startswith(OF_TOKENS) else float(value) for name, value in values.items()}


def _undo_casts(buffers: dict[str, Tensor | None], names: tuple[str, ...], dtype: torch.dtype) -> list[str]:
    """Give buffers of these names their own dtype again; which had another, in words."""
    cast = []
    for name in names:
        buffer = buffers[name]
        if buffer is not None and buffer.dtype != dtype:
            cast.append(f"{name} to {str(buffer.dtype).removeprefix('torch.')}")
            with torch.inference_mode(False):  # a commit will write into what is made here
                buffers[name] = buffer.to(dtype)
    return cast


Observer = Callable[[Tokens, Routing], None]


class StatefulRouter(nn.Module):
    """Base of the routers.

    The contract: `route` and `route_dispatch` take hidden states (..., D) and say where each token goes; `forward` is
    route in the shape that frameworks expect. With gather=True, as forward does, they gather statistics where this
    forward counts (`counts_now`). `enter` checks what comes in; its answer may be passed in place of x, so that what is
    checked once is not checked again.
    """

    weight: Tensor
    expert_bias: Tensor
    top_k: int
    commit_options: CommitOptions
    backend = "auto"
    learns = True  # whether a commit changes anything
    FP32_STATE: tuple[str, ...] = ("expert_bias",)
    INT64_STATE: tuple[str, ...] = ()
    PLAIN_TENSORS: tuple[str, ...] = ("tokens_per_expert",)

    def __init__(self, hidden_size: int, num_experts: int, *, seed: int, name: str) -> None:
        check_positive_int("hidden_size", hidden_size)
        check_positive_int("num_experts", num_experts)
        ops.tell_flop_counters()
        nn.Module.__init__(self)  # not super(): adapters put a class of another framework behind this one
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.seed, self.name = seed, name
        self.frozen = False
        self.pending: Pending
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)
        self._scope: CountingScope | None = None
        self._observers: dict[int, Observer] = OrderedDict()
        self._commits_by_hand = False
        self._warned = self._has_gathered = self._told_of_cast = False
        self._cast: tuple[str, ...] = ()

    @property
    def want_hist(self) -> bool:
        """Whether the balance rule needs the histogram of margins."""
        return self.commit_options.balance == "quantile" and self.top_k < self.num_experts

    @property
    def aux_loss(self) -> Tensor:
        """() the auxiliary loss of the last training forward, already times its coefficient; 0 without one."""
        return self.expert_bias.new_zeros(())

    def enter(
        self,
        x: Tensor | Tokens,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        count_mask: Tensor | None = None,
    ) -> Tokens:
        """Check and flatten hidden states (..., D) and what comes with them, and choose the backend, once."""
        if isinstance(x, Tokens):
            return x
        for name in self.FP32_STATE:
            if self._buffers[name].dtype is not torch.float32:  # type: ignore[union-attr]
                self._own_dtypes_again(tell=True)
        if self.tokens_per_expert.device != self._buffers[self.FP32_STATE[0]].device:  # type: ignore[union-attr]
            self._move_plain_tensors()  # transformers, for one, loads tensor by tensor past the module
        return enter(
            x, mask, count_mask, indices, centroids=self.weight, owner="the router's state", top_k=self.top_k,
            backend=self.backend,
        )  # fmt: skip

    def route(
        self,
        x: Tensor | Tokens,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        count_mask: Tensor | None = None,
        gather: bool = False,
    ) -> Routing:
        """Route x with the state as it is.

        Args:
            x: hidden states (..., D), floating point, or what `enter` made of them and of the masks and ids.
            mask: bool, x.shape[:-1], false for padding, which gets weight 0.
            indices: (T, K) ids to replay.
            count_mask: bool, x.shape[:-1]; tokens outside are routed like any other and count in no statistic.
            gather: gather statistics too, where this forward counts.
        """
        raise NotImplementedError

    def route_dispatch(
        self,
        x: Tensor | Tokens,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        count_mask: Tensor | None = None,
        gather: bool = False,
    ) -> tuple[Routing, Dispatch]:
        """`route`, and the hidden states in expert order."""
        tokens = self.enter(x, mask, indices, count_mask)
        routing = self.route(tokens, gather=gather)
        sent = ops.dispatch(tokens.x, routing.indices, routing.tokens_per_expert, routing.valid, tokens.backend)
        return routing, sent

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        count_mask: Tensor | None = None,
    ) -> RouterOutput:
        """Route x, and in training gather its statistics: see `route`."""
        routing = self.route(x, mask, indices, count_mask=count_mask, gather=True)
        return RouterOutput(routing.weights, routing.indices, routing.scores)

    def observe(self, see: Observer) -> RemovableHandle:
        """Call see(tokens, routing) after each routing, by whichever way it came; `remove()` of the answer ends that.

        Forward hooks see one way alone: of `forward` its output, of `MoE` the (Routing, Dispatch) that it asks for.
        """
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = see
        return handle

    def call_hooks(self, tokens: Tokens, answer: tuple[Routing, Dispatch]) -> None:
        """Show the answer of `route_dispatch` to the forward hooks, for a layer that goes past `forward`; they may look
        and change nothing."""
        for key, hook in self._forward_hooks.items():
            keywords: tuple[Any, ...] = ({},) if key in self._forward_hooks_with_kwargs else ()
            hook(self, (tokens.x,), *keywords, answer)

    def _tell(self, tokens: Tokens, routing: Routing) -> Routing:
        for see in self._observers.values():
            see(tokens, routing)
        return routing

    @property
    def attached(self) -> bool:
        """Whether an attachment says which forwards count, and commits."""
        return self._scope is not None

    @property
    def attachment(self) -> Any:
        """What has bound this router; None where nothing has."""
        return None if self._scope is None else self._scope.owner

    def bind(self, scope: CountingScope) -> None:
        """Let `scope` say from now on which forwards count."""
        self._scope = scope
        self._move_plain_tensors()

    def release(self, scope: CountingScope) -> None:
        """End what `bind` began: training mode and gradients decide again. Nothing where another is bound by now."""
        if self._scope is scope:
            self._scope = None

    def commit(self, skip: Tensor | None = None) -> None:
        """Fold what forward has gathered into the state, once per optimizer step; `attach` calls it for you.

        Args:
            skip: () bool on the router's device; true leaves state and pending as they are, for a step that a
                gradient scaler skipped. Read on the device, without a sync.

        With nothing pending the state does not change, so a second call does nothing. Until a K-Means router has its
        first data, one value is read back to the host.

        Raises:
            RuntimeError: called inside a backward pass, where a recomputation would meet another state.
        """
        if ops.in_backward():
            raise RuntimeError(
                f"{called(self)} must commit outside of a backward pass, got commit() inside of one, so that a "
                "recomputation would route by another state than its forward: call it after backward() has returned, "
                "or kmeans_route.attach(model, optimizer), which waits for the end"
            )
        self._commits_by_hand = True
        if not self.frozen:
            self.before_commit()
            self.commit_pending(skip)

    def commit_pending(self, skip: Tensor | None = None, batch: Pending | None = None) -> None:
        """`commit` after `before_commit`; with `batch`, what all ranks have gathered, in place of this rank's own."""
        raise NotImplementedError

    def before_commit(self) -> None:
        """Called on every rank before the exchange of a commit: the last moment to change what is pending."""
        self._own_dtypes_again(tell=True)
        self._move_plain_tensors()

    def metrics(self) -> dict[str, float]:
        """Flat scalars of the last committed step. See the subclasses."""
        raise NotImplementedError

    def freeze(self, frozen: bool = True) -> "StatefulRouter":
        """Stop (or with False, resume) gathering and committing; routing goes on with the state as it is.

        What is pending is dropped, with a warning: no later commit moves a frozen router, nor takes up old tokens.
        """
        p = self.pending
        # Looked at first, since what inference mode has made takes no writes outside of it.
        if frozen and not p.num_tokens.is_meta and bool(p.num_tokens + p.num_dropped):
            _drop_pending(self, f"a frozen router commits nothing; {_when_to('freeze', self)}")
        self.frozen = frozen
        return self

    def counts_now(self) -> bool:
        """Whether a forward at this moment gathers statistics.

        Under an attached root, the root's training and grad mode at its entry decide; elsewhere the router's own.
        """
        if self.frozen:
            return False
        active = None if self._scope is None else self._scope.active
        counting = self.training and torch.is_grad_enabled() if active is None else active
        if counting and (how := ops.traced()):
            raise RuntimeError(
                f"{called(self)} must be in eval mode to be {how}, got training mode: what comes of it would add "
                "to this router's statistics; call model.eval() first"
            )
        if counting and self.learns and not torch.compiler.is_compiling():
            if self._scope is None:
                self._check_unattached()
            else:
                self._check_attached(self._scope)
        return counting

    def _check_attached(self, scope: CountingScope) -> None:
        if not ops.in_backward():
            if not self._has_gathered:  # a module's attributes are slow to set
                self._has_gathered = True
        elif scope.active is None:  # past the root, whose own entry would tell
            self._warn_gathers_nothing("call attachment.watch(part) on the part of the model that is checkpointed")

    def _check_unattached(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            if world > 1:
                raise RuntimeError(
                    f"a router that trains on {world} ranks must be attached, got one that is not, so that the ranks "
                    "would drift apart: call kmeans_route.attach(model, optimizer); if each rank is to learn alone, "
                    "with a process group of its own"
                )
        if ops.in_backward():
            self._warn_gathers_nothing("call kmeans_route.attach(model, optimizer)")
            return
        self._has_gathered = True
        if not (self._warned or self._commits_by_hand):
            self._warned = True
            warnings.warn(f"{called(self)} trains but nothing commits its statistics: {COMMIT_REMEDY}", stacklevel=5)

    def _warn_gathers_nothing(self, remedy: str) -> None:
        if not (self._has_gathered or self._warned):
            self._warned = True
            warnings.warn(
                f"{called(self)} gathers nothing: its forward ran without gradients, as reentrant activation "
                f"checkpointing runs it: {remedy}, or checkpoint with use_reentrant=False",
                stacklevel=6,
            )

    def _private_generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed_for(self.seed, self.name))

    def _gaussian_rows(self) -> Tensor:
        """(E, D) fp32 from the private generator, on the host, so that every device starts with the same."""
        size = self.num_experts, self.hidden_size
        return torch.randn(size, generator=self._private_generator(), dtype=torch.float32, device="cpu")

    def _own_dtypes_again(self, *, tell: bool) -> None:
        """Undo a cast that has gone past the module: FSDP1's buffer_dtype, `.data` casts, a checkpoint cast whole."""
        cast = _undo_casts(self._buffers, self.FP32_STATE, torch.float32)
        cast += _undo_casts(self._buffers, self.INT64_STATE, torch.int64)
        if cast and tell and not self._cast:
            self._cast = tuple(cast)
        # A compiled graph cannot tell, so that the next commit does.
        if self._cast and not torch.compiler.is_compiling() and not self._told_of_cast:
            self._told_of_cast = True
            warnings.warn(
                f"the state of {called(self)} must keep its dtypes, got {', '.join(self._cast)}: they are as they were "
                "again, but their values rounded; leave buffers out of the cast (FSDP: buffer_dtype=None), since an "
                "average in bf16 stalls",
                stacklevel=2,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StatefulRouter":
        """Moves go through; casts do not: a bf16 average stalls (99% of the gap is left after 2000 steps)."""
        self._own_dtypes_again(tell=True)
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(device=new.device)
        self._move_plain_tensors()
        return self

    @torch.inference_mode(False)  # a commit will write into what is made here
    def _move_plain_tensors(self) -> None:
        """Bring what is no buffer to the device of the buffers; what was on the meta device starts at zero."""
        device = self.expert_bias.device
        self.pending.to(device)
        for name in self.PLAIN_TENSORS:
            old: Tensor = getattr(self, name)
            if old.device != device:
                setattr(self, name, torch.zeros_like(old, device=device) if old.is_meta else old.detach().to(device))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if num_tokens := _num_pending(self):
            warnings.warn(
                f"{called(self)} is saved with {num_tokens} tokens pending, which a state dict does not hold: "
                f"{_when_to('save', self)}",
                stacklevel=2,
            )
        self._own_dtypes_again(tell=True)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load all of this module's state, or none of it: a foreign or non-finite entry refuses the rest by name."""
        self._own_dtypes_again(tell=True)  # else loading would round to what the buffers were cast to
        problems = []
        for name, own in [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]:
            given = state_dict.get(prefix + name)
            if given is None:
                continue
            if given.shape != own.shape:
                problems.append(
                    f"{prefix}{name} must have shape {tuple(own.shape)}, got {tuple(given.shape)}: the checkpoint is "
                    "of a router with another number of experts or another hidden size"
                )
            elif given.is_floating_point() and not given.is_meta and not bool(given.isfinite().all()):
                problems.append(f"{prefix}{name} must be finite, got NaN or Inf: load a checkpoint from before that")
        if problems:
            *_, error_msgs = args  # the last of what PyTorch passes
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._own_dtypes_again(tell=False)  # load_state_dict(assign=True) brings the checkpoint's own dtype
        brought = {name for name in (*self._buffers, *self._parameters) if prefix + name in state_dict}
        if brought.intersection(self.FP32_STATE):
            self._after_load(brought)

    def _after_load(self, brought: set[str]) -> None:
        """Called when state of this module has been loaded: what is pending belongs to the state that is gone."""
        self._move_plain_tensors()
        _drop_pending(self, "they belong to the state that is replaced")

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: a copy is not attached, and shares no graph."""
        state: dict[str, Any] = self.__dict__.copy()
        state["_scope"], state["_observers"] = None, OrderedDict()
        for name in self.PLAIN_TENSORS:
            state[name] = state[name].detach()
        return state
