"""Every launcher at odd sizes, between guard zones: right values, nothing read or written outside, whatever ids hold.

Every tensor made in these tests, inputs and outputs, lies between zones of NaN that are looked at in the end; each
access of a kernel must besides lie inside one of the tensors it was given. Truth is the oracle's, in fp64.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kmeans_route import functional
from kmeans_route.checks import check_route_options
from kmeans_route.kernels import accumulate, combine, commit, directions, dispatch, route, route_bwd
from kmeans_route.kernels.configs import Config
from tests.helpers import oracle
from tests.helpers.compare import (
    ROUND,
    assert_same_bits,
    generator,
    half_step,
    largest_error,
    make_inputs,
    numpy,
    truth,
)
from tests.helpers.guards import Guards

pytestmark = pytest.mark.usefixtures("guards")
TILE = Config(16, 16, 4, 2)
"""No D below is a multiple of its columns; the T are part of one block of its rows, and two blocks and a row."""
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [  # T, D, E, K
    (1, 8, 1, 1),
    (1, 24, 60, 3),
    (7, 24, 13, 3),
    (7, 40, 13, 13),
    (33, 24, 1, 1),
    (33, 8, 13, 1),
    (33, 40, 60, 3),
    pytest.param((7, 8, 60, 60), marks=pytest.mark.slow),
]
Size = tuple[int, int, int, int]
BAD = [-1, 1 << 40, -(1 << 63), (1 << 63) - 1, (1 << 32) + 1]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (combine, route_bwd):
        monkeypatch.setattr(module, "row_config", lambda dtype: TILE)
    monkeypatch.setattr(combine, "copies_config", lambda *_: TILE)
    monkeypatch.setattr(route, "selected_rows", lambda *_, **_long: (16, 16))
    monkeypatch.setattr(dispatch, "RANK_BLOCK", 16)
    for module in (accumulate, commit, directions):
        monkeypatch.setattr(module, "BLOCK", 16)


class Case(NamedTuple):
    """Inputs, one row of NaN and one masked among them where there are several, and their routing by the oracle."""

    x: Tensor
    directions: Tensor
    bias: Tensor
    mask: Tensor
    want: oracle.OracleRouting
    top_k: int

    @property
    def indices(self) -> Tensor:
        return torch.from_numpy(self.want.indices).clone()

    @property
    def valid(self) -> Tensor:
        return torch.from_numpy(self.want.valid).clone()

    @property
    def inv_norm(self) -> Tensor:
        return torch.from_numpy(self.want.inv_norm).float()


def case_of(size: Size, dtype: torch.dtype) -> Case:
    num_tokens, hidden_size, num_experts, top_k = size
    x, weight, bias = make_inputs(num_tokens, hidden_size, num_experts, dtype)
    mask = torch.arange(num_tokens) % 5 != 4
    if num_tokens > 1:
        x[num_tokens // 2] = torch.nan
    want, _ = truth(x, weight, top_k, bias, mask=mask)
    return Case(x, functional.directions(weight, dtype), bias, mask, want, top_k)


def ranks_by_hand(indices: Tensor, valid: Tensor, block: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """rank (T, K) and block_counts (NB, E+2) without the dropped tokens in its last column."""
    num_tokens, top_k = indices.shape
    counts = torch.zeros(-(-num_tokens // block), num_experts + 2, dtype=torch.int32)
    rank = torch.empty(num_tokens, top_k, dtype=torch.int32)
    for t in range(num_tokens):
        for k in range(top_k):
            queue = int(indices[t, k]) if valid[t] else num_experts
            rank[t, k] = counts[t // block, queue]
            counts[t // block, queue] += 1
    return rank, counts


@pytest.mark.parametrize("split", [False, True], ids=["stream", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (33, 24, 130, 3)], ids=str)  # the last selects for part of a block at a time
def test_route_fwd(monkeypatch: pytest.MonkeyPatch, size: Size, dtype: torch.dtype, split: bool) -> None:
    monkeypatch.setattr(route, "PROGRAMS", 64 if split else 1)
    x, directions, bias, mask, want, top_k = case_of(size, dtype)
    num_experts = len(directions)
    out = route.route_fwd(
        x, directions, bias, mask, None, check_route_options(num_experts, top_k),
        want_scores=True, want_std=True, want_hist=top_k < num_experts, want_rank=True, config=TILE,
    )  # fmt: skip
    np.testing.assert_array_equal(out.indices.numpy(), want.indices)
    np.testing.assert_array_equal(out.valid.numpy(), want.valid)
    np.testing.assert_array_equal(out.counts.numpy(), want.tokens_per_expert)
    np.testing.assert_array_equal(out.offsets.numpy(), np.r_[0, want.tokens_per_expert.cumsum()])
    np.testing.assert_allclose(numpy(out.inv_norm), want.inv_norm, rtol=8 * ROUND)
    assert int(out.dropped) == int(mask.sum()) - want.valid.sum()
    for name, exact, tolerance in (
        ("weights", want.weights, 16 * ROUND / 0.2),  # the default tau
        ("selected", want.selected_scores, 8 * ROUND),
        ("scores", want.scores, 8 * ROUND),
        ("score_std", want.scores.std(axis=1), 8 * ROUND),
    ):
        assert largest_error(getattr(out, name), exact) <= tolerance, name
    if top_k < num_experts:
        hist = oracle.margin_histogram(oracle.margins(want, numpy(bias), top_k))
        assert np.abs(out.margin_hist.numpy().cumsum(1) - hist.cumsum(1)).max() <= 1, "but at the edges of bins"
    rank, block_counts = ranks_by_hand(out.indices, out.valid, out.block, num_experts)
    assert_same_bits(out.rank, rank)
    assert_same_bits(out.block_counts[: len(block_counts), :-1], block_counts[:, :-1])
    assert not out.block_counts[len(block_counts) :].any(), "parts of a block past the last token"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ranks_and_dispatch(size: Size, dtype: torch.dtype) -> None:
    case = case_of(size, dtype)
    x, num_experts, want = case.x, len(case.directions), oracle.dispatch(numpy(case.x), case.want)
    ranks = dispatch.rank(case.indices, case.valid, num_experts)
    rank, block_counts = ranks_by_hand(case.indices, case.valid, ranks.block, num_experts)
    assert_same_bits(ranks.rank, rank)
    assert_same_bits(ranks.block_counts[:, :-1], block_counts[:, :-1])
    np.testing.assert_array_equal(ranks.offsets.numpy(), want.offsets)
    for unit in (True, False):
        inv_norm = case.inv_norm if unit else None
        sent = dispatch.dispatch_fwd(
            x, case.indices, case.valid, num_experts, ranks, inv_norm, want_sums=True, config=TILE
        )
        np.testing.assert_array_equal(sent.positions.numpy(), want.positions)
        np.testing.assert_array_equal(sent.token_of_row.numpy(), want.token_of_row)
        np.testing.assert_array_equal(numpy(sent.x_sorted), want.x_sorted)
        rows = np.where(case.want.valid[:, None], numpy(x), 0)
        accumulate = "unit" if unit else "raw"
        exact, _ = oracle.centroid_sums(rows, case.want, accumulate)
        sizes, _ = oracle.centroid_sums(np.abs(rows), case.want, accumulate)
        assert (np.abs(numpy(sent.partials).sum(0) - exact) <= 16 * ROUND * sizes).all()
    alone = dispatch.dispatch_fwd(x, case.indices, case.valid, num_experts, None, want_sums=True, config=TILE)
    assert_same_bits(alone.partials, sent.partials)
    index = dispatch.dispatch_fwd(x, case.indices, case.valid, num_experts, ranks, copies=False, config=TILE)
    assert_same_bits(index.positions, sent.positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_combine_and_its_gradients(size: Size, dtype: torch.dtype) -> None:
    """Rows past the end are NaN, and no token that is valid may see them."""
    num_tokens, hidden_size, _, top_k = size
    case = case_of(size, dtype)
    sent, gen = oracle.dispatch(numpy(case.x), case.want), generator(3)
    positions, end = torch.from_numpy(sent.positions).clone(), int(sent.offsets[-1])
    y_sorted = torch.randn(num_tokens * top_k, hidden_size, generator=gen).to(dtype)
    y_sorted[end:] = torch.nan
    weights = torch.rand(num_tokens, top_k, generator=gen)
    for given in (weights, None):
        y = combine.combine_fwd(y_sorted, positions, given, case.valid)
        factors = np.ones((num_tokens, top_k)) if given is None else numpy(given)
        exact = oracle.combine(numpy(y_sorted), factors, sent.positions, end)
        sizes = oracle.combine(np.abs(numpy(y_sorted)), factors, sent.positions, end)
        assert (np.abs(numpy(y) - exact) <= half_step(dtype, exact) + 2 * top_k * ROUND * sizes).all()
    dy = torch.randn(num_tokens, hidden_size, generator=gen).to(dtype)
    dy[~case.valid] = torch.nan
    d_rows, d_weights = combine.combine_bwd(dy, y_sorted, weights, positions, case.valid)
    exact, exact_weights = oracle.combine_backward(numpy(dy), numpy(y_sorted), numpy(weights), sent.positions, end)
    sizes = oracle.combine_backward(
        np.abs(numpy(dy)), np.abs(numpy(y_sorted)), numpy(weights), sent.positions, end
    )[1]  # fmt: skip
    assert (np.abs(numpy(d_rows) - exact) <= half_step(dtype, exact) + 2 * ROUND * np.abs(exact)).all()
    assert (np.abs(numpy(d_weights) - exact_weights) <= 2 * ROUND * np.sqrt(hidden_size) * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_route_bwd(size: Size, dtype: torch.dtype) -> None:
    num_tokens, hidden_size, _, top_k = size
    case = case_of(size, dtype)
    sent, gen = oracle.dispatch(numpy(case.x), case.want), generator(4)
    d_weights, d_selected = (torch.randn(num_tokens, top_k, generator=gen) for _ in range(2))
    d_x_sorted = torch.randn(num_tokens * top_k, hidden_size, generator=gen).to(dtype)
    end = int(sent.offsets[-1])
    d_x_sorted[end:] = torch.nan
    dx = route_bwd.route_bwd(
        case.x, case.directions, case.indices, torch.from_numpy(case.want.selected_scores).float(), case.inv_norm,
        case.valid, d_weights, d_selected, d_x_sorted, torch.from_numpy(sent.positions).clone(),
        "softmax", 0.2, True, 1.0,
    )  # fmt: skip
    rows = np.where(case.want.valid[:, None], numpy(case.x), 0)
    through_scores = oracle.route_backward(
        rows, numpy(case.directions), case.want, d_weights=numpy(d_weights), d_selected=numpy(d_selected)
    )
    exact = through_scores + oracle.dispatch_backward(numpy(d_x_sorted), num_tokens, sent.positions, end)
    size_of_terms = 6 * case.want.inv_norm[:, None] * top_k / 0.2 + 4 * top_k
    assert (np.abs(numpy(dx) - exact) <= half_step(dtype, exact) + 4 * ROUND * size_of_terms).all()


def state_of(size: Size) -> dict[str, Tensor]:
    """Tensors of `commit`, in its order, then those of a batch."""
    _, hidden_size, num_experts, top_k = size
    gen = generator(5)
    counts = torch.randint(0, 4, (num_experts,), generator=gen)
    return {
        "weight": torch.randn(num_experts, hidden_size, generator=gen),
        "centroids": torch.randn(num_experts, hidden_size, generator=gen),
        "expert_bias": torch.randn(num_experts, generator=gen) * 0.1, "score_std": torch.tensor(0.2),
        "steps": torch.tensor(3), "tokens_seen": torch.randint(0, 9, (num_experts,), generator=gen),
        "dropped_total": torch.tensor(1), "tokens_per_expert": torch.zeros(num_experts, dtype=torch.int64),
        "turn": torch.zeros(2, num_experts), "sums": torch.randn(num_experts, hidden_size, generator=gen),
        "counts": counts, "std_sum": torch.tensor(1.5), "num_tokens": counts.sum() // top_k + 1,
        "num_dropped": torch.tensor(2),
        "margin_hist": torch.randint(3, (num_experts, 1024), generator=gen, dtype=torch.int32),
    }  # fmt: skip


STATES = [(7, 24, 13, 3), (33, 40, 3, 3), (33, 8, 1, 1), pytest.param((33, 40, 60, 3), marks=pytest.mark.slow)]


@pytest.mark.parametrize("rule", ["proportional", "sign", "quantile", "none"])
@pytest.mark.parametrize("size", STATES, ids=str)
def test_commit_and_directions(guards: Guards, size: Size, rule: str) -> None:
    """The bits of a launch without zones; the values are held against the oracle in test_commit."""
    top_k, states = size[3], []
    with torch._C.DisableTorchFunction():
        states.append(state_of(size))
        commit.commit(*states[0].values(), None, top_k, 0.9, rule, 0.05)
    made = len(guards.made)
    states.append(state_of(size))
    assert len(guards.made) > made + 12, "these lie between zones"
    commit.commit(*states[1].values(), None, top_k, 0.9, rule, 0.05)
    for name, value in states[0].items():
        assert_same_bits(states[1][name], value, name)
        assert name in ("dropped_total", "turn", "margin_hist") or value.isfinite().all(), name
    for dtype in DTYPES:
        got = directions.directions(states[1]["weight"], dtype)
        exact = oracle.directions(numpy(states[0]["weight"]))
        assert (np.abs(numpy(got) - exact) <= half_step(dtype, exact) + 4 * ROUND * np.abs(exact)).all()


@pytest.mark.parametrize("size", STATES, ids=str)
def test_accumulate(size: Size) -> None:
    num_tokens, hidden_size, num_experts, top_k = size
    gen, pending = generator(6), state_of(size)
    fields = [pending[name] for name in ("sums", "counts", "std_sum", "num_tokens", "num_dropped", "margin_hist")]
    sums, counts, std_sum, tokens, dropped, hist = (field.clone() for field in fields)
    batch_counts = torch.randint(0, 5, (num_experts,), generator=gen)
    partials = torch.randn(7, num_experts, hidden_size, generator=gen) * (batch_counts > 0)[:, None]
    batch_std, batch_hist = torch.rand(num_tokens, generator=gen), torch.ones_like(hist)
    accumulate.accumulate(partials, batch_counts, batch_std, torch.tensor(4), batch_hist, top_k, *fields)
    for first in range(0, len(partials), 4):  # in the order of the splits, four at a time
        sums = sums + sum(partials[first + 1 : first + 4], partials[first])
    assert_same_bits(fields[0], sums)
    assert_same_bits(fields[1], counts + batch_counts)
    assert abs(float(fields[2]) - float(std_sum.double() + batch_std.double().sum())) <= 4 * ROUND * num_tokens
    assert_same_bits(fields[3], tokens + batch_counts.sum() // top_k)
    assert_same_bits(fields[4], dropped + 4)
    assert_same_bits(fields[5], hist + 1)


def bad_ids(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids (T, K), distinct in most rows; and the rows where one is out of range or repeated."""
    ids = torch.rand(num_tokens, num_experts, generator=generator(7)).argsort(dim=1)[:, :top_k].contiguous()
    rows = []
    for i, value in enumerate([num_experts, *BAD]):
        rows.append(3 * i)
        ids[3 * i, i % top_k] = value
    ids[20, 1], ids[21] = ids[20, 0], 4
    return ids, torch.tensor([*rows, 20, 21])


def assert_distinct(indices: Tensor, num_experts: int) -> None:
    ordered = indices.sort(dim=1).values
    assert int(ordered[:, 0].min()) >= 0
    assert int(ordered[:, -1].max()) < num_experts
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


@pytest.mark.parametrize("options", [{}, {"n_group": 4, "topk_group": 2, "normalize": False}], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["stream", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_ids_are_routed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, split: bool, options: dict[str, Any]
) -> None:
    """A row with an id out of range, or with one twice, is as if nothing had been given; the others are replayed."""
    monkeypatch.setattr(route, "PROGRAMS", 64 if split else 1)
    x, weight, bias = make_inputs(33, 24, 12, dtype)
    x[9] = torch.nan
    ids, bad = bad_ids(33, 12, 3)
    results = []
    for given in (ids, None):
        results.append(
            route.route_fwd(
                x, functional.directions(weight, dtype), bias, None, given, check_route_options(12, 3, **options),
                want_scores=True, want_hist=True, want_rank=True, config=TILE,
            )
        )  # fmt: skip
    got, native = results
    assert_distinct(got.indices, 12)
    assert_same_bits(got.indices[bad], native.indices[bad])
    good = torch.ones(33, dtype=torch.bool)
    good[bad] = good[9] = False
    assert_same_bits(got.indices[good], ids[good])
    assert got.weights.isfinite().all()
    assert int(got.counts.sum()) == 32 * 3


@pytest.mark.parametrize("split", [False, True], ids=["stream", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "bad", ["bias NaN", "bias inf", "bias -inf", "one bias NaN", "directions NaN", "directions inf"]
)
def test_bad_bias_and_directions(monkeypatch: pytest.MonkeyPatch, bad: str, dtype: torch.dtype, split: bool) -> None:
    monkeypatch.setattr(route, "PROGRAMS", 64 if split else 1)
    x, weight, bias = make_inputs(33, 24, 13, dtype)
    directions = functional.directions(weight, dtype)
    value = float(bad.split()[-1])
    if bad.startswith("bias"):
        bias[:] = value
    elif bad.startswith("one"):
        bias[5] = value
    else:
        directions[3], directions[8, 20] = value, value
    out = route.route_fwd(
        x, directions, bias, None, None, check_route_options(13, 3),
        want_scores=True, want_std=True, want_hist=True, want_rank=True, config=TILE,
    )  # fmt: skip
    assert_distinct(out.indices, 13)
    assert out.weights.isfinite().all()
    assert int(out.counts.sum()) == 33 * 3
    if bad == "one bias NaN":
        assert not (out.indices == 5).any(), "a NaN bias ranks last"


def test_dispatch_of_bad_ids() -> None:
    """Every row is written once, whatever the ids are; good tokens come with their own values."""
    x = make_inputs(33, 24, 13, torch.bfloat16)[0]
    ids, _ = bad_ids(33, 13, 3)
    valid = torch.arange(33) % 9 != 2
    ranks = dispatch.rank(ids, valid, 13)
    sent = dispatch.dispatch_fwd(
        x, ids, valid, 13, ranks, x.float().norm(dim=1).reciprocal(), want_sums=True, config=TILE
    )
    assert_same_bits(sent.positions.flatten().sort().values, torch.arange(99))
    rows = torch.where(valid[:, None], x, 0)  # rows that are not valid are copied as zeros
    assert_same_bits(sent.x_sorted, rows[sent.token_of_row])
    assert_same_bits(sent.token_of_row[sent.positions], torch.arange(33)[:, None].expand(33, 3))
    assert sent.partials.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_positions_and_ids_of_the_gradients(dtype: torch.dtype) -> None:
    """A position or an id out of range reads and writes nothing; tokens that have none come out as ever."""
    size = (33, 24, 13, 3)
    case = case_of(size, dtype)
    good = torch.from_numpy(oracle.dispatch(numpy(case.x), case.want).positions).clone()
    rows, dy = (torch.randn(n, 24, generator=generator(n)).to(dtype) for n in (99, 33))
    d_weights = torch.rand(33, 3, generator=generator(8))
    wild, ids, touched = good.clone(), case.indices, torch.arange(33) % 3 == 0
    for i, value in enumerate([99, *BAD]):
        wild[3 * i, i % 3] = value
        ids[3 * i + 15, i % 3] = value if value != 99 else 13
    results = []
    for positions, indices in ((wild, ids), (good, case.indices)):
        y = combine.combine_fwd(rows, positions, d_weights, case.valid)
        d_rows, dw = combine.combine_bwd(dy, rows, d_weights, positions, case.valid)
        dx = route_bwd.route_bwd(
            case.x, case.directions, indices, d_weights, case.inv_norm, case.valid, d_weights, None, rows, positions,
            "softmax", 0.2, True, 1.0,
        )  # fmt: skip
        results.append((y, dw, dx, d_rows[good]))  # d_rows by token
    for name, got, want in zip(("y", "d_weights", "dx", "d_rows"), *results, strict=True):
        assert_same_bits(got[~touched], want[~touched], name)
        assert got.isfinite().all() or name == "d_rows", name
