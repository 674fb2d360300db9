"""The launches of a cell: those that are planned, found without a GPU, and those that happened.

The package's launchers run on meta tensors, with recorders in place of the kernels, so what is planned has the very
types, alignments and constants of what will be launched. Two launches that share a key share a compiled kernel.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cells import Cell, Trial
from benchmarks.offline import MODULES, Launch, commit_launches, eval_launches, recorded, training_launches
from kmeans_route.checks import check_route_options
from kmeans_route.kernels import dispatch, route
from kmeans_route.testing import ModelShape

MUTATING = ("accumulate", "commit")


def parts_of(cell: Cell) -> dict[str, list[Launch]]:
    """Part -> its launches: eval; those of a training step by part; "pieces", the public functions one by one."""
    shape, dtype = ModelShape(*cell[2:5]), getattr(torch, cell.dtype)
    x, d, bias = _inputs(cell)
    with recorded() as pieces:
        r = route.route_fwd(x, d, bias, None, None, _options(cell))
        ranks = dispatch.rank(r.indices, r.valid, cell.num_experts)
        dispatch.dispatch_fwd(x, r.indices, r.valid, cell.num_experts, ranks)
        dispatch.dispatch_fwd(x, r.indices, r.valid, cell.num_experts, None, r.inv_norm, want_sums=True)
    pieces += commit_launches(shape, "whitened")
    training = training_launches(shape, cell.num_tokens, dtype)
    return {"eval": eval_launches(shape, cell.num_tokens, dtype), **training, "pieces": pieces}


def of_trial(trial: Trial) -> list[Launch]:
    """The launches of one kernel with a configuration of its own, and what comes before it."""
    cell, config = trial.cell, trial.config
    x, d, bias = _inputs(cell)
    with recorded() as launches:
        if trial.kernel == "route_fwd":
            route.route_fwd(x, d, bias, None, None, _options(cell), config=config)
        else:
            r = route.route_fwd(x, d, bias, None, None, _options(cell), want_std=True, want_rank=True)
            sorted_copies(x, r, cell.num_experts, config)
    return launches


def sorted_copies(x: Tensor, r: Any, num_experts: int, config: Any = None) -> Any:
    """dispatch_fwd as a training forward launches it, after the routing r with ranks."""
    ranks = dispatch.Ranks(r.rank, r.block_counts, r.offsets, r.block)
    return dispatch.dispatch_fwd(x, r.indices, r.valid, num_experts, ranks, r.inv_norm, want_sums=True, config=config)


def _options(cell: Cell) -> Any:
    return check_route_options(cell.num_experts, cell.top_k)


def _inputs(cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    dtype = getattr(torch, cell.dtype)
    x, d = (torch.empty(n, cell.hidden_size, dtype=dtype, device="meta") for n in (cell.num_tokens, cell.num_experts))
    return x, d, torch.empty(cell.num_experts, device="meta")


def distinct(cells: Iterable[Cell], trials: Iterable[Trial] = ()) -> dict[str, Launch]:
    """Key -> one launch of it, in the order in which they will be needed."""
    found: dict[str, Launch] = {}
    for cell in dict.fromkeys(cells):
        for launches in parts_of(cell).values():
            for launch in launches:
                found.setdefault(key_of(launch), launch)
    for trial in trials:
        for launch in of_trial(trial):
            found.setdefault(key_of(launch), launch)
    return found


def key_of(launch: Launch) -> str:
    """Equal for launches of one compiled kernel: what Triton specializes a kernel by, in the interpreter too."""
    kernel, words = launch.kernel, [launch.name, str(sorted(launch.options.items()))]
    fixed = getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()  # the interpreter's function
    fixed = [*fixed, *(p.name for p in getattr(kernel, "params", ()) if p.do_not_specialize)]  # the compiler's
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        value = launch.arguments[name]
        words.append(f"{name}={_kind(value, 'constexpr' in str(parameter.annotation), name in fixed)}")
    return " ".join(words)


def _kind(value: Any, constant: bool, fixed: bool) -> str:
    """What is known of an argument as a kernel is compiled."""
    if value is None or constant:
        return f"<{value!r}>"
    if isinstance(value, Tensor):
        return f"*{value.dtype}{'' if value.data_ptr() % 16 else ':16'}"
    if not isinstance(value, int):
        return type(value).__name__
    if value == 1 and not fixed:
        return "<1>"
    size = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return size if fixed or value % 16 else f"{size}:16"


class Seen:
    """One launch that happened: `again` repeats it, `restore` puts back what it changed, `launch` says what it was."""

    def __init__(self, kernel: Any, name: str, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {key: named.pop(key) for key in list(named) if key not in kernel.arg_names}
        self.launch = Launch(kernel, name, tuple(grid), named, options)
        self.again: Callable[[], Any] = lambda: kernel[grid](*args, **kwargs)
        tensors = [value for value in named.values() if isinstance(value, Tensor)] if name in MUTATING else []
        self.before = [(tensor, tensor.clone()) for tensor in tensors]

    def restore(self) -> None:
        """The arguments as they were before the first launch; nothing to do for kernels that only write results."""
        for tensor, value in self.before:
            tensor.copy_(value)


@contextmanager
def watched(note: Callable[[Seen], object]) -> Iterator[None]:
    """Within the block `note` gets every launch of the package before it happens."""
    kernels = [(m, name, kernel) for m in MODULES for name, kernel in vars(m).items() if name.endswith("_kernel")]
    for module, name, kernel in kernels:
        setattr(module, name, _Watcher(kernel, name.strip("_").removesuffix("_kernel"), note))
    try:
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


class _Watcher:
    def __init__(self, kernel: Any, name: str, note: Callable[[Seen], object]) -> None:
        self.kernel, self.name, self.note = kernel, name, note
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.note(Seen(self.kernel, self.name, grid, args, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch
