"""The MoE layer against a loop over tokens, for each router; bad rows, odd sizes, compilation, learning."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route import KMeansRouter, LearnedRouter, MoE, directions
from tests.helpers.compare import EPS, assert_no_worse, assert_same_bits, generator, numpy

D, I, E, K = 16, 12, 6, 2  # noqa: E741 (I is the intermediate size)
KINDS = ["kmeans", "softmax", "sigmoid"]
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics", "ignore:.*tokens pending")


def hidden_states(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = generator(seed)
    return (torch.randn(num_tokens, D, generator=gen) + 0.3 * torch.randn(D, generator=gen)).to(dtype)


def make(kind: str = "kmeans", *, intermediate_size: int = I, **options: Any) -> MoE:
    """A layer in the middle of training: centroids from data, and a bias that decides some selections."""
    torch.manual_seed(5)
    layer = MoE(D, intermediate_size, E, K, router=kind, **options)
    if isinstance(layer.router, KMeansRouter):
        layer.router.initialize(hidden_states(300, 100))
    if kind != "softmax":
        layer.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, E))
    return layer


def naive_gates(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Selected ids (T, K) and gates (T, K), as each router's paper writes them."""
    router = layer.router
    if isinstance(router, KMeansRouter):
        scores = F.normalize(x) @ directions(router.weight, x.dtype).T
        ids = (scores + router.expert_bias).topk(K).indices
        return ids, torch.softmax(scores.gather(1, ids) / 0.1, 1)
    logits = x @ router.weight.T
    affinity = logits.softmax(1) if router.kind == "softmax" else logits.sigmoid()
    ids = (affinity + router.expert_bias).topk(K).indices
    chosen = affinity.gather(1, ids)
    return ids, chosen / chosen.sum(1, keepdim=True)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return down @ (F.silu(gate @ x) * (up @ x))


def naive(layer: MoE, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """y token by token."""
    ids, gates = naive_gates(layer, x)
    experts, rows = layer.experts, []
    for t in range(len(x)):
        if mask is not None and not mask[t]:
            rows.append(torch.zeros(D, dtype=x.dtype))
            continue
        y = torch.zeros(D, dtype=x.dtype)
        for k in range(K):
            e = int(ids[t, k])
            y = y + gates[t, k] * swiglu(x[t], experts.gate_up[e], experts.down[e])
        if layer.shared is not None:
            y = y + swiglu(x[t], layer.shared.gate_up.weight, layer.shared.down.weight)
        rows.append(y)
    return torch.stack(rows)


def with_gradients(layer: MoE, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """y and the gradients of a fixed mixture of its entries, in x and every parameter."""
    coefficients = torch.randn(y.shape, generator=generator(3), dtype=torch.float64).to(y.dtype)
    names, leaves = zip(("x", x), *layer.named_parameters(), strict=True)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad((y * coefficients).sum(), leaves), strict=True))}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_shared_experts", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_and_gradients_equal_the_loop(
    kind: str, dtype: torch.dtype, num_shared_experts: int, masked: bool
) -> None:
    layer = make(kind, num_shared_experts=num_shared_experts).to(dtype)
    precise = copy.deepcopy(layer).double()
    x = hidden_states(40, 1, dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    mask = torch.rand(40, generator=generator(2)) < 0.7 if masked else None
    assert torch.equal(naive_gates(layer, x)[0], naive_gates(precise, x64)[0]), "no near-ties in this batch"
    want = with_gradients(precise, naive(precise, x64, mask), x64)
    plain = with_gradients(layer, naive(layer, x, mask), x)
    got = with_gradients(layer, layer(x, mask), x)
    # Learned gates are computed in fp32 whatever the dtype.
    eps = EPS[torch.float32 if kind != "kmeans" else dtype]
    for name, value in want.items():
        scale = float(value.abs().max())
        assert got[name].dtype == dtype, name
        assert_no_worse(got[name], plain[name], numpy(value), 16 * eps * scale, name)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_and_eval(kind: str) -> None:
    layer = make(kind, num_shared_experts=1).eval()
    x, mask = hidden_states(24, 1), torch.rand(24, generator=generator(2)) < 0.7
    y = layer(x.view(2, 3, 4, D), mask.view(2, 3, 4))
    assert y.shape == (2, 3, 4, D)
    torch.testing.assert_close(y.view(24, D), naive(layer, x, mask), rtol=1e-4, atol=1e-5)
    assert int(layer.router.pending.num_tokens) == 0


@pytest.mark.parametrize("num_shared_experts", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_gradient(kind: str, num_shared_experts: int) -> None:
    """The gradient of y.sum() is one number seen through strides of 0."""
    layer = make(kind, num_shared_experts=num_shared_experts)
    x = hidden_states(30).requires_grad_()
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x).sum(), leaves)
    want = torch.autograd.grad(naive(layer, x).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_shared_experts", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_may_hold_anything(kind: str, num_shared_experts: int) -> None:
    layer = make(kind, num_shared_experts=num_shared_experts)
    mask = torch.rand(40, generator=generator(2)) < 0.7
    x = hidden_states(40)
    finite = run(layer, x, mask)
    spoiled = x.clone()
    spoiled[~mask] = torch.tensor([torch.nan, torch.inf, 1e30, -torch.inf])[torch.arange(int((~mask).sum())) % 4, None]
    got = run(layer, spoiled, mask)
    assert not got["y"][~mask].any()
    assert not got["x"][~mask].any()
    for name, value in finite.items():
        assert_same_bits(got[name], value, name)


def run(layer: MoE, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """y, the auxiliary loss, and gradients of their sum; nothing pending is left."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf, mask)
    aux = layer.aux_loss
    ((y * torch.linspace(-1, 1, D)).sum() + aux).backward()
    assert leaf.grad is not None
    grads = {}
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        grads[name] = p.grad.clone()
    return {"y": y.detach(), "aux": aux.detach(), "x": leaf.grad, **grads}


@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_bad_rows_give_zero_and_leave_the_others_alone(num_shared_experts: int) -> None:
    layer = make("kmeans", num_shared_experts=num_shared_experts)
    x = hidden_states(40)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[0, 7, 8, 39]] = True
    spoiled = x.clone()
    spoiled[bad] = torch.tensor([torch.nan, torch.inf, 1e30, 0.0])[:, None]
    got, want = run(layer, spoiled), run(layer, x, ~bad)
    assert not got["y"][bad].any()
    assert not got["x"][bad].any()
    for name, value in want.items():
        assert_same_bits(got[name], value, name)
    torch.testing.assert_close(got["y"][~bad], run(layer, x)["y"][~bad], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_grouped_mm_does_not_take(kind: str) -> None:
    """With 5 inner units a loop runs, with 3 more that are zero grouped_mm does: the same numbers."""
    odd = make(kind, intermediate_size=5)
    even = make(kind, intermediate_size=8)
    with torch.no_grad():
        small, large = odd.experts, even.experts
        for half in range(2):
            large.gate_up[:, 8 * half : 8 * half + 5] = small.gate_up[:, 5 * half : 5 * half + 5]
            large.gate_up[:, 8 * half + 5 : 8 * half + 8] = 0
        large.down[:, :, :5] = small.down
        large.down[:, :, 5:] = 0
        even.router.weight.copy_(odd.router.weight)
    x = hidden_states(40)
    x[3] = 0  # rows after the last offset, in both paths
    mask = torch.rand(40, generator=generator(2)) < 0.7
    got, want = run(even, x, mask), run(odd, x, mask)
    for name in ("y", "x"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    up, down = got["experts.gate_up"], got["experts.down"]
    up = torch.cat([up[:, :5], up[:, 8:13]], 1)
    torch.testing.assert_close(up, want["experts.gate_up"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(down[:, :, :5], want["experts.down"], rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    layer = make("kmeans")
    with torch.no_grad():
        layer.router.expert_bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, -2]))
    got = run(layer, hidden_states(40))
    assert int(layer.tokens_per_expert[5]) == 0
    for name in ("experts.gate_up", "experts.down"):
        assert not got[name][5].any()
        assert got[name][:5].flatten(1).any(1).sum() == int((layer.tokens_per_expert[:5] > 0).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_per_expert_of_the_last_forward(kind: str) -> None:
    layer = make(kind)
    for training in (True, False):
        layer.train(training)
        for seed in (1, 2):
            x, mask = hidden_states(50, seed), torch.rand(50, generator=generator(seed)) < 0.8
            layer(x, mask)
            counts = torch.bincount(naive_gates(layer, x)[0][mask].flatten(), minlength=E)
            assert torch.equal(layer.tokens_per_expert, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_details_lay_one_forward_open(kind: str) -> None:
    layer = make(kind, num_shared_experts=1)
    x, mask = hidden_states(30), torch.rand(30, generator=generator(2)) < 0.7
    y = layer(x, mask)
    loads, pending = layer.tokens_per_expert.clone(), int(layer.router.pending.num_tokens)
    details = layer.details(x.view(5, 6, D).requires_grad_(), mask.view(5, 6))
    assert int(layer.router.pending.num_tokens) == pending == int(mask.sum())
    assert torch.equal(layer.tokens_per_expert, loads)
    assert details.y.shape == (5, 6, D)
    assert_same_bits(details.y.view(30, D), y.detach())
    assert not details.y_sorted.requires_grad
    end = int(details.dispatch.offsets[-1])
    assert end == K * int(mask.sum())
    assert not details.y_sorted[end:].any()
    ids = naive_gates(layer, x)[0]
    for t in mask.nonzero().flatten().tolist():
        for k in range(K):
            row, e = int(details.dispatch.positions[t, k]), int(ids[t, k])
            want = swiglu(x[t], layer.experts.gate_up[e], layer.experts.down[e])
            torch.testing.assert_close(details.y_sorted[row], want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_auxiliary_loss_is_the_switch_loss(masked: bool) -> None:
    layer = make("softmax", aux_loss_coef=0.3)
    x = hidden_states(50).requires_grad_()
    mask = torch.rand(50, generator=generator(2)) < 0.7 if masked else torch.ones(50, dtype=torch.bool)
    layer(x, mask if masked else None)
    p = (x @ layer.router.weight.T).softmax(1)[mask]
    f = torch.bincount(p.topk(K).indices.flatten(), minlength=E) / (K * len(p))
    want = 0.3 * E * (f * p.mean(0)).sum()
    torch.testing.assert_close(layer.aux_loss, want, rtol=1e-5, atol=0)
    leaves = [x, layer.router.weight]
    got_grads = torch.autograd.grad(layer.aux_loss, leaves)
    for got, wanted in zip(got_grads, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-8)
        assert got.any()


def test_auxiliary_loss_is_zero_elsewhere() -> None:
    x = hidden_states(50)
    for layer in (make("kmeans"), make("sigmoid"), make("softmax", balance="none")):
        layer(x)
        assert layer.aux_loss.shape == ()
        assert layer.aux_loss.item() == 0
    layer = make("softmax")
    layer(x)
    assert layer.aux_loss.item() > 0
    layer.eval()(x)
    assert layer.aux_loss.item() == 0


def test_experts_do_not_depend_on_the_router() -> None:
    layers = []
    for kind in KINDS:
        torch.manual_seed(11)
        layers.append(MoE(D, I, E, K, router=kind, num_shared_experts=1, seed=len(layers)))
    for layer in layers[1:]:
        for name in ("experts.gate_up", "experts.down", "shared.gate_up.weight", "shared.down.weight"):
            assert_same_bits(layer.get_parameter(name), layers[0].get_parameter(name), name)
    other = MoE(D, I, E, K)
    assert not torch.equal(other.experts.gate_up, layers[0].experts.gate_up)
    # Each output has the variance of its inputs.
    wide = MoE(64, 32, 16, 1).experts
    assert wide.gate_up.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert wide.down.std().item() == pytest.approx(32**-0.5, rel=0.05)


def test_the_default_balance_of_each_router() -> None:
    assert make("kmeans").router.commit_options.balance == "proportional"
    softmax, sigmoid = make("softmax").router, make("sigmoid").router
    assert isinstance(softmax, LearnedRouter)
    assert isinstance(sigmoid, LearnedRouter)
    assert (softmax.kind, softmax.balance) == ("softmax", "aux")
    assert (sigmoid.kind, sigmoid.balance) == ("sigmoid", "sign")


@pytest.mark.parametrize("num_shared_experts", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str, num_shared_experts: int) -> None:
    layer = make(kind, num_shared_experts=num_shared_experts)
    x = torch.zeros(2, 0, D, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, D)
    (y.sum() + layer.aux_loss).backward()
    assert int(layer.router.pending.num_tokens) == 0
    assert torch.equal(layer.tokens_per_expert, torch.zeros(E, dtype=torch.int64))
    assert layer.aux_loss.item() == 0


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_for_every_token(kind: str, num_experts: int) -> None:
    layer = MoE(D, I, num_experts, num_experts, router=kind)
    x = hidden_states(20)
    y = layer(x)
    routing = layer.router.route(x)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(20))
    want = torch.zeros(20, D)
    for t in range(20):
        for gate, e in zip(routing.weights[t], routing.indices[t].tolist(), strict=True):
            want[t] += gate * swiglu(x[t], layer.experts.gate_up[e], layer.experts.down[e])
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert layer.tokens_per_expert.tolist() == [20] * num_experts
    layer.router.commit()
    layer.router.commit()
    assert not layer.router.expert_bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    layer = make(kind, num_shared_experts=1)
    x = hidden_states(60)
    want = run(layer, x)
    loads = layer.tokens_per_expert.clone()
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaf)
    assert y.shape == x.shape
    (y * torch.linspace(-1, 1, D)).sum().backward()
    if kind == "kmeans":  # no autocast inside the router: not one token moves
        assert torch.equal(layer.tokens_per_expert, loads)
        assert relative_error(y, want["y"]) < 0.02
        assert leaf.grad is not None
        assert relative_error(leaf.grad, want["x"]) < 0.03
        for name in ("experts.gate_up", "experts.down"):
            assert relative_error(layer.get_parameter(name).grad, want[name]) < 0.03
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def relative_error(got: Tensor | None, want: Tensor) -> float:
    assert got is not None
    return float((got.detach().float() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_loads_are_written_in_place(kind: str) -> None:
    layer = MoE(D, I, E, K, router=kind).eval()
    held = layer.tokens_per_expert
    for num_tokens in (3, 8):
        layer(hidden_states(num_tokens))
        assert layer.tokens_per_expert is held
        assert int(held.sum()) == num_tokens * K


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("kind", KINDS)
def test_loads_follow_the_layer_from_the_meta_device(kind: str, how: str) -> None:
    with torch.device("meta"):
        layer = MoE(D, I, E, K, router=kind)
    if how == "to_empty":
        layer.to_empty(device="cpu")
        layer.router.reset_parameters()
        layer.experts.reset_parameters()
        assert layer.tokens_per_expert.tolist() == [0] * E
    else:
        layer.load_state_dict(MoE(D, I, E, K, router=kind).state_dict(), assign=True)
    layer.eval()(hidden_states(8))
    assert layer.tokens_per_expert.device.type == "cpu"
    assert int(layer.tokens_per_expert.sum()) == 8 * K


def test_a_layer_built_in_inference_mode_runs_outside_of_it() -> None:
    with torch.inference_mode():
        layer = MoE(D, I, E, K).eval()
        layer(hidden_states(3))
    with torch.no_grad():
        layer(hidden_states(8))
    assert int(layer.tokens_per_expert.sum()) == 8 * K


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in KINDS), ("sigmoid", {"balance": "quantile"})])
def test_compiled_training_is_eager_training(kind: str, options: dict[str, Any], plain_empty: None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(5)
    eager = MoE(D, I, E, K, router=kind, num_shared_experts=1, **options)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(3):  # before, at and after the first data
        x = hidden_states(40, step)
        mask = torch.rand(40, generator=generator(step)) < 0.8
        results = []
        for layer, call in ((eager, eager), (twin, compiled)):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            loss = call(leaf, mask).square().mean() + layer.aux_loss
            loss.backward()
            grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
            held = {field: getattr(layer.router.pending, field).clone() for field in layer.router.pending.FIELDS}
            results.append({"loss": loss.detach(), "x": leaf.grad, **grads, **held, "n": layer.tokens_per_expert})
            layer.router.commit()
        assert results[1].keys() == results[0].keys()
        assert int(results[0]["num_tokens"]) == int(mask.sum())
        for name, value in results[0].items():
            torch.testing.assert_close(
                results[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def skewed_tokens(step: int, num_tokens: int = 256) -> tuple[Tensor, Tensor]:
    """Tokens of 8 clusters, some of them larger, and a target that differs by cluster."""
    fixed, gen = generator(1), generator(1000 + step)
    centres = torch.randn(8, D, generator=fixed)
    maps = torch.randn(8, D, D, generator=fixed) * D**-0.5
    odds = torch.tensor([6.0, 2, 2, 1, 1, 1, 1, 1])
    member = torch.multinomial(odds, num_tokens, replacement=True, generator=gen)
    x = centres[member] + torch.randn(num_tokens, D, generator=gen)
    return x, torch.einsum("tij,tj->ti", maps[member], x)


def learn(num_steps: int, kind: str = "kmeans", **options: Any) -> tuple[MoE, list[float], Tensor]:
    """A layer after training, its losses, and its loads over the second half."""
    torch.manual_seed(3)
    layer = MoE(D, 16, 8, 2, router=kind, **options)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    losses, loads = [], torch.zeros(8, dtype=torch.int64)
    for step in range(num_steps):
        x, target = skewed_tokens(step)
        loss = (layer(x) - target).square().mean()
        (loss + layer.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.router.commit()
        losses.append(loss.item())
        loads += layer.tokens_per_expert if step >= num_steps // 2 else 0
    return layer, losses, loads


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_learns(kind: str) -> None:
    _, losses, _ = learn(80, kind)
    assert sum(losses[-10:]) / 10 < 0.3 * sum(losses[:5]) / 5


def test_balancing_lowers_max_vio() -> None:
    def max_vio(loads: Tensor) -> float:
        return float(loads.max() / loads.double().mean() - 1)

    free = max_vio(learn(50, balance="none")[2])
    assert free > 0.3, "the data is skewed enough for balancing to matter"
    for balance in ("proportional", "quantile"):
        assert max_vio(learn(50, balance=balance)[2]) < 0.5 * free


@pytest.mark.parametrize("options", [{}, {"balance": "quantile"}, {"kind": "sigmoid"}], ids=str)
def test_two_equal_trainings_end_in_the_same_bits(options: dict[str, Any]) -> None:
    one, other = (learn(10, **options)[0].state_dict() for _ in range(2))
    for name, value in one.items():
        assert_same_bits(other[name], value, name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"router": "topk"}, ValueError, "router must be one of 'kmeans', 'softmax', 'sigmoid', got 'topk'"),
        ({"intermediate_size": 0}, ValueError, "intermediate_size must be at least 1, got 0"),
        ({"intermediate_size": 1.5}, TypeError, "intermediate_size must be an int, got float"),
        ({"num_shared_experts": -1}, ValueError, "num_shared_experts must be at least 0, got -1"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"top_k": 7}, ValueError, r"top_k must be in \[1, 6\], got 7"),
        ({"balance": "aux"}, ValueError, "balance must be one of 'proportional', 'sign', 'quantile', 'none'"),
        ({"router": "softmax", "balance": "proportional"}, ValueError, "balance must be one of 'aux', 'sign'"),
        ({"router": "sigmoid", "decay": 0.5}, TypeError, "decay"),
        ({"router": "kmeans", "aux_loss_coef": 0.5}, TypeError, "aux_loss_coef"),
    ],
    ids=str,
)
def test_options_are_refused_at_construction(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MoE(**{"hidden_size": D, "intermediate_size": I, "num_experts": E, "top_k": K, **arguments})


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_refused(kind: str) -> None:
    layer = make(kind)
    for call in (layer, layer.details):
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 16\), got \(4, 3\)"):
            call(torch.zeros(4, 3))
        with pytest.raises(TypeError, match="mask must be a bool tensor"):
            call(torch.zeros(4, D), torch.ones(4))
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 2\)"):
            call(torch.zeros(2, 2, D), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_forward_hooks_on_the_router_see_what_the_layer_gets(with_kwargs: bool) -> None:
    layer, seen = MoE(D, 8, E, K), []
    x = torch.randn(2, 5, D)
    handle = layer.router.register_forward_hook(lambda *given: seen.append(given), with_kwargs=with_kwargs)
    layer.eval()(x)
    router, (rows,), *keywords, (routing, sent) = seen[0]
    assert router is layer.router
    assert keywords == [{}] * with_kwargs
    assert torch.equal(rows, x.view(10, D))
    assert torch.equal(routing.indices, layer.router.route(x).indices)
    assert sent.x_sorted.shape == (10 * K, D)
    handle.remove()
    layer(x)
    assert len(seen) == 1
