"""A token counts once however often it is recomputed: every kind of checkpointing, torch.compile, and both."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from kmeans_route import KMeansRouter, MoE, attach, ops
from kmeans_route.backends import torch as torch_backend
from tests.helpers.compare import EPS, assert_same_bits, generator

D, E, K = 16, 6, 2
PART, NUM_STEPS = 40, 3
PROPORTIONAL, QUANTILE = {"balance": "proportional"}, {"balance": "quantile"}
SIGMOID, SIGMOID_QUANTILE = {"router": "sigmoid"}, {"router": "sigmoid", "balance": "quantile"}
# By what is compiled: alike blocks share their code, and a whole model costs by the block.
BLOCKS = {"": [PROPORTIONAL, QUANTILE], "blocks": [QUANTILE, QUANTILE], "model": [PROPORTIONAL]}
EXPERT_OPS = {torch.ops.kmeans_route.grouped_linear.default, torch.ops.aten.silu.default}
ROUTING_OPS = {
    torch.ops.kmeans_route.route.default,
    torch.ops.kmeans_route.route_dispatch.default,
    torch.ops.kmeans_route.dispatch.default,
}
pytestmark = [
    pytest.mark.usefixtures("plain_empty"),
    pytest.mark.filterwarnings("ignore:.*nothing commits its statistics"),
]


def keeping(kept: set[Any]) -> Callable[[], Any]:
    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": keeping(EXPERT_OPS)},
    "selective, routing kept": {"use_reentrant": False, "context_fn": keeping(ROUTING_OPS)},
}


class Mode(NamedTuple):
    """How blocks are recomputed (a key of CHECKPOINTS, or "") and what is compiled: "blocks", "model" or ""."""

    recompute: str
    compiled: str

    @property
    def counts_unattached(self) -> bool:
        """Reentrant checkpointing runs the first forward without gradients, unless torch.compile sees through it."""
        return self.recompute != "reentrant" or self.compiled == "model"


MODES = {
    "plain": Mode("", ""),
    **{kind: Mode(kind, "") for kind in CHECKPOINTS},
    "compile(block)": Mode("", "blocks"),
    "compile(model)": Mode("", "model"),
    **{f"{kind}(compile(block))": Mode(kind, "blocks") for kind in ("reentrant", "non-reentrant")},
    **{f"compile({kind}(block))": Mode(kind, "model") for kind in ("reentrant", "non-reentrant", "selective")},
}
PLAIN = MODES["plain"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """On CUDA a recomputation runs on a thread of autograd's own."""
    return str(request.param)


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[Mode]:
    """The cells of one mode share what is compiled for them."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):
        yield MODES[request.param]


class Model(nn.Module):
    """Blocks that are recomputed in the backward pass as `recompute` says."""

    def __init__(self, recompute: str, blocks: list[dict[str, str]]) -> None:
        super().__init__()
        self.recompute = recompute
        self.inward = nn.Linear(D, D)
        self.blocks = nn.ModuleList(MoE(D, 8, E, K, name=f"blocks.{i}", **o) for i, o in enumerate(blocks))
        self.outward = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inward(x)
        for block in self.blocks:
            h = h + (checkpoint(block, h, **CHECKPOINTS[self.recompute]) if self.recompute else block(h))
        return self.outward(h).square().mean()


class Call(NamedTuple):
    """The ids of one dispatch, and whether a backward pass asked for it."""

    recomputed: bool
    indices: Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every dispatch that runs, compiled or not: its body is opaque to torch.compile."""
    made: list[Call] = []

    def watch(where: Any) -> None:
        original = where.dispatch_fwd

        def dispatch_fwd(x: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Any:
            made.append(Call(ops.in_backward(), indices.clone()))
            return original(x, indices, *args, **kwargs)

        monkeypatch.setattr(where, "dispatch_fwd", dispatch_fwd)

    from kmeans_route.kernels import dispatch

    watch(torch_backend)
    watch(dispatch)
    return made


class Step(NamedTuple):
    """What a step of training gathered, computed, and left."""

    pending: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    calls: list[Call]


def pending_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": getattr(block.router.pending, field).clone()
        for name, block in model.named_modules()
        if isinstance(block, MoE)
        for field in block.router.pending.FIELDS
    }


def train(
    mode: Mode,
    blocks: list[dict[str, str]],
    calls: list[Call],
    *,
    num_parts: int = 1,
    attached: bool = True,
    device: str = "cpu",
    backend: str = "aot_eager",
) -> list[Step]:
    """Three steps, the first of which sets the centroids, and what is to be compared of each."""
    torch.manual_seed(7)
    model = Model(mode.recompute, blocks).to(device)
    forward: Any = model
    if mode.compiled == "blocks":
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
    elif mode.compiled:
        forward = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    if attached:
        attach(model, optimizer)
    steps = []
    for step in range(NUM_STEPS):
        calls.clear()
        x = torch.randn(num_parts * PART, D, generator=generator(step)) + 0.5
        for part in x.to(device).chunk(num_parts):
            (forward(part) / num_parts).backward()
        pending = pending_of(model)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        if not attached:
            for block in model.blocks:
                block.router.commit()
        state = {name: b.clone() for name, b in model.named_buffers()}
        steps.append(Step(pending, gradients, state, list(calls)))
    return steps


def assert_rounding_apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Integers equal, fp32 within a few roundings of a tensor's largest value; a single number, which may be a sum that
    cancels, within those of the largest value of all."""
    assert got.keys() == want.keys()
    largest = {name: float(v.abs().max()) for name, v in want.items() if v.is_floating_point() and v.numel()}
    for name, value in want.items():
        if value.is_floating_point():
            scale = max(largest.values()) if value.numel() == 1 else largest.get(name, 0.0)
            tolerance = 16 * EPS[torch.float32] * scale
            torch.testing.assert_close(
                got[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )
        else:
            assert_same_bits(got[name], value, name)


def assert_recomputed_alike(calls: list[Call], num_parts: int, recompute: str) -> None:
    """Each micro-batch is recomputed block by block from the last, and every token goes where it went."""
    by_part = len(calls) // num_parts
    for start in range(0, len(calls), by_part):
        part = calls[start : start + by_part]
        forward = [call.indices for call in part if not call.recomputed]
        again = [call.indices for call in part if call.recomputed]
        assert part[: len(forward)] == [call for call in part if not call.recomputed]
        if recompute == "selective, routing kept" or not recompute:
            assert again == []
            continue
        assert len(again) == len(forward) > 0
        for got, want in zip(again, reversed(forward), strict=True):
            assert_same_bits(got, want)


def assert_trained_alike(got: list[Step], want: list[Step], num_parts: int, recompute: str) -> None:
    for one, other in zip(got, want, strict=True):
        assert_rounding_apart(one.pending, other.pending)
        assert_rounding_apart(one.gradients, other.gradients)
        assert_rounding_apart(one.state, other.state)
        assert_recomputed_alike(one.calls, num_parts, recompute)
        forwards = [call.indices for call in one.calls if not call.recomputed]
        for ids, plain_ids in zip(forwards, (call.indices for call in other.calls), strict=True):
            assert_same_bits(ids, plain_ids)


def assert_each_token_counted_once(steps: list[Step], num_tokens: int) -> None:
    for step in steps:
        for name, value in step.pending.items():
            if name.endswith("num_tokens"):
                assert int(value) == num_tokens, name
            elif name.endswith("counts"):
                assert int(value.sum()) == num_tokens * K, name
    last = {name: int(value) for name, value in steps[-1].state.items() if name.endswith("steps")}
    assert set(last.values()) <= {NUM_STEPS - 1}, "the first commit sets the centroids"


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "unattached"])
@pytest.mark.parametrize("num_parts", [1, 4])
def test_training_is_that_of_the_plain_model(
    mode: Mode, num_parts: int, attached: bool, device: str, calls: list[Call]
) -> None:
    blocks = BLOCKS[mode.compiled]
    want = train(PLAIN, blocks, calls, num_parts=num_parts, device=device)
    assert_each_token_counted_once(want, num_parts * PART)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = train(mode, blocks, calls, num_parts=num_parts, attached=attached, device=device)
    told = [str(w.message) for w in caught if "gathers nothing" in str(w.message)]
    if attached or mode.counts_unattached:
        assert told == []
        assert_trained_alike(got, want, num_parts, mode.recompute)
        return
    assert not any(value.any() for step in got for value in step.pending.values())
    if mode.compiled:  # compiled code cannot tell
        assert told == []
    else:
        assert len(told) == len(blocks), "once for each router"
        assert all("use_reentrant=False" in message and "kmeans_route.attach" in message for message in told)


@pytest.mark.parametrize("name", [*(name for name in MODES if "compile" not in name), "compile(non-reentrant(block))"])
def test_learned_routers_count_once_too(name: str, device: str, calls: list[Call]) -> None:
    torch._dynamo.reset()
    mode = MODES[name]
    blocks = [SIGMOID_QUANTILE] if mode.compiled else [SIGMOID, SIGMOID_QUANTILE]
    want = train(PLAIN, blocks, calls, num_parts=2, device=device)
    assert_each_token_counted_once(want, 2 * PART)
    got = train(mode, blocks, calls, num_parts=2, device=device)
    assert_trained_alike(got, want, 2, mode.recompute)


@pytest.mark.parametrize(
    "recompute", ["reentrant", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(CHECKPOINTS)[1:])]
)
def test_the_triton_backend_counts_once(recompute: str, coarse_rows: None, calls: list[Call]) -> None:
    """In the interpreter; on a GPU the other tests run on that backend."""
    blocks = [{"backend": "triton"}]
    want = train(PLAIN, blocks, calls)
    assert_each_token_counted_once(want, PART)
    assert_trained_alike(train(Mode(recompute, ""), blocks, calls), want, 1, recompute)


@pytest.mark.slow  # half a minute in a C++ compiler
def test_compiled_by_inductor(device: str, calls: list[Call]) -> None:
    torch._dynamo.reset()
    mode, blocks = MODES["compile(non-reentrant(block))"], BLOCKS["model"]
    want = train(PLAIN, blocks, calls, num_parts=2, device=device)
    got = train(mode, blocks, calls, num_parts=2, device=device, backend="inductor")
    assert_trained_alike(got, want, 2, mode.recompute)


def test_attached_to_what_torch_compile_returns(device: str) -> None:
    """A forward without gradients does not count, beside those that do."""
    torch._dynamo.reset()
    model = Model("non-reentrant", [PROPORTIONAL]).to(device)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    attachment = attach(compiled, optimizer)
    (router,) = attachment.routers.values()
    x = torch.randn(PART, D, device=device)
    assert isinstance(router, KMeansRouter)
    for step in range(2):
        compiled(x).backward()
        if step:
            with torch.no_grad():
                compiled(x)
        assert int(router.pending.num_tokens) == PART
        optimizer.step()
        assert int(router.pending.num_tokens) == 0
        assert int(router.steps) == step


@pytest.mark.parametrize("recompute", ["", *CHECKPOINTS])
def test_micro_batches_are_one_batch(recompute: str, device: str) -> None:
    """For one step with centroids given: the same counts, and sums, gradients and centroids within rounding."""
    results = []
    for num_parts in (1, 4):
        torch.manual_seed(7)
        model = Model(recompute, BLOCKS[""]).to(device)
        x = torch.randn(4 * PART, D, generator=generator(0)).to(device)
        for block in model.blocks:
            block.router.initialize(x)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        attach(model, optimizer)
        for part in x.chunk(num_parts):
            (model(part) / num_parts).backward()
        gathered = pending_of(model)
        assert {int(n) for name, n in gathered.items() if name.endswith("num_tokens")} == {4 * PART}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        results.append((gathered, gradients, {name: b.clone() for name, b in model.named_buffers()}))
    for got, want in zip(results[1], results[0], strict=True):
        assert_rounding_apart(got, want)


class Mark:
    """Lives as long as the graph that it is in."""


class Marking(torch.autograd.Function):
    """The identity, on a node that holds a mark. `held` has those of recomputations that live, and `before` how many
    there were as each recomputation began."""

    held: ClassVar["weakref.WeakSet[Mark]"] = weakref.WeakSet()
    before: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark = Mark()
        if ops.in_backward():
            Marking.before.append(len(Marking.held))
            Marking.held.add(ctx.mark)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy


class WithLoss(nn.Module):
    """A block that reads its auxiliary loss inside of what is recomputed, and goes on computing with it."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.inward, self.moe = nn.Linear(D, D), MoE(D, 8, E, K, "softmax")
        if compiled:
            self.moe.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.moe(Marking.apply(self.inward(x)))
        loss = self.moe.aux_loss * 2
        loss *= self.moe.aux_loss.exp()
        return x + y, loss


def gradients_with_loss(recompute: str, device: str, *, early_stop: bool, compiled: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(7)
    blocks = nn.ModuleList(WithLoss(compiled) for _ in range(3)).to(device)
    optimizer = torch.optim.SGD(blocks.parameters(), 1e-2)
    attach(blocks, optimizer)
    h = torch.randn(PART, D, generator=generator(0)).to(device).requires_grad_()
    losses, read = [], []
    with set_checkpoint_early_stop(early_stop):
        for block in blocks:
            h, loss = checkpoint(block, h, **CHECKPOINTS[recompute]) if recompute else block(h)
            losses.append(loss)
            read.append(block.moe.aux_loss.detach().clone())
    (h.square().mean() + torch.stack(losses).sum()).backward()
    for block, before in zip(blocks, read, strict=True):
        assert_same_bits(block.moe.aux_loss.detach(), before, "aux_loss")
    return {name: p.grad for name, p in blocks.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:the auxiliary loss of .* trains nothing under reentrant")
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("recompute", CHECKPOINTS)
def test_an_auxiliary_loss_trains_and_holds_no_recomputed_graph(recompute: str, early_stop: bool, device: str) -> None:
    """Else every block's would live until the pass is over and longer, and checkpointing would save nothing."""
    want = gradients_with_loss("", device, early_stop=early_stop)
    Marking.before.clear()
    got = gradients_with_loss(recompute, device, early_stop=early_stop)
    assert Marking.before == [0, 0, 0]
    assert not Marking.held
    assert_rounding_apart(got, want)
    assert len(got) == 3 * 5


@pytest.mark.filterwarnings("ignore:the auxiliary loss of .* trains nothing under reentrant")
@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_an_auxiliary_loss_of_a_compiled_layer_trains(recompute: str, device: str) -> None:
    torch._dynamo.reset()
    want = gradients_with_loss("", device, early_stop=True)
    assert_rounding_apart(gradients_with_loss(recompute, device, early_stop=True, compiled=True), want)


class Asking(torch.autograd.Function):
    """The identity; its backward notes whether it runs in a backward pass, and on which thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, told: list[Any]) -> Tensor:
        ctx.told = told
        told.append((ops.in_backward(), threading.get_ident()))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.told.append((ops.in_backward(), threading.get_ident()))
        return dy, None


class Telling(torch.nn.Module):
    """Adds 1 where it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if ops.traced() == "exported" else x


def test_exporting_is_true_in_an_export_and_not_in_a_compilation() -> None:
    """It rests on a flag that is private to PyTorch, so this must hold for each version claimed."""
    x, module = torch.zeros(1), Telling()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert [int(call(x)) for call in (module, compiled)] == [0, 0]
    for strict in (False, True):
        assert int(torch.export.export(module, (x,), strict=strict).module()(x)) == 1
    assert [int(call(x)) for call in (module, compiled)] == [0, 0]


def test_in_backward_is_true_in_a_backward_pass_and_nowhere_else(device: str) -> None:
    """It rests on a call that is private to PyTorch, so this must hold for each version claimed."""
    assert not ops.in_backward()
    told: list[Any] = []
    x = torch.ones(3, device=device, requires_grad=True)
    y = Asking.apply(x, told)
    y.register_hook(lambda dy: told.append((ops.in_backward(), None)))
    elsewhere: list[bool] = []
    x.register_hook(lambda dy: on_another_thread(lambda: elsewhere.append(ops.in_backward())))
    y.sum().backward()
    assert [inside for inside, _ in told] == [False, True, True]
    if device == "cuda":
        assert told[2][1] != told[0][1], "autograd has a thread of its own for each device"
    assert elsewhere == [False]
    assert not ops.in_backward()
    torch.autograd.grad(Asking.apply(x, told).sum(), x)
    assert [inside for inside, _ in told[3:]] == [False, True]


def on_another_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_in_backward_ends_with_a_backward_pass_that_raises(device: str) -> None:
    def fail(_dy: Tensor) -> None:
        assert ops.in_backward()
        raise ArithmeticError("in the backward pass")

    x = torch.ones(3, device=device, requires_grad=True)
    y = x.clone()
    y.register_hook(fail)
    with pytest.raises(ArithmeticError, match="in the backward pass"):
        y.sum().backward()
    assert not ops.in_backward()


class Calling(torch.autograd.Function):
    """The identity; its backward asks for a call once it is through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, told: list[str]) -> Tensor:
        ctx.told = told
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ops.call_after_node(lambda: ctx.told.append("called"))
        ctx.told.append("through")
        return dy, None


@pytest.mark.parametrize("unpacking", [False, True], ids=["Python's", "PyTorch's own"])
def test_a_call_after_a_node_comes_once_it_is_through(unpacking: bool, device: str) -> None:
    """It rests on a call that is private to PyTorch, so this must hold for each version claimed."""
    told: list[str] = []
    x = torch.ones(3, device=device, requires_grad=True)
    h = x * 2
    h.register_hook(lambda _: told.append("next"))

    def unpack(value: Tensor) -> Tensor:  # as non-reentrant checkpointing recomputes
        ops.call_after_node(lambda: told.append("called"))
        told.append("through")
        return value

    if unpacking:
        with torch.autograd.graph.saved_tensors_hooks(lambda value: value, unpack):
            y = h.exp()
    else:
        y = Calling.apply(h, told)
    for _ in range(2):  # a second pass calls for itself alone
        y.sum().backward(retain_graph=True)
        assert told == ["through", "called", "next"]
        told.clear()
    ops.call_after_node(lambda: told.append("called"))
    assert told == [], "outside of a pass no node ends"
