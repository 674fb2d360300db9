"""Guard zones: every tensor that is made lies between two zones of bytes that nobody may touch.

The zones are 0xFF throughout: NaN in every floating dtype, -1 in every integer one, so that what is read from them
shows in the results, and what is written to them shows in the zones.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ZONE = 4096
"""Bytes on each side: more than a tile of any kernel under test reaches past the end of a row."""


class Guarded(NamedTuple):
    """Bytes [ZONE, ZONE + size) of the buffer are the tensor's."""

    buffer: Tensor
    size: int
    what: str


class Guards(TorchFunctionMode):
    """While it is active, every tensor that a call of torch makes lies between guard zones, in launchers too.

    Left where they are: tensors that autograd follows, those that are not dense, and what is made inside of a
    registered operator, whose calls are one call: tests call the launchers themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Guarded] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or any(_shares_memory(out, arg) for arg in (*args, *kwargs.values())):
            return out
        return self.place(out, getattr(func, "__name__", str(func)))

    def place(self, tensor: Tensor, what: str = "place") -> Tensor:
        """The tensor between guard zones: same values, shape, strides and dtype."""
        movable = type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.requires_grad
        if not movable or not tensor.numel() or tensor.untyped_storage().nbytes() != _num_bytes(tensor):
            return tensor
        size = _num_bytes(tensor)
        with torch._C.DisableTorchFunction():
            buffer = torch.full((ZONE + size + ZONE,), 0xFF, dtype=torch.uint8)
            inside = buffer[ZONE : ZONE + size].view(tensor.dtype).as_strided(
                tensor.shape, tensor.stride(), ZONE // tensor.element_size()
            )  # fmt: skip
            inside.copy_(tensor)
            self.made.append(Guarded(buffer, size, f"{what}{tuple(tensor.shape)} {tensor.dtype}"))
        return inside

    def check(self) -> None:
        """Assert that no zone was written to.

        Raises:
            AssertionError: one was; says which and where.
        """
        with torch._C.DisableTorchFunction():
            for buffer, size, what in self.made:
                for zone, name in ((buffer[:ZONE], "before"), (buffer[ZONE + size :], "past")):
                    hit = (zone != 0xFF).nonzero()
                    if len(hit):
                        away = ZONE - int(hit[-1]) if name == "before" else int(hit[0]) + 1
                        raise AssertionError(f"{len(hit)} bytes written {name} {what}, the nearest {away} bytes away")


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shares_memory(out: Tensor, arg: Any) -> bool:
    if isinstance(arg, (tuple, list)):
        return any(_shares_memory(out, one) for one in arg)
    if not isinstance(arg, Tensor):
        return False
    return bool(out.untyped_storage().data_ptr() == arg.untyped_storage().data_ptr())
