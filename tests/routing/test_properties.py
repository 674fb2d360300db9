"""What must hold for every input: drawn by hypothesis, 100 cases in the fast lane and 1,000 in the slow one."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmeans_route import Routing, centroid_sums, combine, directions, dispatch, route
from tests.helpers.compare import EPS, assert_same_bits, assert_same_routing, generator, make_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Case(NamedTuple):
    """One drawn call of route."""

    x: Tensor
    weight: Tensor
    top_k: int
    bias: Tensor | None
    mask: Tensor | None
    options: dict[str, Any]
    backend: str

    def route(self, **changes: Any) -> Routing:
        arguments = {"mask": self.mask, "backend": self.backend, "return_scores": True, **self.options, **changes}
        x = arguments.pop("x", self.x)
        return route(x, self.weight, self.top_k, self.bias, **arguments)

    def __repr__(self) -> str:
        """Short enough to read in a failure; hypothesis draws the same case again."""
        sizes = f"x {tuple(self.x.shape)} {self.x.stride()} {self.x.dtype}, E {len(self.weight)}, K {self.top_k}"
        return (
            f"Case({sizes}, bias {self.bias is not None}, mask {self.mask is not None}, {self.options}, {self.backend})"
        )

    @property
    def rows(self) -> Tensor:
        return self.x.reshape(-1, self.x.shape[-1])

    @property
    def slack(self) -> float:
        """A few roundings of the dtype that scores are computed in."""
        return 16 * EPS[torch.float64 if self.x.dtype == torch.float64 else torch.float32]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout; "expanded" repeats the first row."""
    num_tokens, hidden_size = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        wide = torch.full((num_tokens, 2 * hidden_size), torch.nan, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "expanded" and num_tokens:
        return x[:1].expand(num_tokens, hidden_size)
    if layout == "cube" and num_tokens % 2 == 0:
        return x.reshape(2, num_tokens // 2, hidden_size).transpose(0, 1).contiguous().transpose(0, 1)
    return x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random sizes, dtypes and layouts; whole numbers in half of them, so that ties are common; some rows not valid."""
    num_experts = draw(st.integers(1, 40))
    size = draw(st.integers(1, 40))
    num_tokens = draw(st.integers(0, 60))
    top_k = draw(st.one_of(st.integers(1, min(8, num_experts)), st.just(num_experts)))
    dtype = draw(st.sampled_from(DTYPES))
    gen = generator(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        x = torch.randint(-2, 3, (num_tokens, size), generator=gen).to(dtype)
        weight = torch.randint(-1, 2, (num_experts, size), generator=gen).float()
        bias = torch.randint(-1, 2, (num_experts,), generator=gen).float() / 4
    else:
        x = torch.randn(num_tokens, size, generator=gen).to(dtype)
        weight = torch.randn(num_experts, size, generator=gen)
        bias = torch.randn(num_experts, generator=gen) * 0.1
    for row in range(num_tokens):
        if torch.rand((), generator=gen) < 0.1:
            x[row] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0]))
    if draw(st.booleans()) and num_experts > 1:
        weight[draw(st.integers(0, num_experts - 1))] = weight[draw(st.integers(0, num_experts - 1))]
    options: dict[str, Any] = {
        "gate": draw(st.sampled_from(["softmax", "sigmoid", "cosine", "uniform"])),
        "normalize": draw(st.booleans()),
        "scaling": draw(st.sampled_from([1.0, 2.5])),
        "tau": draw(st.sampled_from([0.05, 1.0])),
    }
    divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    n_group = draw(st.sampled_from(divisors))
    kept = [g for g in range(1, n_group + 1) if g * num_experts // n_group >= top_k]
    if draw(st.booleans()):
        options |= {
            "n_group": n_group,
            "topk_group": draw(st.sampled_from(kept)),
            "group_score": draw(st.sampled_from(["top2", "max"])),
        }
    x = lay_out(x, draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded", "cube"])))
    mask = None if draw(st.booleans()) else torch.rand(x.shape[:-1], generator=gen) < 0.8
    return Case(
        x,
        weight,
        top_k,
        bias if draw(st.booleans()) else None,
        mask,
        options,
        draw(st.sampled_from(["reference", "torch", "torch"])),
    )


def in_both_lanes(body: Callable[[Case], None]) -> tuple[Callable[[], None], Callable[[], None]]:
    """The property as a test of 100 repeated cases, and as a slow one of 1,000 new ones."""
    fast = settings(settings.get_profile("fast"))(given(cases())(body))
    slow = pytest.mark.slow(settings(settings.get_profile("slow"))(given(cases())(body)))
    return fast, slow


def selection(case: Case, got: Routing) -> tuple[Tensor, Tensor]:
    """s + b as selection must have seen it, -inf outside the selected groups, and the ids it must have chosen."""
    assert got.scores is not None
    ranking = got.scores if case.bias is None else got.scores + case.bias.to(got.scores.dtype)
    num_experts = ranking.shape[1]
    n_group = case.options.get("n_group", 1)
    if n_group > 1:
        size = num_experts // n_group
        best = 1 if case.options["group_score"] == "max" else min(2, size)
        groups = ranking.reshape(-1, n_group, size)
        group_scores = groups.sort(dim=2, descending=True).values[:, :, :best].sum(dim=2)
        kept = group_scores.sort(dim=1, descending=True, stable=True).indices[:, : case.options["topk_group"]]
        inside = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, kept, True)
        ranking = ranking.masked_fill(~inside.repeat_interleave(size, dim=1), -torch.inf)
    return ranking, ranking.sort(dim=1, descending=True, stable=True).indices[:, : case.top_k]


def check_routing(case: Case) -> None:
    """Ids, order, ties, gates, counts, validity."""
    got = case.route()
    rows, top_k, num_experts = case.rows, case.top_k, case.weight.shape[0]
    for name, field in zip(got._fields, got, strict=True):
        assert field is not None
        assert torch.isfinite(field).all(), name
    allowed = torch.ones(len(rows), dtype=torch.bool) if case.mask is None else case.mask.reshape(-1)
    norms = rows.double().square().sum(dim=1)
    assert torch.equal(got.valid, allowed & torch.isfinite(norms) & (norms > 0))

    ids = got.indices.sort(dim=1).values
    assert ((ids >= 0) & (ids < num_experts)).all()
    assert (ids[:, 1:] > ids[:, :-1]).all(), "an id twice in a row"
    _, chosen = selection(case, got)
    assert torch.equal(got.indices[got.valid], chosen[got.valid]), "not the K largest, lower ids first among equals"
    assert (got.indices[~got.valid] == torch.arange(top_k)).all()

    counted = torch.bincount(got.indices[got.valid].flatten(), minlength=num_experts)
    assert torch.equal(got.tokens_per_expert, counted)
    assert got.tokens_per_expert.sum() == int(got.valid.sum()) * top_k

    assert torch.equal(got.selected_scores, got.scores.gather(1, got.indices))
    assert got.scores.abs().max() <= 1 + 4 * EPS[case.x.dtype] if len(rows) else True
    assert (got.weights >= 0).all()
    assert (got.weights[~got.valid] == 0).all()
    total = got.weights[got.valid].sum(dim=1)
    scaling = case.options["scaling"]
    if case.options["normalize"] or case.options["gate"] == "uniform":
        assert ((total - scaling).abs() <= 4 * top_k * case.slack).all()
    else:
        limit = scaling * (1 if case.options["gate"] == "softmax" else top_k)
        # Directions rounded to fp16 or bf16 may be a little longer than 1.
        assert (total <= limit * (1 + 4 * EPS[case.x.dtype]) + 4 * top_k * case.slack).all()

    exact = torch.nn.functional.normalize(rows.double(), dim=1) @ directions(case.weight, case.x.dtype).double().T
    assert ((got.scores - exact)[got.valid].abs() <= case.slack).all()


def check_dispatch_and_combine(case: Case) -> None:
    """A permutation and its inverse, monotone offsets, every row where it belongs, nothing past the end."""
    got = case.route()
    sent = dispatch(case.x, got, backend=case.backend)
    num_rows, num_experts = got.indices.numel(), case.weight.shape[0]
    everything = torch.arange(num_rows)
    assert torch.equal(sent.positions.flatten().sort().values, everything), "positions are no permutation"
    tokens = torch.arange(len(case.rows))[:, None].expand_as(got.indices)
    assert torch.equal(sent.token_of_row[sent.positions], tokens)
    inverse = torch.empty_like(everything)
    inverse[sent.positions.flatten()] = everything
    assert torch.equal(sent.positions.flatten()[inverse], everything)
    assert torch.equal(inverse // case.top_k, sent.token_of_row)

    assert sent.offsets[0] == 0
    assert (sent.offsets.diff() >= 0).all()
    assert torch.equal(sent.offsets.diff().long(), got.tokens_per_expert)
    end = int(sent.offsets[-1])
    owner = torch.repeat_interleave(torch.arange(num_experts), got.tokens_per_expert)
    assert torch.equal(got.indices.flatten()[inverse[:end]], owner)
    assert_same_bits(sent.x_sorted[:end], case.rows[sent.token_of_row[:end]], "x_sorted")
    assert (sent.x_sorted[end:] == 0).all()
    within = torch.cat([owner[:end], torch.full((num_rows - end,), num_experts)]) * num_rows + inverse
    assert (within.diff() > 0).all(), "rows of an expert are not in the order of (token, k)"

    y_sorted = sent.x_sorted.clone()
    y_sorted[end:] = torch.nan
    y = combine(y_sorted, got, sent, backend=case.backend)
    assert (y[~got.valid] == 0).all()
    exact = case.rows.double() * got.weights.double().sum(dim=1, keepdim=True)
    error = (y.double() - exact)[got.valid].abs()
    bound = EPS[case.x.dtype] * exact.abs() + 4 * case.top_k * case.slack * case.rows.double().abs()
    assert (error <= bound[got.valid] + torch.finfo(case.x.dtype).tiny).all()


def check_sums(case: Case) -> None:
    """Sums equal index_add in fp64; counts equal the routing's."""
    got = case.route()
    clean = case.rows.double().masked_fill(~got.valid[:, None], 0.0)
    for accumulate in ("unit", "raw"):
        sums, counts = centroid_sums(case.x, got, accumulate=accumulate, backend=case.backend)
        assert torch.equal(counts, got.tokens_per_expert)
        unit = clean * (got.inv_norm.double()[:, None] if accumulate == "unit" else 1)
        exact, sizes = torch.zeros(2, *case.weight.shape, dtype=torch.float64)
        for k in range(case.top_k):
            ids = torch.where(got.valid, got.indices[:, k], 0)
            exact.index_add_(0, ids, unit)
            sizes.index_add_(0, ids, unit.abs())
        assert ((sums - exact).abs() <= case.slack * sizes).all()


def check_permuted_batch(case: Case) -> None:
    """Permuting the tokens permutes the result, but in rows where s + b ties within rounding."""
    rows = case.rows
    permutation = torch.randperm(len(rows), generator=generator(len(rows)))
    mask = None if case.mask is None else case.mask.reshape(-1)
    got = case.route(x=rows, mask=mask)
    moved = case.route(x=rows[permutation], mask=None if mask is None else mask[permutation])
    back = torch.argsort(permutation)
    same = (moved.indices[back] == got.indices).all(dim=1)
    assert torch.equal(moved.valid[back], got.valid)
    assert ((moved.scores[back] - got.scores).abs() <= case.slack).all()
    steep = max(1.0, 1 / case.options["tau"]) * case.options["scaling"]
    steep = 1e3 * case.options["scaling"] if case.options["gate"] == "cosine" else steep
    assert ((moved.weights[back] - got.weights)[same].abs() <= 4 * steep * case.slack).all()
    if case.options.get("n_group", 1) > 1:
        return  # two groups that tie may swap experts whose own scores lie far apart
    ranking, _ = selection(case, got)
    apart = (ranking.gather(1, moved.indices[back]) - ranking.gather(1, got.indices)).abs()
    assert (apart[~same] <= case.slack).all()


def check_gradient(case: Case) -> None:
    """Finite everywhere, zero where not valid, along x zero: a score does not change with the length of x."""
    leaf = case.x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    got = case.route(x=leaf)
    gen = generator(1)
    loss = sum(
        (field * torch.randn(field.shape, generator=gen, dtype=field.dtype)).sum()
        for field in (got.weights, got.selected_scores, got.scores)
    )
    loss.backward()
    grad = leaf.grad.reshape(-1, case.rows.shape[1])
    assert torch.isfinite(grad).all()
    assert (grad[~got.valid] == 0).all()
    good = got.valid
    along = (grad[good].double() * case.rows[good].double()).sum(dim=1)
    sizes = (grad[good].double() * case.rows[good].double()).abs().sum(dim=1)
    # The pieces that cancel along x are as large as ds, not as dx: 1 / tau times a few units.
    steep = case.options["scaling"] * (1e3 if case.options["gate"] == "cosine" else 1 / case.options["tau"])
    bound = 2 * EPS[case.x.dtype] * sizes + 8 * case.weight.shape[0] * (case.slack + EPS[case.x.dtype] * 0.1) * (
        1 + steep
    )
    assert (along.abs() <= bound + torch.finfo(case.x.dtype).tiny).all()


test_routing, test_routing_long = in_both_lanes(check_routing)
test_dispatch_and_combine, test_dispatch_and_combine_long = in_both_lanes(check_dispatch_and_combine)
test_sums, test_sums_long = in_both_lanes(check_sums)
test_permuted_batch, test_permuted_batch_long = in_both_lanes(check_permuted_batch)
test_gradient, test_gradient_long = in_both_lanes(check_gradient)


@pytest.fixture(params=[("few", 80), ("all", 20)], ids=["threads as given", "every core"])
def repeats(request: pytest.FixtureRequest) -> Iterator[int]:
    """How often to repeat; one thread alone would hide a race, so a part of it runs on every core."""
    threads, number = request.param
    before = torch.get_num_threads()
    if threads == "all":
        torch.set_num_threads(max(2, os.cpu_count() or 2))
    yield number
    torch.set_num_threads(before)


def test_repeats_give_the_same_bits(repeats: int, plain_empty: None) -> None:
    """A hundred times route, dispatch, combine and the sums, and every tenth time the gradients."""
    x, weight, bias = make_inputs(2_000, 64, 60, torch.float32, seed=11)
    x[77] = torch.nan
    leaf = x.clone().requires_grad_()
    dy = torch.randn(2_000, 64, generator=generator(12))

    def once(with_gradient: bool) -> tuple[Routing, list[Tensor]]:
        leaf.grad = None
        routing = route(leaf, weight, 6, bias, return_scores=True)
        sent = dispatch(leaf, routing)
        y = combine(sent.x_sorted, routing, sent)
        tensors = [*sent, y, *centroid_sums(leaf, routing)]
        if with_gradient:
            y.backward(dy)
            tensors.append(leaf.grad)
        return routing, tensors

    first, tensors = once(True)
    for repeat in range(repeats):
        again, others = once(repeat % 10 == 0)
        assert_same_routing(again, first)
        for one, other in zip(tensors, others, strict=False):
            assert_same_bits(other, one, f"repeat {repeat}")
