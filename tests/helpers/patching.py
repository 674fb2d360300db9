"""Replacing private methods of Triton's interpreter, in a way that shows when another version has others."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def replace(owner: Any, name: str, parameters: str, make: Callable[[Any], Any]) -> None:
    """owner.name = make(what it was), once it is known to take these parameters; "..." at the end: and any others.

    Raises:
        RuntimeError: there is no such function, or it takes others.
    """
    original = getattr(owner, name, None)
    where = f"{getattr(owner, '__name__', owner)}.{name}"
    if original is None:
        raise RuntimeError(f"Triton {triton.__version__} has no {where}: tests/helpers must be adapted to it")
    found = " ".join(inspect.signature(original).parameters)
    if found != parameters and not (parameters.endswith("...") and found.startswith(parameters[:-3])):
        raise RuntimeError(
            f"Triton {triton.__version__}: {where} takes ({found}), expected ({parameters}): "
            "tests/helpers must be adapted to it"
        )
    setattr(owner, name, make(original))
