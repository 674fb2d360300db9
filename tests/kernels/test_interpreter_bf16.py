"""bf16 in Triton's interpreter against torch.bfloat16 bit for bit: infinities, NaN, subnormal numbers and ties too."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.helpers import bf16, interpreter, patching

NUM = 4096
SPECIAL = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x3FC0, 0x4000, 0x7F7F, 0x7F80, 0x7FC0, 0x7F81]


def random_bits(seed: int) -> Tensor:
    """NUM bf16 numbers of random bits, all pairs of the special ones among them (seeds 0 and 1 give the two sides)."""
    special = torch.tensor(SPECIAL + [bits | 0x8000 for bits in SPECIAL])
    first, second = torch.cartesian_prod(special, special).T
    bits = torch.randint(0, 1 << 16, (NUM,), generator=torch.Generator().manual_seed(seed))
    bits[: first.numel()] = first if seed % 2 == 0 else second
    # A third of the pairs have exponents that meet: else a sum is nearly always the larger of the two.
    near = torch.arange(NUM) % 3 == 2
    bits[near] = bits[near] & 0x81FF | 0x3C00
    return bits.to(torch.int32).to(torch.uint16).view(torch.bfloat16)


def assert_same(got: Tensor, want: Tensor) -> None:
    """The same bits, any NaN for any other."""
    assert got.dtype == want.dtype
    if want.dtype.is_floating_point:
        torch.testing.assert_close(got.isnan(), want.isnan(), rtol=0, atol=0)
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
        keep = ~want.isnan()
        got, want = got[keep].view(integer), want[keep].view(integer)
    assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} differ"


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "div":  # Triton divides bf16 in fp32
        c = (a / b).to(tl.bfloat16)
    elif OP == "minimum":
        c = tl.minimum(a, b).to(tl.bfloat16)
    elif OP == "maximum":
        c = tl.maximum(a, b).to(tl.bfloat16)
    elif OP == "clamp":
        c = tl.clamp(a, -1.0, 1.5).to(tl.bfloat16)
    elif OP == "where":
        c = tl.where(a < b, a, b)
    elif OP == "scalar":
        c = a * 1.5 + 0.375
    elif OP == "full":
        c = a + tl.full([N], -2.0078125, tl.bfloat16)
    elif OP == "neg":
        c = -a + 0.0  # the sign of a zero differs between versions of Triton
    elif OP == "abs":
        c = tl.abs(a)
    elif OP == "in place":
        c = a
        c += b
    tl.store(out_ptr + i, c)


def but_nan(choose: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The other one where one is NaN, a signalling NaN too (torch.fmin and C's fminf differ there)."""
    return lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, choose(a, b)))


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "minimum": but_nan(torch.minimum),
    "maximum": but_nan(torch.maximum),
    "clamp": lambda a, b: torch.where(a.isnan(), -1.0, a.clamp(-1.0, 1.5)),
    "where": lambda a, b: torch.where(a < b, a, b),
    "scalar": lambda a, b: a * torch.tensor(1.5).bfloat16() + torch.tensor(0.375).bfloat16(),
    "full": lambda a, b: a + torch.tensor(-2.0078125).bfloat16(),
    "neg": lambda a, b: -a + torch.tensor(0.0).bfloat16(),
    "abs": lambda a, b: a.abs(),
    "in place": torch.add,
}


@pytest.mark.parametrize("op", BINARY)
def test_element_wise(op: str) -> None:
    a, b = random_bits(0), random_bits(1)
    out = torch.empty(NUM, dtype=torch.bfloat16)
    _binary_kernel[(1,)](a, b, out, OP=op, N=NUM)
    assert_same(out, BINARY[op](a, b))


@triton.jit
def _compare_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a < b)
    tl.store(out_ptr + N + i, a <= b)
    tl.store(out_ptr + 2 * N + i, a == b)
    tl.store(out_ptr + 3 * N + i, a != b)
    tl.store(out_ptr + 4 * N + i, a >= b)
    tl.store(out_ptr + 5 * N + i, a > b)


def test_comparisons() -> None:
    a, b = random_bits(2), random_bits(3)
    b[::5] = a[::5]
    out = torch.empty(6, NUM, dtype=torch.bool)
    _compare_kernel[(1,)](a, b, out, N=NUM)
    assert_same(out, torch.stack([a < b, a <= b, a == b, a != b, a >= b, a > b]))


@triton.jit
def _cast_kernel(a_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(a_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _rounding_kernel(a_ptr, out_ptr, N: tl.constexpr, MODE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(a_ptr + i).to(tl.bfloat16, fp_downcast_rounding=MODE))


def cast(a: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(a.shape, dtype=dtype)
    _cast_kernel[(1,)](a, out, N=a.numel())
    return out


def fp32_bits() -> Tensor:
    """Random fp32; among them every way to lie at, below and above a tie of two bf16 numbers, and NaN of all ones."""
    bits = torch.randint(-(1 << 31), 1 << 31, (NUM,), generator=torch.Generator().manual_seed(4))
    head, tail = bits & ~0xFFFF, torch.tensor([0x7FFF, 0x8000, 0x8001, 0x0001])[torch.arange(NUM) % 4]
    bits = torch.where(torch.arange(NUM) % 2 == 0, bits, head | tail)
    bits[:4] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F7FFFFF])  # the last rounds to infinity
    return bits.to(torch.int32).view(torch.float32)


def test_every_number_as_fp32() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert_same(cast(every, torch.float32), every.float())
    assert_same(cast(every.float(), torch.bfloat16), every)


@pytest.mark.parametrize("mode", ["rtne", "rtz"])
def test_fp32_is_rounded(mode: str) -> None:
    a, out = fp32_bits(), torch.empty(NUM, dtype=torch.bfloat16)
    _rounding_kernel[(1,)](a, out, N=NUM, MODE=mode)
    cut = (a.view(torch.int32) & -65536).view(torch.float32).bfloat16()  # exact
    assert_same(out, a.bfloat16() if mode == "rtne" else torch.where(a.isnan(), torch.nan, cut))
    if mode == "rtne":
        assert_same(cast(a, torch.bfloat16), out)
        assert (out != cut)[~a.isnan()].float().mean() > 0.3, "rounding and cutting must differ in these numbers"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64, torch.bool], ids=str)
def test_casts_to_and_from(dtype: torch.dtype) -> None:
    a = random_bits(5)
    if not dtype.is_floating_point and dtype != torch.bool:
        a = torch.where(a.abs() < 2.0**30, a, 7.75)
    assert_same(cast(a, dtype), a.to(dtype))
    if dtype.is_floating_point:
        other = fp32_bits().to(dtype)
    else:
        other = torch.randint(-(1 << 30), 1 << 30, (NUM,), generator=torch.Generator().manual_seed(6)).to(dtype)
    assert_same(cast(other, torch.bfloat16), other.to(torch.bfloat16))


def test_fp64_is_rounded_once() -> None:
    """A hair above a tie: rounding to fp32 first would drop the hair, and the tie would go to the even neighbour."""
    a = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8], dtype=torch.float64)
    assert cast(a, torch.bfloat16).tolist() == [1 + 2**-7, 1, -1 - 2**-7, 1]


@triton.jit
def _fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.math.fma(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)))


def nearest_bf16(exact: Fraction) -> float:
    """By comparing distances, the even one of two that are as near."""
    centre = int(bf16.to_bf16(np.float64(exact))) if exact else 0
    near = [bits for bits in (centre - 1, centre, centre + 1) if 0 <= bits & 0x7FFF < 0x7F80]
    values = {bits: Fraction(float(bf16.to_fp32(np.array(bits, np.uint16)))) for bits in near}
    return float(values[min(near, key=lambda bits: (abs(values[bits] - exact), bits & 1))])


def test_fma_is_rounded_once() -> None:
    """Exact fractions are the truth; the last rows are ties but for a term that even fp64 cannot hold beside it."""
    a, b, c = (random_bits(seed).float().clamp(-1e9, 1e9).nan_to_num(1.0).bfloat16() for seed in (6, 7, 8))
    a, b, c = (torch.where(t.abs() < 1e-9, 0.5, t)[:400] for t in (a, b, c))
    # 1.0625 x 1.0625 = 1.12890625 lies half way between 1.125 and 1.1328125.
    ties = [(1.0625, 1.0625, 2.0**-70), (1.0625, 1.0625, -(2.0**-70)), (1.0625, 1.0625, 0.0)]
    a, b, c = (
        torch.cat([t, torch.tensor(last).bfloat16()])
        for t, last in zip((a, b, c), zip(*ties, strict=True), strict=True)
    )
    a, b, c = (torch.nn.functional.pad(t, (0, 512 - len(t)), value=1.0) for t in (a, b, c))
    out = torch.empty(512, dtype=torch.bfloat16)
    _fma_kernel[(1,)](a, b, c, out, N=512)
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    want = [nearest_bf16(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in rows]
    assert out.tolist() == want
    assert out[400:403].tolist() == [1.1328125, 1.125, 1.125]


@triton.jit
def _sums_kernel(a_ptr, sum_ptr, max_ptr, min_ptr, N: tl.constexpr, M: tl.constexpr):
    rows, columns = tl.arange(0, N), tl.arange(0, M)
    a = tl.load(a_ptr + rows[:, None] * M + columns[None, :])
    tl.store(sum_ptr + columns, tl.sum(a, axis=0))
    tl.store(max_ptr + columns, tl.max(a, axis=0).to(tl.bfloat16))
    tl.store(min_ptr + columns, tl.min(a, axis=0).to(tl.bfloat16))


def test_sums_and_extremes() -> None:
    """`tl.sum` of bf16 stays bf16: integers past 256 are rounded on the way."""
    a = torch.randint(-60, 120, (8, 16), generator=torch.Generator().manual_seed(9)).bfloat16()
    a[0, 0], a[1, 1] = torch.inf, -torch.inf
    outs = [torch.empty(16, dtype=torch.bfloat16) for _ in range(3)]
    _sums_kernel[(1,)](a, *outs, N=8, M=16)
    total = torch.zeros(16, dtype=torch.bfloat16)
    for row in a:
        total = total + row
    assert not torch.equal(total, a.float().sum(0).bfloat16())
    assert_same(outs[0], total)
    assert_same(outs[1], a.amax(0))
    assert_same(outs[2], a.amin(0))


@triton.jit
def _scans_kernel(a_ptr, sums_ptr, back_ptr, products_ptr, N: tl.constexpr, M: tl.constexpr):
    where = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    a = tl.load(a_ptr + where)
    tl.store(sums_ptr + where, tl.cumsum(a, axis=0).to(tl.bfloat16))
    tl.store(back_ptr + where, tl.cumsum(a, axis=0, reverse=True).to(tl.bfloat16))
    tl.store(products_ptr + where, tl.cumprod(a, axis=0).to(tl.bfloat16))


def test_scans() -> None:
    """Small integers, exact in bf16 and fp32: versions of Triton differ in which of them they scan."""
    a = torch.randint(-2, 4, (8, 16), generator=torch.Generator().manual_seed(9)).bfloat16()
    a[2:] = a[2:].clamp(-1, 2)
    sums, back, products = (torch.empty_like(a) for _ in range(3))
    _scans_kernel[(1,)](a, sums, back, products, N=8, M=16)
    assert_same(sums, a.float().cumsum(0).bfloat16())
    assert_same(back, a.float().flip(0).cumsum(0).flip(0).bfloat16())
    torch.testing.assert_close(products.float(), a.float().cumprod(0), rtol=0, atol=0)


@triton.jit
def _smaller_sum(a, b):
    return tl.where(a < b, a + a, a + b)


@triton.jit
def _own_function_kernel(a_ptr, total_ptr, scan_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    tl.store(total_ptr, tl.reduce(a, 0, _smaller_sum))
    tl.store(scan_ptr + i, tl.associative_scan(a, 0, _smaller_sum))


def test_reductions_and_scans_by_a_function_of_ones_own() -> None:
    a = torch.randn(16, generator=torch.Generator().manual_seed(11)).bfloat16()
    total, scan = torch.empty(1, dtype=torch.bfloat16), torch.empty_like(a)
    _own_function_kernel[(1,)](a, total, scan, N=16)
    want = [a[0]]
    for value in a[1:]:
        want.append(want[-1] + torch.minimum(want[-1], value) if want[-1] < value else want[-1] + value)
    assert_same(scan, torch.stack(want))
    assert_same(total, scan[-1:])


@triton.jit
def _exp_kernel(a_ptr, OP: tl.constexpr):
    a = tl.load(a_ptr + tl.arange(0, 4))
    if OP == "exp":
        tl.exp(a)
    elif OP == "log":
        tl.log(a)
    elif OP == "sqrt":
        tl.sqrt(a)
    elif OP == "floor":
        tl.floor(a)
    elif OP == "erf":
        tl.erf(a)


@pytest.mark.parametrize("op", ["exp", "log", "sqrt", "floor", "erf"])
def test_functions_of_fp32_are_refused(op: str) -> None:
    """By Triton, on a GPU too: so they need no patch."""
    with pytest.raises(triton.runtime.errors.InterpreterError, match=r"Expected dtype .*fp32.* but got bf16"):
        _exp_kernel[(1,)](torch.ones(4).bfloat16(), OP=op)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, tl.trans(b), tl.full([M, N], 0.25, tl.float32)))


def test_dot() -> None:
    """Factors in bf16, products and sums in fp32."""
    a, b = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (16, 32))
    out = torch.empty(16, 32)
    _dot_kernel[(1,)](a, b, out, M=16, N=32, K=64)
    exact = a.double() @ b.double().T + 0.25
    terms = a.double().abs() @ b.double().abs().T
    assert ((out.double() - exact).abs() <= 64 * torch.finfo(torch.float32).eps * terms).all()


@triton.jit
def _atomic_kernel(out_ptr, before_ptr, values_ptr, N: tl.constexpr, SLOTS: tl.constexpr):
    i = tl.arange(0, N)
    before = tl.atomic_add(out_ptr + i % SLOTS, tl.load(values_ptr + i), mask=i < N - 1)
    tl.store(before_ptr + i, before)


def test_atomic_add() -> None:
    """One lane after another, though several add to one address; the masked lane adds nothing."""
    values = torch.arange(1, 9).bfloat16() * 1.0078125
    out, before = torch.full((3,), 250.0).bfloat16(), torch.empty(8, dtype=torch.bfloat16)
    want, seen = out.clone(), []
    for i in range(7):
        seen.append(float(want[i % 3]))
        want[i % 3] += values[i]
    _atomic_kernel[(1,)](out, before, values, N=8, SLOTS=3)
    assert_same(out, want)
    assert before[:7].tolist() == seen


@triton.jit
def _bits_kernel(a_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    rows = tl.trans(tl.reshape(tl.load(a_ptr + i), (N // 8, 8)))
    column = tl.load(a_ptr + tl.arange(0, 8))[:, None]
    rows = tl.where(rows.to(tl.int16, bitcast=True) >= 0, rows, tl.broadcast_to(column, (8, N // 8)))
    tl.store(out_ptr + i, tl.reshape(rows, (N,)))


def test_what_moves_bits() -> None:
    a, out = random_bits(10), torch.empty(NUM, dtype=torch.bfloat16)
    _bits_kernel[(1,)](a, out, N=NUM)
    rows = a.view(NUM // 8, 8).T
    assert torch.equal(
        out.view(torch.int16), torch.where(rows.view(torch.int16) >= 0, rows, a[:8, None]).reshape(-1).view(torch.int16)
    )


def test_a_version_with_other_methods_is_refused() -> None:
    class Builder:
        def binary_op(self, left: int, right: int) -> None: ...

    with pytest.raises(RuntimeError, match=r"Triton .* has no Builder\.unary_op: tests/helpers must be adapted"):
        patching.replace(Builder, "unary_op", "self arg op", lambda original: original)
    with pytest.raises(RuntimeError, match=r"binary_op takes \(self left right\), expected \(self lhs rhs op\)"):
        patching.replace(Builder, "binary_op", "self lhs rhs op", lambda original: original)
    patching.replace(Builder, "binary_op", "self left ...", lambda original: original)
    before = triton.runtime.interpreter.InterpreterBuilder.binary_op
    interpreter.install()  # a second time: nothing is patched twice
    assert triton.runtime.interpreter.InterpreterBuilder.binary_op is before
