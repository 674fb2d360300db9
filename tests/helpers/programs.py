"""Interpreted launches: what memory they may touch, and in which order their programs run.

An access must lie inside one of the tensors that the launch was given, else it raises `OutOfBounds`: on a GPU it would
go unnoticed, in the interpreter it may end the process. Inside of `compared_orders` a launch of several programs runs
twice, in the usual order and in a random one, and every bit of every tensor must come out equal. `shuffled` and
`interleaved` run it once, by another schedule.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tests.helpers.patching import replace
from tests.helpers.schedules import Baton, Index, Kernel, Schedule, in_random_order, take_turns


class OutOfBounds(Exception):
    """A load, store or atomic outside of every tensor of the launch."""


class IntegerMask(Exception):
    """A mask of integers, which the interpreter of Triton 3.9.0 refuses: `kernels.common.as_mask` keeps it of bools."""


class OrderMatters(AssertionError):
    """Programs in another order left other bits."""


class Extent(NamedTuple):
    """The bytes [first, end) of one argument."""

    first: int
    end: int
    name: str


class _State:
    """Of the interpreter, which runs one launch at a time."""

    def __init__(self) -> None:
        self.checked = True  # accesses
        self.order: random.Random | None = None  # of the second run of each launch
        self.compared: set[Any] = set()  # launches that ran twice
        self.schedule: Schedule | None = None
        self.kernel = ""  # of the launch under way
        self.extents: tuple[Extent, ...] = ()  # of its tensors
        self.patched: frozenset[str] = frozenset()  # language modules that it has patched
        self.error: OutOfBounds | IntegerMask | None = None


_state = _State()


@contextmanager
def _set(**values: object) -> Iterator[None]:
    before = {name: getattr(_state, name) for name in values}
    vars(_state).update(values)
    try:
        yield
    finally:
        vars(_state).update(before)


def unchecked() -> Any:
    """A context in which accesses are not checked."""
    return _set(checked=False)


@contextmanager
def compared_orders(seed: object, compared: set[Any]) -> Iterator[None]:
    """A context in which launches of several programs run in two orders, which must leave the same bits.

    Args:
        compared: launches that need not run twice, by kernel, grid, sizes and constants; those that do are added.
    """
    with _set(order=random.Random(str(seed)), compared=compared):
        yield


def shuffled(seed: int) -> Any:
    """A context in which programs run once, in a random order."""
    return _set(schedule=in_random_order(random.Random(seed)))


@contextmanager
def interleaved(seed: int) -> Iterator[Baton]:
    """A context in which programs take turns at each access."""
    baton = Baton(seed)
    with _set(schedule=baton):
        yield baton


def _extents(tensors: dict[str, Tensor]) -> Iterator[Extent]:
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            yield Extent(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), name)


def _check(what: str, pointers: Any, mask: Any) -> None:
    if not _state.checked:
        return
    if mask.data.dtype != np.bool_:
        _state.error = IntegerMask(f"{what} of {_state.kernel}: a mask of {mask.data.dtype}")
        raise _state.error
    on = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if not on.size:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    low, high = int(on.min()), int(on.max()) + size
    if any(first <= low and high <= end for first, end, _ in _state.extents):
        return
    gaps = [(max(e.first - low, high - e.end), e.name) for e in _state.extents]
    gap, name = min(gaps, default=(0, "nothing"))
    program = interpreter.interpreter_builder.grid_idx
    _state.error = OutOfBounds(
        f"{what} of {_state.kernel}, program {program}: {gap} bytes outside of {name}, the nearest tensor"
    )
    raise _state.error


def _create_masked_load(original: Any) -> Any:
    def create_masked_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        take_turns()
        _check("load", ptrs, mask)
        return original(self, ptrs, mask, *others)

    return create_masked_load


def _create_masked_store(original: Any) -> Any:
    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        take_turns()
        _check("store", ptrs, mask)
        return original(self, ptrs, value, mask, *others)

    return create_masked_store


def _create_atomic_rmw(original: Any) -> Any:
    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *others: Any) -> Any:
        take_turns(at_atomic=True)
        _check("atomic", ptr, mask)
        return original(self, op, ptr, val, mask, *others)

    return create_atomic_rmw


def _create_atomic_cas(original: Any) -> Any:
    def create_atomic_cas(self: Any, ptr: Any, *others: Any) -> Any:
        take_turns(at_atomic=True)
        _check("atomic", ptr, interpreter.TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1))
        return original(self, ptr, *others)

    return create_atomic_cas


class _Programs:
    """Stands for a kernel in the interpreter's loop over the grid: collects the programs, runs them by a schedule."""

    def __init__(self, fn: Kernel, schedule: Schedule) -> None:
        self.fn, self.schedule, self.indices = fn, schedule, list[Index]()
        self.__name__, self.__globals__ = fn.__name__, fn.__globals__
        self.__annotations__, self.__signature__ = fn.__annotations__, inspect.signature(fn)

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        self.indices.append(builder.grid_idx)
        if len(self.indices) == math.prod(builder.grid_dim):
            self.schedule(self.fn, arguments, self.indices)


def _is_new(executor: Any, arguments: dict[str, Any]) -> bool:
    """Whether the launch is to be compared: of several programs, and like none that was, but for its numbers."""
    grid = None if callable(executor.grid) else executor.grid
    if _state.order is None or _state.schedule is not None or (grid and math.prod(grid) == 1):
        return False
    sizes = ((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in arguments.values())
    signature = executor.fn.__name__, grid, *zip(arguments, sizes, strict=True)
    if signature in _state.compared:
        return False
    _state.compared.add(signature)
    return True


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point():
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
        one, other = one.view(integer), other.view(integer)
    return torch.equal(one, other)


def _call_twice(call: Callable[[], None], name: str, tensors: dict[str, Tensor]) -> None:
    """In the usual order, then from the same memory in another."""
    assert _state.order is not None
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    call()
    usual = {key: tensor.clone() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not _same_bits(before[key], usual[key]):  # what is only read may be expanded, and not be written to
            tensor.copy_(before[key])
    with _set(schedule=in_random_order(_state.order)):
        call()
    for key, tensor in tensors.items():
        if not _same_bits(tensor, usual[key]):
            raise OrderMatters(f"{name} leaves other bits in {key} when its programs run in another order")


def _call_executor(original: Any) -> Any:
    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        fn, name = executor.fn, executor.fn.__name__
        arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}

        def once() -> None:
            _state.patched = frozenset()
            executor.fn = fn if _state.schedule is None else _Programs(fn, _state.schedule)
            original(executor, *args, **kwargs)

        twice = _is_new(executor, arguments)
        with (
            _set(kernel=name, extents=tuple(_extents(tensors)), patched=frozenset(), error=None),
            np.errstate(all="ignore"),
            torch._C.DisableTorchFunction(),  # copies made here are none of the test's
        ):
            try:
                if twice:
                    _call_twice(once, name, tensors)
                else:
                    once()
            except interpreter.InterpreterError:
                if _state.error is not None:
                    raise _state.error from None
                raise

    return call


def _patch_lang(original: Any) -> Any:
    """Each call of a device function patches the language again, a third of the interpreter's time: once a launch is
    enough."""
    seen: dict[Any, frozenset[str]] = {}

    def patch_lang(fn: Any) -> Any:
        key = fn.fn if isinstance(fn, _Programs) else fn
        if key not in seen:
            modules = (value for value in fn.__globals__.values() if inspect.ismodule(value))
            seen[key] = frozenset(m.__name__ for m in modules if m in (tl, tl.core))
        if not _state.kernel or not seen[key] <= _state.patched:
            _state.patched |= seen[key]
            return original(fn)
        return interpreter._LangPatchScope()

    return patch_lang


def install() -> None:
    """Patch the interpreter.

    Raises:
        RuntimeError: a method has another name or other parameters than in Triton 3.6 to 3.9.
    """
    builder = interpreter.InterpreterBuilder
    replace(builder, "create_masked_load", "self ptrs mask other ...", _create_masked_load)
    replace(builder, "create_masked_store", "self ptrs value mask ...", _create_masked_store)
    replace(builder, "create_atomic_rmw", "self rmwOp ptr val mask ...", _create_atomic_rmw)
    replace(builder, "create_atomic_cas", "self ptr cmp val ...", _create_atomic_cas)
    replace(interpreter.GridExecutor, "__call__", "self args_dev kwargs", _call_executor)
    replace(interpreter, "_patch_lang", "fn", _patch_lang)
