"""Adapters to training frameworks, one file a framework; importing one asks for its framework, this package does not.

Each declares, as plain constants:

- `SUPPORTED`, the versions it accepts, such as ">=0.3,<0.4". Importing the adapter with another one, or without the
  framework, raises ImportError.
- `TRIED`, those that its tests have run with, such as ("0.3.0",). docs/compatibility.md lists them; a test compares.
"""

import importlib
import importlib.metadata
import operator
import re
from types import ModuleType

COMPARISONS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}


def require(distribution: str, supported: str, module: str | None = None) -> ModuleType:
    """Import a framework, or say what to install.

    Args:
        distribution: its name in the package index, as "megatron-core".
        supported: versions, comma-separated, each ">=", "<" or "==" and digits, as ">=0.3,<0.4".
        module: what to import; None for the distribution's name.

    Returns:
        The imported module.

    Raises:
        ImportError: the framework is absent, or of another version.

    Example:
        >>> require("torch", ">=2").__name__
        'torch'
    """
    remedy = f'pip install "{distribution}{supported}"'
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"{distribution} must be installed for this adapter, got none: {remedy} (--no-deps keeps your torch)"
        ) from error
    if not accepts(supported, version):
        raise ImportError(f"{distribution} must be a supported version, {supported}, got {version}: {remedy}")
    return importlib.import_module(distribution if module is None else module)


def accepts(supported: str, version: str) -> bool:
    """Whether a version meets all of the comma-separated conditions, by its leading numbers alone.

    Example:
        >>> accepts(">=0.3,<0.4", "0.3.12"), accepts(">=0.3,<0.4", "0.4.0rc1")
        (True, False)
    """
    for condition in supported.split(","):
        found = re.fullmatch(r"(>=|<|==)(\d+(?:\.\d+)*)", condition.strip())
        if found is None:
            raise ValueError(f"supported must be made of conditions like '>=0.3', got {condition!r}: write it so")
        if not COMPARISONS[found[1]](_numbers(version), _numbers(found[2])):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without zeros at the end: 0.3.0rc1 -> (0, 3)."""
    leading = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in leading[0].split(".")] if leading else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
