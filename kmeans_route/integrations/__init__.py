"""Adapters to training frameworks, one file a framework; importing one asks for its framework, this package does not.

Each declares, as plain constants:

- `SUPPORTED`, the versions it accepts, such as ">=0.3,<0.4". Importing the adapter with another one, or without the
  framework, raises ImportError.
- `TRIED`, those that its tests have run with, such as ("0.3.0",). docs/compatibility.md lists them; a test compares.
"""

import importlib
import importlib.metadata
from types import ModuleType


def require(distribution: str, supported: str, module: str | None = None) -> ModuleType:
    """The module of a framework, or an ImportError that says what to install where it is absent or of another version.

    distribution: its name in the package index. supported: versions by PEP 440, as ">=0.3,<0.4". module: what to
    import; None for the distribution's name.
    """
    remedy = f'pip install "{distribution}{supported}"'
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"{distribution} must be installed for this adapter, got none: {remedy} (--no-deps keeps your torch)"
        ) from error
    from packaging.specifiers import SpecifierSet  # comes with every framework, but not with torch

    if not SpecifierSet(supported).contains(version, prereleases=True):
        raise ImportError(f"{distribution} must be a supported version, {supported}, got {version}: {remedy}")
    return importlib.import_module(distribution if module is None else module)
