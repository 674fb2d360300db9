"""What the tests rely on to find faults in kernels finds planted ones: bounds, guard zones, orders, interleavings."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kmeans_route.kernels.common import as_mask
from tests.helpers import programs
from tests.helpers.guards import ZONE, Guards


@triton.jit
def _shift_kernel(x_ptr, y_ptr, N, LOAD: tl.constexpr, STORE: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i + LOAD, mask=i < N, other=0.0)
    tl.store(y_ptr + i + STORE, x, mask=i < N)


@triton.jit
def _count_kernel(count_ptr, AT: tl.constexpr):
    tl.atomic_add(count_ptr + AT, 1)


@triton.jit
def _first_blocks_kernel(x_ptr, N, AS_MASK: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    first = tl.program_id(0) < 1
    tl.store(x_ptr + i, 1.0, mask=(i < N) & (as_mask(first) if AS_MASK else first))


def test_masks_of_integers_are_refused() -> None:
    """As by the interpreter of Triton 3.9.0."""
    x = torch.zeros(13)
    with pytest.raises(programs.IntegerMask, match="store of _first_blocks_kernel: a mask of int32"):
        _first_blocks_kernel[(2,)](x, 13, AS_MASK=False, B=8)
    _first_blocks_kernel[(2,)](x, 13, AS_MASK=True, B=8)
    assert x.tolist() == [1.0] * 8 + [0.0] * 5


@pytest.mark.parametrize(
    ("load", "store", "message"),
    [
        (1, 0, r"load of _shift_kernel, program \(1, 0, 0\): 4 bytes outside of x_ptr"),
        (-2, 0, r"load of _shift_kernel, program \(0, 0, 0\): 8 bytes outside of x_ptr"),
        (0, 1, r"store of _shift_kernel, program \(1, 0, 0\): 4 bytes outside of y_ptr"),
        (0, -1, r"store of _shift_kernel, program \(0, 0, 0\): 4 bytes outside of y_ptr"),
        (0, 1 << 40, r"store of _shift_kernel"),
    ],
)
def test_accesses_outside_are_refused(load: int, store: int, message: str) -> None:
    with Guards():  # so that the two do not lie side by side
        x, y = torch.ones(13), torch.zeros(13)
    with pytest.raises(programs.OutOfBounds, match=message):
        _shift_kernel[(2,)](x, y, 13, LOAD=load, STORE=store, B=8)
    _shift_kernel[(2,)](x, y, 13, LOAD=0, STORE=0, B=8)
    assert torch.equal(x, y)


def test_atomics_outside_are_refused() -> None:
    count = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(programs.OutOfBounds, match=r"atomic of _count_kernel"):
        _count_kernel[(1,)](count, AT=3)
    _count_kernel[(5,)](count, AT=2)
    assert count.tolist() == [0, 0, 5]


def test_a_view_is_bounded_by_what_it_covers() -> None:
    """Not by its storage: columns of a wider matrix end with the last row's last column."""
    wide = torch.zeros(3, 8)
    x = wide[:, 2:5]
    _shift_kernel[(1,)](x, torch.empty(19), 19, LOAD=0, STORE=0, B=32)
    with pytest.raises(programs.OutOfBounds, match="4 bytes outside of x_ptr"):
        _shift_kernel[(1,)](x, torch.empty(20), 20, LOAD=0, STORE=0, B=32)


@pytest.mark.parametrize("shift", [1, -1])
def test_guard_zones_show_what_was_written(shift: int) -> None:
    """Without the check of accesses, which would come first."""
    with Guards() as guards:
        x, y = torch.ones(13), torch.zeros(13)
    guards.check()
    with programs.unchecked():
        _shift_kernel[(2,)](x, y, 13, LOAD=0, STORE=shift, B=8)
    with pytest.raises(AssertionError, match=rf"4 bytes written {'past' if shift > 0 else 'before'} zeros\(13,\)"):
        guards.check()


def test_guard_zones_are_nan() -> None:
    with Guards():
        x, y = torch.ones(13, dtype=torch.bfloat16), torch.zeros(13, dtype=torch.bfloat16)
    with programs.unchecked():
        _shift_kernel[(2,)](x, y, 13, LOAD=1, STORE=0, B=8)
    assert y.isnan().tolist() == [False] * 12 + [True]


def test_what_launchers_make_is_guarded() -> None:
    """Values, strides and fill stay; views, results in place and what autograd follows are left alone."""
    with Guards() as guards:
        made = [torch.zeros(3, 5), torch.ones(3, 5).T.contiguous(), torch.full((3,), 7), torch.empty(4)]
        made += [made[0].new_empty(2, 3, dtype=torch.bfloat16), torch.empty_like(made[1].T)]
        inside = len(guards.made)
        made[0].view(15).add_(1)
        leaf = torch.ones(3).detach().requires_grad_()
        leaf.mul(2)
        assert len(guards.made) == inside + 1, "the ones"
    for tensor in made:
        assert tensor.untyped_storage().nbytes() == 2 * ZONE + tensor.numel() * tensor.element_size()
        assert tensor.data_ptr() % 16 == 0
    assert made[0].tolist() == [[1.0] * 5] * 3
    assert made[2].tolist() == [7] * 3
    assert made[4].isnan().all(), "what nobody wrote is NaN"
    assert made[5].stride() == (1, 3)


@triton.jit
def _last_one_kernel(x_ptr, N):
    tl.store(x_ptr + N, tl.program_id(0))


@triton.jit
def _own_row_kernel(x_ptr, y_ptr):
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(y_ptr + row, tl.load(x_ptr + row) + 1)


def test_a_kernel_that_depends_on_the_order_is_found(two_orders: set[object]) -> None:
    """Every launch of more than one program is compared in all tests; like ones once."""
    x, y = torch.arange(6.0).expand(2, 6)[0], torch.zeros(6)
    _last_one_kernel[(1,)](y, 0)
    assert not two_orders, "one program has one order"
    for _ in range(2):
        _own_row_kernel[(2, 3)](x, y)
    assert len(two_orders) == 1
    assert torch.equal(y, x + 1)
    with pytest.raises(programs.OrderMatters, match=r"_last_one_kernel leaves other bits in x_ptr"):
        _last_one_kernel[(5,)](y, 0)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_runs_each_program_once(seed: int) -> None:
    x, y = torch.arange(6.0), torch.zeros(6)
    with programs.shuffled(seed):
        _own_row_kernel[(2, 3)](x, y)
    assert torch.equal(y, x + 1)
    with programs.shuffled(seed):
        _last_one_kernel[(2,)](y, 0)
    assert y[0] == 0, "two programs in an order that is not the usual one"


@triton.jit
def _add_kernel(total_ptr, seen_ptr, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(total_ptr, 1)
    else:
        tl.store(total_ptr, tl.load(total_ptr) + 1)
    program = tl.program_id(0)
    tl.store(seen_ptr + program, program)
    tl.store(seen_ptr + tl.num_programs(0) + tl.program_id(0), tl.load(seen_ptr + tl.program_id(0)))


def totals(atomic: bool) -> list[int]:
    found = []
    for seed in range(60):
        total, seen = torch.zeros(1, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
        with programs.interleaved(seed):
            _add_kernel[(4,)](total, seen, ATOMIC=atomic)
        assert seen.tolist() == [0, 1, 2, 3] * 2, "a program keeps its index over every switch"
        found.append(int(total))
    return found


def test_lost_updates_are_found() -> None:
    """A load, an addition and a store lose updates in some schedules, and in none with an atomic."""
    assert set(totals(atomic=True)) == {4}
    lossy = totals(atomic=False)
    assert {1, 2, 3, 4} <= set(lossy)
    assert totals(atomic=False) == lossy, "a seed gives one schedule"


@triton.jit
def _stray_kernel(x_ptr):
    tl.store(x_ptr + tl.program_id(0), tl.load(x_ptr + 0))


def test_an_error_in_one_program_ends_all() -> None:
    x = torch.zeros(3)
    for seed in range(10):
        with programs.interleaved(seed), pytest.raises(programs.OutOfBounds, match=r"store of _stray_kernel"):
            _stray_kernel[(5,)](x)
    with pytest.raises(programs.OutOfBounds):
        _stray_kernel[(5,)](x)


@triton.jit
def _twice(x):
    return x + tl.sum(tl.zeros([4], dtype=tl.float32)) + x


@triton.jit
def _twice_kernel(x_ptr, y_ptr):
    tl.store(y_ptr + tl.program_id(0), _twice(tl.load(x_ptr + tl.program_id(0))))


def test_the_language_is_patched_in_a_launch_and_no_longer() -> None:
    before: dict[str, object] = {name: getattr(tl, name) for name in ("load", "store", "sum", "program_id", "range")}
    x: Tensor = torch.arange(3.0)
    y = torch.empty(3)
    for _ in range(2):
        _twice_kernel[(3,)](x, y)
        assert torch.equal(y, 2 * x)
        assert {name: getattr(tl, name) for name in before} == before
