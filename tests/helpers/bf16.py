"""bf16 by value in Triton's interpreter, which keeps it as uint16 and computes with the bits.

Every operation is done in fp32 and rounded to nearest even, as PyTorch on a CPU does it; NaN stays NaN and subnormal
numbers are kept. Patched: arithmetic, comparisons, `dot`, casts, constants, `fma`, sums, scans, atomic adds. Not in
need of it: what moves bits alone (load, store, where, broadcast, transpose, bitcast, abs); minimum, maximum, clamp and
the largest of many, which Triton promotes to fp32; reductions and scans by a function of one's own, which call the
operators; exp and its kind, which Triton refuses. In every dtype minimum, maximum and clamp drop a NaN unless told to
propagate it, as the hardware does and the interpreter does not.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tests.helpers.patching import replace

Handle = interpreter.TensorHandle
FLOATS = (tl.float16, tl.float32, tl.float64)


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """The values of bf16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: Any) -> np.ndarray:
    """bf16 bits (uint16) nearest to the values, ties to even; NaN becomes 0x7FC0. fp64 is rounded once."""
    values = np.asarray(values)
    values = _to_odd(values) if values.dtype == np.float64 else values.astype(np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _to_odd(values: np.ndarray) -> np.ndarray:
    """fp64 as fp32 with inexact values at the odd neighbour, so that a second rounding errs no more than one would."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = (near.astype(np.float64) != values) & np.isfinite(near) & (bits & 1 == 0)
    # The bits of a float grow with its magnitude, on either side of zero.
    step = np.where(np.abs(values) > np.abs(near.astype(np.float64)), 1, -1)
    return np.where(inexact, bits.astype(np.int64) + step, bits).astype(np.uint32).view(np.float32)


def is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _values(handle: Any) -> np.ndarray:
    return to_fp32(handle.data) if is_bf16(handle) else handle.data


def _handle(values: Any) -> Any:
    return Handle(to_bf16(values), tl.bfloat16)


def _binary_op(original: Any) -> Any:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_bf16(lhs) and not is_bf16(rhs):
            return original(self, lhs, rhs, op)
        output = op(_values(lhs), _values(rhs))
        return Handle(output, tl.int1) if output.dtype == np.bool_ else _handle(output)

    return binary_op


def _unary_op(original: Any) -> Any:
    def unary_op(self: Any, arg: Any, op: Any) -> Any:  # Triton 3.9 negates with it
        return _handle(op(_values(arg))) if is_bf16(arg) else original(self, arg, op)

    return unary_op


def _minnumf(_original: Any) -> Any:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


def _maxnumf(_original: Any) -> Any:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


def _create_clampf(original: Any) -> Any:
    def create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if propagate_nans == interpreter._ir.PROPAGATE_NAN.ALL:
            return original(self, arg, lo, hi, propagate_nans)
        return self.create_minnumf(self.create_maxnumf(arg, lo), hi)

    return create_clampf


def _create_fma(original: Any) -> Any:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        """One rounding. The product is exact in fp64; what its sum with z loses shows in the last bit, made odd."""
        if not is_bf16(z):
            return original(self, x, y, z)
        product, addend = _values(x).astype(np.float64) * _values(y), _values(z).astype(np.float64)
        total = product + addend
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        even = np.isfinite(total) & (total.view(np.uint64) & 1 == 0)
        toward = np.where(lost > 0, np.inf, -np.inf)
        return _handle(np.where(even & (lost != 0), np.nextafter(total, toward), total))

    return create_fma


def _create_dot(original: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a, b = (Handle(to_fp32(t.data), tl.float32) if is_bf16(t) else t for t in (a, b))
        return original(self, a, b, d, input_precision, max_num_imprecise_acc)

    return create_dot


def _cast_impl(original: Any) -> Any:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if is_bf16(src):
            if dst_type.scalar == tl.bfloat16:
                return src
            values = Handle(to_fp32(src.data), tl.float32)
            return values if dst_type.scalar == tl.float32 else original(self, values, dst_type)
        return _handle(src.data) if dst_type.scalar == tl.bfloat16 else original(self, src, dst_type)

    return cast_impl


def _create_fp_to_fp(original: Any) -> Any:
    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar not in FLOATS:
            return original(self, src, dst_type, rounding_mode)
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE:
            return _handle(src.data)
        values = src.data.astype(np.float32)
        cut = (values.view(np.uint32) >> 16).astype(np.uint16)
        return Handle(np.where(np.isnan(values), np.uint16(0x7FC0), cut), tl.bfloat16)

    return create_fp_to_fp


def _get_bf16(_self: Any, value: Any) -> Any:
    return _handle(np.array([value], dtype=np.float64))


def _create_atomic_rmw(original: Any) -> Any:
    def create_atomic_rmw(self: Any, rmwOp: Any, ptr: Any, val: Any, mask: Any, *others: Any) -> Any:
        if not is_bf16(val):
            return original(self, rmwOp, ptr, val, mask, *others)
        if rmwOp != interpreter._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"an atomic {rmwOp} of bf16 in the interpreter")
        before = np.zeros_like(val.data)
        for place in np.argwhere(mask.data):  # one after another: two lanes may add to one address
            one = tuple(slice(i, i + 1) for i in place)
            there, on = ptr.data[one], mask.data[one]
            before[one] = interpreter._interpreter.load(there, on, before[one], before.dtype)
            total = to_bf16(to_fp32(before[one]) + to_fp32(val.data[one]))
            interpreter._interpreter.store(there, total, on)
        return Handle(before, tl.bfloat16)

    return create_atomic_rmw


def _sum(original: Any) -> Any:
    """The quick ways of the interpreter take numpy's sum of the bits; its slow way calls the operator."""
    return lambda self, input: self.generic_reduce((input,))[0] if is_bf16(input) else original(self, input)


def _scan(original: Any) -> Any:  # Triton 3.6 and 3.7 promote to fp32 first
    return lambda self, input: self.generic_scan((input,)) if is_bf16(input) else original(self, input)


def install() -> None:
    """Patch the interpreter.

    Raises:
        RuntimeError: a method has another name or other parameters than in Triton 3.6 to 3.9.
    """
    builder = interpreter.InterpreterBuilder
    replace(builder, "binary_op", "self lhs rhs op", _binary_op)
    replace(builder, "unary_op", "self arg op", _unary_op)
    replace(builder, "create_minnumf", "self lhs rhs", _minnumf)
    replace(builder, "create_maxnumf", "self lhs rhs", _maxnumf)
    replace(builder, "create_clampf", "self arg lo hi propagate_nans", _create_clampf)
    replace(builder, "create_fma", "self x y z", _create_fma)
    replace(builder, "create_dot", "self a b d input_precision max_num_imprecise_acc", _create_dot)
    replace(builder, "cast_impl", "self src dst_type", _cast_impl)
    replace(builder, "create_fp_to_fp", "self src dst_type rounding_mode", _create_fp_to_fp)
    replace(builder, "create_atomic_rmw", "self rmwOp ptr val mask ...", _create_atomic_rmw)
    replace(interpreter.ReduceOps, "sum", "self input", _sum)
    replace(interpreter.ScanOps, "cumsum", "self input", _scan)
    replace(interpreter.ScanOps, "cumprod", "self input", _scan)
    builder.get_bf16 = _get_bf16  # the interpreter has no constants of bf16
