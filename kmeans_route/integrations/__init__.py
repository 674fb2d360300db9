"""Adapters to frameworks that train and serve; importing one asks for its framework, this package does not.

Each declares, as plain constants:

- `SUPPORTED`, the versions it accepts, such as ">=0.3,<0.4". Importing the adapter with another one, or without the
  framework, raises ImportError.
- `TRIED`, those that its tests have run with, such as ("0.3.0",). docs/compatibility.md lists them; a test compares.
"""

import importlib
import importlib.metadata
from collections.abc import Sequence
from types import ModuleType


def require(distribution: str, supported: str, module: str | None = None, others: Sequence[str] = ()) -> ModuleType:
    """The module of a framework, or an ImportError that says what to install where it is absent or of another version.

    distribution: its name in the package index. supported: versions by PEP 440, as ">=0.3,<0.4". module: what to
    import; None for the distribution's name. others: distributions of the same module, which will do.
    """
    installed = [name for name in (distribution, *others) if version_of(name)]
    found = installed[0] if installed else distribution
    remedy = f'pip install "{found}{supported}"'
    version = version_of(found)
    if version is None:
        raise ImportError(
            f"{distribution} must be installed for this adapter, got none: {remedy} (--no-deps keeps your torch)"
        )
    from packaging.specifiers import SpecifierSet  # comes with every framework, but not with torch

    if not SpecifierSet(supported).contains(version, prereleases=True):
        raise ImportError(f"{found} must be a supported version, {supported}, got {version}: {remedy}")
    return importlib.import_module(distribution if module is None else module)


def version_of(distribution: str) -> str | None:
    """What is installed of it; None where nothing is."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
