"""A learned offset beside the centroids: the gradient of the directions on every backend, and what keeps it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kmeans_route
from kmeans_route import KMeansRouter, MoE, reference
from kmeans_route.backends import INTERPRETED, TRITON_INSTALLED
from kmeans_route.functional import route

T, D, E, K = 40, 24, 8, 3
BACKENDS = ("torch", "triton") if TRITON_INSTALLED and INTERPRETED else ("torch",)
FORMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax over all": {"normalize": False},
    "sigmoid": {"gate": "sigmoid"},
    "sigmoid alone": {"gate": "sigmoid", "normalize": False},
    "cosine": {"gate": "cosine"},
    "groups": {"n_group": 4, "topk_group": 2},
}


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=g)
    x[3], x[5, 2], x[7] = 0.0, torch.nan, torch.inf
    rows = kmeans_route.directions(torch.randn(E, D, generator=g), torch.float32)
    return x.to(dtype), rows.to(dtype), torch.randn(T, K, generator=g)


def gradients(backend: str, x: Tensor, rows: Tensor, d_gates: Tensor, all_scores: bool, **form: Any) -> list[Tensor]:
    x, rows = x.clone().requires_grad_(), rows.clone().requires_grad_()
    mask = torch.arange(T) % 9 != 4
    routing = route(
        x, rows, K, torch.linspace(-0.1, 0.1, E), mask=mask, directions=rows, return_scores=all_scores,
        backend=backend, tau=0.2, **form,
    )  # fmt: skip
    loss = (routing.weights * d_gates).sum() + routing.selected_scores.where(routing.valid[:, None], 0.0).sum()
    if all_scores:
        assert routing.scores is not None
        loss = loss + routing.scores.where(routing.valid[:, None], 0.0).square().sum()
    return list(torch.autograd.grad(loss, [x, rows]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("all_scores", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_directions_is_that_of_the_reference(backend: str, all_scores: bool, form: str) -> None:
    x, rows, d_gates = problem()
    expected = gradients("reference", x.double(), rows.double(), d_gates, all_scores, **FORMS[form])
    got = gradients(backend, x, rows, d_gates, all_scores, **FORMS[form])
    assert expected[1].abs().max() > 0.1
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_directions_in_half_precision(backend: str) -> None:
    x, rows, d_gates = problem(torch.float16)
    expected = gradients("reference", x.double(), rows.double(), d_gates, False)[1]
    got = gradients(backend, x, rows, d_gates, False)[1]
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_directions_alone_may_be_learned(backend: str) -> None:
    x, rows, d_gates = problem()
    rows.requires_grad_()
    routing = route(x, rows, K, directions=rows, backend=backend)
    (routing.weights * d_gates).sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() > 0.1
    assert x.grad is None


def routers(**options: Any) -> tuple[KMeansRouter, KMeansRouter]:
    plain, learned = (
        KMeansRouter(D, E, K, seed=2, learned_offset=offset, **options) for offset in (False, True)
    )  # fmt: skip
    return plain, learned


@pytest.mark.filterwarnings("ignore:router .* trains but nothing commits")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_zero_changes_nothing(backend: str) -> None:
    plain, learned = routers(backend=backend)
    assert learned.offset is not None
    assert not learned.offset.any()
    x, _, d_gates = problem()
    for _ in range(3):
        out = []
        for router in (plain, learned):
            given = x.clone().requires_grad_()
            routing, sent = router.route_dispatch(given, gather=True)
            (routing.weights * d_gates).sum().backward()
            out.append((routing.indices, sent.x_sorted, routing.weights, given.grad))
            router.commit()
        assert torch.equal(out[0][0], out[1][0])
        for one, other in zip(out[0][1:], out[1][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(plain.weight, learned.weight)
    assert learned.offset.grad is not None
    assert learned.offset.grad.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:router .* trains but nothing commits")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_moves_selection_and_gates_and_no_average(backend: str) -> None:
    plain, learned = routers(backend=backend)
    x, _, _ = problem()
    for router in (plain, learned):
        router.initialize(x)
    with torch.no_grad():
        learned.offset.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(3)))  # type: ignore[union-attr]
    rows = plain.weight / plain.weight.norm(dim=1, keepdim=True) + learned.offset
    expected = route(x, rows, K, tau=plain.options.tau, backend="reference")
    routing = learned.route(x, gather=True)
    assert torch.equal(routing.indices, expected.indices)
    assert not torch.equal(routing.indices, plain.route(x, gather=True).indices)
    torch.testing.assert_close(routing.weights, expected.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learned.directions(), rows / rows.norm(dim=1, keepdim=True))
    assert not learned.directions().requires_grad
    sums, counts = kmeans_route.centroid_sums(x, routing)
    learned.commit()
    beta = 0.0  # the first step after the centroids were set
    mean = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], plain.centroids)
    torch.testing.assert_close(learned.centroids, beta * plain.centroids + (1 - beta) * mean, rtol=1e-4, atol=1e-5)


def test_it_is_a_parameter_as_any_other() -> None:
    learned = KMeansRouter(D, E, K, learned_offset=True)
    assert [name for name, _ in learned.named_parameters()] == ["offset"]
    assert not list(KMeansRouter(D, E, K).parameters())
    assert "learned_offset=True" in repr(learned)
    with torch.no_grad():
        learned.offset.fill_(0.5)  # type: ignore[union-attr]
    twin = KMeansRouter(D, E, K, learned_offset=True, seed=9)
    twin.load_state_dict(learned.state_dict())
    assert torch.equal(twin.directions(), learned.directions())
    assert torch.equal(copy.deepcopy(learned).directions(), learned.directions())
    with pytest.raises(RuntimeError, match="offset"):
        twin.load_state_dict(KMeansRouter(D, E, K).state_dict())
    bad = {**learned.state_dict(), "offset": torch.full((E, D), torch.nan)}
    with pytest.raises(RuntimeError, match="offset must be finite"):
        twin.load_state_dict(bad)
    half = learned.half()
    assert half.offset is not None
    assert half.offset.dtype == torch.float16
    assert half.weight.dtype == torch.float32
    assert half.eval()(torch.randn(5, D).half())[0].isfinite().all()
    meta = KMeansRouter(D, E, K, learned_offset=True, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert not meta.offset.any()


@pytest.mark.parametrize("options", [{"detach_gates": True}, {"gate": "uniform"}])
def test_gates_that_teach_it_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="learned_offset must have gates"):
        KMeansRouter(D, E, K, learned_offset=True, **options)


def test_what_is_no_direction_stays_out() -> None:
    unit, offset = torch.eye(4), torch.zeros(4, 4)
    offset[0], offset[1] = -unit[0], torch.nan
    d = reference.shifted_directions(unit, offset, torch.float32)
    assert torch.equal(d[:2], torch.zeros(2, 4))
    assert torch.equal(d[2:], unit[2:])


def layer() -> MoE:
    torch.manual_seed(0)
    return MoE(D, 16, num_experts=E, top_k=K, learned_offset=True, seed=1)


def test_a_layer_learns_it() -> None:
    """Towards a target that the layer alone cannot reach, the offset takes its part, and commits go on."""
    moe = layer()
    assert [name for name, _ in moe.named_parameters() if "router" in name] == ["router.offset"]
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.01)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(4))
    target = x.roll(1, 1)
    kmeans_route.attach(moe, optimizer)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (moe(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert int(moe.router.steps) == 29
    assert moe.router.offset.abs().max() > 0.01


def test_recomputation_and_compilation_give_the_same_gradient() -> None:
    x, _, _ = problem()
    x = x[8:]  # rows that are not valid reach no expert twice
    grads = []
    for call in (
        lambda moe, x: moe(x),
        lambda moe, x: checkpoint(moe, x, use_reentrant=False),
        lambda moe, x: torch.compile(moe, backend="aot_eager", fullgraph=True)(x),
    ):
        moe = layer()
        attachment = kmeans_route.attach(moe, torch.optim.SGD(moe.parameters(), lr=0.0))
        moe.router.initialize(x)
        with torch.no_grad():
            moe.router.offset.copy_(0.3 * torch.randn(E, D, generator=torch.Generator().manual_seed(3)))
        call(moe, x).square().sum().backward()
        assert moe.router.offset.grad is not None
        grads.append(moe.router.offset.grad.clone())
        attachment.remove()
        torch.compiler.reset()
    assert grads[0].abs().max() > 0
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other, rtol=1e-4, atol=1e-6)


def test_a_linear_gate_made_of_it_chooses_alike() -> None:
    router = KMeansRouter(D, E, K, learned_offset=True).eval()
    with torch.no_grad():
        router.offset.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(5)))  # type: ignore[union-attr]
    x = torch.randn(20, D)
    assert torch.equal(kmeans_route.to_linear(router)(x).topk(K).indices, router(x).indices)


def test_a_swapped_model_keeps_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from kmeans_route.integrations.transformers import apply_kmeans_routing, load_kmeans_pretrained
    from tests.integrations.transformers_models import tiny_model

    model = tiny_model("mixtral")
    apply_kmeans_routing(model, learned_offset=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attachment = kmeans_route.attach(model, optimizer)
    ids = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(6))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    attachment.remove()
    model.eval().save_pretrained(tmp_path)
    loaded = load_kmeans_pretrained(type(model), tmp_path).eval()
    offsets = [parameter for name, parameter in loaded.named_parameters() if name.endswith("gate.offset")]
    assert len(offsets) == 2
    assert all(float(offset.detach().abs().max()) > 1e-3 for offset in offsets)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_shapes_on_meta_are_told_with_an_offset_too() -> None:
    router = KMeansRouter(D, E, K, learned_offset=True, device="meta").eval()
    output = router(torch.empty(T, D, device="meta"))
    assert (output.weights.shape, output.indices.shape) == ((T, K), (T, K))
