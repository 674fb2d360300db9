"""How options and results become the flat arguments and results of an operator, and back; and who is looking.

Named tuples go in and come out everywhere else. Their fields give the schema, so an operator's order is theirs.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kmeans_route import backends
from kmeans_route.reference import exporting_onnx
from kmeans_route.reference import no_autocast as no_autocast
from kmeans_route.types import RouteOptions, Wanted

Named = TypeVar("Named", bound=NamedTuple)
PLAIN_TYPES = {Tensor, torch.nn.Parameter}
KINDS = {int: "int", float: "float", bool: "bool", str: "str", Tensor: "Tensor", Tensor | None: "Tensor?"}


def arguments(named: type[NamedTuple], prefix: str = "") -> str:
    """The fields as arguments of a schema: "int top_k, str gate, ..."."""
    return ", ".join(f"{KINDS[kind]} {prefix}{name}" for name, kind in named.__annotations__.items())


def results(*named: type[NamedTuple], more: int = 0) -> str:
    """The results of an operator that returns these, and `more` tensors: "(Tensor, Tensor, ...)"."""
    return f"({', '.join(['Tensor'] * (sum(len(each._fields) for each in named) + more))})"


def take(named: type[Named], values: Iterator[Any]) -> Named:
    """The next values, by name."""
    return named(*islice(values, len(named._fields)))


# What the frames of a backward pass and of a `torch.autograd.Function` run; its local `self` is the node. They are
# private to PyTorch; this is their only use, and a test holds them for each version claimed.
_PASS_CODE = torch.autograd.graph._engine_run_backward.__code__
_NODE_CODES = {
    getattr(torch.autograd.function.BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(torch.autograd.function.BackwardCFunction, name)
}

OPTIONS = f"{arguments(RouteOptions)}, {arguments(Wanted, 'want_')}"


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that a forward here is a recomputation.

    The call is private to PyTorch; this is its only use, and a test holds it for each version claimed.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def call_after_backward(call: Callable[[], None]) -> None:
    """Call at the end of the backward pass that this thread is inside of: of the outermost, where they are nested.

    Nothing calls if a pass raises, nor at the end of one that a hook began inside another.
    DistributedDataParallel and FSDP wait for their last work in the same way.
    """
    torch.autograd.Variable._execution_engine.queue_callback(partial(_pass_ends, call))


def _pass_ends(call: Callable[[], None]) -> None:
    """A pass is nested where the stack shows the node whose backward began it, as reentrant checkpointing does."""
    frame: FrameType | None = sys._getframe()
    passes = 0
    while frame is not None and frame.f_code not in _NODE_CODES:
        passes += frame.f_code is _PASS_CODE
        frame = frame.f_back
    if frame is not None:  # once that node is through, the pass that it belongs to is the current one
        _call_after(frame.f_locals["self"], partial(call_after_backward, call))
    elif passes < 2:
        call()


def call_after_node(call: Callable[[], None]) -> None:
    """Call once the node is through whose backward this thread is inside of: the one that asked for a recomputation.

    The call that names it is private to PyTorch; this is its only use, and a test holds it for each version claimed.
    """
    node = torch._C._current_autograd_node()
    if node is not None:  # none runs in a callback at the end of a pass
        _call_after(node, call)


def _call_after(node: Any, call: Callable[[], None]) -> None:
    def node_ends(*_gradients: Any) -> None:
        handle.remove()
        call()

    handle = node.register_hook(node_ends)


def exporting() -> bool:
    """Whether torch.export is at work, seen from inside torch.compile too.

    `torch.compiler.is_exporting` is true within every torch.compile in torch 2.11. The flag that later versions read
    there is private to PyTorch; this is its only use, and a test holds it for each version claimed.
    """
    return bool(torch.compiler._is_exporting_flag)


def jit_tracing() -> bool:
    """Whether torch.jit.trace is at work."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def traced() -> str:
    """What makes a program of a forward, or another function of it, so that it may leave nothing behind; "" for none.

    torch.compile does not: its programs write into the state as the forward does.
    """
    if exporting():
        return "exported"
    if backends.by_definition():
        if backends.transformed():
            return "transformed by torch.func"
        return "exported" if exporting_onnx() else "differentiated forward"
    if jit_tracing():
        return "traced by torch.jit"
    if is_in_torch_dispatch_mode() and not torch.compiler.is_compiling() and get_proxy_mode() is not None:
        return "traced by make_fx"
    return ""


def looked_at(*tensors: Tensor) -> bool:
    """Whether a compiler, a tracer, a profiler, a dispatch mode (which counts FLOPs, say) or a tensor of another kind
    looks on."""
    if torch.compiler.is_compiling() or jit_tracing() or is_in_torch_dispatch_mode() or profiler._is_profiler_enabled:
        return True
    return not PLAIN_TYPES.issuperset(map(type, tensors))


def _batched() -> bool:
    """Whether a transform maps over this call: of torch.func, or of autograd's `is_grads_batched`.

    The mode of the latter is private to PyTorch; this is its only use, and a test holds it for each version claimed.
    """
    return backends.transformed() or bool(torch._C._dispatch_tls_is_dispatch_key_included("VmapMode"))


def direct(
    operator: Callable[..., Any], body: Callable[..., Any], setup: Any = None, backward: Any = None
) -> Callable[..., Any]:
    """A call of `operator` where somebody looks at it, else of `body`, in grad mode under a node of autograd.

    PyTorch's dispatcher takes up to 0.15 ms a call on a CPU, so who need not see an operator goes past it. Both take
    the same inputs; the first two are tensors, and say whether somebody looks. setup(ctx, inputs, output) and
    backward(ctx, *grads) are as `register_autograd` takes them; without them there is no derivative, and no node.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = body(*inputs)
        setup(ctx, inputs, output)
        return output

    name = body.__name__.strip("_").removesuffix("_body")
    node: Any = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    in_grad_mode = torch.no_grad()(body) if setup is None else node.apply

    def call(*inputs: Any) -> Any:
        if looked_at(*inputs[:2]):
            return operator(*inputs)
        return in_grad_mode(*inputs) if torch.is_grad_enabled() else body(*inputs)

    return call


def direct_in_backward(operator: Callable[..., Any], body: Callable[..., Any]) -> Callable[..., Any]:
    """`direct` for what a backward calls: both take the same arguments.

    A backward that is differentiated gets the operator, which says that it has no derivative, and one over batched
    gradients too: it takes them one by one.
    """

    def call(x: Tensor, other: Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled() or looked_at(x, other) or _batched():
            return operator(x, other, *rest)
        return body(x, other, *rest)

    return call
